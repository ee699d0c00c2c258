// Warps, and what the threads of a block work out together. For .cu files only.
#pragma once

#include <cuda_runtime.h>

namespace liftbyimage::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % kWarp; }

// Inclusive prefix sum over the lanes of a warp.
template <typename T>
__device__ T warp_inclusive_scan(T value) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T before = __shfl_up_sync(kFullWarp, value, offset);
    if (lane() >= offset) value += before;
  }
  return value;
}

// Inclusive prefix sum over the threads of a block of kWarps warps; `total` receives the sum over all of them.
template <int kWarps, typename T>
__device__ T inclusive_scan(T value, T* warp_sums, T& total) {
  const int warp = threadIdx.x / kWarp;
  value = warp_inclusive_scan(value);
  __syncthreads();
  if (lane() == kWarp - 1) warp_sums[warp] = value;
  __syncthreads();
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) value += warp_sums[i];
    total += warp_sums[i];
  }
  return value;
}

}  // namespace liftbyimage::cuda
