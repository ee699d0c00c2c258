// What kernels for tensor cores are made of, on any GPU that has such (sm_80 on): tiles in swizzled shared memory, copies
// into them, pairs of two-byte elements. For .cu files only.
//
// A tile is stored in columns of 64 elements: [rows][64] of two bytes each, 128 bytes a row, column after column.
// Eight rows are 1024 bytes, in which the 16-byte units of row i lie in the order unit ^ i: eight threads that read one
// unit of eight rows, or eight units of one row, meet eight different groups of banks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common.h"

#ifndef __CUDACC__
#include "emulated_tiles.h"  // without nvcc: tests/cuda_emulation
#endif

namespace liftbyimage::cuda {

constexpr int kColumn = 64;  // elements in a row of a column
constexpr int kUnit = 8;     // elements in a unit of 16 bytes
constexpr int kRowBytes = 128;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Where unit `unit` of row `row` of a column lies, in bytes.
__host__ __device__ inline int swizzled(int row, int unit) { return row * kRowBytes + ((unit ^ (row & 7)) << 4); }

#ifdef __CUDACC__

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes in the background; zeros where `valid` is false.
__device__ inline void copy_unit(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0));
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n"); }

// Waits until at most `kPending` of this thread's groups of copies are under way.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// 2^x to about two units in the last place; 0 for −∞.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

#endif

// Two elements in a register, the first in the lower half.
template <typename T>
__device__ uint32_t pack(float first, float second) {
  struct alignas(4) Pair {
    T first, second;
  } pair;
  from_float(first, pair.first);
  from_float(second, pair.second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <typename T>
__device__ void unpack(uint32_t bits, float& first, float& second) {
  T pair[2];
  memcpy(pair, &bits, sizeof(bits));
  first = to_float(pair[0]);
  second = to_float(pair[1]);
}

}  // namespace liftbyimage::cuda
