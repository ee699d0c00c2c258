#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "../checks.h"
#include "small_tokens.h"
#include "ops.h"
#include "samples.h"

namespace liftbyimage::cpu {
namespace {

template <typename T>
class UpdateJoints {
 public:
  int64_t joints, width, heads, context_width, hidden_width;
  const T* unfold;      // [H, W, E], or [H, E, W] where it is transposed; null: W = E
  bool transposed;
  const T* value_bias;  // [D], null: none
  Linear<T> out_proj, linear1, linear2;
  LayerNorm<T> norm1, norm2;

  // tokens, joints_out [samples, J, D], context [samples, H, J, W]
  void run(const T* tokens, const T* context, int64_t samples, T* joints_out) const {
    const int64_t rows = samples * joints;
    const Buffer<T> scratch = uninitialized<T>(rows * (width + hidden_width));
    T* attended = scratch.get();         // [rows, D]
    T* hidden = attended + rows * width;  // [rows, F]
    for_columns(heads, heads_per_task(head_width()), [&](int64_t first, int64_t count) {
      merge_heads(context, samples, first, count, attended);
    });
    for_columns(width, task_columns, [&](int64_t first, int64_t count) {
      apply_linear(out_proj, first, count, attended, rows, tokens, joints_out, width);
    });
    normalize_rows(norm1, rows, joints_out);
    for_columns(hidden_width, task_columns, [&](int64_t first, int64_t count) {
      apply_linear<T>(linear1, first, count, joints_out, rows, nullptr, hidden, hidden_width);
      for (int64_t row = 0; row < rows; ++row) {
        gelu_row(hidden + row * hidden_width + first, count);
      }
    });
    for_columns(width, task_columns, [&](int64_t first, int64_t count) {
      apply_linear(linear2, first, count, hidden, rows, joints_out, joints_out, width);
    });
    normalize_rows(norm2, rows, joints_out);
  }

 private:
  int64_t head_width() const { return width / heads; }

