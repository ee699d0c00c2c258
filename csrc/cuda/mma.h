// The matrix products of a warp (sm_80 on): d [16, 8] += A [16, 16] · B [16, 8], accumulated in float32. Thread t of the
// warp, with r = t / 4 and c = t % 4, holds in its registers
//
//   d[0], d[1]   row r,     columns 2·c and 2·c + 1          a[0]         row r of A, elements 2·c and 2·c + 1
//   d[2], d[3]   row r + 8, the same                         a[1]         row r + 8, the same
//                                                            a[2], a[3]   the same rows, 8 elements on
//                                                            b0, b1       column r of B, the same elements
//
// Two neighbouring blocks of eight columns of a result, rounded, are an A.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "tiles.h"

#ifndef __CUDACC__
#include "emulated_mma.h"  // without nvcc: tests/cuda_emulation
#endif

namespace liftbyimage::cuda {

#ifdef __CUDACC__

// Four 8 × 8 matrices of two-byte elements: thread 8·m + i names row i, 16 bytes, of matrix m; thread t receives
// elements 2·c and 2·c + 1 of row r of each.
__device__ inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row)));
}

// The same transposed: thread t receives elements 2·c and 2·c + 1 of column r of each.
__device__ inline void load_transposed(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row)));
}

// The same value, of which the compiler knows nothing: what follows from it is computed again in every turn of a loop
// instead of being kept in registers.
__device__ inline int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

#define LIFTBYIMAGE_MMA(TYPE)                                                                                   \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
      "{%0, %1, %2, %3};\n"                                                                                       \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <typename T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    LIFTBYIMAGE_MMA("f16");
  else
    LIFTBYIMAGE_MMA("bf16");
}

#undef LIFTBYIMAGE_MMA

#endif

}  // namespace liftbyimage::cuda
