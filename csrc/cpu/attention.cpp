#include "attention.h"

#include <cmath>
#include <type_traits>
#include <limits>

#include "gemm.h"
#include "gemm_bf16.h"
#include "parallel.h"
#include "tiles.h"
#include "vectors.h"

namespace liftbyimage::cpu {
namespace {

constexpr int64_t row_grain = 8;
constexpr auto plain = Transpose::no;
constexpr auto transposed = Transpose::yes;

template <typename T>
using Vec = at::vec::Vectorized<T>;

// C = op(A) · op(B), or added to C; scores are T and round to bfloat16 only here, as the operand of a product.
template <typename A, typename S, typename T>
void multiply(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const A* a, int64_t lda,
              const S* b, int64_t ldb, bool add, T* c, int64_t ldc) {
  if constexpr (std::is_same_v<S, c10::BFloat16>) {
    gemm_bf16(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, add, c, ldc);
  } else {
    gemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, add, c, ldc);
  }
}

// target [n, m] = source [m, n] transposed; what lies close together is what is converted.
template <typename S, typename T>
void transpose_rounded(const T* source, int64_t source_stride, int64_t m, int64_t n, S* target,
                       int64_t target_stride) {
  if constexpr (std::is_same_v<S, T>) {
    transpose(source, source_stride, m, n, target, target_stride);
  } else {
    const Buffer<S> rounded = uninitialized<S>(m * n);
    for (int64_t i = 0; i < m; ++i) {
      at::vec::convert(source + i * source_stride, rounded.get() + i * n, n);
    }
    transpose(rounded.get(), n, m, n, target, target_stride);
  }
}

template <typename S, typename T>
void transpose_widened(const S* source, int64_t source_stride, int64_t m, int64_t n, T* target,
                       int64_t target_stride) {
  if constexpr (std::is_same_v<S, T>) {
    transpose(source, source_stride, m, n, target, target_stride);
  } else {
    const Buffer<S> turned = uninitialized<S>(n * m);
    transpose(source, source_stride, m, n, turned.get(), m);
    for (int64_t i = 0; i < n; ++i) {
      at::vec::convert(turned.get() + i * m, target + i * target_stride, m);
    }
  }
}

// target [rows, width] = factor(t, row) · partial_t [rows, width], summed over tiles in order.
template <typename T, typename Factor>
void sum_partials_row(const T* partial, int64_t tiles, int64_t rows, int64_t width, int64_t row, const Factor& factor,
                      T* target) {
  for (int64_t t = 0; t < tiles; ++t) {
    scale_row(target, partial + (t * rows + row) * width, factor(t), width, t > 0);
  }
}

// Softmax of rows that are cut into tiles: each tile against its own maximum, and the factor that makes them one.
template <typename T>
class TiledSoftmax {
 public:
  TiledSoftmax(int64_t tiles, int64_t rows)
      : tiles_(tiles), rows_(rows), max_(uninitialized<T>(tiles * rows)), weight_(uninitialized<T>(tiles * rows)) {}

  // scores = exp(scale · scores - the tile's maximum) for one row of a tile.
  void exponentiate(int64_t tile, int64_t row, T* scores, int64_t size, T scale) {
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    const T most = max_scaled(scores, size, scale);
    max_[tile * rows_ + row] = most;
    // A row of -inf is 0 here and becomes NaN only if it is -inf in every tile.
    weight_[tile * rows_ + row] = exp_row(scores, size, scale, most == lowest ? T(0) : most);
  }

  // Turns the sums of a row's tiles into their weights and returns the row's log-sum-exp.
  T finish_row(int64_t row) {
    T most = -std::numeric_limits<T>::infinity(), total = 0;
    for (int64_t at = row; at < tiles_ * rows_; at += rows_) {
      most = std::isnan(max_[at]) || max_[at] > most ? max_[at] : most;
    }
    for (int64_t at = row; at < tiles_ * rows_; at += rows_) {
      total += std::exp(max_[at] - most) * weight_[at];
    }
    for (int64_t at = row; at < tiles_ * rows_; at += rows_) {
      weight_[at] = std::exp(max_[at] - most) / total;
    }
    return most + std::log(total);
  }

