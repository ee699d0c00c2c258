// What kernels for Hopper (sm_90a) are made of beside tiles: operands of products named for them, warpgroup barriers.
// For .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tiles.h"

#ifdef __CUDACC__
#include "wgmma.h"
#else
#include "emulated_hopper.h"  // without nvcc: tests/cuda_emulation
#endif

namespace liftbyimage::cuda {

constexpr int kWarpgroup = 128;
constexpr int kSwizzleBytes = 1024;

#ifdef __CUDACC__

// Tensor cores read shared memory by a path of their own: what this thread wrote becomes visible there.
__device__ inline void publish_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// A named barrier, beside barrier 0 of __syncthreads.
__device__ inline void wait_at_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// Before the first product that uses registers which the threads have written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most `kPending` of the warpgroup's groups of products are under way.
template <int kPending = 0>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Names an operand of a product that starts at `pointer`: groups of eight rows are 1024 bytes apart, swizzled over 128.
__device__ inline uint64_t operand(const void* pointer) {
  constexpr uint64_t kUnused = 1, kSwizzle128 = 1;
  return (shared_address(pointer) & 0x3ffff) >> 4 | kUnused << 16 |
         static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | kSwizzle128 << 62;
}

// Stores kMatrices 8 × 8 matrices of two-byte elements transposed. Registers hold them as a product leaves them, one
// each; thread 8·m + i names where column i of matrix m becomes a row of 16 bytes.
template <int kMatrices>
__device__ void store_transposed(void* row, const uint32_t (&matrix)[kMatrices]) {
  static_assert(kMatrices == 4 || kMatrices == 2);
  if constexpr (kMatrices == 4)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)),
                 "r"(matrix[0]), "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(shared_address(row)),
                 "r"(matrix[0]), "r"(matrix[1])
                 : "memory");
}

#endif

// What to add to an operand's name for one that starts so many bytes on.
__host__ __device__ constexpr uint64_t advance(int bytes) { return static_cast<uint64_t>(bytes) >> 4; }

}  // namespace liftbyimage::cuda
