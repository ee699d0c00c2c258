// Stand-in for the instructions of csrc/cuda/mma.h: registers hold what the page of the instruction says. After
// csrc/cuda/tiles.h.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace liftbyimage::cuda {

// What the lanes `from(0)` … `from(kCount - 1)` of the warp handed in.
template <int kCount, typename Value, typename From>
std::array<Value, kCount> of_lanes(Value value, From from) {
  std::array<Value, kCount> values;
  emulate::Block::current()->exchange(0xffffffffu, value, 0, [&](auto handed) {
    for (int i = 0; i < kCount; ++i) values[i] = handed(from(i));
    return value;
  });
  return values;
}

inline void check_row(const void* row) {
  if (shared_address(row) % 16 != 0) emulate::fail("a row of a matrix is not aligned to 16 bytes");
}

inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  check_row(row);
  const int lane = emulate::Block::current()->lane();
  const auto rows = of_lanes<4>(static_cast<const char*>(row), [&](int m) { return 8 * m + lane / 4; });
  for (int m = 0; m < 4; ++m) std::memcpy(&matrix[m], rows[m] + lane % 4 * 4, sizeof(uint32_t));
}

inline void load_transposed(uint32_t (&matrix)[4], const void* row) {
  check_row(row);
  const int lane = emulate::Block::current()->lane();
  const auto from = [&](int i) { return 8 * (i / 2) + lane % 4 * 2 + i % 2; };
  const auto rows = of_lanes<8>(static_cast<const char*>(row), from);
  for (int i = 0; i < 8; ++i)
    std::memcpy(reinterpret_cast<char*>(&matrix[i / 2]) + i % 2 * 2, rows[i] + lane / 4 * 2, sizeof(uint16_t));
}

inline int recomputed(int value) { return value; }

inline uint64_t both(uint32_t first, uint32_t second) { return first | static_cast<uint64_t>(second) << 32; }

// The 16 elements of which thread c of four holds pairs c and c + 4, two such pairs each.
template <typename T>
void elements_of(float (&elements)[16], const uint64_t* pairs) {
  uint32_t words[8];
  for (int c = 0; c < 4; ++c) {
    words[c] = static_cast<uint32_t>(pairs[c]);
    words[c + 4] = static_cast<uint32_t>(pairs[c] >> 32);
  }
  T values[16];
  std::memcpy(values, words, sizeof(values));
  for (int k = 0; k < 16; ++k) elements[k] = to_float(values[k]);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulate::Block::current()->lane();
  float left[2][16], right[2][16];
  for (int lower = 0; lower < 2; ++lower)
    elements_of<T>(left[lower],
                   of_lanes<4>(both(a[lower], a[2 + lower]), [&](int c) { return lane / 4 * 4 + c; }).data());
  const auto columns = of_lanes<8>(both(b0, b1), [&](int i) { return (lane % 4 * 2 + i / 4) * 4 + i % 4; });
  for (int side = 0; side < 2; ++side) elements_of<T>(right[side], columns.data() + 4 * side);
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += left[i / 2][k] * right[i % 2][k];
}

}  // namespace liftbyimage::cuda
