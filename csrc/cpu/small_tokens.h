#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "parallel.h"
#include "row_products.h"
#include "tiles.h"
#include "vectors.h"

// The pieces of transformer blocks over the few tokens of a sample, T = float or double:
//   for_groups, for_columns   who computes what
//   Linear                    pack (weights of few inputs, once per call), for_linear (any use of its rows),
//                             apply_linear (with a residual)
//   LayerNorm                 normalize_row (with its statistics), normalize_rows in place
//   gelu_row
//   KeptSamples               stochastic depth: those whose branch is computed
// Their gradients are in linear_gradients.h.
namespace liftbyimage::cpu {

// Rows that share a pass over the weights: four samples of 17 joints, so two threads have a group each at batch 8.
constexpr int64_t group_rows = 72;
// Fewer would not occupy many threads better.
constexpr int64_t task_columns = panel_columns;

// f(first sample, samples): the batch in even groups, threads over groups where that keeps them all busy.
template <typename F>
void for_groups(int64_t batch, int64_t joints, const F& f) {
  if (batch == 0) {
    return;
  }
  const int64_t groups = divide_up(batch, std::max<int64_t>(1, group_rows / joints));
  const int64_t size = divide_up(batch, groups);
  for_samples(divide_up(batch, size), [&](int64_t group) {
    const int64_t first = group * size;
    f(first, std::min(size, batch - first));
  });
}

// f(first, count) over `size` columns (or rows) in tasks of `most`.
template <typename F>
void for_columns(int64_t size, int64_t most, const F& f) {
  parallel_tasks(divide_up(size, most), 1, [&](int64_t task) {
    const int64_t first = task * most;
    f(first, std::min(most, size - first));
  });
}

inline int64_t heads_per_task(int64_t head_width) { return std::max<int64_t>(1, task_columns / head_width); }

// As torch.nn.Linear stores it. S is the type of the operands, T that of their sums.
template <typename T, typename S = T>
struct Linear {
  const S* weight;  // [outputs, inputs]
  const T* bias;    // [outputs]
  int64_t inputs;
  const S* panels = nullptr;  // the weight packed, null: used as it lies
};

// The panels of a weight [outputs, inputs] that is_packed, else null.
template <typename S>
Buffer<S> pack(const S* weight, int64_t outputs, int64_t inputs) {
  if (!is_packed<S>(inputs)) {
    return nullptr;
  }
  Buffer<S> panels = uninitialized<S>(divide_up(outputs, panel_columns) * panel_columns * inputs);
  for_columns(outputs, panel_columns, [&](int64_t first, int64_t count) {
    pack_panel(weight + first * inputs, inputs, count, panels.get() + first * inputs);
  });
  return panels;
}

// f(row, column, y, count) for every piece of y = b + x Wᵀ in the columns [first, first + outputs), of which the
// piece's `column` is one; y is f's to change. With panels `first` is that of one.
template <typename T, typename S, typename F>
void for_linear(const Linear<T, S>& layer, int64_t first, int64_t outputs, const S* x, int64_t rows, const F& f) {
  const auto finish = [&](int64_t row, int64_t column, T* y, int count) {
    const T* bias = layer.bias + first + column;
    for (int c = 0; c < count; ++c) {
      y[c] += bias[c];
    }
    f(row, first + column, y, count);
  };
  if (layer.panels != nullptr) {
    multiply_packed(rows, outputs, layer.inputs, x, layer.inputs, layer.panels + first * layer.inputs, finish);
  } else {
    multiply_transposed(rows, outputs, layer.inputs, x, layer.inputs, layer.weight + first * layer.inputs,
                        layer.inputs, finish);
  }
}

// y [rows, first .. first + count) = residual + b + x Wᵀ, without a residual where it is null; it may be y itself.
template <typename T>
void apply_linear(const Linear<T>& layer, int64_t first, int64_t count, const T* x, int64_t rows, const T* residual,
                  T* y, int64_t y_stride) {
  for_linear(layer, first, count, x, rows, [&](int64_t row, int64_t column, const T* sums, int columns) {
    const int64_t at = row * y_stride + column;
    for (int c = 0; c < columns; ++c) {
      y[at + c] = residual != nullptr ? residual[at + c] + sums[c] : sums[c];
    }
  });
}

template <typename T>
struct LayerNorm {
  const T* weight;  // [width]
  const T* bias;    // [width]
  int64_t width;
  T eps;
};

template <typename T>
struct RowStatistics {
  T mean, reciprocal_deviation;
};

// The variance in a second pass over the row, about its mean.
template <typename T>
RowStatistics<T> statistics_of(const LayerNorm<T>& norm, const T* row) {
  using Vec = at::vec::Vectorized<T>;
  Vec total(0);
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) { total = total + Vec::loadu(row + i, count); });
  const T mean = sum_lanes<T>(total) / static_cast<T>(norm.width);
  Vec squares(0);
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) {
    const Vec difference = Vec::loadu(row + i, count) - Vec(mean);
    const Vec x = count == Vec::size() ? difference : Vec::set(Vec(0), difference, count);
    squares = at::vec::fmadd(x, x, squares);
  });
  const T variance = sum_lanes<T>(squares) / static_cast<T>(norm.width);
  return {mean, T(1) / std::sqrt(variance + norm.eps)};
}

