#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "linear_gradients.h"
#include "ops.h"
#include "samples.h"
#include "small_tokens.h"

namespace liftbyimage::cpu {
namespace {

// S is the type of tensors and of the products' operands, T that of sums.
template <typename S, typename T>
class FeedForward {
 public:
  int64_t count, width, hidden_width;  // tokens of a sample, D, F
  LayerNorm<T> norm;
  Linear<T, S> linear1, linear2;
  const KeptSamples<T>& kept;
  const S* tokens;  // [B, T, D], as updated
  S* updated;
  S* hidden_out;    // [B, T, F], null: not kept
  T* statistics;    // [B, T, 2]

  // Samples [first, first + size) of those kept.
  void run(int64_t first, int64_t size) const {
    const int64_t rows = size * count;
    const Buffer<S> scratch = uninitialized<S>(rows * (width + hidden_width));
    S* normalized = scratch.get();                 // [rows, D]
    S* hidden = normalized + rows * width;         // [rows, F]
    normalize(first, rows, normalized);
    for_columns(hidden_width, task_columns, [&](int64_t column, int64_t columns) {
      expand(first, column, columns, normalized, rows, hidden);
    });
    for_columns(width, task_columns, [&](int64_t column, int64_t columns) {
      contract(first, column, columns, hidden, rows);
    });
  }

 private:
  // Where a row of the kept samples lies among all tokens.
  int64_t token_of(int64_t first, int64_t row) const { return kept.samples[first + row / count] * count + row % count; }

  void normalize(int64_t first, int64_t rows, S* normalized) const {
    constexpr int64_t grain = 24;  // a row takes about 0.1 µs, waking a thread a few
    for_columns(rows, grain, [&](int64_t begin, int64_t size) {
      const Buffer<T> wide = std::is_same_v<S, T> ? nullptr : uninitialized<T>(width);
      for (int64_t row = begin; row < begin + size; ++row) {
        const int64_t token = token_of(first, row);
        const RowStatistics<T> found = normalize_token(tokens + token * width, normalized + row * width, wide.get());
        if (hidden_out != nullptr) {
          statistics[2 * token] = found.mean;
          statistics[2 * token + 1] = found.reciprocal_deviation;
        }
      }
    });
  }

  RowStatistics<T> normalize_token(const S* token, S* target, T* wide) const {
    if constexpr (std::is_same_v<S, T>) {
      return normalize_row(norm, token, target);
    } else {
      at::vec::convert(token, wide, width);
      const RowStatistics<T> found = normalize_row(norm, wide, wide);
      at::vec::convert(wide, target, width);
      return found;
    }
  }

  // hidden = gelu(b₁ + normalized W₁ᵀ), some columns of it.
  void expand(int64_t first, int64_t column, int64_t columns, const S* normalized, int64_t rows, S* hidden) const {
    for_linear(linear1, column, columns, normalized, rows, [&](int64_t row, int64_t at_column, T* y, int64_t size) {
      if (hidden_out != nullptr) {
        at::vec::convert(y, hidden_out + token_of(first, row) * hidden_width + at_column, size);
      }
      gelu_row(y, size);
      at::vec::convert(y, hidden + row * hidden_width + at_column, size);
    });
  }

  // updated = tokens + scale · (b₂ + hidden W₂ᵀ), some columns of it.
  void contract(int64_t first, int64_t column, int64_t columns, const S* hidden, int64_t rows) const {
    for_linear(linear2, column, columns, hidden, rows, [&](int64_t row, int64_t at_column, T* y, int64_t size) {
      const int64_t at = token_of(first, row) * width + at_column;
      const T scale = kept.scales[first + row / count];
      T residual[panel_columns];
      at::vec::convert(tokens + at, residual, size);
      for (int64_t c = 0; c < size; ++c) {
        y[c] = residual[c] + scale * y[c];
      }
      at::vec::convert(y, updated + at, size);
    });
  }
};

// Gradients over all rows of the kept samples, in chunks of rows. The products are those of BLAS.
template <typename T>
class FeedForwardBackward {
 public:
  int64_t count, width, hidden_width;
  LayerNorm<T> norm;
  const T* linear1_weight;
  const T* linear2_weight;
  const KeptSamples<T>& kept;
  const T* tokens;       // [B, T, D], as grad_updated
  const T* grad_updated;
  const T* hidden;       // [B, T, F]
  const T* statistics;   // [B, T, 2]
  // As the tensors of the forward; null where not wanted. Those of biases and of the norm start at zero.
  T* grad_tokens;
  T* grad_norm_weight;
  T* grad_norm_bias;
  T* grad_linear1_weight;
  T* grad_linear1_bias;
  T* grad_linear2_weight;
  T* grad_linear2_bias;

