#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "linear_gradients.h"
#include "ops.h"
#include "residual_branch.h"
#include "small_tokens.h"
#include "token_attention.h"

namespace liftbyimage::cpu {
namespace {

template <typename T>
T softmax_scale(int64_t head_width) {
  return T(1) / std::sqrt(static_cast<T>(head_width));
}

template <typename T>
PackedTokens<T> packed_tokens(const T* projected, int64_t width) {
  return {projected, projected + width, projected + 2 * width, 3 * width};
}

// S is the type of tensors and of the products' operands, T that of sums and of the attention.
template <typename S, typename T>
class ResidualAttention {
 public:
  ResidualBranch<S, T> branch;
  int64_t heads;
  Linear<T, S> in_proj, out_proj;
  S* projected_out;  // [B, T, 3D], null: not kept

  // Samples [first, first + size) of those kept.
  void run(int64_t first, int64_t size) const {
    const int64_t rows = size * branch.count, width = branch.width;
    const Buffer<S> operands = uninitialized<S>(rows * 2 * width);
    S* normalized = operands.get();           // [rows, D]
    S* attended = normalized + rows * width;  // [rows, D]
    const Buffer<T> scratch = uninitialized<T>(keeps_in_place() ? 0 : rows * 3 * width);
    branch.normalize(first, rows, normalized);
    for_columns(3 * width, task_columns, [&](int64_t column, int64_t columns) {
      project(first, rows, column, columns, normalized, scratch.get());
    });
    for_head_groups(size, branch.count, heads, width / heads, [&](int64_t sample, int64_t head, int64_t count) {
      attend(projected_of(first, sample, scratch.get()), head, count, attended + sample * branch.count * width);
    });
    for_columns(width, task_columns, [&](int64_t column, int64_t columns) {
      for_linear(out_proj, column, columns, attended, rows, [&](int64_t row, int64_t at, T* y, int64_t count) {
        branch.add(first, row, at, y, count);
      });
    });
  }

 private:
  bool keeps_in_place() const { return std::is_same_v<S, T> && projected_out != nullptr; }

  // The packed projection [T, 3D] of a sample: where it is kept, or [samples, T, 3D] of the group in `scratch`.
  T* projected_of(int64_t first, int64_t sample, T* scratch) const {
    const int64_t size = branch.count * 3 * branch.width;
    if constexpr (std::is_same_v<S, T>) {
      if (projected_out != nullptr) {
        return projected_out + branch.kept.samples[first + sample] * size;
      }
    }
    return scratch + sample * size;
  }

  // Some columns of query, key and value.
  void project(int64_t first, int64_t rows, int64_t column, int64_t columns, const S* normalized, T* scratch) const {
    const int64_t stride = 3 * branch.width;
    for_linear(in_proj, column, columns, normalized, rows, [&](int64_t row, int64_t at, const T* y, int64_t size) {
      const int64_t token = row % branch.count;
      std::copy_n(y, size, projected_of(first, row / branch.count, scratch) + token * stride + at);
      if (!keeps_in_place() && projected_out != nullptr) {
        at::vec::convert(y, projected_out + branch.token_of(first, row) * stride + at, size);
      }
    });
  }

  // Heads [head, head + count) of one sample: projected [T, 3D], attended [T, D].
  void attend(const T* projected, int64_t head, int64_t count, S* attended) const {
    const int64_t width = branch.width, tokens = branch.count, E = width / heads, columns = count * E;
    const TokenAttention<T> attention{tokens, count, E, softmax_scale<T>(E)};
    const PackedTokens<T> in = packed_tokens<T>(projected + head * E, width);
    const int64_t size = attention.scratch_size();
    if constexpr (std::is_same_v<S, T>) {
      const Buffer<T> scratch = uninitialized<T>(size);
      attention.forward(in, scratch.get(), attended + head * E, width);
    } else {
      const Buffer<T> scratch = uninitialized<T>(size + tokens * columns);
      attention.forward(in, scratch.get(), scratch.get() + size, columns);
      for (int64_t token = 0; token < tokens; ++token) {
        at::vec::convert(scratch.get() + size + token * columns, attended + token * width + head * E, columns);
      }
    }
  }
};

// Gradients over the kept samples, in chunks of whole samples.
template <typename T>
class ResidualAttentionBackward {
 public:
  ResidualBranchBackward<T> branch;
  int64_t heads;
  const LinearBackward<T>& in_proj;
  const LinearBackward<T>& out_proj;
  const T* projected;  // [B, T, 3D]

