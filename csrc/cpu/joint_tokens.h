#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "parallel.h"
#include "row_products.h"
#include "tiles.h"
#include "vectors.h"

// Linear layers, layer norm and GELU over the few joint tokens of a sample, T = float or double; the two joint ops
// share them.
namespace liftbyimage::cpu {

// Rows that share a pass over the weights: four samples of 17 joints, so two threads have a group each at batch 8.
constexpr int64_t group_rows = 72;
// 64 columns of 256 weights are 64 KiB, which stay in L2 for all rows; fewer would not occupy many threads better.
constexpr int64_t task_columns = 64;

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

// f(first, count) over `size` columns in tasks of `most`.
template <typename F>
void for_columns(int64_t size, int64_t most, const F& f) {
  parallel_tasks(divide_up(size, most), 1, [&](int64_t task) {
    const int64_t first = task * most;
    f(first, std::min(most, size - first));
  });
}

inline int64_t heads_per_task(int64_t head_width) { return std::max<int64_t>(1, task_columns / head_width); }

// As torch.nn.Linear stores it.
template <typename T>
struct Linear {
  const T* weight;  // [outputs, inputs]
  const T* bias;    // [outputs]
  int64_t inputs;
};

// y [rows, first .. first + count) = residual + b + x Wᵀ, without a residual where it is null; it may be y itself.
template <typename T>
void apply_linear(const Linear<T>& layer, int64_t first, int64_t count, const T* x, int64_t rows, const T* residual,
                  T* y, int64_t y_stride) {
  const T* bias = layer.bias + first;
  multiply_transposed(
      rows, count, layer.inputs, x, layer.inputs, layer.weight + first * layer.inputs, layer.inputs,
      [&](int64_t row, int64_t column, const T* sums, int columns) __attribute__((always_inline)) {
        const int64_t at = row * y_stride + first + column;
        for (int c = 0; c < columns; ++c) {
          const T sum = sums[c] + bias[column + c];
          y[at + c] = residual != nullptr ? residual[at + c] + sum : sum;
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

// One row in place; the variance in a second pass over the row, about its mean.
template <typename T>
void normalize_row(const LayerNorm<T>& norm, T* row) {
  using Vec = at::vec::Vectorized<T>;
  Vec total(0);
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) { total = total + Vec::loadu(row + i, count); });
  const Vec mean(sum_lanes<T>(total) / static_cast<T>(norm.width));
  Vec squares(0);
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) {
    const Vec difference = Vec::loadu(row + i, count) - mean;
    const Vec x = count == Vec::size() ? difference : Vec::set(Vec(0), difference, count);
    squares = at::vec::fmadd(x, x, squares);
  });
  const T variance = sum_lanes<T>(squares) / static_cast<T>(norm.width);
  const Vec scale(T(1) / std::sqrt(variance + norm.eps));
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) {
    const Vec x = (Vec::loadu(row + i, count) - mean) * scale;
    at::vec::fmadd(x, Vec::loadu(norm.weight + i, count), Vec::loadu(norm.bias + i, count))
        .store(row + i, static_cast<int>(count));
  });
}

template <typename T>
void normalize_rows(const LayerNorm<T>& norm, int64_t rows, T* x) {
  constexpr int64_t grain = 24;  // a row takes about 0.1 µs, waking a thread a few
  parallel_tasks(rows, grain, [&](int64_t row) { normalize_row(norm, x + row * norm.width); });
}

// row = x Φ(x), Φ by the error function.
template <typename T>
void gelu_row(T* row, int64_t size) {
  using Vec = at::vec::Vectorized<T>;
  const Vec one(1), half(0.5), root(static_cast<T>(M_SQRT1_2));
  for_vectors<T>(size, [&](int64_t i, int64_t count) {
    const Vec x = Vec::loadu(row + i, count);
    (half * x * (one + (x * root).erf())).store(row + i, static_cast<int>(count));
  });
}

template <typename T>
const T* data_of(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace liftbyimage::cpu
