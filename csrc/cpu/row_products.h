#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

// Products of few rows. BLAS packs a weight matrix before it multiplies, which 17 rows do not pay back (it reaches two
// thirds of its rate there); here the weights are read as they are stored. Each element of a result is summed in an
// order that only the shape of the weight decides: not other rows, threads or alignment.
namespace liftbyimage::cpu {

// Accumulators of one block: as many as leave registers for the operands.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int block_rows = 6;
#else
constexpr int block_rows = 3;
#endif
constexpr int block_columns = 4;
// Weights that stay in the second-level cache while all rows pass over them.
constexpr int64_t panel_columns = 64;
// What of the inner axis is summed at a time: a block of rows and one of columns are in the first-level cache together.
constexpr int64_t chunk_bytes = 2560;
// Rows that pass over a block of columns while it is there, themselves in it too.
constexpr int64_t strip_bytes = 18 << 10;
constexpr int64_t most_strip_rows = 3 * block_rows;

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

// One register of operands and its product, S = float or double.
template <typename S>
struct Operand {
  using Vec = at::vec::Vectorized<S>;
  static constexpr int64_t size = Vec::size();
  Vec values;

  static Operand load(const S* source) { return {Vec::loadu(source)}; }
  static Operand load(const S* source, int64_t count) { return {Vec::loadu(source, count)}; }
  static Operand repeat(const S* source) { return {Vec(*source)}; }
  void keep() { hold(values); }
  Vec multiply_add(const Operand& other, const Vec& sum) const { return at::vec::fmadd(values, other.values, sum); }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
template <>
struct Operand<c10::BFloat16> {
  using Vec = at::vec::Vectorized<float>;
  static constexpr int64_t size = 32;
  __m512i values;

  static Operand load(const c10::BFloat16* source) { return {_mm512_loadu_si512(source)}; }
  static Operand load(const c10::BFloat16* source, int64_t count) {
    return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), source)};
  }
  static Operand repeat(const c10::BFloat16* source) {  // a pair, of which a product takes both
    int pair;
    std::memcpy(&pair, source, sizeof(pair));
    return {_mm512_set1_epi32(pair)};
  }
  void keep() { asm("" : "+v"(values)); }
  Vec multiply_add(const Operand& other, const Vec& sum) const {
    return _mm512_dpbf16_ps(sum, (__m512bh)values, (__m512bh)other.values);
  }
};
#else
template <>
struct Operand<c10::BFloat16> {
  using Vec = at::vec::Vectorized<float>;
  static constexpr int64_t size = at::vec::Vectorized<c10::BFloat16>::size();
  Vec low, high;

  static Operand load(const c10::BFloat16* source, int64_t count = size) {
    const auto [low, high] =
        at::vec::convert_bfloat16_float(at::vec::Vectorized<c10::BFloat16>::loadu(source, static_cast<int>(count)));
    return {low, high};
  }
  void keep() {}
  Vec multiply_add(const Operand& other, const Vec& sum) const {
    return at::vec::fmadd(high, other.high, at::vec::fmadd(low, other.low, sum));
  }
};
#endif

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

