// What the kernels of attention on warps' tensor cores (mma.h) share: rows of all heads in shared memory, strips of 16
// patches in the registers of a warp. For .cu files only.
//
// Two orders make loads and stores of whole units possible, where the order does not matter:
//
//   elements   A thread holds, of each group of four units of a patch, unit c, and takes its eight elements for those
//              that a thread holds of two products. Rows are read alike, and a sum has no order.
//   rows       Position p of shared memory holds row row_at(p): what a thread holds of 16 scores of a patch are four
//              neighbouring rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "mma.h"
#include "shares.h"
#include "tensor_attention.h"
#include "tiles.h"
#include "warps.h"

namespace liftbyimage::cuda {

constexpr int kStrip = 16;                               // patches or rows of one product
constexpr int kBlock = 8;                                // rows or columns of one product
constexpr int kRowBlocks = kTensorRows / kBlock;
constexpr int kStripWarps = 8;                           // of a block whose warps work on strips of patches
constexpr int kStripThreads = kStripWarps * kWarp;
constexpr int kAllRowsBytes = kTensorRows * kRowBytes;   // a column of all rows
constexpr int kUnitsOfGroup = 4;

constexpr int kGroup = kUnitsOfGroup * kUnit;             // elements

using StripScores = float[kRowBlocks][4];  // [16 patches, 144 rows] as products leave them
using Group = uint32_t[2][4];              // unit c of a group, of patches r and r + 8

__device__ inline int block_warp() { return threadIdx.x / kWarp; }
__device__ inline int lane_row() { return lane() / 4; }
__device__ inline int lane_word() { return lane() % 4; }

__host__ __device__ constexpr int row_at(int position) {
  return position / 16 * 16 + position % 8 / 2 * 4 + position / 8 % 2 * 2 + position % 2;
}

// Where unit `unit` of position `position` of a column lies: one unit of eight neighbouring positions, or four of two,
// are in different banks.
__host__ __device__ constexpr int spread(int position, int unit) {
  return position * kRowBytes + ((unit ^ ((position & 1) << 2 | (position >> 1 & 3))) << 4);
}

// Two or four words in one piece; `out` is aligned to as many bytes.
template <int kWords>
__device__ void store_words(void* out, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 2 || kWords == 4);
  if constexpr (kWords == 4)
    *static_cast<uint4*>(out) = uint4{words[0], words[1], words[2], words[3]};
  else
    *static_cast<uint2*>(out) = uint2{words[0], words[1]};
}

template <int kWords>
__device__ void load_words(uint32_t (&words)[kWords], const void* from) {
  static_assert(kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    const uint4 given = *static_cast<const uint4*>(from);
    memcpy(words, &given, sizeof(words));
  } else {
    const uint2 given = *static_cast<const uint2*>(from);
    memcpy(words, &given, sizeof(words));
  }
}

// A of a product over rows or patches, from blocks of its sums: of the `step`-th 16.
template <typename T>
__device__ void operand_of(uint32_t (&a)[4], const float (*blocks)[4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* pair = &blocks[2 * step + i / 2][i % 2 * 2];
    a[i] = pack<T>(pair[0], pair[1]);
  }
}

// B for two neighbouring blocks of columns, which are units `unit` and the one after, and the `step`-th 16 rows of a
// column of shared memory. place(row, unit) says where a unit lies.
template <typename Place>
__device__ void load_across(uint32_t (&b)[4], const char* column, int step, int unit, Place place) {
  load_transposed(b, column + place(16 * step + lane() / 8 % 2 * 8 + lane() % 8, unit + lane() / 16));
}

// Copies the rows of one sample, `width` elements each, into columns: position p receives row row_at(p).
template <typename T, int kColumns>
__device__ void stage_rows(char* columns, const T* rows, int count, int width) {
  constexpr int kUnits = kColumns * kRowBytes / 16;
  for (int i = threadIdx.x; i < kTensorRows * kUnits; i += kStripThreads) {
    const int position = i / kUnits, unit = i % kUnits, row = row_at(position);
    const bool valid = row < count && unit * kUnit < width;
    copy_unit(columns + unit / 8 * kAllRowsBytes + spread(position, unit % 8),
              valid ? rows + row * width + unit * kUnit : rows, valid);
  }
}

// A thread's units of a strip of patches, which starts at patch `first`; what lies beyond the last patch is read there.
template <typename T, int kColumns>
class StripReader {
 public:
  __device__ StripReader(const T* tokens, int64_t stride, int first, int patches, int width)
      : width_(width - lane_word() * kUnit) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower)
      rows_[lower] = tokens + min(first + lane_row() + kBlock * lower, patches - 1) * stride +
                     lane_word() * kUnit;
  }

  __device__ void read(Group& group, int index) const {
    const int element = index * kGroup;
    // Only of the last column some elements may be missing.
    const bool inside = element < (kColumns - 1) * kColumn || element < width_;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const uint4 zero = {};
      const uint4 given = inside ? *reinterpret_cast<const uint4*>(rows_[lower] + element) : zero;
      memcpy(group[lower], &given, sizeof(given));
    }
  }

 private:
  const T* rows_[2];
  int width_;
};

// s += the products of one group of the strip with the same group of all rows.
template <typename T>
__device__ void multiply_group(StripScores& s, const Group& group, const char* rows, int index) {
  const char* units = rows + index / 2 * kAllRowsBytes + spread(lane_row(), index % 2 * kUnitsOfGroup + lane_word());
  const uint32_t a[2][4] = {{group[0][0], group[1][0], group[0][1], group[1][1]},
                            {group[0][2], group[1][2], group[0][3], group[1][3]}};
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block) {
    uint32_t b[4];
    load_words(b, units + block * kBlock * kRowBytes);
    mma<T>(s[block], a[0], b[0], b[1]);
    mma<T>(s[block], a[1], b[2], b[3]);
  }
}

// Calls function(row, block, side) for every row that the thread holds: its sums are s[block][side] and, of the patch
// eight further on, s[block][2 + side].
template <typename Function>
__device__ void for_each_row(Function function) {
#pragma unroll
  for (int block = 0; block < kRowBlocks; ++block)
#pragma unroll
    for (int side = 0; side < 2; ++side) function(row_at(kBlock * block + 2 * lane_word() + side), block, side);
}

inline int columns_of(int32_t width) { return static_cast<int>(ceil_div(width, kColumn)); }

// Calls function(std::integral_constant<int, columns>{}) for as many columns as hold the width.
template <typename Function>
auto with_columns(int32_t width, Function function) {
  switch (columns_of(width)) {
    case 1:
      return function(std::integral_constant<int, 1>{});
    case 2:
      return function(std::integral_constant<int, 2>{});
    case 3:
      return function(std::integral_constant<int, 3>{});
    default:
      return function(std::integral_constant<int, 4>{});
  }
}

// Shared memory of a kernel that holds `held` tensors of all rows and two floats per row.
constexpr int64_t held_bytes(int held, int64_t columns) {
  return held * columns * kAllRowsBytes + static_cast<int64_t>(sizeof(float)) * 2 * kTensorRows;
}

// Whether it fits the current device.
inline bool rows_fit(int held, int32_t width) {
  return held_bytes(held, columns_of(width)) <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

inline bool has_tensor_cores() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

}  // namespace liftbyimage::cuda
