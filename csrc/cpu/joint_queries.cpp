#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>

#include "../checks.h"
#include "small_tokens.h"
#include "ops.h"
#include "samples.h"
#include "token_attention.h"

namespace liftbyimage::cpu {
namespace {

template <typename T>
class JointQueries {
 public:
  int64_t joints, width, heads, query_width;
  Linear<T> in_proj, out_proj, query;
  LayerNorm<T> norm;
  const T* fold;  // [H, E, W], null: the plain query of every head

  // tokens, joints_out [samples, J, D], queries [samples, H, J, W]
  void run(const T* tokens, int64_t samples, T* joints_out, T* queries) const {
    const int64_t rows = samples * joints, per_task = heads_per_task(head_width());
    const Buffer<T> scratch = uninitialized<T>(rows * 4 * width);
    T* projected = scratch.get();                   // [rows, 3D], then the queries [rows, D]
    T* attended = projected + rows * 3 * width;     // [rows, D]
    for_columns(heads, per_task, [&](int64_t first, int64_t count) {
      attend(tokens, samples, first, count, projected, attended);
    });
    for_columns(width, task_columns, [&](int64_t first, int64_t count) {
      apply_linear(out_proj, first, count, attended, rows, tokens, joints_out, width);
    });
    normalize_rows(norm, rows, joints_out);
    for_columns(heads, per_task, [&](int64_t first, int64_t count) {
      ask(joints_out, samples, first, count, projected, queries);
    });
  }

 private:
  int64_t head_width() const { return width / heads; }

  // Projections and attention of heads [first, first + count).
  void attend(const T* tokens, int64_t samples, int64_t first, int64_t count, T* projected, T* attended) const {
    const int64_t E = head_width(), stride = 3 * width;
    for (int64_t part = 0; part < 3; ++part) {
      apply_linear<T>(in_proj, part * width + first * E, count * E, tokens, samples * joints, nullptr, projected,
                      stride);
    }
    const TokenAttention<T> attention{joints, count, E, T(1) / std::sqrt(static_cast<T>(E))};
    const Buffer<T> scratch = uninitialized<T>(attention.scratch_size());
    for (int64_t sample = 0; sample < samples; ++sample) {
      const T* q = projected + sample * joints * stride + first * E;  // [J, count · E], as key and value beside it
      attention.forward({q, q + width, q + 2 * width, stride}, scratch.get(),
                        attended + sample * joints * width + first * E, width);
    }
  }

  // The queries of heads [first, first + count), folded.
  void ask(const T* tokens, int64_t samples, int64_t first, int64_t count, T* plain_queries, T* queries) const {
    const int64_t E = head_width(), W = query_width;
    apply_linear<T>(query, first * E, count * E, tokens, samples * joints, nullptr, plain_queries, width);
    for (int64_t sample = 0; sample < samples; ++sample) {
      for (int64_t head = first; head < first + count; ++head) {
        const T* q = plain_queries + sample * joints * width + head * E;  // [J, E]
        T* target = queries + (sample * heads + head) * joints * W;       // [J, W]
        if (fold != nullptr) {
          multiply(joints, W, E, q, width, 1, fold + head * E * W, W, target, W);
        } else {
          for (int64_t row = 0; row < joints; ++row) {
            std::memcpy(target + row * E, q + row * width, E * sizeof(T));
          }
        }
      }
    }
  }
};

}  // namespace

Tensor2 joint_queries_forward(const at::Tensor& joints_in, const at::Tensor& in_proj_weight_in,
                              const at::Tensor& in_proj_bias_in, const at::Tensor& out_proj_weight_in,
                              const at::Tensor& out_proj_bias_in, const at::Tensor& norm_weight_in,
                              const at::Tensor& norm_bias_in, const at::Tensor& query_weight_in,
                              const at::Tensor& query_bias_in, const OptionalTensor& fold_in, int64_t heads,
                              double eps) {
  check_rank(joints_in, 3, "joints");
  const int64_t batch = joints_in.size(0), joints = joints_in.size(1), width = joints_in.size(2);
  TORCH_CHECK(heads >= 1 && width % heads == 0, "heads must divide D = ", width, ", got ", heads);
  const int64_t query_width = fold_in.has_value() && fold_in->dim() == 3 ? fold_in->size(2) : width / heads;
  check_matches(joints_in, {batch, joints, width}, joints_in, "joints");
  check_matches(in_proj_weight_in, {3 * width, width}, joints_in, "in_proj_weight");
  check_matches(in_proj_bias_in, {3 * width}, joints_in, "in_proj_bias");
  check_matches(out_proj_weight_in, {width, width}, joints_in, "out_proj_weight");
  check_matches(out_proj_bias_in, {width}, joints_in, "out_proj_bias");
  check_matches(norm_weight_in, {width}, joints_in, "norm_weight");
  check_matches(norm_bias_in, {width}, joints_in, "norm_bias");
  check_matches(query_weight_in, {width, width}, joints_in, "query_weight");
  check_matches(query_bias_in, {width}, joints_in, "query_bias");
  check_matches(fold_in, {heads, width / heads, query_width}, joints_in, "fold");
  const at::Tensor tokens = joints_in.contiguous();
  const at::Tensor in_proj_weight = in_proj_weight_in.contiguous(), in_proj_bias = in_proj_bias_in.contiguous();
  const at::Tensor out_proj_weight = out_proj_weight_in.contiguous(), out_proj_bias = out_proj_bias_in.contiguous();
  const at::Tensor norm_weight = norm_weight_in.contiguous(), norm_bias = norm_bias_in.contiguous();
  const at::Tensor query_weight = query_weight_in.contiguous(), query_bias = query_bias_in.contiguous();
  const OptionalTensor fold = contiguous(fold_in);
  const at::Tensor joints_out = at::empty({batch, joints, width}, tokens.options());
  const at::Tensor queries = at::empty({batch, heads, joints, query_width}, tokens.options());

  AT_DISPATCH_FLOATING_TYPES(tokens.scalar_type(), "joint_queries_forward", [&] {
    using T = scalar_t;
    const auto data = [](const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); };
    const JointQueries<T> kernel{joints,
                                 width,
                                 heads,
                                 query_width,
                                 {data(in_proj_weight), data(in_proj_bias), width},
                                 {data(out_proj_weight), data(out_proj_bias), width},
                                 {data(query_weight), data(query_bias), width},
                                 {data(norm_weight), data(norm_bias), width, static_cast<T>(eps)},
                                 data_of<T>(fold)};
    for_groups(batch, joints, [&](int64_t first, int64_t samples) {
      kernel.run(data(tokens) + first * joints * width, samples,
                 joints_out.mutable_data_ptr<T>() + first * joints * width,
                 queries.mutable_data_ptr<T>() + first * heads * joints * query_width);
    });
  });
  return {joints_out, queries};
}

}  // namespace liftbyimage::cpu
