#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

// Vectorised loops over one contiguous row, T = float or double.
namespace liftbyimage::cpu {

// f(offset, count) over a row in vector steps; the last step may be partial.
template <typename T, typename F>
inline void for_vectors(int64_t size, const F& f) {
  constexpr int64_t width = at::vec::Vectorized<T>::size();
  int64_t i = 0;
  for (; i + width <= size; i += width) {
    f(i, width);
  }
  if (i < size) {
    f(i, size - i);
  }
}

template <typename T>
inline T sum_lanes(const at::vec::Vectorized<T>& lanes) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::vec_reduce_all<T>([](Vec& x, Vec& y) { return x + y; }, lanes);
}

// The largest scale · row[i]; where one is NaN, anything.
template <typename T>
inline T max_scaled(const T* row, int64_t size, T scale) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t width = Vec::size(), lanes = 4;  // as many comparisons in flight
  const Vec scales(scale), lowest(-std::numeric_limits<T>::infinity());
  Vec best[lanes] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + lanes * width <= size; i += lanes * width) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      best[lane] = at::vec::clamp_min(Vec::loadu(row + i + lane * width) * scales, best[lane]);
    }
  }
  for_vectors<T>(size - i, [&](int64_t offset, int64_t count) {
    const Vec x = Vec::loadu(row + i + offset, count) * scales;
    best[0] = at::vec::clamp_min(count == width ? x : Vec::set(lowest, x, count), best[0]);
  });
  const Vec most = at::vec::maximum(at::vec::maximum(best[0], best[1]), at::vec::maximum(best[2], best[3]));
  return at::vec::vec_reduce_all<T>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, most);
}

// exp(x) to 1 ulp for finite or -inf x whose exp is finite: 0 at -inf and below the denormals, NaN at NaN.
template <typename T>
inline at::vec::Vectorized<T> exp_vector(const at::vec::Vectorized<T>& x) {
  return x.exp();
}

#if defined(CPU_CAPABILITY_AVX512)
// 2ⁿ · p(r) with x = n · ln 2 + r: half the instructions of a general exp, which also minds overflow.
template <>
inline at::vec::Vectorized<float> exp_vector(const at::vec::Vectorized<float>& x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);  // the second operand, x, where it is NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), y);  // ln 2 in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  // The minimax polynomial of exp on |r| <= ln 2 / 2 with p(0) = 1: relative error 2e-8.
  __m512 p = _mm512_set1_ps(0.00138436444f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.00837416295f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0416680016f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.166664317f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.49999994f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}
#endif

// Φ(x), the distribution function of the standard normal: 0 far below 0, NaN at NaN.
template <typename T>
inline at::vec::Vectorized<T> normal_distribution(const at::vec::Vectorized<T>& x) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::fmadd((x * Vec(static_cast<T>(M_SQRT1_2))).erf(), Vec(T(0.5)), Vec(T(0.5)));
}

