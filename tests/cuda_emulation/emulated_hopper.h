// Stand-in for what csrc/cuda/hopper.h and wgmma.h do with Hopper's own instructions. Products are done at once
// where they are issued, so nothing is proven about waiting for them; that operands lie where descriptors say, and
// registers as the products leave them, is. After csrc/cuda/tiles.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace liftbyimage::cuda {

inline void publish_to_tensor_cores() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending = 0>
void wgmma_wait() {}

inline void wait_at_barrier(int barrier, int threads) { emulate::Block::current()->sync_named(barrier, threads); }

inline uint64_t operand(const void* pointer) { return shared_address(pointer) >> 4; }

// One element of an operand: entry `line` of its 64 or N side, entry `k` of its 16 side.
template <typename T>
float operand_element(uint64_t operand, int line, int k, bool transposed) {
  constexpr int kGroupBytes = 1024;  // of eight rows of 128 bytes
  const int row = transposed ? k : line;
  const int element = transposed ? line : k;
  uint32_t address = static_cast<uint32_t>(operand << 4) + row / 8 * kGroupBytes + row % 8 * 128 + element * 2;
  address ^= address / 128 % 8 * 16;
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(shared_memory) + address, sizeof(value));
  return to_float(value);
}

struct ResultPlace {
  int lane = emulate::Block::current()->lane();
  int first_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;

  int row(int i) const { return first_row + i / 2 % 2 * 8; }
  int column(int i) const { return i / 4 * 8 + lane % 4 * 2 + i % 2; }
};

template <typename T, bool kTransposeA>
void wgmma_shared(float (&d)[36], uint64_t a, uint64_t b, bool accumulate) {
  const ResultPlace place;
  float left[2][16];
  for (int lower = 0; lower < 2; ++lower)
    for (int k = 0; k < 16; ++k) left[lower][k] = operand_element<T>(a, place.row(2 * lower), k, kTransposeA);
  for (int i = 0; i < 36; ++i) {
    float sum = accumulate ? d[i] : 0.0f;
    for (int k = 0; k < 16; ++k) sum += left[i / 2 % 2][k] * operand_element<T>(b, place.column(i), k, false);
    d[i] = sum;
  }
}

// The thread beside that holds columns 2·(k / 2 % 4) … of the same rows, and its register of column k of row half.
template <typename T>
float register_element(const uint32_t (&a)[4], int lower, int k) {
  emulate::Block& block = *emulate::Block::current();
  const int from = block.lane() / 4 * 4 + k % 8 / 2;
  const uint32_t pair = block.exchange(0xffffffffu, a[k / 8 * 2 + lower], 0, [&](auto handed) { return handed(from); });
  const uint16_t bits = static_cast<uint16_t>(k % 2 ? pair >> 16 : pair);
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return to_float(value);
}

template <typename T>
void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const ResultPlace place;
  float left[2][16];
  for (int lower = 0; lower < 2; ++lower)
    for (int k = 0; k < 16; ++k) left[lower][k] = register_element<T>(a, lower, k);
  for (int i = 0; i < 32; ++i) {
    float sum = accumulate ? d[i] : 0.0f;
    for (int k = 0; k < 16; ++k) sum += left[i / 2 % 2][k] * operand_element<T>(b, place.column(i), k, true);
    d[i] = sum;
  }
}

template <int kMatrices>
void store_transposed(void* row, const uint32_t (&matrix)[kMatrices]) {
  emulate::Block& block = *emulate::Block::current();
  for (int m = 0; m < kMatrices; ++m)
    for (int side = 0; side < 2; ++side) {
      const int column = 8 * m + block.lane() % 4 * 2 + side;
      const auto of_column = [&](auto handed) { return handed(column); };
      char* target = block.exchange(0xffffffffu, static_cast<char*>(row), 0, of_column);
      const uint16_t bits = static_cast<uint16_t>(side ? matrix[m] >> 16 : matrix[m]);
      std::memcpy(target + block.lane() / 4 * 2, &bits, sizeof(bits));
    }
}

}  // namespace liftbyimage::cuda