// y = the normalized x; it may be x itself.
template <typename T>
void normalize_row(const LayerNorm<T>& norm, const RowStatistics<T>& statistics, const T* x, T* y) {
  using Vec = at::vec::Vectorized<T>;
  const Vec mean(statistics.mean), scale(statistics.reciprocal_deviation);
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) {
    const Vec normalized = (Vec::loadu(x + i, count) - mean) * scale;
    at::vec::fmadd(normalized, Vec::loadu(norm.weight + i, count), Vec::loadu(norm.bias + i, count))
        .store(y + i, static_cast<int>(count));
  });
}

template <typename T>
RowStatistics<T> normalize_row(const LayerNorm<T>& norm, const T* x, T* y) {
  const RowStatistics<T> statistics = statistics_of(norm, x);
  normalize_row(norm, statistics, x, y);
  return statistics;
}

template <typename T>
void normalize_rows(const LayerNorm<T>& norm, int64_t rows, T* x) {
  constexpr int64_t grain = 24;  // a row takes about 0.1 µs, waking a thread a few
  parallel_tasks(rows, grain, [&](int64_t row) { normalize_row(norm, x + row * norm.width, x + row * norm.width); });
}

// row = x Φ(x)
template <typename T>
void gelu_row(T* row, int64_t size) {
  using Vec = at::vec::Vectorized<T>;
  for_vectors<T>(size, [&](int64_t i, int64_t count) {
    const Vec x = Vec::loadu(row + i, count);
    (x * normal_distribution<T>(x)).store(row + i, static_cast<int>(count));
  });
}

// Stochastic depth: the samples whose branch is computed, in order, and the factors on their branches.
template <typename T>
struct KeptSamples {
  std::vector<int64_t> samples;
  std::vector<T> scales;

  // `scale` [batch] or, for 1 everywhere, nothing.
  KeptSamples(const std::optional<at::Tensor>& scale, int64_t batch) {
    const auto type = c10::CppTypeToScalarType<T>::value;
    const at::Tensor factors = scale.has_value() ? scale->to(type).contiguous() : at::Tensor();
    for (int64_t sample = 0; sample < batch; ++sample) {
      const T factor = factors.defined() ? factors.const_data_ptr<T>()[sample] : T(1);
      if (factor != T(0)) {
        samples.push_back(sample);
        scales.push_back(factor);
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(samples.size()); }
};

template <typename T>
const T* data_of(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace liftbyimage::cpu
