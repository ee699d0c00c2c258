#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "parallel.h"
#include "small_tokens.h"
#include "vectors.h"

// Gradients of the pieces in small_tokens.h over many rows, T = float or double:
//   for_row_chunks            rows in passes whose scratch stays in the last cache
//   tiled_product             dX = dY W and dW = dYᵀ X
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

// f(first, count) over the rows in their order.
template <typename F>
void for_row_chunks(int64_t rows, const F& f) {
  const int64_t chunk = rows == 0 ? 1 : even_piece(rows, chunk_rows);
  for (int64_t first = 0; first < rows; first += chunk) {
    f(first, std::min(chunk, rows - first));
  }
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

template <typename T>
void tiled_product(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
                   int64_t lda, const T* b, int64_t ldb, bool add, T* c, int64_t ldc) {
  tiled_product(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, add, c, ldc,
                [](int64_t, int64_t, int64_t, int64_t) {});
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
