#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>
#include <cstdint>

#include "vectors.h"

// Products of few rows, T = float or double. BLAS packs a weight matrix before it multiplies, which 17 rows do not pay
// back (it reaches two thirds of its rate there); here the weights are read once, as they are stored. Each element of
// a result is summed in an order that only the shape of the weight decides: not other rows, threads or alignment.
namespace liftbyimage::cpu {

// Accumulators of one block: as many as leave registers for the operands.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int block_rows = 6;
#else
constexpr int block_rows = 3;
#endif
constexpr int block_columns = 4;
// Rows that pass over a weight block while it is in the first-level cache, themselves in it at an inner size of 256.
constexpr int64_t strip_rows = 3 * 6;

// Keeps an operand in its register: folded into each product it would be loaded again, and loads are the bottleneck.
template <typename T>
inline void hold(at::vec::Vectorized<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == sizeof(float)) {
    __m512 raw = x;
    asm("" : "+v"(raw));
    x = raw;
  } else {
    __m512d raw = x;
    asm("" : "+v"(raw));
    x = raw;
  }
#endif
}

// target[c] = sum of the lanes of x[c]
template <typename T>
inline void sum_each(const at::vec::Vectorized<T> (&x)[block_columns], T* target) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == sizeof(float)) {
    const __m512 a = x[0], b = x[1], c = x[2], d = x[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(target, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    return;
  }
#endif
  for (int c = 0; c < block_columns; ++c) {
    target[c] = sum_lanes<T>(x[c]);
  }
}

template <typename T>
inline void sum_each(const at::vec::Vectorized<T> (&x)[1], T* target) {
  target[0] = sum_lanes<T>(x[0]);
}

// x Wᵀ of R rows and C columns, both contiguous along the inner axis; f(row, sums [C]) takes a row of results.
template <int R, int C, bool fetch, typename T, typename F>
inline void dot_block(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t inner, const F& f) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      sums[r][c] = Vec(0);
    }
  }
  const auto step = [&](int64_t k, const auto& load) __attribute__((always_inline)) {
    Vec weights[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      weights[c] = load(w + c * w_stride + k);
      if constexpr (fetch) {
        // The next columns; the memory of a long row would push the rows out of the first-level cache.
        __builtin_prefetch(w + (C + c) * w_stride + k, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec row = load(x + r * x_stride + k);
      hold(row);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        sums[r][c] = at::vec::fmadd(row, weights[c], sums[r][c]);
      }
    }
  };
  int64_t k = 0;
  for (; k + Vec::size() <= inner; k += Vec::size()) {
    step(k, [](const T* source) { return Vec::loadu(source); });
  }
  if (k < inner) {
    step(k, [&](const T* source) { return Vec::loadu(source, inner - k); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T row_sums[C];
    sum_each<T>(sums[r], row_sums);
    f(r, row_sums);
  }
}

// x M of R rows and C vectors of columns, the last of them `lanes` wide; x_step is from one inner element to the next.
template <int R, int C, typename T>
inline void outer_block(const T* x, int64_t x_stride, int64_t x_step, const T* m, int64_t m_stride, int64_t inner,
                        int64_t lanes, T* target, int64_t target_stride) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      sums[r][c] = Vec(0);
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    Vec columns[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      columns[c] = C > 1 ? Vec::loadu(m + k * m_stride + c * Vec::size()) : Vec::loadu(m + k * m_stride, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec scalar(x[r * x_stride + k * x_step]);
      hold(scalar);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        sums[r][c] = at::vec::fmadd(scalar, columns[c], sums[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      T* at = target + r * target_stride + c * Vec::size();
      C > 1 ? sums[r][c].store(at) : sums[r][c].store(at, static_cast<int>(lanes));
    }
  }
}

// f(integral constant of the rows) for 1 to block_rows.
template <int R = block_rows, typename F>
inline void with_rows(int64_t rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) {
      with_rows<R - 1>(rows, f);
      return;
    }
  }
  f(std::integral_constant<int, R>());
}

// f(row, column, sums, count) for every piece of x Wᵀ: x [rows, inner], W [columns, inner].
template <typename T, typename F>
void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const T* x, int64_t x_stride, const T* w,
                         int64_t w_stride, const F& f) {
  for (int64_t strip = 0; strip < rows; strip += strip_rows) {
    const int64_t end = std::min(rows, strip + strip_rows);
    const auto block = [&](int64_t column, auto columns_of_block, auto fetch, int64_t row) {
      constexpr int C = decltype(columns_of_block)::value;
      with_rows(end - row, [&](auto rows_of_block) {
        dot_block<decltype(rows_of_block)::value, C, decltype(fetch)::value>(
            x + row * x_stride, x_stride, w + column * w_stride, w_stride, inner,
            [&](int r, const T* sums) __attribute__((always_inline)) { f(row + r, column, sums, C); });
      });
    };
    const auto all_rows = [&](int64_t column, auto columns_of_block) {
      int64_t row = strip;
      if (row == 0) {  // the first to touch these weights asks for the next
        block(column, columns_of_block, std::true_type(), row);
        row += block_rows;
      }
      for (; row < end; row += block_rows) {
        block(column, columns_of_block, std::false_type(), row);
      }
    };
    int64_t column = 0;
    for (; column + block_columns <= columns; column += block_columns) {
      all_rows(column, std::integral_constant<int, block_columns>());
    }
    for (; column < columns; ++column) {
      all_rows(column, std::integral_constant<int, 1>());
    }
  }
}

// target [rows, columns] = x M: x [rows, inner] of any two strides, M [inner, columns].
template <typename T>
void multiply(int64_t rows, int64_t columns, int64_t inner, const T* x, int64_t x_stride, int64_t x_step, const T* m,
              int64_t m_stride, T* target, int64_t target_stride) {
  constexpr int64_t lanes = at::vec::Vectorized<T>::size();
  const auto all_rows = [&](int64_t column, auto vectors, int64_t count) {
    for (int64_t row = 0; row < rows; row += block_rows) {
      with_rows(rows - row, [&](auto rows_of_block) {
        outer_block<decltype(rows_of_block)::value, decltype(vectors)::value>(
            x + row * x_stride, x_stride, x_step, m + column, m_stride, inner, count,
            target + row * target_stride + column, target_stride);
      });
    }
  };
  int64_t column = 0;
  for (; column + block_columns * lanes <= columns; column += block_columns * lanes) {
    all_rows(column, std::integral_constant<int, block_columns>(), lanes);
  }
  for (; column + 2 * lanes <= columns; column += 2 * lanes) {
    all_rows(column, std::integral_constant<int, 2>(), lanes);
  }
  for (; column < columns; column += lanes) {
    all_rows(column, std::integral_constant<int, 1>(), std::min(lanes, columns - column));
  }
}

}  // namespace liftbyimage::cpu