  void run() const {
    const int64_t rows = kept.size() * count, most = std::min(rows, chunk_rows);
    const Buffer<T> scratch = uninitialized<T>(most * 2 * (width + hidden_width));
    T* normalized = scratch.get();                     // [rows, D]
    T* grad_branch = normalized + most * width;        // [rows, D], then that of `normalized`
    T* activated = grad_branch + most * width;         // [rows, F]
    T* grad_hidden = activated + most * hidden_width;  // [rows, F]
    for_row_chunks(rows, [&](int64_t first, int64_t size) {
      prepare(first, size, grad_branch, normalized);
      differentiate_hidden(first, size, grad_branch, activated, grad_hidden);
      add_linear2_gradients(first > 0, size, grad_branch, activated);
      add_linear1_gradients(first > 0, size, grad_hidden, normalized);
      if (grad_tokens != nullptr || grad_norm_weight != nullptr || grad_norm_bias != nullptr) {
        T* grad_normalized = grad_branch;
        tiled_product(Transpose::no, Transpose::no, size, width, hidden_width, grad_hidden, hidden_width,
                      linear1_weight, width, false, grad_normalized, width);
        differentiate_tokens(first, size, grad_normalized);
        add_norm_gradients(first, size, grad_normalized);
      }
    });
  }

 private:
  int64_t token_of(int64_t row) const { return kept.samples[row / count] * count + row % count; }
  RowStatistics<T> statistics_at(int64_t token) const { return {statistics[2 * token], statistics[2 * token + 1]}; }

  void prepare(int64_t first, int64_t size, T* grad_branch, T* normalized) const {
    parallel_tasks(size, 24, [&](int64_t row) {
      const int64_t token = token_of(first + row);
      scale_row(grad_branch + row * width, grad_updated + token * width, kept.scales[(first + row) / count], width,
                false);
      normalize_row(norm, statistics_at(token), tokens + token * width, normalized + row * width);
    });
  }

  // GELU's part follows each tile of the product while it is in cache.
  void differentiate_hidden(int64_t first, int64_t size, const T* grad_branch, T* activated, T* grad_hidden) const {
    tiled_product(Transpose::no, Transpose::no, size, hidden_width, width, grad_branch, width, linear2_weight,
                  hidden_width, false, grad_hidden, hidden_width,
                  [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
                    for (int64_t i = row; i < row + rows; ++i) {
                      const int64_t at = i * hidden_width + column;
                      gelu_row_backward(hidden + token_of(first + i) * hidden_width + column, columns, activated + at,
                                        grad_hidden + at);
                    }
                  });
  }

  void differentiate_tokens(int64_t first, int64_t size, const T* grad_normalized) const {
    if (grad_tokens == nullptr) {
      return;
    }
    parallel_tasks(size, 24, [&](int64_t row) {
      const int64_t token = token_of(first + row), at = token * width;
      normalize_row_backward(norm, statistics_at(token), tokens + at, grad_normalized + row * width, grad_updated + at,
                             grad_tokens + at);
    });
  }

  void add_linear2_gradients(bool add, int64_t size, const T* grad_branch, const T* activated) const {
    if (grad_linear2_weight != nullptr) {
      tiled_product(Transpose::yes, Transpose::no, width, hidden_width, size, grad_branch, width, activated,
                    hidden_width, add, grad_linear2_weight, hidden_width);
    }
    if (grad_linear2_bias != nullptr) {
      add_column_sums(size, width, grad_branch, grad_linear2_bias);
    }
  }

  void add_linear1_gradients(bool add, int64_t size, const T* grad_hidden, const T* normalized) const {
    if (grad_linear1_weight != nullptr) {
      tiled_product(Transpose::yes, Transpose::no, hidden_width, width, size, grad_hidden, hidden_width, normalized,
                    width, add, grad_linear1_weight, width);
    }
    if (grad_linear1_bias != nullptr) {
      add_column_sums(size, hidden_width, grad_hidden, grad_linear1_bias);
    }
  }

