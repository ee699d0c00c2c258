#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "parallel.h"
#include "small_tokens.h"
#include "vectors.h"

// Gradients of the pieces in small_tokens.h over many rows, T = float or double:
//   RowPasses                 rows in parts and in chunks whose scratch stays in a cache
//   LinearBackward            dX = dY W and dW = dYᵀ X
//   add_column_sums           db, and the sums of a layer norm's gradients
//   normalize_row_backward, gelu_row_backward
// One rule makes every figure the same for any number of threads: what a thread computes is a tile or a block of
// columns whose size the shapes alone decide, and each sums its rows in their order, chunk after chunk.
namespace liftbyimage::cpu {

// 32 samples of 17 tokens: long enough for BLAS, and what a chunk needs (8 MB at D = 640, F = 1280) is soon used again,
// while more fresh memory would cost more page faults.
constexpr int64_t chunk_rows = 32 * 18;
// Tiles of a product: packing their operands is a small part of the work of large ones (BLAS reaches 102 GFLOP/s a core
// with 272 × 640, 98 with 272 × 320); a small product is cut finer, into about four.
constexpr int64_t most_tile_rows = 320, least_tile_rows = 64, most_tile_columns = 640;

// `most` or a little less, so that pieces are alike.
inline int64_t even_piece(int64_t size, int64_t most) { return divide_up(size, divide_up(size, most)); }

// Where the weights of a layer are few, they, their gradients and a chunk of rows share a core's second-level cache.
// Threads then take parts of the rows instead of tiles of each product: nothing goes from one core to another but the
// parts' sums in the end. Parts are a power of two, so that as many threads share them evenly, and long enough to pay
// back a gradient of their own.
constexpr int64_t most_narrow_bytes = 256 << 10, narrow_chunk_rows = 72, most_parts = 8, least_part_rows = 96;

// Whether layers with so many weights are taken so.
template <typename T>
bool is_narrow(int64_t weights) {
  return weights * static_cast<int64_t>(sizeof(T)) <= most_narrow_bytes;
}

// Rows [0, rows) in parts whose sums are separate, and those in chunks; both in whole units.
struct RowPasses {
  int64_t rows, part, chunk;

  int64_t parts() const { return divide_up(rows, part); }

  // f(first, size) over the chunks of a part in their order.
  template <typename F>
  void for_chunks(int64_t index, const F& f) const {
    const int64_t end = std::min(rows, (index + 1) * part);
    for (int64_t first = index * part; first < end; first += chunk) {
      f(first, std::min(chunk, end - first));
    }
  }
};

inline RowPasses row_passes(int64_t rows, int64_t unit, bool narrow) {
  const int64_t units = std::max<int64_t>(1, rows / unit);
  int64_t parts = 1;
  while (narrow && 2 * parts <= std::min({most_parts, rows / least_part_rows, units})) {
    parts *= 2;
  }
  const int64_t part = divide_up(units, parts), most = (narrow ? narrow_chunk_rows : chunk_rows) / unit;
  return {rows, part * unit, even_piece(part, std::max<int64_t>(1, most)) * unit};
}

// As gemm: C [m, n] = op(A) op(B), added to C or not, by all threads. finish(row, rows, column, columns) follows each
// finished tile in its thread.
template <typename T, typename F>
void tiled_product(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
                   int64_t lda, const T* b, int64_t ldb, bool add, T* c, int64_t ldc, const F& finish) {
  const int64_t line = 64 / sizeof(T);  // operands of a tile stay aligned
  const int64_t columns = line * divide_up(even_piece(n, most_tile_columns), line), across = divide_up(n, columns);
  const int64_t most_rows = std::clamp(m * across / 4, least_tile_rows, most_tile_rows);
  const int64_t rows = line * divide_up(even_piece(m, most_rows), line);
  parallel_tasks(divide_up(m, rows) * across, 1, [&](int64_t task) {
    const int64_t row = task / across * rows, column = task % across * columns;
    const int64_t height = std::min(rows, m - row), width = std::min(columns, n - column);
    gemm(transpose_a, transpose_b, height, width, k, a + (transpose_a == Transpose::no ? row * lda : row), lda,
         b + (transpose_b == Transpose::no ? column : column * ldb), ldb, add, c + row * ldc + column, ldc);
    finish(row, height, column, width);
  });
}

// target [columns] += Σ over rows of f(row, column, count), a vector of the values there. Partial sums of a few rows
// keep the rounding of long sums down.
template <typename T, typename F>
void add_column_sums(int64_t rows, int64_t columns, T* target, const F& f) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t partial_rows = 32, vectors = 4, block = vectors * Vec::size();
  for_columns(columns, block, [&](int64_t first, int64_t size) {
    T totals[block];
    std::copy_n(target + first, size, totals);
    for (int64_t begin = 0; begin < rows; begin += partial_rows) {
      const int64_t end = std::min(rows, begin + partial_rows);
      Vec sums[vectors] = {Vec(0), Vec(0), Vec(0), Vec(0)};
      for (int64_t row = begin; row < end; ++row) {
        for_vectors<T>(size, [&](int64_t i, int64_t count) {
          Vec& sum = sums[i / Vec::size()];
          sum = sum + f(row, first + i, count);
        });
      }
      for_vectors<T>(size, [&](int64_t i, int64_t count) {
        (Vec::loadu(totals + i, count) + sums[i / Vec::size()]).store(totals + i, static_cast<int>(count));
      });
    }
    std::copy_n(totals, size, target + first);
  });
}

