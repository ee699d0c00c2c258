// What the kernels of attention on Hopper's tensor cores share: tiles of 64 patches on the 64 side of a product, up to
// 144 rows in two halves of 72 on its N side. For .cu files only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.h"
#include "hopper.h"
#include "shares.h"
#include "tensor_attention.h"
#include "warps.h"

namespace liftbyimage::cuda {

constexpr int kThreads = 2 * kWarpgroup;
constexpr int kWarps = kWarpgroup / kWarp;  // of a warpgroup
constexpr int kHalf = kTensorRows / 2;      // rows of one product
constexpr int kBlocks = kHalf / 8;          // blocks of eight columns of a result
constexpr int kTile = 64;                   // patches
constexpr int kStep = 16;                   // entries that one product sums over
constexpr int kTileBytes = kTile * kRowBytes;        // a column of a tile
constexpr int kHalfBytes = kHalf * kRowBytes;        // a column of 72 rows
constexpr int kRowsBytes = kTensorRows * kRowBytes;  // a column of all rows
constexpr size_t kSharedLimit = 232448;              // bytes that a block may use
constexpr int kOwnBarrier = 1;                       // + warpgroup: a named barrier of its 128 threads

using Scores = float[2][4 * kBlocks];  // [64 patches, 144 rows] in halves, as products leave them

__device__ inline int warpgroup() { return threadIdx.x / kWarpgroup; }
// The same from one lane for all, so that the compiler knows addresses made of it to be one for a warp.
__device__ inline int uniform_warpgroup() { return __shfl_sync(kFullWarp, warpgroup(), 0); }
__device__ inline int member() { return threadIdx.x % kWarpgroup; }
__device__ inline int warp() { return member() / kWarp; }
__device__ inline int result_row() { return 16 * warp() + lane() / 4; }  // and the one 8 below
__device__ inline int result_column(int block) { return 8 * block + 2 * (lane() % 4); }  // and the one beside
__device__ inline void wait_for_warpgroup() { wait_at_barrier(kOwnBarrier + warpgroup(), kWarpgroup); }

__device__ inline char* aligned_shared_memory() {
  char* start = reinterpret_cast<char*>(shared_memory);
  return start + (kSwizzleBytes - shared_address(start) % kSwizzleBytes) % kSwizzleBytes;
}

// Copies kEntries rows of up to 64·kColumns elements into columns, kCopiers threads together. Each thread has one place
// in a row of 128 bytes and every kCopiers / 8-th row, so that all but the first address is a constant away.
template <typename T, int kColumns, int kEntries, int kCopiers>
class TileCopier {
 public:
  // For rows of `width` elements, `stride` apart; what is beyond the width becomes zero.
  __device__ TileCopier(int thread, int64_t stride, int width)
      : row_(thread / kUnitsOfRow), stride_(stride), from_(row_ * stride + thread % kUnitsOfRow * kUnit),
        to_(swizzled(row_, thread % kUnitsOfRow)), valid_width_(width - thread % kUnitsOfRow * kUnit) {}

  // The rows from `rows` on; those from `count` on become zero.
  __device__ void copy(char* tile, const T* rows, int count) const {
    const T* from = rows + from_;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool row_valid = row_ + pass * kRowsOfPass < count && row_ + pass * kRowsOfPass < kEntries;
      if (kEntries % kRowsOfPass == 0 || row_ + pass * kRowsOfPass < kEntries) {
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const bool valid = row_valid && column * kColumn < valid_width_;
          copy_unit(tile + to_ + column * kEntries * kRowBytes + pass * kRowsOfPass * kRowBytes,
                    valid ? from + column * kColumn : rows, valid);
        }
      }
      from += kRowsOfPass * stride_;
    }
  }

 private:
  static constexpr int kUnitsOfRow = kColumn / kUnit;
  static constexpr int kRowsOfPass = kCopiers / kUnitsOfRow;
  static constexpr int kPasses = (kEntries + kRowsOfPass - 1) / kRowsOfPass;
  static_assert(kRowsOfPass % 8 == 0, "the swizzle of a thread's rows must be one");

  int row_;
  int64_t stride_;
  int64_t from_;
  int to_;
  int valid_width_;
};

// The columns of the tiles that a warpgroup works on, in the order of their use: each is copied kSlots − 1 uses ahead.
// copy(n, slot) copies the n-th of `count`.
template <int kSlots, typename Copy>
class ColumnStream {
 public:
  __device__ ColumnStream(char* slots, int count, Copy copy) : slots_(slots), count_(count), copy_(copy) {
    for (int n = 0; n + 1 < kSlots; ++n) start(n);
  }

  // The next column. The products with the one before must have been waited for: its place is taken.
  __device__ const char* next() {
    wait_for_copies<kSlots - 2>();
    publish_to_tensor_cores();
    wait_for_warpgroup();
    start(used_ + kSlots - 1);
    return slot(used_++);
  }

 private:
  __device__ char* slot(int n) const { return slots_ + n % kSlots * kTileBytes; }

  __device__ void start(int n) {
    if (n < count_) copy_(n, slot(n));
    commit_copies();
  }

  char* slots_;
  int count_;
  Copy copy_;
  int used_ = 0;
};

// s (+)= one column of a tile times the same column of all rows; left under way.
template <typename T>
__device__ void multiply_column(Scores& s, const char* tile_column, const char* rows_column, bool accumulate) {
  const uint64_t tile_operand = operand(tile_column), rows_operand = operand(rows_column);
  wgmma_fence();
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int k = 0; k < kColumn / kStep; ++k)
      wgmma_shared<T, false>(s[half], tile_operand + advance(2 * kStep * k),
                             rows_operand + advance(half * kHalfBytes + 2 * kStep * k), accumulate || k > 0);
  wgmma_commit();
}

inline int columns_of(int32_t width) { return static_cast<int>(ceil_div(width, kColumn)); }

inline bool on_hopper() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

inline int64_t tiles_of(int32_t patches) { return ceil_div(patches, kTile); }

}  // namespace liftbyimage::cuda