#if defined(CPU_CAPABILITY_AVX512)
// 1/2 + x P(x²) / Q(x²), less than half the time of a general erf. The rational is a minimax fit on |x| <= 5.3 to 4e-9;
// rounding leaves 1.7e-7.
template <>
inline at::vec::Vectorized<float> normal_distribution(const at::vec::Vectorized<float>& x) {
  const __m512 most = _mm512_set1_ps(5.3f), least = _mm512_set1_ps(-5.3f);
  const __m512 y = _mm512_max_ps(least, _mm512_min_ps(most, x));  // the second operand, x, where it is NaN
  const __m512 square = _mm512_mul_ps(y, y);
  __m512 p = _mm512_set1_ps(2.40514515e-8f);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(6.37896925e-6f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(1.60320278e-4f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(4.627908075e-3f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(3.293438505e-2f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(0.398942254f));
  __m512 q = _mm512_set1_ps(1.23719493e-6f);
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(7.13477774e-5f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(1.83649149e-3f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(2.81380241e-2f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(0.249220491f));
  q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(1.0f));
  const __mmask16 above = _mm512_cmp_ps_mask(x, least, _CMP_NLE_UQ);
  return _mm512_maskz_fmadd_ps(above, _mm512_div_ps(p, q), y, _mm512_set1_ps(0.5f));
}
#endif

// exp(scale · source - shift); lanes past `count` are 0 and so add nothing to a sum.
template <typename T>
inline at::vec::Vectorized<T> exp_scaled(const T* source, int64_t count, const at::vec::Vectorized<T>& scales,
                                         const at::vec::Vectorized<T>& shifts) {
  using Vec = at::vec::Vectorized<T>;
  const Vec e = exp_vector<T>(at::vec::fmsub(Vec::loadu(source, count), scales, shifts));
  return count == Vec::size() ? e : Vec::set(Vec(0), e, count);
}

// row = exp(scale · row - shift); returns its sum.
template <typename T>
inline T exp_row(T* row, int64_t size, T scale, T shift) {
  using Vec = at::vec::Vectorized<T>;
  Vec total(0);
  const Vec scales(scale), shifts(shift);
  for_vectors<T>(size, [&](int64_t i, int64_t count) {
    const Vec e = exp_scaled(row + i, count, scales, shifts);
    e.store(row + i, static_cast<int>(count));
    total = total + e;
  });
  return sum_lanes<T>(total);
}

// target [n, m] = source [m, n] transposed, m and n at most the side of a square of registers.
template <typename T>
inline void transpose_square(const T* source, int64_t source_stride, int64_t m, int64_t n, T* target,
                             int64_t target_stride) {
  at::vec::transpose_mxn<T>(source, source_stride, target, target_stride, static_cast<int>(m), static_cast<int>(n));
}

#if defined(CPU_CAPABILITY_AVX512)
// A whole square, without the masks of the general one: each of four stages pairs rows twice as far apart.
template <>
inline void transpose_square(const float* source, int64_t source_stride, int64_t m, int64_t n, float* target,
                             int64_t target_stride) {
  if (m != 16 || n != 16) {
    at::vec::transpose_mxn<float>(source, source_stride, target, target_stride, static_cast<int>(m),
                                  static_cast<int>(n));
    return;
  }
  __m512 x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    x[i] = _mm512_loadu_ps(source + i * source_stride);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int group = i / 2 * 4, half = i % 2;
    const __m512d a = _mm512_castps_pd(y[group + half]), b = _mm512_castps_pd(y[group + half + 2]);
    // x[group + c]: in 128-bit lane l the rows group … group + 3 of column 4 l + c.
    x[group + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    x[group + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    y[c] = _mm512_shuffle_f32x4(x[c], x[4 + c], 0x88);
    y[4 + c] = _mm512_shuffle_f32x4(x[c], x[4 + c], 0xdd);
    y[8 + c] = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0x88);
    y[12 + c] = _mm512_shuffle_f32x4(x[8 + c], x[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm512_storeu_ps(target + c * target_stride, _mm512_shuffle_f32x4(y[c], y[8 + c], 0x88));
    _mm512_storeu_ps(target + (4 + c) * target_stride, _mm512_shuffle_f32x4(y[4 + c], y[12 + c], 0x88));
    _mm512_storeu_ps(target + (8 + c) * target_stride, _mm512_shuffle_f32x4(y[c], y[8 + c], 0xdd));
    _mm512_storeu_ps(target + (12 + c) * target_stride, _mm512_shuffle_f32x4(y[4 + c], y[12 + c], 0xdd));
  }
}
#endif

// target [n, m] = source [m, n] transposed.
template <typename T>
inline void transpose(const T* source, int64_t source_stride, int64_t m, int64_t n, T* target, int64_t target_stride) {
  constexpr int64_t side = sizeof(T) == 2 ? 32 : 16;
  for (int64_t i = 0; i < m; i += side) {
    for (int64_t j = 0; j < n; j += side) {
      transpose_square(source + i * source_stride + j, source_stride, std::min(side, m - i), std::min(side, n - j),
                       target + j * target_stride + i, target_stride);
    }
  }
}

// target += factor · source, or target = factor · source.
template <typename T>
inline void scale_row(T* target, const T* source, T factor, int64_t size, bool add) {
  using Vec = at::vec::Vectorized<T>;
  const Vec factors(factor);
  for_vectors<T>(size, [&](int64_t i, int64_t count) {
    const Vec x = Vec::loadu(source + i, count);
    const Vec y = add ? at::vec::fmadd(x, factors, Vec::loadu(target + i, count)) : x * factors;
    y.store(target + i, static_cast<int>(count));
  });
}

}  // namespace liftbyimage::cpu
