// Launchers of pose-guided attention. Plain structs, no torch: the caller owns every buffer and knows every size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace liftbyimage::cuda {

// A patch-side tensor [batch, groups, patches, width]: strides in elements, the width is contiguous.
struct PatchTensor {
  const void* data;
  int64_t batch_stride;
  int64_t group_stride;
  int64_t patch_stride;
};

// A "group" is one key/value head with the query rows that read it: groups = Hk, rows = H·J / Hk.
// Row-side tensors are contiguous [batch, groups, rows, width].
struct PoseGuidedAttentionInputs {
  int32_t dtype;
  int32_t batch;
  int32_t groups;
  int32_t rows;
  int32_t patches;
  int32_t key_width;
  int32_t value_width;
  int32_t model_width;
  float scale;
  const void* query;       // [batch, groups, rows, key_width]
  PatchTensor key;         // [batch, groups, patches, key_width]
  PatchTensor value;       // [batch, groups, patches, value_width]
  const void* pose_value;  // [batch, groups, rows, model_width]
  cudaStream_t stream;
};

struct PoseGuidedAttentionForward {
  PoseGuidedAttentionInputs inputs;
  PatchTensor tokens;  // [batch, 1, patches, model_width], the patches to update
  void* context;       // [batch, groups, rows, value_width]
  void* patches_out;   // [batch, patches, model_width]
  float* importance;   // [batch, patches]
  float* lse;          // [batch, groups, rows]
  float* residual;     // [batch, groups, rows], scratch: what lse loses to rounding
};

struct PoseGuidedAttentionBackward {
  PoseGuidedAttentionInputs inputs;
  const float* lse;              // [batch, groups, rows]
  const void* grad_context;      // [batch, groups, rows, value_width]; null: zero
  PatchTensor grad_patches;      // [batch, 1, patches, model_width]; data null: zero
  const float* grad_importance;  // [batch, patches]; null: zero
  bool patches_is_key;           // add grad_patches to grad_key
  float* residual;               // [batch, groups, rows], scratch: what lse lost to rounding
  float* delta;                  // [batch, groups, rows], scratch: rowsum(A ∘ dA)
  void* grad_query;              // [batch, groups, rows, key_width]
  void* grad_key;                // [batch, groups, patches, key_width]; null: no token gradients
  void* grad_value;              // [batch, groups, patches, value_width]; null: value is key, summed into grad_key
  void* grad_pose_value;         // [batch, groups, rows, model_width]
};

constexpr int kMaxWidth = 512;

extern "C" cudaError_t pose_guided_attention_forward(const PoseGuidedAttentionForward* params);
extern "C" cudaError_t pose_guided_attention_backward(const PoseGuidedAttentionBackward* params);

}  // namespace liftbyimage::cuda
