#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "row_products.h"
#include "tiles.h"
#include "vectors.h"

// Bilinear sampling of feature maps whose channels are contiguous, so that a corner is a row of memory. S is the type
// of the maps, T = float or double that of the arithmetic.
namespace liftbyimage::cpu {

// From here on padding "zeros" reads nothing; a place is clamped so far that no index overflows.
constexpr double far_outside = 4;

// One sample of a map.
template <typename S>
struct SampleMap {
  S* data;  // [height, width, channels]
  int64_t channels, height, width, row_stride, column_stride;
};

// A whole batch of one level.
template <typename S>
struct LevelMap {
  S* data;
  int64_t channels, height, width, batch_stride, row_stride, column_stride;

  SampleMap<S> sample(int64_t b) const {
    return {data + b * batch_stride, channels, height, width, row_stride, column_stride};
  }
};

inline bool has_dense_channels(const at::Tensor& map) { return map.stride(1) == 1 || map.size(1) == 1; }

// [B, C, Hf, Wf] over memory whose channels are contiguous.
inline at::Tensor empty_channels_last(const at::Tensor& map, at::ScalarType type) {
  return at::empty({map.size(0), map.size(2), map.size(3), map.size(1)}, map.options().dtype(type))
      .permute({0, 3, 1, 2});
}

// A map as it is where its channels are contiguous, else a copy in which they are.
inline at::Tensor with_dense_channels(const at::Tensor& map) {
  if (has_dense_channels(map) || map.numel() == 0) {
    return map;
  }
  const at::Tensor source = map.contiguous(), target = empty_channels_last(map, map.scalar_type());
  constexpr int64_t piece = 64;  // pixels
  const int64_t channels = map.size(1), pixels = map.size(2) * map.size(3), pieces = divide_up(pixels, piece);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, map.scalar_type(), "with_dense_channels", [&] {
    const scalar_t* from = source.const_data_ptr<scalar_t>();
    scalar_t* to = target.mutable_data_ptr<scalar_t>();
    parallel_tasks(map.size(0) * pieces, 16, [&](int64_t i) {
      const int64_t sample = i / pieces * pixels * channels, first = i % pieces * piece;
      transpose(from + sample + first, pixels, channels, std::min(piece, pixels - first),
                to + sample + first * channels, channels);
    });
  });
  return target;
}

inline std::vector<at::Tensor> with_dense_channels(at::TensorList maps) {
  std::vector<at::Tensor> dense;
  for (const at::Tensor& map : maps) {
    dense.push_back(with_dense_channels(map));
  }
  return dense;
}

// `maps` are [B, C, Hf, Wf] with contiguous channels.
template <typename S>
std::vector<LevelMap<const S>> level_maps(const std::vector<at::Tensor>& maps) {
  std::vector<LevelMap<const S>> result;
  for (const at::Tensor& map : maps) {
    result.push_back({map.const_data_ptr<S>(), map.size(1), map.size(2), map.size(3), map.stride(0), map.stride(2),
                      map.stride(3)});
  }
  return result;
}

// One vector of T from a row of S; lanes past `count` are 0.
template <typename T, typename S>
inline at::vec::Vectorized<T> load_row(const S* source, int64_t count) {
  using Vec = at::vec::Vectorized<T>;
  if constexpr (std::is_same_v<S, T>) {
    return count == Vec::size() ? Vec::loadu(source) : Vec::loadu(source, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1);
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes, source);
    if constexpr (std::is_same_v<S, at::BFloat16>) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    } else {
      return _mm512_cvtph_ps(bits);
    }
#else
    T values[Vec::size()] = {};
    at::vec::convert(source, values, count);
    return Vec::loadu(values);
#endif
  }
}