  T weight(int64_t tile, int64_t row) const { return weight_[tile * rows_ + row]; }

 private:
  int64_t tiles_, rows_;
  Buffer<T> max_, weight_;  // [tiles, rows]
};

template <typename S>
class ForwardBlock {
 public:
  using T = at::opmath_type<S>;

  ForwardBlock(const AttentionShape& shape, T scale, int64_t rows, bool spreads)
      : shape_(shape),
        scale_(scale),
        spreads_(spreads),
        tiles_(tile_count(shape)),
        scores_(uninitialized<T>(spreads ? rows * shape.patches : 0)),
        context_(uninitialized<T>(tiles_ * rows * shape.value_width)),
        softmax_(tiles_, rows) {}

  void run(const ForwardInputs<S>& in, const ForwardOutputs<S>& out, RowBlock block) {
    block_ = block;
    parallel_tasks(tiles_, 1, [&](int64_t t) { gather(in, tile_at(shape_, t)); });
    parallel_tasks(block.rows, row_grain, [&](int64_t row) { finish_row(out, row); });
    if (spreads_) {
      parallel_tasks_last_first(tiles_, 1, [&](int64_t t) { spread(in, out, tile_at(shape_, t)); });
    }
  }

 private:
  T* scores(const Tile& tile) { return scores_.get() + block_.rows * tile.first; }  // [rows, n]

  // Scores of a tile, its softmax against the tile's own maximum, and its share of the context.
  void gather(const ForwardInputs<S>& in, const Tile& tile) {
    const int64_t n = tile.size, E = shape_.key_width, F = shape_.value_width;
    const Buffer<T> passing = uninitialized<T>(spreads_ ? 0 : block_.rows * n);
    T* s = spreads_ ? scores(tile) : passing.get();                                     // [rows, n]
    T* context = context_.get() + tile.index * block_.rows * F;                         // [rows, F]
    for_each_group(shape_, block_, [&](int64_t group, int64_t row, int64_t rows) {
      const S* key = in.key + (group * shape_.patches + tile.first) * E;                // [n, E]
      const S* value = in.value + (group * shape_.patches + tile.first) * F;            // [n, F]
      multiply(plain, transposed, rows, n, E, in.query + (block_.first + row) * E, E, key, E, false, s + row * n, n);
      for (int64_t r = row; r < row + rows; ++r) {
        softmax_.exponentiate(tile.index, r, s + r * n, n, scale_);
      }
      multiply(plain, plain, rows, F, n, s + row * n, n, value, F, false, context + row * F, F);
    });
  }

  void finish_row(const ForwardOutputs<S>& out, int64_t row) {
    const int64_t F = shape_.value_width;
    out.lse[block_.first + row] = softmax_.finish_row(row);
    sum_partials_row<T>(context_.get(), tiles_, block_.rows, F, row,
                        [&](int64_t t) { return softmax_.weight(t, row); }, out.context + (block_.first + row) * F);
  }

  // What each patch receives: importance, its attention column, the pose values, and its channels anew.
  void spread(const ForwardInputs<S>& in, const ForwardOutputs<S>& out, const Tile& tile) {
    constexpr int64_t strip = 16;  // rows that are summed in a register before they join the running mean
    for (int64_t row = 0; row < block_.rows; row += strip) {
      normalize(out, tile, {row, std::min(strip, block_.rows - row)});
    }
    if (out.patches != nullptr) {
      update_patches(in, out, tile);
    }
    if (out.channels != nullptr && block_.first == 0) {
      const int64_t E = shape_.key_width;
      for (int64_t p = tile.first; p < tile.first + tile.size; ++p) {
        std::copy_n(in.key + p * E, E, out.channels + p * out.attention_stride);
      }
    }
  }