  void add_norm_gradients(int64_t first, int64_t size, const T* grad_normalized) const {
    using Vec = at::vec::Vectorized<T>;
    if (grad_norm_bias != nullptr) {
      add_column_sums(size, width, grad_normalized, grad_norm_bias);
    }
    if (grad_norm_weight != nullptr) {
      add_column_sums(size, width, grad_norm_weight, [&](int64_t row, int64_t column, int64_t lanes) {
        const int64_t token = token_of(first + row);
        const RowStatistics<T> found = statistics_at(token);
        const Vec normal = (Vec::loadu(tokens + token * width + column, lanes) - Vec(found.mean)) *
                           Vec(found.reciprocal_deviation);
        return normal * Vec::loadu(grad_normalized + row * width + column, lanes);
      });
    }
  }
};

void check_arguments(const at::Tensor& tokens, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                     const at::Tensor& linear1_weight, const at::Tensor& linear1_bias,
                     const at::Tensor& linear2_weight, const at::Tensor& linear2_bias,
                     const OptionalTensor& branch_scale) {
  check_rank(tokens, 3, "tokens");
  check_rank(linear1_weight, 2, "linear1_weight");
  const int64_t width = tokens.size(2), hidden_width = linear1_weight.size(0);
  TORCH_CHECK(hidden_width > 0, "linear1_weight must be non-empty, got shape ", linear1_weight.sizes());
  check_matches(tokens, tokens.sizes(), tokens, "tokens");
  check_matches(norm_weight, {width}, tokens, "norm_weight");
  check_matches(norm_bias, {width}, tokens, "norm_bias");
  check_matches(linear1_weight, {hidden_width, width}, tokens, "linear1_weight");
  check_matches(linear1_bias, {hidden_width}, tokens, "linear1_bias");
  check_matches(linear2_weight, {width, hidden_width}, tokens, "linear2_weight");
  check_matches(linear2_bias, {width}, tokens, "linear2_bias");
  check_matches(branch_scale, {tokens.size(0)}, tokens, "branch_scale");
}

at::ScalarType sums_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Dense and aligned: BLAS sums in an order that depends on its operands' alignment.
at::Tensor operand(const at::Tensor& tensor, at::ScalarType type) {
  const at::Tensor dense = tensor.to(type).contiguous();
  return is_aligned(dense.const_data_ptr()) ? dense : dense.clone();
}

}  // namespace

Tensor3 residual_feed_forward_forward(const at::Tensor& tokens_in, const at::Tensor& norm_weight_in,
                                      const at::Tensor& norm_bias_in, const at::Tensor& linear1_weight_in,
                                      const at::Tensor& linear1_bias_in, const at::Tensor& linear2_weight_in,
                                      const at::Tensor& linear2_bias_in, const OptionalTensor& branch_scale,
                                      double eps, bool keep) {
  check_arguments(tokens_in, norm_weight_in, norm_bias_in, linear1_weight_in, linear1_bias_in, linear2_weight_in,
                  linear2_bias_in, branch_scale);
  const int64_t batch = tokens_in.size(0), count = tokens_in.size(1), width = tokens_in.size(2);
  const int64_t hidden_width = linear1_weight_in.size(0);
  const at::ScalarType sums = sums_type(tokens_in.scalar_type());
  const at::Tensor tokens = tokens_in.contiguous();
  const at::Tensor norm_weight = norm_weight_in.to(sums).contiguous(), norm_bias = norm_bias_in.to(sums).contiguous();
  const at::Tensor linear1_weight = linear1_weight_in.contiguous();
  const at::Tensor linear1_bias = linear1_bias_in.to(sums).contiguous();
  const at::Tensor linear2_weight = linear2_weight_in.contiguous();
  const at::Tensor linear2_bias = linear2_bias_in.to(sums).contiguous();
  const at::Tensor updated = at::empty({batch, count, width}, tokens.options());
  const at::Tensor hidden = keep ? at::empty({batch, count, hidden_width}, tokens.options())
                                 : at::empty({0}, tokens.options());
  const at::Tensor statistics = keep ? at::empty({batch, count, 2}, tokens.options().dtype(sums))
                                     : at::empty({0}, tokens.options().dtype(sums));

  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, tokens.scalar_type(), "residual_feed_forward_forward", [&] {
    using S = scalar_t;
    using T = at::opmath_type<S>;
    const KeptSamples<T> kept(branch_scale, batch);
    if (kept.size() < batch) {
      updated.copy_(tokens);
    }
    const auto data = [](const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); };
    const S* weight1 = linear1_weight.const_data_ptr<S>();
    const S* weight2 = linear2_weight.const_data_ptr<S>();
    const Buffer<S> panels1 = pack(weight1, hidden_width, width), panels2 = pack(weight2, width, hidden_width);
    const FeedForward<S, T> kernel{
        count,
        width,
        hidden_width,
        {data(norm_weight), data(norm_bias), width, static_cast<T>(eps)},
        {weight1, data(linear1_bias), width, panels1.get()},
        {weight2, data(linear2_bias), hidden_width, panels2.get()},
        kept,
        tokens.const_data_ptr<S>(),
        updated.mutable_data_ptr<S>(),
        keep ? hidden.mutable_data_ptr<S>() : nullptr,
        keep ? statistics.mutable_data_ptr<T>() : nullptr};
    for_groups(kept.size(), count, [&](int64_t first, int64_t size) { kernel.run(first, size); });
  });
  return {updated, hidden, statistics};
}

