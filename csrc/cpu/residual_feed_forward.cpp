#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <array>
#include <vector>

#include "../checks.h"
#include "linear_gradients.h"
#include "ops.h"
#include "residual_branch.h"
#include "small_tokens.h"

namespace liftbyimage::cpu {
namespace {

// S is the type of tensors and of the products' operands, T that of sums.
template <typename S, typename T>
class FeedForward {
 public:
  ResidualBranch<S, T> branch;
  int64_t hidden_width;  // F
  Linear<T, S> linear1, linear2;
  S* hidden_out;  // [B, T, F], null: not kept

  // Samples [first, first + size) of those kept.
  void run(int64_t first, int64_t size) const {
    const int64_t rows = size * branch.count, width = branch.width;
    const Buffer<S> scratch = uninitialized<S>(rows * (width + hidden_width));
    S* normalized = scratch.get();          // [rows, D]
    S* hidden = normalized + rows * width;  // [rows, F]
    branch.normalize(first, rows, normalized);
    for_columns(hidden_width, task_columns, [&](int64_t column, int64_t columns) {
      expand(first, column, columns, normalized, rows, hidden);
    });
    for_columns(width, task_columns, [&](int64_t column, int64_t columns) {
      for_linear(linear2, column, columns, hidden, rows, [&](int64_t row, int64_t at, T* y, int64_t count) {
        branch.add(first, row, at, y, count);
      });
    });
  }

 private:
  // hidden = gelu(b₁ + normalized W₁ᵀ), some columns of it.
  void expand(int64_t first, int64_t column, int64_t columns, const S* normalized, int64_t rows, S* hidden) const {
    for_linear(linear1, column, columns, normalized, rows, [&](int64_t row, int64_t at_column, T* y, int64_t size) {
      if (hidden_out != nullptr) {
        at::vec::convert(y, hidden_out + branch.token_of(first, row) * hidden_width + at_column, size);
      }
      gelu_row(y, size);
      at::vec::convert(y, hidden + row * hidden_width + at_column, size);
    });
  }
};

// Gradients over all rows of the kept samples.
template <typename T>
class FeedForwardBackward {
 public:
  ResidualBranchBackward<T> branch;
  int64_t hidden_width;
  const LinearBackward<T>& linear1;
  const LinearBackward<T>& linear2;
  const T* hidden;  // [B, T, F]

  void run(const RowPasses& passes, int64_t part, const BranchGradients<T>& grads) const {
    const int64_t width = branch.width, most = passes.chunk;
    const Buffer<T> scratch = uninitialized<T>(most * 2 * (width + hidden_width));
    T* normalized = scratch.get();                     // [rows, D]
    T* grad_branch = normalized + most * width;        // [rows, D], then that of `normalized`
    T* activated = grad_branch + most * width;         // [rows, F]
    T* grad_hidden = activated + most * hidden_width;  // [rows, F]
    bool add = false;
    passes.for_chunks(part, [&](int64_t first, int64_t size) {
      branch.begin(first, size, grad_branch, normalized);
      differentiate_hidden(first, size, grad_branch, activated, grad_hidden);
      linear2.differentiate_parameters(size, grad_branch, activated, add, grads.weight2, grads.bias2);
      linear1.differentiate_parameters(size, grad_hidden, normalized, add, grads.weight1, grads.bias1);
      if (branch.wants_normalized(grads)) {
        T* grad_normalized = grad_branch;
        linear1.differentiate_inputs(size, grad_hidden, grad_normalized);
        branch.finish(first, size, grad_normalized, grads);
      }
      add = true;
    });
  }

 private:
  // GELU's part follows each tile of the product while it is in cache.
  void differentiate_hidden(int64_t first, int64_t size, const T* grad_branch, T* activated, T* grad_hidden) const {
    linear2.differentiate_inputs(
        size, grad_branch, grad_hidden, [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
          for (int64_t i = row; i < row + rows; ++i) {
            const int64_t at = i * hidden_width + column;
            gelu_row_backward(hidden + branch.token_of(first + i) * hidden_width + column, columns, activated + at,
                              grad_hidden + at);
          }
        });
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
    const FeedForward<S, T> kernel{{count,
                                    width,
                                    {data(norm_weight), data(norm_bias), width, static_cast<T>(eps)},
                                    kept,
                                    tokens.const_data_ptr<S>(),
                                    updated.mutable_data_ptr<S>(),
                                    keep ? statistics.mutable_data_ptr<T>() : nullptr},
                                   hidden_width,
                                   {weight1, data(linear1_bias), width, panels1.get()},
                                   {weight2, data(linear2_bias), hidden_width, panels2.get()},
                                   keep ? hidden.mutable_data_ptr<S>() : nullptr};
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

  BranchTensors grads;
  AT_DISPATCH_FLOATING_TYPES(sums, "residual_feed_forward_backward", [&] {
    using T = scalar_t;
    const KeptSamples<T> kept(branch_scale, batch);
    grads = branch_tensors(inputs, wanted, tokens.options(), kept.size() > 0);
    if (grads[0].defined() && kept.size() < batch) {
      grads[0].copy_(grad_updated);
    }
    if (kept.size() == 0) {
      return;
    }
    const auto data = [](const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); };
    const bool narrow = is_narrow<T>(2 * hidden_width * width);
    const LinearBackward<T> linear1(data(linear1_weight), hidden_width, width, narrow);
    const LinearBackward<T> linear2(data(linear2_weight), width, hidden_width, narrow);
    const FeedForwardBackward<T> kernel{{count,
                                         width,
                                         {data(norm_weight), data(norm_bias), width, T(0)},
                                         kept,
                                         data(tokens),
                                         data(grad_updated),
                                         data(statistics),
                                         grads[0].defined() ? grads[0].mutable_data_ptr<T>() : nullptr},
                                        hidden_width,
                                        linear1,
                                        linear2,
                                        data(hidden)};
    const RowPasses passes = row_passes(kept.size() * count, 1, narrow);
    for_parts<T>(passes.parts(), grads,
                 [&](int64_t part, const BranchGradients<T>& own) { kernel.run(passes, part, own); });
  });
  return defined_tensors(grads, type);
}

}  // namespace liftbyimage::cpu