// x Wᵀ of R rows and C columns, both contiguous along the inner axis; f(row, sums [C]) takes a row of results. While it
// runs, `fetch` brings the same columns of the next panel into the second-level cache.
template <int R, int C, bool fetch, typename S, typename F>
inline void dot_block(const S* x, int64_t x_stride, const S* w, int64_t w_stride, int64_t inner, const F& f) {
  using T = at::opmath_type<S>;
  using Vec = at::vec::Vectorized<T>;
  using Inputs = Operand<S>;
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      sums[r][c] = Vec(0);
    }
  }
  const auto step = [&](int64_t k, const auto& load) __attribute__((always_inline)) {
    Inputs weights[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      weights[c] = load(w + c * w_stride + k);
      if constexpr (fetch) {
        __builtin_prefetch(w + (panel_columns + c) * w_stride + k, 0, 2);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Inputs row = load(x + r * x_stride + k);
      row.keep();
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        sums[r][c] = row.multiply_add(weights[c], sums[r][c]);
      }
    }
  };
  int64_t k = 0;
  for (; k + Inputs::size <= inner; k += Inputs::size) {
    step(k, [](const S* source) { return Inputs::load(source); });
  }
  if (k < inner) {
    step(k, [&](const S* source) { return Inputs::load(source, inner - k); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T row_sums[C];
    sum_each<T>(sums[r], row_sums);
    f(r, row_sums);
  }
}

// x M of R rows and C vectors of columns, the last of them `lanes` wide, added to the target or not; x_step is from one
// inner element to the next.
template <int R, int C, bool add, typename T>
inline void outer_block(const T* x, int64_t x_stride, int64_t x_step, const T* m, int64_t m_stride, int64_t inner,
                        int64_t lanes, T* target, int64_t target_stride) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const T* at = target + r * target_stride + c * Vec::size();
      sums[r][c] = !add ? Vec(0) : C > 1 ? Vec::loadu(at) : Vec::loadu(at, lanes);
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

// f(row, column, sums, count) for every piece of x Wᵀ, at most panel_columns wide: x [rows, inner], W [columns, inner].
// The sums are f's to change.
template <typename S, typename F>
void multiply_transposed(int64_t rows, int64_t columns, int64_t inner, const S* x, int64_t x_stride, const S* w,
                         int64_t w_stride, const F& f) {
  using T = at::opmath_type<S>;
  constexpr int64_t item = sizeof(S), most_chunk = chunk_bytes / item, unit = Operand<S>::size;
  const int64_t chunks = std::max<int64_t>(1, (inner + most_chunk - 1) / most_chunk);
  const int64_t chunk = ((inner + chunks - 1) / chunks + unit - 1) / unit * unit;
  const int64_t strip_blocks = std::max<int64_t>(1, strip_bytes / (block_rows * chunk * item));
  const int64_t strip_rows = std::min(most_strip_rows, strip_blocks * block_rows);
  T tile[most_strip_rows][panel_columns];

  // A strip's rows by C columns and [begin, end) of the inner axis; the rows from `asking` on ask for the next panel.
  const auto multiply_strip = [&](int64_t strip, int64_t end_row, int64_t first, int64_t column, auto columns_of_block,
                                  int64_t begin, int64_t end, int64_t asking) {
    constexpr int C = decltype(columns_of_block)::value;
    for (int64_t row = strip; row < end_row; row += block_rows) {
      const auto block = [&](auto rows_of_block, auto fetch) {
        dot_block<decltype(rows_of_block)::value, C, decltype(fetch)::value>(
            x + row * x_stride + begin, x_stride, w + (first + column) * w_stride + begin, w_stride, end - begin,
            [&](int r, const T* sums) __attribute__((always_inline)) {
              T* target = tile[row - strip + r] + column;
              for (int c = 0; c < C; ++c) {
                target[c] = begin == 0 ? sums[c] : target[c] + sums[c];
              }
            });
      };
      with_rows(end_row - row, [&](auto rows_of_block) {
        if (C > 1 && row == asking) {
          block(rows_of_block, std::true_type());
        } else {
          block(rows_of_block, std::false_type());
        }
      });
    }
  };
  for (int64_t first = 0; first < columns; first += panel_columns) {
    const int64_t width = std::min(panel_columns, columns - first);
    for (int64_t strip = 0; strip < rows; strip += strip_rows) {
      const int64_t end_row = std::min(rows, strip + strip_rows);
      for (int64_t begin = 0; begin == 0 || begin < inner; begin += chunk) {
        const int64_t end = std::min(inner, begin + chunk);
        int64_t column = 0, asking = 0;
        for (; column + block_columns <= width; column += block_columns) {
          multiply_strip(strip, end_row, first, column, std::integral_constant<int, block_columns>(), begin, end,
                         asking);
          asking = asking + block_rows < rows ? asking + block_rows : 0;  // blocks of rows take turns
        }
        for (; column < width; ++column) {
          multiply_strip(strip, end_row, first, column, std::integral_constant<int, 1>(), begin, end, asking);
        }
      }
      for (int64_t row = strip; row < end_row; ++row) {
        f(row, first, tile[row - strip], static_cast<int>(width));
      }
    }
  }
}

// Short dot products spend as long on adding up their lanes as on the products. Weights of few inputs are therefore
// packed once per call into panels [inputs, panel_columns], where a vector holds different columns; in bfloat16 pairs
// of inputs lie side by side, [inputs / 2, panel_columns, 2].
constexpr int64_t most_packed_inputs = 256;

template <typename S>
constexpr int64_t inputs_per_lane = 1;
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
template <>
constexpr int64_t inputs_per_lane<c10::BFloat16> = 2;
#else
template <>
constexpr int64_t inputs_per_lane<c10::BFloat16> = 0;  // no such products
#endif

template <typename S>
bool is_packed(int64_t inputs) {
  constexpr int64_t unit = inputs_per_lane<S>;
  return unit > 0 && inputs <= most_packed_inputs && inputs % std::max<int64_t>(1, unit) == 0;
}

// The panel of `columns` rows of W, filled up with zeros.
template <typename S>
void pack_panel(const S* w, int64_t inputs, int64_t columns, S* panel) {
  using Lane = at::opmath_type<S>;  // as wide as the inputs of a lane
  if (columns < panel_columns) {
    std::memset(panel, 0, inputs * panel_columns * sizeof(S));
  }
  const int64_t lanes = inputs * sizeof(S) / sizeof(Lane);
  transpose(reinterpret_cast<const Lane*>(w), lanes, columns, lanes, reinterpret_cast<Lane*>(panel), panel_columns);
}

// tile [R, 4 vectors of columns] = x Wᵀ
template <int R, typename S, typename T>
inline void packed_block(const S* x, int64_t x_stride, const S* panel, int64_t inputs, T* tile) {
  using Vec = at::vec::Vectorized<T>;
  using Inputs = Operand<S>;
  Vec sums[R][block_columns];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < block_columns; ++c) {
      sums[r][c] = Vec(0);
    }
  }
  for (int64_t k = 0; k < inputs; k += inputs_per_lane<S>) {
    Inputs weights[block_columns];
#pragma GCC unroll 8
    for (int c = 0; c < block_columns; ++c) {
      weights[c] = Inputs::load(panel + k * panel_columns + c * Inputs::size);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Inputs row = Inputs::repeat(x + r * x_stride + k);
      row.keep();
#pragma GCC unroll 8
      for (int c = 0; c < block_columns; ++c) {
        sums[r][c] = row.multiply_add(weights[c], sums[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < block_columns; ++c) {
      sums[r][c].store(tile + r * panel_columns + c * Vec::size());
    }
  }
}

// As multiply_transposed, with `columns` weights packed in panels.
template <typename S, typename F>
void multiply_packed(int64_t rows, int64_t columns, int64_t inputs, const S* x, int64_t x_stride, const S* panels,
                     const F& f) {
  using T = at::opmath_type<S>;
  if constexpr (inputs_per_lane<S> > 0) {
    constexpr int64_t width = block_columns * at::vec::Vectorized<T>::size();
    T tile[block_rows * panel_columns];
    for (int64_t first = 0; first < columns; first += panel_columns) {
      const int64_t size = std::min(panel_columns, columns - first);
      for (int64_t row = 0; row < rows; row += block_rows) {
        with_rows(rows - row, [&](auto rows_of_block) {
          for (int64_t column = 0; column < size; column += width) {
            packed_block<decltype(rows_of_block)::value>(x + row * x_stride, x_stride,
                                                         panels + first * inputs + column * inputs_per_lane<S>, inputs,
                                                         tile + column);
          }
        });
        for (int64_t i = row; i < std::min<int64_t>(rows, row + block_rows); ++i) {
          f(i, first, tile + (i - row) * panel_columns, static_cast<int>(size));
        }
      }
    }
  }
}

// target [rows, columns] = x M, or += x M: x [rows, inner] of any two strides, M [inner, columns].
template <bool add = false, typename T>
void multiply(int64_t rows, int64_t columns, int64_t inner, const T* x, int64_t x_stride, int64_t x_step, const T* m,
              int64_t m_stride, T* target, int64_t target_stride) {
  constexpr int64_t lanes = at::vec::Vectorized<T>::size();
  const auto all_rows = [&](int64_t column, auto vectors, int64_t count) {
    for (int64_t row = 0; row < rows; row += block_rows) {
      with_rows(rows - row, [&](auto rows_of_block) {
        outer_block<decltype(rows_of_block)::value, decltype(vectors)::value, add>(
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