  void run(const RowPasses& passes, int64_t part, const BranchGradients<T>& grads) const {
    const int64_t width = branch.width, most = passes.chunk;
    const Buffer<T> scratch = uninitialized<T>(most * 7 * width);
    T* grad_branch = scratch.get();                // [rows, D]
    T* normalized = grad_branch + most * width;    // [rows, D]
    T* grad_attended = normalized + most * width;  // [rows, D], then that of what is normalized
    T* attended = grad_attended + most * width;    // [rows, D]
    T* grad_projected = attended + most * width;   // [rows, 3D]
    bool add = false;
    passes.for_chunks(part, [&](int64_t first, int64_t rows) {
      branch.begin(first, rows, grad_branch, normalized);
      out_proj.differentiate_inputs(rows, grad_branch, grad_attended);
      differentiate_attention(first, rows, grad_attended, attended, grad_projected);
      if (branch.wants_normalized(grads)) {
        in_proj.differentiate_inputs(rows, grad_projected, grad_attended);
        branch.finish(first, rows, grad_attended, grads);
      }
      out_proj.differentiate_parameters(rows, grad_branch, attended, add, grads.weight2, grads.bias2);
      in_proj.differentiate_parameters(rows, grad_projected, normalized, add, grads.weight1, grads.bias1);
      add = true;
    });
  }

 private:
  void differentiate_attention(int64_t first, int64_t rows, const T* grad_attended, T* attended,
                               T* grad_projected) const {
    const int64_t tokens = branch.count, width = branch.width, E = width / heads;
    for_head_groups(rows / tokens, tokens, heads, E, [&](int64_t sample, int64_t head, int64_t count) {
      const TokenAttention<T> attention{tokens, count, E, softmax_scale<T>(E)};
      const Buffer<T> scratch = uninitialized<T>(attention.backward_scratch_size());
      const int64_t row = sample * tokens, column = head * E;
      T* grads = grad_projected + row * 3 * width + column;
      attention.backward(packed_tokens(projected + branch.token_of(first + row) * 3 * width + column, width),
                         grad_attended + row * width + column, width, scratch.get(), attended + row * width + column,
                         grads, grads + width, grads + 2 * width);
    });
  }
};

void check_arguments(const at::Tensor& tokens, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                     const at::Tensor& in_proj_weight, const at::Tensor& in_proj_bias,
                     const at::Tensor& out_proj_weight, const at::Tensor& out_proj_bias,
                     const OptionalTensor& branch_scale, int64_t heads) {
  check_rank(tokens, 3, "tokens");
  const int64_t width = tokens.size(2);
  TORCH_CHECK(heads >= 1 && width % heads == 0, "heads must divide D = ", width, ", got ", heads);
  check_matches(tokens, tokens.sizes(), tokens, "tokens");
  check_matches(norm_weight, {width}, tokens, "norm_weight");
  check_matches(norm_bias, {width}, tokens, "norm_bias");
  check_matches(in_proj_weight, {3 * width, width}, tokens, "in_proj_weight");
  check_matches(in_proj_bias, {3 * width}, tokens, "in_proj_bias");
  check_matches(out_proj_weight, {width, width}, tokens, "out_proj_weight");
  check_matches(out_proj_bias, {width}, tokens, "out_proj_bias");
  check_matches(branch_scale, {tokens.size(0)}, tokens, "branch_scale");
}

}  // namespace

Tensor3 residual_attention_forward(const at::Tensor& tokens_in, const at::Tensor& norm_weight_in,
                                   const at::Tensor& norm_bias_in, const at::Tensor& in_proj_weight_in,
                                   const at::Tensor& in_proj_bias_in, const at::Tensor& out_proj_weight_in,
                                   const at::Tensor& out_proj_bias_in, const OptionalTensor& branch_scale,
                                   int64_t heads, double eps, bool keep) {
  check_arguments(tokens_in, norm_weight_in, norm_bias_in, in_proj_weight_in, in_proj_bias_in, out_proj_weight_in,
                  out_proj_bias_in, branch_scale, heads);
  const int64_t batch = tokens_in.size(0), count = tokens_in.size(1), width = tokens_in.size(2);
  const at::ScalarType sums = sums_type(tokens_in.scalar_type());
  const at::Tensor tokens = tokens_in.contiguous();
  const at::Tensor norm_weight = norm_weight_in.to(sums).contiguous(), norm_bias = norm_bias_in.to(sums).contiguous();
  const at::Tensor in_proj_weight = in_proj_weight_in.contiguous(), out_proj_weight = out_proj_weight_in.contiguous();
  const at::Tensor in_proj_bias = in_proj_bias_in.to(sums).contiguous();
  const at::Tensor out_proj_bias = out_proj_bias_in.to(sums).contiguous();
  const at::Tensor updated = at::empty({batch, count, width}, tokens.options());
  const auto kept_tensor = [&](int64_t columns, at::ScalarType type) {
    const auto options = tokens.options().dtype(type);
    return keep ? at::empty({batch, count, columns}, options) : at::empty({0}, options);
  };
  const at::Tensor projected = kept_tensor(3 * width, tokens.scalar_type()), statistics = kept_tensor(2, sums);

  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, tokens.scalar_type(), "residual_attention_forward", [&] {
    using S = scalar_t;
    using T = at::opmath_type<S>;
    const KeptSamples<T> kept(branch_scale, batch);
    if (kept.size() < batch) {
      updated.copy_(tokens);
    }
    const auto data = [](const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); };
    const S* in_weight = in_proj_weight.const_data_ptr<S>();
    const S* out_weight = out_proj_weight.const_data_ptr<S>();
    const Buffer<S> in_panels = pack(in_weight, 3 * width, width), out_panels = pack(out_weight, width, width);
    const ResidualAttention<S, T> kernel{{count,
                                          width,
                                          {data(norm_weight), data(norm_bias), width, static_cast<T>(eps)},
                                          kept,
                                          tokens.const_data_ptr<S>(),
                                          updated.mutable_data_ptr<S>(),
                                          keep ? statistics.mutable_data_ptr<T>() : nullptr},
                                         heads,
                                         {in_weight, data(in_proj_bias), width, in_panels.get()},
                                         {out_weight, data(out_proj_bias), width, out_panels.get()},
                                         keep ? projected.mutable_data_ptr<S>() : nullptr};
    for_groups(kept.size(), count, [&](int64_t first, int64_t size) { kernel.run(first, size); });
  });
  return {updated, projected, statistics};
}

