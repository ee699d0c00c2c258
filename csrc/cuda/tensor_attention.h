// Launcher of attention on Hopper's tensor cores, for one token tensor that is key and value of all heads (and, with a
// pose value, the patches that are updated). Plain structs, no torch: the caller owns every buffer, knows every size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace liftbyimage::cuda {

constexpr int kTensorRows = 144;   // at most so many query rows H·J
constexpr int kTensorWidth = 256;  // at most so wide

struct TensorAttention {
  int32_t dtype;  // kFloat16 or kBFloat16
  int32_t batch;
  int32_t rows;
  int32_t patches;
  int32_t width;
  float scale;
  const void* query;   // [batch, rows, width]
  const void* tokens;  // [batch, patches, width]; strides in elements, the width is contiguous
  int64_t tokens_batch_stride;
  int64_t tokens_patch_stride;
  const void* pose_value;   // [batch, rows, width]; null: no update
  void* context;            // [batch, rows, width]
  float* lse;               // [batch, rows]
  bool given_lse;           // lse is read, and there is no context: only what the attention gives is wanted
  void* patches_out;        // [batch, patches, width]; null without pose_value
  float* importance;        // [batch, patches]; null: not wanted
  void* attention;          // [batch, patches, …], rows of channels + attention_rows elements; null: not wanted
  int64_t attention_stride;  // from patch to patch, in elements
  int32_t attention_rows;   // `rows`, or more: the others are zero
  int32_t channels;         // width: the tokens come before the attention; 0: they do not
  float* workspace;         // tensor_attention_workspace(params) elements
  cudaStream_t stream;
};

// Whether these kernels serve such sizes, addresses and strides on the current device.
bool tensor_attention_serves(const TensorAttention& params);
int64_t tensor_attention_workspace(const TensorAttention& params);
extern "C" cudaError_t tensor_attention_forward(const TensorAttention* params);

}  // namespace liftbyimage::cuda
