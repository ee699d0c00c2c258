// Warps, and what the threads of a block work out together. For .cu files only.
#pragma once

#include <cuda_runtime.h>

namespace liftbyimage::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Inclusive prefix sum over the threads of a block of kWarps warps; `total` receives the sum over all of them.
template <int kWarps>
__device__ int inclusive_scan(int value, int* warp_sums, int& total) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int before = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += before;
  }
  __syncthreads();
  if (lane == kWarp - 1) warp_sums[warp] = value;
  __syncthreads();
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) value += warp_sums[i];
    total += warp_sums[i];
  }
  return value;
}

}  // namespace liftbyimage::cuda