std::vector<at::Tensor> residual_attention_backward(
    const at::Tensor& grad_updated_in, const at::Tensor& tokens_in, const at::Tensor& norm_weight_in,
    const at::Tensor& norm_bias_in, const at::Tensor& in_proj_weight_in, const at::Tensor& in_proj_bias_in,
    const at::Tensor& out_proj_weight_in, const at::Tensor& out_proj_bias_in, const OptionalTensor& branch_scale,
    const at::Tensor& projected_in, const at::Tensor& statistics_in, int64_t heads, c10::List<bool> wanted) {
  check_arguments(tokens_in, norm_weight_in, norm_bias_in, in_proj_weight_in, in_proj_bias_in, out_proj_weight_in,
                  out_proj_bias_in, branch_scale, heads);
  const int64_t batch = tokens_in.size(0), count = tokens_in.size(1), width = tokens_in.size(2);
  const at::ScalarType type = tokens_in.scalar_type(), sums = sums_type(type);
  check_matches(grad_updated_in, tokens_in.sizes(), tokens_in, "grad_updated");
  check_matches(projected_in, {batch, count, 3 * width}, tokens_in, "projected");
  check_shape(statistics_in, {batch, count, 2}, "statistics");
  TORCH_CHECK(statistics_in.scalar_type() == sums, "statistics must have dtype ", sums, ", got ",
              statistics_in.scalar_type());
  const std::array<const at::Tensor*, 7> inputs = {&tokens_in,       &norm_weight_in,     &norm_bias_in,
                                                   &in_proj_weight_in, &in_proj_bias_in, &out_proj_weight_in,
                                                   &out_proj_bias_in};
  TORCH_CHECK(wanted.size() == inputs.size() + 1 && !wanted[inputs.size()],
              "wanted must have ", inputs.size() + 1, " entries, the last of them false");
  const at::Tensor grad_updated = operand(grad_updated_in, sums), tokens = operand(tokens_in, sums);
  const at::Tensor norm_weight = operand(norm_weight_in, sums), norm_bias = operand(norm_bias_in, sums);
  const at::Tensor in_proj_weight = operand(in_proj_weight_in, sums);
  const at::Tensor out_proj_weight = operand(out_proj_weight_in, sums);
  const at::Tensor projected = operand(projected_in, sums), statistics = statistics_in.contiguous();

  BranchTensors grads;
  AT_DISPATCH_FLOATING_TYPES(sums, "residual_attention_backward", [&] {
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
    const bool narrow = is_narrow<T>(4 * width * width);
    const LinearBackward<T> in_proj(data(in_proj_weight), 3 * width, width, narrow);
    const LinearBackward<T> out_proj(data(out_proj_weight), width, width, narrow);
    const ResidualAttentionBackward<T> kernel{{count,
                                               width,
                                               {data(norm_weight), data(norm_bias), width, T(0)},
                                               kept,
                                               data(tokens),
                                               data(grad_updated),
                                               data(statistics),
                                               grads[0].defined() ? grads[0].mutable_data_ptr<T>() : nullptr},
                                              heads,
                                              in_proj,
                                              out_proj,
                                              data(projected)};
    const RowPasses passes = row_passes(kept.size() * count, count, narrow);
    for_parts<T>(passes.parts(), grads,
                 [&](int64_t part, const BranchGradients<T>& own) { kernel.run(passes, part, own); });
  });
  return defined_tensors(grads, type);
}

}  // namespace liftbyimage::cpu
