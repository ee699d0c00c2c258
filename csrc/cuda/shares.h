// How the patches of a sample are shared out among blocks, and what launchers ask of sizes. For .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.h"

namespace liftbyimage::cuda {

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Blocks for one sample of so many tiles: fewest tiles one after the other, where a multiprocessor holds `resident`
// blocks, each of which costs `overhead` tiles beside its own.
inline int32_t choose_shares(int64_t tiles, int32_t batch, int32_t resident, int64_t overhead) {
  constexpr int64_t kMaxShares = 64;
  const int64_t together = static_cast<int64_t>(device_attribute(cudaDevAttrMultiProcessorCount)) * resident;
  int64_t best_cost = INT64_MAX;
  int32_t best = 1;
  for (int64_t shares = 1; shares <= tiles && shares <= kMaxShares; ++shares) {
    const int64_t waves = ceil_div(shares * batch, together);
    const int64_t cost = waves * (ceil_div(tiles, shares) + overhead) + shares / 4;
    if (cost < best_cost) {
      best_cost = cost;
      best = static_cast<int32_t>(shares);
    }
  }
  return best;
}

}  // namespace liftbyimage::cuda