  // Rows of a tile: scores become attention where a later step reads them; importance and attention go out.
  void normalize(const ForwardOutputs<S>& out, const Tile& tile, RowBlock strip) {
    const int64_t n = tile.size;
    const bool store = out.attention != nullptr || out.patches != nullptr;
    const bool starts = block_.first + strip.first == 0;
    const Vec<T> share(T(1) / static_cast<T>(shape_.rows()));
    T* a = scores(tile) + strip.first * n;  // [strip.rows, n]
    for_vectors<T>(n, [&](int64_t i, int64_t count) {
      const auto size = static_cast<int>(count);
      Vec<T> sum(0);
      for (int64_t r = 0; r < strip.rows; ++r) {
        const Vec<T> x = Vec<T>::loadu(a + r * n + i, count) * Vec<T>(softmax_.weight(tile.index, strip.first + r));
        if (store) {
          x.store(a + r * n + i, size);
        }
        sum = sum + x;
      }
      if (out.importance != nullptr) {
        T* importance = out.importance + tile.first + i;
        const Vec<T> before = starts ? Vec<T>(0) : Vec<T>::loadu(importance, count);
        at::vec::fmadd(sum, share, before).store(importance, size);
      }
    });
    if (out.attention != nullptr) {
      S* columns = out.attention + tile.first * out.attention_stride + block_.first + strip.first;  // [n, strip.rows]
      transpose_rounded(a, n, strip.rows, n, columns, out.attention_stride);
    }
  }

  void update_patches(const ForwardInputs<S>& in, const ForwardOutputs<S>& out, const Tile& tile) {
    const int64_t n = tile.size, D = shape_.model_width;
    T* target = out.patches + tile.first * D;  // [n, D]
    if (block_.first == 0) {
      at::vec::convert(in.patches + tile.first * D, target, n * D);
    }
    const S* pose_value = in.pose_value + block_.first * D;  // [rows, D]
    multiply(transposed, plain, n, D, block_.rows, scores(tile), n, pose_value, D, true, target, D);
  }

  const AttentionShape& shape_;
  T scale_;
  RowBlock block_{0, 0};
  bool spreads_;  // patches receive something, so that scores wait for the weights of their rows
  int64_t tiles_;
  Buffer<T> scores_;   // [tiles][rows, n] if spreads
  Buffer<T> context_;  // [tiles, rows, F]
  TiledSoftmax<T> softmax_;
};

// dA = dO Vᵀ + U dXᵀ + g/R + dAttention;  dS = scale · A ∘ (dA − δ), δ = rowsum(A ∘ dA);
// dQ = dS K;  dK = dSᵀ Q;  dV = Aᵀ dO;  dU = A dX.
template <typename S>
class BackwardBlock {
 public:
  using T = at::opmath_type<S>;

  BackwardBlock(const AttentionShape& shape, T scale, int64_t rows)
      : shape_(shape),
        scale_(scale),
        tiles_(tile_count(shape)),
        attention_(uninitialized<T>(rows * shape.patches)),
        grad_(uninitialized<T>(rows * shape.patches)),
        partial_(uninitialized<T>(tiles_ * rows * std::max(shape.key_width, shape.model_width))),
        softmax_(tiles_, rows),
        delta_(uninitialized<T>(tiles_ * rows)) {}

  void run(const BackwardInputs<S>& in, const BackwardOutputs<T>& out, RowBlock block) {
    block_ = block;
    parallel_tasks(tiles_, 1, [&](int64_t t) { recompute(in, tile_at(shape_, t)); });
    parallel_tasks(block.rows, row_grain, [&](int64_t row) { finish_row(in, out, row); });
    parallel_tasks_last_first(tiles_, 1, [&](int64_t t) { token_gradients(in, out, tile_at(shape_, t)); });
    parallel_tasks(block.rows, row_grain, [&](int64_t row) {
      const int64_t E = shape_.key_width;
      sum_partials_row<T>(partial_.get(), tiles_, block_.rows, E, row, [](int64_t) { return T(1); },
                          out.grad_query + (block_.first + row) * E);
    });
  }

 private:
  T* attention(const Tile& tile) { return attention_.get() + block_.rows * tile.first; }  // [rows, n]
  T* grad(const Tile& tile) { return grad_.get() + block_.rows * tile.first; }            // [rows, n]

