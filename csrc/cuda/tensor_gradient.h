// Launcher of the score gradient of tensor_attention.h's attention. Plain structs, no torch: the caller owns every
// buffer and knows every size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace liftbyimage::cuda {

// [batch, patches, …]: strides in elements, the last axis is contiguous; null data: zero.
struct PatchRows {
  const void* data;
  int64_t batch_stride;
  int64_t patch_stride;
};

struct TensorGradient {
  int32_t dtype;  // kFloat16 or kBFloat16
  int32_t batch;
  int32_t rows;
  int32_t patches;
  int32_t width;
  float scale;
  PatchRows tokens;              // [batch, patches, width], key and value
  PatchRows grad_patches;        // [batch, patches, width]
  const void* grad_context;      // [batch, rows, width]; null: zero
  const void* pose_value;        // [batch, rows, width]; with grad_patches
  const float* grad_importance;  // [batch, patches]; null: zero
  PatchRows grad_attention;      // [batch, patches, rows]
  const float* delta;            // [batch, rows], rowsum(A ∘ dA)
  void* weights;                 // [batch, patches, 2, padded_rows]: A is read, dS written
  int32_t padded_rows;           // a multiple of 8, at least rows; the columns between are zero
  cudaStream_t stream;
};

// Whether the kernel serves such sizes, addresses and strides on the current device.
bool tensor_gradient_serves(const TensorGradient& params);
extern "C" cudaError_t tensor_gradient(const TensorGradient* params);

}  // namespace liftbyimage::cuda
