#include "gemm_bf16.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <exception>
#include <type_traits>

#include "tiles.h"
#include "vectors.h"

namespace liftbyimage::cpu {

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__)

using c10::BFloat16;

namespace {

// The instruction multiplies pairs along k, so that k is padded to even with zeros.
int64_t even(int64_t k) { return k + k % 2; }

void copy_row(const BFloat16* source, BFloat16* target, int64_t size) { std::copy_n(source, size, target); }
void copy_row(const float* source, BFloat16* target, int64_t size) { at::vec::convert(source, target, size); }

// op(A) [m, even(k)], row major.
template <typename A>
Buffer<BFloat16> pack_rows(Transpose transpose_a, int64_t m, int64_t k, const A* a, int64_t lda) {
  const int64_t stride = even(k);
  Buffer<BFloat16> packed = uninitialized<BFloat16>(m * stride);
  if (transpose_a == Transpose::no) {
    for (int64_t i = 0; i < m; ++i) {
      copy_row(a + i * lda, packed.get() + i * stride, k);
    }
  } else {
    const Buffer<BFloat16> rounded = uninitialized<BFloat16>(k * m);
    for (int64_t i = 0; i < k; ++i) {
      copy_row(a + i * lda, rounded.get() + i * m, m);
    }
    transpose(rounded.get(), m, k, m, packed.get(), stride);
  }
  for (int64_t i = 0; i < m && stride > k; ++i) {
    packed[i * stride + k] = BFloat16(0);
  }
  return packed;
}

// op(B) [k, n] as [even(k) / 2, n, 2]: the pairs along k side by side.
Buffer<BFloat16> pack_pairs(Transpose transpose_b, int64_t k, int64_t n, const BFloat16* b, int64_t ldb) {
  Buffer<BFloat16> packed = uninitialized<BFloat16>(even(k) * n);
  if (transpose_b == Transpose::yes && k % 2 == 0 && ldb % 2 == 0) {
    // A pair is as wide as a float; a transposition only moves it.
    transpose(reinterpret_cast<const float*>(b), ldb / 2, n, k / 2, reinterpret_cast<float*>(packed.get()), n);
    return packed;
  }
  const int64_t row = transpose_b == Transpose::no ? ldb : 1, column = transpose_b == Transpose::no ? 1 : ldb;
  for (int64_t i = 0; i < k; i += 2) {
    BFloat16* pairs = packed.get() + i * n;
    const BFloat16* first = b + i * row;
    if (i + 1 < k) {
      for (int64_t j = 0; j < n; ++j) {
        pairs[2 * j] = first[j * column];
        pairs[2 * j + 1] = first[j * column + row];
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        pairs[2 * j] = first[j * column];
        pairs[2 * j + 1] = BFloat16(0);
      }
    }
  }
  return packed;
}

template <typename A>
void multiply(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const A* a, int64_t lda,
              const BFloat16* b, int64_t ldb, bool add, float* c, int64_t ldc) {
  const Buffer<BFloat16> pairs = pack_pairs(transpose_b, k, n, b, ldb);
  Buffer<BFloat16> rows;
  const BFloat16* left = nullptr;
  int64_t left_stride = even(k);
  if constexpr (std::is_same_v<A, BFloat16>) {
    if (transpose_a == Transpose::no && k % 2 == 0) {
      left = a;
      left_stride = lda;
    }
  }
  if (left == nullptr) {
    rows = pack_rows(transpose_a, m, k, a, lda);
    left = rows.get();
  }
  at::native::cpublas::brgemm(m, n, even(k), left_stride, n, ldc, add, left, pairs.get(), c);
  at::native::cpublas::brgemm_release();
}

}  // namespace

namespace {

// Asked of oneDNN itself: torch may be built without these kernels, and the environment may forbid it the instructions.
bool multiplies_bf16() {
  if (!__builtin_cpu_supports("avx512bf16") || !at::globalContext().hasMKLDNN()) {
    return false;
  }
  const BFloat16 ones[2] = {1, 1};
  float product = 0;
  try {
    multiply(Transpose::no, Transpose::no, 1, 1, 2, ones, 2, ones, 1, false, &product, 1);
  } catch (const std::exception&) {
    return false;
  }
  return product == 2;
}

}  // namespace

bool has_bf16_products() {
  static const bool possible = multiplies_bf16();
  return possible && at::globalContext().userEnabledMkldnn();
}

void gemm_bf16(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const float* a,
               int64_t lda, const BFloat16* b, int64_t ldb, bool add, float* c, int64_t ldc) {
  multiply(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, add, c, ldc);
}

void gemm_bf16(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const BFloat16* a,
               int64_t lda, const BFloat16* b, int64_t ldb, bool add, float* c, int64_t ldc) {
  multiply(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, add, c, ldc);
}

#else

bool has_bf16_products() { return false; }

void gemm_bf16(Transpose, Transpose, int64_t, int64_t, int64_t, const float*, int64_t, const c10::BFloat16*, int64_t,
               bool, float*, int64_t) {
  TORCH_INTERNAL_ASSERT(false);
}

void gemm_bf16(Transpose, Transpose, int64_t, int64_t, int64_t, const c10::BFloat16*, int64_t, const c10::BFloat16*,
               int64_t, bool, float*, int64_t) {
  TORCH_INTERNAL_ASSERT(false);
}

#endif

}  // namespace liftbyimage::cpu