  // A and dA of a tile, A against the tile's own maximum, and the tile's shares of δ and dU.
  void recompute(const BackwardInputs<S>& in, const Tile& tile) {
    const int64_t n = tile.size, D = shape_.model_width, rows = block_.rows;
    T* a = attention(tile);
    for_each_group(shape_, block_, [&](int64_t group, int64_t row, int64_t group_rows) {
      const int64_t E = shape_.key_width;
      const S* query = in.query + (block_.first + row) * E;                // [group_rows, E]
      const S* key = in.key + (group * shape_.patches + tile.first) * E;  // [n, E]
      multiply(plain, transposed, group_rows, n, E, query, E, key, E, false, a + row * n, n);
    });
    attention_gradient(in, tile);
    for (int64_t r = 0; r < rows; ++r) {
      row_statistics(in, tile, r);
    }
    if (in.grad_patches != nullptr) {
      T* grad_pose_value = partial_.get() + tile.index * rows * D;  // [rows, D]
      multiply(plain, plain, rows, D, n, a, n, in.grad_patches + tile.first * D, D, false, grad_pose_value, D);
    }
  }

  // dA of a tile, without the importance term.
  void attention_gradient(const BackwardInputs<S>& in, const Tile& tile) {
    const int64_t n = tile.size, D = shape_.model_width, rows = block_.rows;
    T* d = grad(tile);
    bool add = false;
    if (in.grad_attention != nullptr) {
      const S* columns = in.grad_attention + tile.first * in.attention_stride + block_.first;  // [n, rows]
      transpose_widened(columns, in.attention_stride, n, rows, d, n);
      add = true;
    }
    if (in.grad_context != nullptr) {
      for_each_group(shape_, block_, [&](int64_t group, int64_t row, int64_t group_rows) {
        const int64_t F = shape_.value_width;
        const S* value = in.value + (group * shape_.patches + tile.first) * F;  // [n, F]
        multiply(plain, transposed, group_rows, n, F, in.grad_context + (block_.first + row) * F, F, value, F, add,
                d + row * n, n);
      });
      add = true;
    }
    if (in.grad_patches != nullptr) {
      multiply(plain, transposed, rows, n, D, in.pose_value + block_.first * D, D, in.grad_patches + tile.first * D, D,
              add, d, n);
      add = true;
    }
    if (!add) {
      std::fill_n(d, rows * n, T(0));
    }
  }

  void row_statistics(const BackwardInputs<S>& in, const Tile& tile, int64_t row) {
    const int64_t n = tile.size;
    T* a = attention(tile) + row * n;
    T* d = grad(tile) + row * n;
    softmax_.exponentiate(tile.index, row, a, n, scale_);
    const Vec<T> share(T(1) / static_cast<T>(shape_.rows()));
    Vec<T> delta(0);
    for_vectors<T>(n, [&](int64_t i, int64_t count) {
      Vec<T> g = Vec<T>::loadu(d + i, count);
      if (in.grad_importance != nullptr) {
        g = at::vec::fmadd(Vec<T>::loadu(in.grad_importance + tile.first + i, count), share, g);
        g.store(d + i, static_cast<int>(count));
      }
      delta = at::vec::fmadd(Vec<T>::loadu(a + i, count), g, delta);
    });
    delta_[tile.index * block_.rows + row] = sum_lanes<T>(delta);
  }

  // Leaves δ of the row in delta_[row]. The softmax is normalised anew rather than by the saved log-sum-exp,
  // whose rounding alone is 5e-4 at logits of 1e4.
  void finish_row(const BackwardInputs<S>& in, const BackwardOutputs<T>& out, int64_t row) {
    softmax_.finish_row(row);
    T delta = 0;
    for (int64_t t = 0; t < tiles_; ++t) {
      delta += softmax_.weight(t, row) * delta_[t * block_.rows + row];
    }
    delta_[row] = delta;
    if (out.grad_pose_value == nullptr) {
      return;
    }
    const int64_t D = shape_.model_width;
    T* target = out.grad_pose_value + (block_.first + row) * D;
    if (in.grad_patches != nullptr) {
      sum_partials_row<T>(partial_.get(), tiles_, block_.rows, D, row,
                          [&](int64_t t) { return softmax_.weight(t, row); }, target);
    } else {
      std::fill_n(target, D, T(0));
    }
  }