// target [columns] += Σ over rows of x
template <typename T>
void add_column_sums(int64_t rows, int64_t columns, const T* x, T* target) {
  using Vec = at::vec::Vectorized<T>;
  add_column_sums(rows, columns, target, [&](int64_t row, int64_t column, int64_t count) {
    return Vec::loadu(x + row * columns + column, count);
  });
}

// The way back through y = x Wᵀ + b: by panels of W where it is narrow, else by BLAS.
template <typename T>
class LinearBackward {
 public:
  LinearBackward(const T* weight, int64_t outputs, int64_t inputs, bool narrow)
      : weight_(weight), outputs_(outputs), inputs_(inputs), panels_(narrow ? pack_columns() : nullptr) {}

  // dX [rows, inputs] = dY W; finish(row, rows, column, columns) follows each finished tile in its thread.
  template <typename F>
  void differentiate_inputs(int64_t rows, const T* grad_y, T* grad_x, const F& finish) const {
    if (panels_ == nullptr) {
      tiled_product(Transpose::no, Transpose::no, rows, inputs_, outputs_, grad_y, outputs_, weight_, inputs_, false,
                    grad_x, inputs_, finish);
      return;
    }
    for_columns(inputs_, panel_columns, [&](int64_t first, int64_t size) {
      multiply_packed(rows, size, outputs_, grad_y, outputs_, panels_.get() + first * outputs_,
                      [&](int64_t row, int64_t, const T* sums, int count) {
                        std::copy_n(sums, count, grad_x + row * inputs_ + first);
                        finish(row, 1, first, count);
                      });
    });
  }

  void differentiate_inputs(int64_t rows, const T* grad_y, T* grad_x) const {
    differentiate_inputs(rows, grad_y, grad_x, [](int64_t, int64_t, int64_t, int64_t) {});
  }

