// Stand-in for what csrc/cuda/tiles.h does with instructions of its own. Copies are done at once where they are issued,
// so nothing is proven about waiting for them. After csrc/cuda/common.h.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace liftbyimage::cuda {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - reinterpret_cast<const char*>(shared_memory));
}

inline void copy_unit(void* target, const void* source, bool valid) {
  if (shared_address(target) % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0)
    emulate::fail("a copied unit is not aligned to 16 bytes");
  if (valid)
    std::memcpy(target, source, 16);
  else
    std::memset(target, 0, 16);
}

inline void commit_copies() {}
template <int kPending>
void wait_for_copies() {}

inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace liftbyimage::cuda