  void token_gradients(const BackwardInputs<S>& in, const BackwardOutputs<T>& out, const Tile& tile) {
    const int64_t n = tile.size, E = shape_.key_width, F = shape_.value_width;
    T* a = attention(tile);                                           // [rows, n]
    T* d = grad(tile);                                                // [rows, n]
    T* grad_query = partial_.get() + tile.index * block_.rows * E;    // [rows, E]
    for (int64_t r = 0; r < block_.rows; ++r) {
      score_gradient(a + r * n, d + r * n, n, softmax_.weight(tile.index, r), delta_[r]);
    }
    for_each_group(shape_, block_, [&](int64_t group, int64_t row, int64_t rows) {
      const int64_t first_token = group * shape_.patches + tile.first;
      multiply(plain, plain, rows, E, n, d + row * n, n, in.key + first_token * E, E, false, grad_query + row * E, E);
      if (out.grad_key == nullptr) {
        return;
      }
      const bool starts_group = (block_.first + row) % shape_.group_rows() == 0;
      T* grad_key = out.grad_key + first_token * E;        // [n, E]
      T* grad_value = out.grad_value + first_token * F;    // [n, F]
      bool add = !starts_group;
      if (starts_group && in.grad_tokens != nullptr) {
        for (int64_t p = 0; p < n; ++p) {
          at::vec::convert(in.grad_tokens + (tile.first + p) * in.grad_tokens_stride, grad_key + p * E, E);
        }
        add = true;
      }
      multiply(transposed, plain, n, E, rows, d + row * n, n, in.query + (block_.first + row) * E, E, add, grad_key, E);
      if (in.grad_context != nullptr) {
        add = !starts_group || grad_value == grad_key;
        multiply(transposed, plain, n, F, rows, a + row * n, n, in.grad_context + (block_.first + row) * F, F, add,
                grad_value, F);
      } else if (starts_group && grad_value != grad_key) {
        std::fill_n(grad_value, n * F, T(0));
      }
    });
  }

  // a = A and d = scale · dS from the recomputed A, dA.
  void score_gradient(T* a, T* d, int64_t n, T weight, T delta) const {
    const Vec<T> weights(weight), deltas(delta), scales(scale_);
    for_vectors<T>(n, [&](int64_t i, int64_t count) {
      const auto size = static_cast<int>(count);
      const Vec<T> x = Vec<T>::loadu(a + i, count) * weights;
      (x * (Vec<T>::loadu(d + i, count) - deltas) * scales).store(d + i, size);
      x.store(a + i, size);
    });
  }

  const AttentionShape& shape_;
  T scale_;
  RowBlock block_{0, 0};
  int64_t tiles_;
  Buffer<T> attention_;  // [tiles][rows, n]
  Buffer<T> grad_;       // [tiles][rows, n]
  Buffer<T> partial_;    // [tiles, rows, D] for dU, then [tiles, rows, E] for dQ
  TiledSoftmax<T> softmax_;
  Buffer<T> delta_;      // [tiles, rows], then [rows]
};

}  // namespace

template <typename S>
void Attention<S>::forward(const ForwardInputs<S>& in, const ForwardOutputs<S>& out) const {
  const bool spreads = out.importance != nullptr || out.attention != nullptr || out.patches != nullptr;
  // What a row keeps: its scores, or without anything to spread those of one tile and its shares of the context.
  const int64_t passing = std::max(tile_patches(shape_), tile_count(shape_) * shape_.value_width);
  const int64_t row_size = spreads ? shape_.patches : passing;
  const int64_t rows = rows_per_block(shape_, row_size * sizeof(T));
  ForwardBlock<S> scratch(shape_, scale_, rows, spreads);
  for_each_block(shape_, rows, [&](const RowBlock& block) { scratch.run(in, out, block); });
}

template <typename S>
void Attention<S>::backward(const BackwardInputs<S>& in, const BackwardOutputs<T>& out) const {
  const int64_t rows = rows_per_block(shape_, 2 * shape_.patches * sizeof(T));
  BackwardBlock<S> scratch(shape_, scale_, rows);
  for_each_block(shape_, rows, [&](const RowBlock& block) { scratch.run(in, out, block); });
}

template class Attention<float>;
template class Attention<double>;
template class Attention<c10::BFloat16>;

}  // namespace liftbyimage::cpu
