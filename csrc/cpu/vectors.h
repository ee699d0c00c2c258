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

// The largest scale · row[i], or NaN where one is.
template <typename T>
inline T max_scaled(const T* row, int64_t size, T scale) {
  using Vec = at::vec::Vectorized<T>;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  const Vec scales(scale);
  Vec best(lowest);
  for_vectors<T>(size, [&](int64_t i, int64_t count) {
    const Vec x = Vec::loadu(row + i, count) * scales;
    best = at::vec::maximum(best, count == Vec::size() ? x : Vec::set(Vec(lowest), x, count));
  });
  return at::vec::vec_reduce_all<T>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, best);
}

// exp(scale · source - shift); lanes past `count` are 0 and so add nothing to a sum.
template <typename T>
inline at::vec::Vectorized<T> exp_scaled(const T* source, int64_t count, const at::vec::Vectorized<T>& scales,
                                         const at::vec::Vectorized<T>& shifts) {
  using Vec = at::vec::Vectorized<T>;
  const Vec e = at::vec::fmsub(Vec::loadu(source, count), scales, shifts).exp();
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
