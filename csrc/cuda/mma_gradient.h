// Launcher of the score gradient of tensor_gradient.h on the tensor cores of any GPU that has them for bfloat16 (sm_80
// on).
#pragma once

#include "tensor_gradient.h"

namespace liftbyimage::cuda {

// Whether the kernel serves such sizes, addresses and strides on the current device.
bool mma_gradient_serves(const TensorGradient& params);
extern "C" cudaError_t mma_gradient(const TensorGradient* params);

}  // namespace liftbyimage::cuda