  // dW = dYᵀ X, added or not, and db += Σ dY, each unless it is null.
  void differentiate_parameters(int64_t rows, const T* grad_y, const T* x, bool add, T* grad_weight,
                                T* grad_bias) const {
    if (grad_weight != nullptr && panels_ == nullptr) {
      tiled_product(Transpose::yes, Transpose::no, outputs_, inputs_, rows, grad_y, outputs_, x, inputs_, add,
                    grad_weight, inputs_, [](int64_t, int64_t, int64_t, int64_t) {});
    } else if (grad_weight != nullptr) {
      for_columns(outputs_, 8 * block_rows, [&](int64_t first, int64_t size) {
        T* target = grad_weight + first * inputs_;
        if (add) {
          multiply<true>(size, inputs_, rows, grad_y + first, 1, outputs_, x, inputs_, target, inputs_);
        } else {
          multiply(size, inputs_, rows, grad_y + first, 1, outputs_, x, inputs_, target, inputs_);
        }
      });
    }
    if (grad_bias != nullptr) {
      add_column_sums(rows, outputs_, grad_y, grad_bias);
    }
  }

 private:
  // Panels [outputs, panel_columns] of the columns of W, filled up with zeros.
  Buffer<T> pack_columns() const {
    Buffer<T> panels = uninitialized<T>(divide_up(inputs_, panel_columns) * panel_columns * outputs_);
    for_columns(inputs_, panel_columns, [&](int64_t first, int64_t size) {
      T* panel = panels.get() + first * outputs_;
      for (int64_t row = 0; row < outputs_; ++row) {
        T* end = std::copy_n(weight_ + row * inputs_ + first, size, panel + row * panel_columns);
        std::fill_n(end, panel_columns - size, T(0));
      }
    });
    return panels;
  }

  const T* weight_;  // [outputs, inputs]
  int64_t outputs_, inputs_;
  Buffer<T> panels_;
};

// grad_x = residual + the gradient of a layer norm whose result has the gradient `grad`.
template <typename T>
void normalize_row_backward(const LayerNorm<T>& norm, const RowStatistics<T>& statistics, const T* x, const T* grad,
                            const T* residual, T* grad_x) {
  using Vec = at::vec::Vectorized<T>;
  const Vec mean(statistics.mean), scale(statistics.reciprocal_deviation);
  Vec total(0), along(0);  // Σ g and Σ g x̂ with g = grad · weight
  const auto load = [](const T* source, int64_t count) {
    return count == Vec::size() ? Vec::loadu(source) : Vec::set(Vec(0), Vec::loadu(source, count), count);
  };
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) {
    const Vec g = load(grad + i, count) * load(norm.weight + i, count);
    total = total + g;
    along = at::vec::fmadd(g, (load(x + i, count) - mean) * scale, along);
  });
  const Vec mean_total(sum_lanes<T>(total) / static_cast<T>(norm.width));
  const Vec mean_along(sum_lanes<T>(along) / static_cast<T>(norm.width));
  for_vectors<T>(norm.width, [&](int64_t i, int64_t count) {
    const Vec g = Vec::loadu(grad + i, count) * Vec::loadu(norm.weight + i, count);
    const Vec normalized = (Vec::loadu(x + i, count) - mean) * scale;
    const Vec inner = g - mean_total - normalized * mean_along;
    at::vec::fmadd(inner, scale, Vec::loadu(residual + i, count)).store(grad_x + i, static_cast<int>(count));
  });
}

// y = gelu(x) and grad = grad · gelu'(x), gelu' = Φ(x) + x φ(x).
template <typename T>
void gelu_row_backward(const T* x, int64_t size, T* y, T* grad) {
  using Vec = at::vec::Vectorized<T>;
  const Vec minus_half(-0.5), density(static_cast<T>(M_2_SQRTPI * M_SQRT1_2 / 2));
  for_vectors<T>(size, [&](int64_t i, int64_t count) {
    const Vec value = Vec::loadu(x + i, count), distribution = normal_distribution<T>(value);
    const Vec slope = at::vec::fmadd(value * density, exp_vector<T>(minus_half * value * value), distribution);
    (value * distribution).store(y + i, static_cast<int>(count));
    (Vec::loadu(grad + i, count) * slope).store(grad + i, static_cast<int>(count));
  });
}

}  // namespace liftbyimage::cpu