  // attended = context unfold + value_bias of heads [first, first + count), side by side.
  void merge_heads(const T* context, int64_t samples, int64_t first, int64_t count, T* attended) const {
    const int64_t E = head_width(), W = context_width;
    for (int64_t sample = 0; sample < samples; ++sample) {
      for (int64_t head = first; head < first + count; ++head) {
        const T* source = context + (sample * heads + head) * joints * W;  // [J, W]
        T* target = attended + sample * joints * width + head * E;         // [J, E]
        if (unfold != nullptr && transposed) {
          multiply_transposed(joints, E, W, source, W, unfold + head * W * E, W,
                              [&](int64_t row, int64_t column, const T* sums, int columns) {
                                std::copy_n(sums, columns, target + row * width + column);
                              });
        } else if (unfold != nullptr) {
          multiply(joints, E, W, source, W, 1, unfold + head * W * E, E, target, width);
        }
        for (int64_t row = 0; row < joints; ++row) {
          if (unfold == nullptr) {
            scale_row(target + row * width, source + row * E, T(1), E, false);
          }
          if (value_bias != nullptr) {
            scale_row(target + row * width, value_bias + head * E, T(1), E, true);
          }
        }
      }
    }
  }
};

}  // namespace

at::Tensor update_joints_forward(const at::Tensor& joints_in, const at::Tensor& context_in,
                                 const OptionalTensor& unfold_in, const OptionalTensor& value_bias_in,
                                 const at::Tensor& out_proj_weight_in, const at::Tensor& out_proj_bias_in,
                                 const at::Tensor& norm1_weight_in, const at::Tensor& norm1_bias_in,
                                 const at::Tensor& linear1_weight_in, const at::Tensor& linear1_bias_in,
                                 const at::Tensor& linear2_weight_in, const at::Tensor& linear2_bias_in,
                                 const at::Tensor& norm2_weight_in, const at::Tensor& norm2_bias_in, double eps) {
  check_rank(joints_in, 3, "joints");
  check_rank(context_in, 4, "context");
  check_rank(linear1_weight_in, 2, "linear1_weight");
  const int64_t batch = joints_in.size(0), joints = joints_in.size(1), width = joints_in.size(2);
  const int64_t heads = context_in.size(1), hidden_width = linear1_weight_in.size(0);
  TORCH_CHECK(width % heads == 0, "context's heads must divide D = ", width, ", got ", heads);
  const int64_t context_width = unfold_in.has_value() ? context_in.size(3) : width / heads;
  check_matches(joints_in, {batch, joints, width}, joints_in, "joints");
  check_matches(context_in, {batch, heads, joints, context_width}, joints_in, "context");
  check_matches(unfold_in, {heads, context_width, width / heads}, joints_in, "unfold");
  check_matches(value_bias_in, {width}, joints_in, "value_bias");
  check_matches(out_proj_weight_in, {width, width}, joints_in, "out_proj_weight");
  check_matches(out_proj_bias_in, {width}, joints_in, "out_proj_bias");
  check_matches(norm1_weight_in, {width}, joints_in, "norm1_weight");
  check_matches(norm1_bias_in, {width}, joints_in, "norm1_bias");
  check_matches(linear1_weight_in, {hidden_width, width}, joints_in, "linear1_weight");
  check_matches(linear1_bias_in, {hidden_width}, joints_in, "linear1_bias");
  check_matches(linear2_weight_in, {width, hidden_width}, joints_in, "linear2_weight");
  check_matches(linear2_bias_in, {width}, joints_in, "linear2_bias");
  check_matches(norm2_weight_in, {width}, joints_in, "norm2_weight");
  check_matches(norm2_bias_in, {width}, joints_in, "norm2_bias");
  const at::Tensor tokens = joints_in.contiguous(), context = context_in.contiguous();
  // The value projection of the absorbed formulation comes as it is stored, [H, E, W]: no copy is made of it.
  const bool transposed = unfold_in.has_value() && unfold_in->stride(1) == 1;
  const OptionalTensor unfold = transposed ? unfold_in->transpose(1, 2).contiguous() : contiguous(unfold_in);
  const OptionalTensor value_bias = contiguous(value_bias_in);
  const at::Tensor out_proj_weight = out_proj_weight_in.contiguous(), out_proj_bias = out_proj_bias_in.contiguous();
  const at::Tensor norm1_weight = norm1_weight_in.contiguous(), norm1_bias = norm1_bias_in.contiguous();
  const at::Tensor linear1_weight = linear1_weight_in.contiguous(), linear1_bias = linear1_bias_in.contiguous();
  const at::Tensor linear2_weight = linear2_weight_in.contiguous(), linear2_bias = linear2_bias_in.contiguous();
  const at::Tensor norm2_weight = norm2_weight_in.contiguous(), norm2_bias = norm2_bias_in.contiguous();
  const at::Tensor joints_out = at::empty({batch, joints, width}, tokens.options());

  AT_DISPATCH_FLOATING_TYPES(tokens.scalar_type(), "update_joints_forward", [&] {
    using T = scalar_t;
    const auto data = [](const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); };
    const UpdateJoints<T> kernel{joints,
                                 width,
                                 heads,
                                 context_width,
                                 hidden_width,
                                 data_of<T>(unfold),
                                 transposed,
                                 data_of<T>(value_bias),
                                 {data(out_proj_weight), data(out_proj_bias), width},
                                 {data(linear1_weight), data(linear1_bias), width},
                                 {data(linear2_weight), data(linear2_bias), hidden_width},
                                 {data(norm1_weight), data(norm1_bias), width, static_cast<T>(eps)},
                                 {data(norm2_weight), data(norm2_bias), width, static_cast<T>(eps)}};
    for_groups(batch, joints, [&](int64_t first, int64_t samples) {
      kernel.run(data(tokens) + first * joints * width, data(context) + first * heads * joints * context_width,
                 samples, joints_out.mutable_data_ptr<T>() + first * joints * width);
    });
  });
  return joints_out;
}

}  // namespace liftbyimage::cpu
