#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "attention.h"

// How one sample's rows × patches are cut into cache-sized pieces.
namespace liftbyimage::cpu {

// 384 columns of 136 rows and a 384 × 256 token tile share a 1 MiB L2, and no row stride is a power of two.
constexpr int64_t most_tile_patches = 384;
// Scores of a row block per thread. Blocks of fewer than about 60 rows cost more BLAS speed than staying in L2 gains.
constexpr int64_t block_bytes = 4 << 20;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// BLAS sums in an order that depends on how its operands are aligned, so every operand starts on this boundary.
constexpr std::align_val_t alignment{64};

struct AlignedDelete {
  void operator()(void* pointer) const { ::operator delete(pointer, alignment); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

template <typename T>
Buffer<T> uninitialized(int64_t size) {
  return Buffer<T>(static_cast<T*>(::operator new(size * sizeof(T), alignment)));
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<size_t>(alignment) == 0;
}

struct Tile {
  int64_t index, first, size;  // patches [first, first + size)
};

// Tiles are alike and, beyond one, even in number, so that two threads share a sample equally.
inline int64_t tile_patches(const AttentionShape& shape) {
  const int64_t tiles = divide_up(shape.patches, most_tile_patches);
  const int64_t size = 16 * divide_up(shape.patches, 16 * (tiles == 1 ? 1 : tiles + tiles % 2));
  return size % 256 == 0 ? size + 16 : size;
}

inline int64_t tile_count(const AttentionShape& shape) { return divide_up(shape.patches, tile_patches(shape)); }

inline Tile tile_at(const AttentionShape& shape, int64_t index) {
  const int64_t size = tile_patches(shape), first = index * size;
  return {index, first, std::min(size, shape.patches - first)};
}

struct RowBlock {
  int64_t first, rows;
};

// A block is a part of one group, or several whole groups.
inline int64_t rows_per_block(const AttentionShape& shape, int64_t bytes_per_row) {
  const int64_t group = shape.group_rows();
  const int64_t most = std::max<int64_t>(16, block_bytes / bytes_per_row);
  if (most >= group) {
    const int64_t groups = std::min(shape.groups, most / group);
    return group * divide_up(shape.groups, divide_up(shape.groups, groups));
  }
  return divide_up(group, divide_up(group, most));
}

template <typename F>
void for_each_block(const AttentionShape& shape, int64_t block_rows, const F& f) {
  const int64_t unit = std::max(block_rows, shape.group_rows());
  for (int64_t begin = 0; begin < shape.rows(); begin += unit) {
    const int64_t end = std::min(begin + unit, shape.rows());
    for (int64_t first = begin; first < end; first += block_rows) {
      f(RowBlock{first, std::min(block_rows, end - first)});
    }
  }
}

// f(group, first row within the block, rows) for every group the block touches.
template <typename F>
void for_each_group(const AttentionShape& shape, const RowBlock& block, const F& f) {
  const int64_t group_rows = shape.group_rows();
  for (int64_t row = 0; row < block.rows;) {
    const int64_t group = (block.first + row) / group_rows;
    const int64_t rows = std::min(block.rows - row, (group + 1) * group_rows - block.first - row);
    f(group, row, rows);
    row += rows;
  }
}

}  // namespace liftbyimage::cpu
