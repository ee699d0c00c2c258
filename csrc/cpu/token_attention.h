#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "row_products.h"
#include "tiles.h"
#include "vectors.h"

// softmax(scale · Q Kᵀ) V over the few tokens of one sequence, several heads at a time, T = float or double. The
// attention lies with its keys as rows and the queries of all heads as columns, [T, H·T]: the softmax then runs down
// the columns, a vector of queries at a time, without a sum over lanes and with no partial vector but the last.
namespace liftbyimage::cpu {

// Queries of a sequence that are taken together, where a head has not more: five vectors of them.
constexpr int64_t most_queries = 80;

// Heads side by side, [tokens, heads · head_width] each, in rows of `stride`.
template <typename T>
struct PackedTokens {
  const T* query;
  const T* key;
  const T* value;
  int64_t stride;
};

template <typename T>
class TokenAttention {
 public:
  int64_t tokens, heads, head_width;
  T scale;

  // Of what forward and backward are lent.
  int64_t scratch_size() const { return tokens * queries(); }
  int64_t backward_scratch_size() const { return 2 * scratch_size(); }

  // attended [tokens, heads · head_width]
  void forward(const PackedTokens<T>& in, T* scratch, T* attended, int64_t attended_stride) const {
    attend(in, scratch);
    for_heads([&](int64_t column, int64_t query) {
      multiply(tokens, head_width, tokens, scratch + query, 1, queries(), in.value + column, in.stride,
               attended + column, attended_stride);
    });
  }

  // grad [tokens, heads · head_width] is that of the result, in rows as `attended`, which is given again unless it is
  // null; the others are those of the inputs, in rows of in.stride.
  void backward(const PackedTokens<T>& in, const T* grad, int64_t grad_stride, T* scratch, T* attended, T* grad_query,
                T* grad_key, T* grad_value) const {
    T* attention = scratch;                       // [tokens, H·T]
    T* grad_scores = scratch + scratch_size();    // [tokens, H·T]
    if (attended != nullptr) {
      forward(in, attention, attended, grad_stride);
    } else {
      attend(in, attention);
    }
    for_heads([&](int64_t column, int64_t query) {
      multiply(tokens, head_width, tokens, attention + query, queries(), 1, grad + column, grad_stride,
               grad_value + column, in.stride);
      products(in.value + column, in.stride, grad + column, grad_stride, T(1), grad_scores + query);
    });
    differentiate_softmax(attention, grad_scores);
    for_heads([&](int64_t column, int64_t query) {
      multiply(tokens, head_width, tokens, grad_scores + query, 1, queries(), in.key + column, in.stride,
               grad_query + column, in.stride);
      multiply(tokens, head_width, tokens, grad_scores + query, queries(), 1, in.query + column, in.stride,
               grad_key + column, in.stride);
    });
  }

 private:
  using Vec = at::vec::Vectorized<T>;

  int64_t queries() const { return heads * tokens; }

  // f(first column of a head's tokens, first of its queries)
  template <typename F>
  void for_heads(const F& f) const {
    for (int64_t head = 0; head < heads; ++head) {
      f(head * head_width, head * tokens);
    }
  }

  // target [tokens, tokens] = factor · rows columnsᵀ of one head, in rows of `queries()`
  void products(const T* rows, int64_t row_stride, const T* columns, int64_t column_stride, T factor, T* target) const {
    multiply_transposed(tokens, tokens, head_width, rows, row_stride, columns, column_stride,
                        [&](int64_t row, int64_t column, const T* sums, int count) {
                          for (int c = 0; c < count; ++c) {
                            target[row * queries() + column + c] = factor * sums[c];
                          }
                        });
  }

  void attend(const PackedTokens<T>& in, T* attention) const {
    for_heads([&](int64_t column, int64_t query) {
      products(in.key + column, in.stride, in.query + column, in.stride, scale, attention + query);
    });
    for_vectors<T>(queries(), [&](int64_t first, int64_t count) { softmax(attention + first, count); });
  }

  // Down `count` columns. The scale is in the scores: the largest then gives exp(0) exactly.
  void softmax(T* columns, int64_t count) const {
    const int stored = static_cast<int>(count);
    Vec most = Vec::loadu(columns, count);
    for (int64_t token = 1; token < tokens; ++token) {
      most = at::vec::maximum(most, Vec::loadu(columns + token * queries(), count));  // NaN if one is
    }
    Vec total(0);
    for (int64_t token = 0; token < tokens; ++token) {
      T* row = columns + token * queries();
      const Vec e = exp_vector<T>(Vec::loadu(row, count) - most);
      e.store(row, stored);
      total = total + e;
    }
    const Vec factor = Vec(1) / total;
    for (int64_t token = 0; token < tokens; ++token) {
      T* row = columns + token * queries();
      (Vec::loadu(row, count) * factor).store(row, stored);
    }
  }

  // grad = scale · attention · (grad - Σ attention · grad), the sum down each column
  void differentiate_softmax(const T* attention, T* grad) const {
    const Vec scales(scale);
    for_vectors<T>(queries(), [&](int64_t first, int64_t count) {
      Vec total(0);
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t at = token * queries() + first;
        total = at::vec::fmadd(Vec::loadu(attention + at, count), Vec::loadu(grad + at, count), total);
      }
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t at = token * queries() + first;
        const Vec difference = Vec::loadu(grad + at, count) - total;
        (scales * Vec::loadu(attention + at, count) * difference).store(grad + at, static_cast<int>(count));
      }
    });
  }
};

// f(sequence, first head, heads): as many heads at once as give about five vectors of queries; small tasks together.
template <typename F>
void for_head_groups(int64_t batch, int64_t tokens, int64_t heads, int64_t head_width, const F& f) {
  constexpr int64_t task_products = 1 << 17;  // multiply-adds, which take about 3 µs
  const int64_t size = std::clamp<int64_t>(most_queries / tokens, 1, heads), groups = divide_up(heads, size);
  const int64_t products = 2 * tokens * tokens * size * head_width;
  parallel_tasks(batch * groups, divide_up(task_products, products), [&](int64_t task) {
    const int64_t first = task % groups * size;
    f(task / groups, first, std::min(size, heads - first));
  });
}

}  // namespace liftbyimage::cpu
