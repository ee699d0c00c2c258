// Launcher of the attention of tensor_attention.h on the tensor cores of any GPU that has them for bfloat16 (sm_80 on).
#pragma once

#include "tensor_attention.h"

namespace liftbyimage::cuda {

// Whether these kernels serve such sizes, addresses and strides on the current device.
bool mma_attention_serves(const TensorAttention& params);
int64_t mma_attention_workspace(const TensorAttention& params);
extern "C" cudaError_t mma_attention_forward(const TensorAttention* params);

}  // namespace liftbyimage::cuda
