// Launchers of patch pruning. Plain structs, no torch. Rows are moved as bytes, so their element type does not matter.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace liftbyimage::cuda {

struct PrunePatchesForward {
  int32_t importance_dtype;
  int32_t batch;
  int32_t patches;
  int32_t keep;               // 1 … patches
  int64_t row_bytes;          // bytes of one patch; a multiple of 2
  const void* rows;           // [batch, patches], each row_bytes long
  int64_t rows_batch_stride;  // bytes
  int64_t rows_patch_stride;  // bytes
  const void* importance;     // [batch, patches] contiguous
  void* kept;                 // [batch, keep] contiguous rows
  int64_t* index;             // [batch, keep] ascending
  cudaStream_t stream;
};

struct PrunePatchesBackward {
  int32_t batch;
  int32_t patches;
  int32_t keep;
  int64_t row_bytes;
  const void* grad_kept;  // [batch, keep] contiguous rows
  const int64_t* index;   // [batch, keep] ascending
  void* grad_rows;        // [batch, patches] contiguous rows
  cudaStream_t stream;
};

extern "C" cudaError_t prune_patches_forward(const PrunePatchesForward* params);
extern "C" cudaError_t prune_patches_backward(const PrunePatchesBackward* params);

}  // namespace liftbyimage::cuda