std::vector<at::Tensor> residual_feed_forward_backward(
    const at::Tensor& grad_updated_in, const at::Tensor& tokens_in, const at::Tensor& norm_weight_in,
    const at::Tensor& norm_bias_in, const at::Tensor& linear1_weight_in, const at::Tensor& linear1_bias_in,
    const at::Tensor& linear2_weight_in, const at::Tensor& linear2_bias_in, const OptionalTensor& branch_scale,
    const at::Tensor& hidden_in, const at::Tensor& statistics_in, c10::List<bool> wanted) {
  check_arguments(tokens_in, norm_weight_in, norm_bias_in, linear1_weight_in, linear1_bias_in, linear2_weight_in,
                  linear2_bias_in, branch_scale);
  const int64_t batch = tokens_in.size(0), count = tokens_in.size(1), width = tokens_in.size(2);
  const int64_t hidden_width = linear1_weight_in.size(0);
  const at::ScalarType type = tokens_in.scalar_type(), sums = sums_type(type);
  check_matches(grad_updated_in, tokens_in.sizes(), tokens_in, "grad_updated");
  check_matches(hidden_in, {batch, count, hidden_width}, tokens_in, "hidden");
  check_shape(statistics_in, {batch, count, 2}, "statistics");
  TORCH_CHECK(statistics_in.scalar_type() == sums, "statistics must have dtype ", sums, ", got ",
              statistics_in.scalar_type());
  const std::array<const at::Tensor*, 7> inputs = {&tokens_in,         &norm_weight_in,    &norm_bias_in,
                                                   &linear1_weight_in, &linear1_bias_in,   &linear2_weight_in,
                                                   &linear2_bias_in};
  TORCH_CHECK(wanted.size() == inputs.size() + 1 && !wanted[inputs.size()],
              "wanted must have ", inputs.size() + 1, " entries, the last of them false");
  const at::Tensor grad_updated = operand(grad_updated_in, sums), tokens = operand(tokens_in, sums);
  const at::Tensor norm_weight = operand(norm_weight_in, sums), norm_bias = operand(norm_bias_in, sums);
  const at::Tensor linear1_weight = operand(linear1_weight_in, sums), linear2_weight = operand(linear2_weight_in, sums);
  const at::Tensor hidden = operand(hidden_in, sums), statistics = statistics_in.contiguous();

  std::array<at::Tensor, 7> grads;
  AT_DISPATCH_FLOATING_TYPES(sums, "residual_feed_forward_backward", [&] {
    using T = scalar_t;
    const KeptSamples<T> kept(branch_scale, batch);
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (wanted[i]) {
        const bool written = kept.size() > 0 && inputs[i]->dim() > 1;  // biases and norms are added to
        grads[i] = written ? at::empty(inputs[i]->sizes(), tokens.options())
                           : at::zeros(inputs[i]->sizes(), tokens.options());
      }
    }
    if (grads[0].defined() && kept.size() < batch) {
      grads[0].copy_(grad_updated);
    }
    const auto data = [](const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); };
    const auto target = [&](int i) { return grads[i].defined() ? grads[i].mutable_data_ptr<T>() : nullptr; };
    FeedForwardBackward<T>{count,
                           width,
                           hidden_width,
                           {data(norm_weight), data(norm_bias), width, T(0)},
                           data(linear1_weight),
                           data(linear2_weight),
                           kept,
                           data(tokens),
                           data(grad_updated),
                           data(hidden),
                           data(statistics),
                           target(0),
                           target(1),
                           target(2),
                           target(3),
                           target(4),
                           target(5),
                           target(6)}
        .run();
  });
  std::vector<at::Tensor> results;
  for (const at::Tensor& grad : grads) {
    if (grad.defined()) {
      results.push_back(grad.to(type));
    }
  }
  return results;
}

}  // namespace liftbyimage::cpu