// target [size] = sum over k of factors[k] · rows[k] [size], V vectors of channels at a time.
template <int V, typename T, typename S>
inline void sum_rows_block(S* const* rows, const T* factors, int64_t count, int64_t offset, int64_t lanes, T* target) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    sums[v] = Vec(0);
  }
  for (int64_t k = 0; k < count; ++k) {
    const Vec factor(factors[k]);
    const S* row = rows[k] + offset;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[v] = at::vec::fmadd(
          load_row<T, std::remove_const_t<S>>(row + v * Vec::size(), V > 1 ? Vec::size() : lanes), factor, sums[v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    sums[v].store(target + offset + v * Vec::size(), static_cast<int>(V > 1 ? Vec::size() : lanes));
  }
}

template <typename T, typename S>
inline void sum_rows(S* const* rows, const T* factors, int64_t count, int64_t size, T* target) {
  constexpr int64_t lanes = at::vec::Vectorized<T>::size();
  int64_t i = 0;
  for (; i + 8 * lanes <= size; i += 8 * lanes) {
    sum_rows_block<8>(rows, factors, count, i, lanes, target);
  }
  for (; i + 2 * lanes <= size; i += 2 * lanes) {
    sum_rows_block<2>(rows, factors, count, i, lanes, target);
  }
  for (; i < size; i += lanes) {
    sum_rows_block<1>(rows, factors, count, i, std::min(lanes, size - i), target);
  }
}

// products[k] = rows[k] · x for the four corners of a place.
template <typename T, typename S>
inline void corner_products(S* const* rows, const T* x, int64_t size, T* products) {
  using Vec = at::vec::Vectorized<T>;
  Vec sums[4] = {Vec(0), Vec(0), Vec(0), Vec(0)};
  for_vectors<T>(size, [&](int64_t i, int64_t count) {
    const Vec factor = load_row<T, T>(x + i, count);
    for (int k = 0; k < 4; ++k) {
      sums[k] = at::vec::fmadd(load_row<T, std::remove_const_t<S>>(rows[k] + i, count), factor, sums[k]);
    }
  });
  sum_each<T>(sums, products);
}

// The four map cells about every place of one joint in one level, north-west, north-east, south-west, south-east.
template <typename S, typename T>
class Corners {
 public:
  Corners(int64_t places, int64_t most_channels)
      : nowhere_(most_channels), rows_(4 * places), factors_(4 * places), x_(places), y_(places) {}

  // reference [2], offsets [places, 2]
  template <typename P>
  void find(const SampleMap<S>& map, const P* reference, const P* offsets, bool zeros) {
    const T x = static_cast<T>(reference[0]), y = static_cast<T>(reference[1]);
    for (size_t i = 0; i < x_.size(); ++i) {
      x_[i] = locate(x + static_cast<T>(offsets[2 * i]), map.width, zeros);
      y_[i] = locate(y + static_cast<T>(offsets[2 * i + 1]), map.height, zeros);
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t column = x_[i].first + corner % 2, row = y_[i].first + corner / 2;
        const bool inside = column >= 0 && column < map.width && row >= 0 && row < map.height;
        rows_[4 * i + corner] =
            inside ? map.data + row * map.row_stride + column * map.column_stride : nowhere_.data();
        factors_[4 * i + corner] = (corner % 2 == 0 ? 1 - x_[i].fraction : x_[i].fraction) *
                                   (corner / 2 == 0 ? 1 - y_[i].fraction : y_[i].fraction);
      }
    }
  }

  // What every corner of `count` places counts in their weighted sum: factors [count, 4], weights [count].
  template <typename W>
  void weigh(int64_t place, int64_t count, const W* weights, T* factors) const {
    const T* shares = this->factors(place);
    for (int64_t k = 0; k < 4 * count; ++k) {
      factors[k] = static_cast<T>(weights[k / 4]) * shares[k];
    }
  }

  S* const* rows(int64_t place) const { return rows_.data() + 4 * place; }
  const T* factors(int64_t place) const { return factors_.data() + 4 * place; }
  // Whether no place of `count` is NaN.
  bool known(int64_t place, int64_t count) const {
    bool all = true;
    for (int64_t i = place; i < place + count; ++i) {
      all = all && !std::isnan(x_[i].fraction + y_[i].fraction);
    }
    return all;
  }

  // Derivatives of the sample with respect to x and y of its place, given that of each corner's value.
  std::array<T, 2> place_gradient(int64_t place, const T* corner) const {
    const Between &x = x_[place], &y = y_[place];
    // Where the slope is zero, so is the gradient, whatever the corners hold.
    return {x.slope == 0 ? T(0)
                         : x.slope * ((corner[1] - corner[0]) * (1 - y.fraction) + (corner[3] - corner[2]) * y.fraction),
            y.slope == 0 ? T(0)
                         : y.slope * ((corner[2] - corner[0]) * (1 - x.fraction) + (corner[3] - corner[1]) * x.fraction)};
  }

 private:
  // Along one axis: between cells `first` and `first` + 1.
  struct Between {
    int64_t first;  // may lie outside the map
    T fraction;     // NaN for a NaN place, which is nowhere
    T slope;        // of the position in cells; 0 on the border and beyond
  };

  static Between locate(T place, int64_t size, bool zeros) {
    const T reach = static_cast<T>(zeros ? far_outside : 1), half = static_cast<T>(size - 1) / 2;
    const T near = place < -reach ? -reach : place > reach ? reach : place;  // NaN stays
    const T position = (near + 1) * half, cell = std::floor(position);
    const bool clamped = !zeros && !(position > 0 && position < static_cast<T>(size - 1));
    return {std::isnan(position) ? -2 : static_cast<int64_t>(cell), position - cell, clamped ? T(0) : half};
  }

  // What a corner outside the map reads, and where a gradient goes that nobody wants.
  std::vector<std::remove_const_t<S>> nowhere_;
  std::vector<S*> rows_;    // [places, 4]
  std::vector<T> factors_;  // [places, 4]
  std::vector<Between> x_, y_;
};

// f(place, gradient of its weight, gradient [2] of its offset) for the `count` places of a weighted sum, given the
// sum's gradient [channels]; all are 0 where a place is NaN. weights [count].
template <typename S, typename T, typename W, typename F>
void differentiate_places(const Corners<const S, T>& corners, int64_t first, int64_t count, const W* weights,
                          const T* grad, int64_t channels, const F& f) {
  const bool known = corners.known(first, count);
  for (int64_t i = 0; i < count; ++i) {
    T of_weight = 0;
    std::array<T, 2> of_offset{};
    if (known) {
      T values[4];
      corner_products(corners.rows(first + i), grad, channels, values);
      for (int k = 0; k < 4; ++k) {
        of_weight += corners.factors(first + i)[k] * values[k];
      }
      of_offset = corners.place_gradient(first + i, values);
      for (T& value : of_offset) {
        value *= static_cast<T>(weights[i]);
      }
    }
    f(first + i, of_weight, of_offset);
  }
}

// Adds to the map what a weighted sum of `count` places gives it, given the sum's gradient [channels]; nothing where a
// place is NaN. weights [count], factors [count, 4] is scratch.
template <typename T, typename W>
void scatter_sum(const Corners<T, T>& corners, int64_t first, int64_t count, const W* weights, const T* grad,
                 int64_t channels, T* factors) {
  if (!corners.known(first, count)) {
    return;
  }
  corners.weigh(first, count, weights, factors);
  for (int64_t k = 0; k < 4 * count; ++k) {
    scale_row(corners.rows(first)[k], grad, factors[k], channels, true);
  }
}

}  // namespace liftbyimage::cpu
