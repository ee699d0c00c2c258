#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include "../checks.h"
#include "attention.h"
#include "attention_arguments.h"
#include "ops.h"
#include "samples.h"

namespace liftbyimage::cpu {
namespace {

AttentionShape pose_guided_shape(const at::Tensor& query, const at::Tensor& key, const OptionalTensor& value,
                                 const at::Tensor& pose_value) {
  AttentionShape shape = attention_shape(query, key, value);
  check_rank(pose_value, 4, "pose_value");
  shape.model_width = pose_value.size(3);
  check_matches(pose_value, {shape.batch, shape.heads, shape.joints, shape.model_width}, query, "pose_value");
  return shape;
}

void check_patches_is_key(const AttentionShape& shape, const at::Tensor& key) {
  TORCH_CHECK(shape.groups == 1 && shape.key_width == shape.model_width,
              "patches can be key only with one shared head of width ", shape.model_width, ", got key of shape ",
              key.sizes());
}

}  // namespace

Tensor4 pose_guided_attention_forward(const at::Tensor& query_in, const at::Tensor& key_in,
                                      const OptionalTensor& value_in, const at::Tensor& pose_value_in,
                                      const OptionalTensor& patches_in, double scale) {
  const AttentionShape shape = pose_guided_shape(query_in, key_in, value_in, pose_value_in);
  if (!patches_in.has_value()) {
    check_patches_is_key(shape, key_in);
  }
  check_matches(patches_in, {shape.batch, shape.patches, shape.model_width}, query_in, "patches");
  const at::Tensor query = query_in.contiguous(), key = key_in.contiguous(), pose_value = pose_value_in.contiguous();
  const OptionalTensor value = contiguous(value_in), patches = contiguous(patches_in);
  const auto options = query.options(), statistics = options.dtype(at::toOpMathType(query.scalar_type()));
  const at::Tensor context = at::empty({shape.batch, shape.heads, shape.joints, shape.value_width}, options);
  const at::Tensor patches_out = at::empty({shape.batch, shape.patches, shape.model_width}, options);
  const at::Tensor importance = at::empty({shape.batch, shape.patches}, statistics);
  const at::Tensor lse = at::empty({shape.batch, shape.heads, shape.joints}, statistics);

  dispatch_types(query.scalar_type(), [&](auto element, auto operand) {
    using scalar_t = decltype(element);
    using S = decltype(operand);
    using T = at::opmath_type<S>;
    const Attention<S> kernel(shape, static_cast<T>(scale));
    for_samples(shape.batch, [&](int64_t b) {
      const SampleInput<scalar_t, S> q(query, b), k(key, b), v(value, b), u(pose_value, b), tokens(patches, b);
      const SampleOutput<scalar_t, T> out_context(context, b), out_patches(patches_out, b);
      const SampleOutput<T, T> out_importance(importance, b), out_lse(lse, b);
      kernel.forward({q.data(), k.data(), v.data() ? v.data() : k.data(), u.data(),
                      tokens.data() ? tokens.data() : k.data()},
                     {out_context.data(), out_importance.data(), out_lse.data(), out_patches.data(), nullptr, 0,
                      nullptr});
    });
  });
  return {context, patches_out, importance, lse};
}

Tensor4 pose_guided_attention_backward(const OptionalTensor& grad_context_in, const OptionalTensor& grad_patches_in,
                                       const OptionalTensor& grad_importance_in, const at::Tensor& query_in,
                                       const at::Tensor& key_in, const OptionalTensor& value_in,
                                       const at::Tensor& pose_value_in, const at::Tensor& context,
                                       const at::Tensor& lse, double scale, bool need_token_grads,
                                       bool patches_is_key) {
  const AttentionShape shape = pose_guided_shape(query_in, key_in, value_in, pose_value_in);
  if (patches_is_key) {
    check_patches_is_key(shape, key_in);
  }
  check_saved(shape, query_in, context, lse);
  check_matches(grad_context_in, context.sizes(), query_in, "grad_context");
  check_matches(grad_patches_in, {shape.batch, shape.patches, shape.model_width}, query_in, "grad_patches");
  check_matches(grad_importance_in, {shape.batch, shape.patches}, lse, "grad_importance");
  const at::Tensor query = query_in.contiguous(), key = key_in.contiguous();
  const at::Tensor pose_value = pose_value_in.contiguous();
  const OptionalTensor value = contiguous(value_in), grad_context = contiguous(grad_context_in);
  const OptionalTensor grad_patches = contiguous(grad_patches_in), grad_importance = contiguous(grad_importance_in);
  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  const at::Tensor grad_pose_value = at::empty(pose_value.sizes(), query.options());
  const auto [grad_key, grad_value] = empty_token_gradients(key, value, need_token_grads);

  dispatch_types(query.scalar_type(), [&](auto element, auto operand) {
    using scalar_t = decltype(element);
    using S = decltype(operand);
    using T = at::opmath_type<S>;
    const Attention<S> kernel(shape, static_cast<T>(scale));
    for_samples(shape.batch, [&](int64_t b) {
      const SampleInput<scalar_t, S> q(query, b), k(key, b), v(value, b), u(pose_value, b);
      const SampleInput<scalar_t, S> dcontext(grad_context, b), dpatches(grad_patches, b);
      const SampleInput<T, T> dimportance(grad_importance, b);
      const SampleOutput<scalar_t, T> dquery(grad_query, b), dkey(grad_key, b), dvalue(grad_value, b);
      const SampleOutput<scalar_t, T> dpose_value(grad_pose_value, b);
      kernel.backward({q.data(), k.data(), v.data() ? v.data() : k.data(), u.data(),
                       dcontext.data(), dpatches.data(), dimportance.data(), nullptr, 0,
                       patches_is_key ? dpatches.data() : nullptr, shape.model_width},
                      {dquery.data(), dkey.data(), v.data() ? dvalue.data() : dkey.data(), dpose_value.data()});
    });
  });
  return {grad_query, grad_key, grad_value, grad_pose_value};
}

}  // namespace liftbyimage::cpu
