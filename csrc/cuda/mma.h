// The matrix products of a warp (sm_80 on): d [16, 8] += A [16, K] · B [K, 8], where K is 32 bytes, accumulated in
// float32. Thread t of the warp, with r = t / 4 and c = t % 4, holds in its registers
//
//   d[0], d[1]   row r,     columns 2·c and 2·c + 1          a[0]   row r       of A, word c of the 32 bytes
//   d[2], d[3]   row r + 8, the same                         a[1]   row r + 8,  the same
//                                                            a[2], a[3]   the same rows, word c + 4
//                                                            b0, b1       column r of B, words c and c + 4
//
// A word is two neighbouring elements of two bytes or one float32. Two neighbouring blocks of eight columns of a result,
// rounded to two bytes, are an A; so are eight columns of float32 with K in the order 0, 2, 4, 6, 1, 3, 5, 7.
//
// float32 goes through TF32, which keeps 11 bits, in three products of high and low parts: what is lost is the product
// of the low parts, 2⁻²² of a term.
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

// Four 8 × 8 matrices of two-byte elements (8 × 4 of float32): thread 8·m + i names row i, 16 bytes, of matrix m;
// thread t receives word c of row r of each.
__device__ inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row)));
}

// The same of two-byte elements, transposed: thread t receives elements 2·c and 2·c + 1 of column r of each.
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

// The nearest TF32, in the upper bits of a float32.
__device__ inline uint32_t nearest_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

#define LIFTBYIMAGE_MMA(SHAPE, TYPE)                                                                                  \
  asm("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
               "{%8, %9}, {%0, %1, %2, %3};\n"                                                                        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// One product of elements of type T; of TF32 where T is float.
template <typename T>
__device__ void mma_once(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, float>)
    LIFTBYIMAGE_MMA("m16n8k8", "tf32");
  else if constexpr (std::is_same_v<T, __half>)
    LIFTBYIMAGE_MMA("m16n8k16", "f16");
  else
    LIFTBYIMAGE_MMA("m16n8k16", "bf16");
}

#undef LIFTBYIMAGE_MMA

#endif

// A word of float32 as a TF32 and what it leaves.
struct SplitWord {
  uint32_t high, low;
};

__device__ inline SplitWord split_word(uint32_t word) {
  const uint32_t high = nearest_tf32(__uint_as_float(word));
  return {high, nearest_tf32(__uint_as_float(word) - __uint_as_float(high))};
}

template <typename T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, float>) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SplitWord split = split_word(a[i]);
      high[i] = split.high;
      low[i] = split.low;
    }
    const SplitWord first = split_word(b0), second = split_word(b1);
    mma_once<float>(d, low, first.high, second.high);  // the small terms first
    mma_once<float>(d, high, first.low, second.low);
    mma_once<float>(d, high, first.high, second.high);
  } else {
    mma_once<T>(d, a, b0, b1);
  }
}

}  // namespace liftbyimage::cuda
