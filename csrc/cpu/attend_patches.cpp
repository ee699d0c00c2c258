#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include "../checks.h"
#include "attention.h"
#include "attention_arguments.h"
#include "ops.h"
#include "samples.h"

namespace liftbyimage::cpu {
namespace {

// [B, H, J, P] over patch-major memory [B, P, R]; [0] where not wanted.
at::Tensor empty_attention(const AttentionShape& shape, const at::TensorOptions& options, bool wanted) {
  if (!wanted) {
    return at::empty({0}, options);
  }
  const int64_t rows = shape.rows();
  return at::empty_strided({shape.batch, shape.heads, shape.joints, shape.patches},
                           {shape.patches * rows, shape.joints, 1, rows}, options);
}

// [B, P]; [0] where not wanted.
at::Tensor empty_importance(const AttentionShape& shape, const at::TensorOptions& options, bool wanted) {
  return wanted ? at::empty({shape.batch, shape.patches}, options) : at::empty({0}, options);
}

}  // namespace

Tensor4 attend_patches_forward(const at::Tensor& query_in, const at::Tensor& key_in, const OptionalTensor& value_in,
                               double scale, bool need_attention, bool need_importance) {
  const AttentionShape shape = attention_shape(query_in, key_in, value_in);
  const at::Tensor query = query_in.contiguous(), key = key_in.contiguous();
  const OptionalTensor value = contiguous(value_in);
  const auto options = query.options(), statistics = options.dtype(at::toOpMathType(query.scalar_type()));
  const at::Tensor context = at::empty({shape.batch, shape.heads, shape.joints, shape.value_width}, options);
  const at::Tensor importance = empty_importance(shape, statistics, need_importance);
  const at::Tensor lse = at::empty({shape.batch, shape.heads, shape.joints}, statistics);
  const at::Tensor attention = empty_attention(shape, options, need_attention);

  dispatch_types(query.scalar_type(), [&](auto element, auto operand) {
    using scalar_t = decltype(element);
    using S = decltype(operand);
    using T = at::opmath_type<S>;
    const Attention<S> kernel(shape, static_cast<T>(scale));
    for_samples(shape.batch, [&](int64_t b) {
      const SampleInput<scalar_t, S> q(query, b), k(key, b), v(value, b);
      const SampleOutput<scalar_t, T> out_context(context, b);
      const SampleOutput<scalar_t, S> out_attention(attention, b);
      const SampleOutput<T, T> out_importance(importance, b), out_lse(lse, b);
      kernel.forward({q.data(), k.data(), v.data() ? v.data() : k.data(), nullptr, nullptr},
                     {out_context.data(), out_importance.data(), out_lse.data(), nullptr, out_attention.data(), shape.rows(),
                      nullptr});
    });
  });
  return {context, importance, attention, lse};
}

Tensor3 attend_patches_backward(const OptionalTensor& grad_context_in, const OptionalTensor& grad_importance_in,
                                const OptionalTensor& grad_attention_in, const at::Tensor& query_in,
                                const at::Tensor& key_in, const OptionalTensor& value_in, const at::Tensor& context,
                                const at::Tensor& lse, double scale, bool need_token_grads) {
  const AttentionShape shape = attention_shape(query_in, key_in, value_in);
  check_saved(shape, query_in, context, lse);
  check_matches(grad_context_in, context.sizes(), query_in, "grad_context");
  check_matches(grad_importance_in, {shape.batch, shape.patches}, lse, "grad_importance");
  check_matches(grad_attention_in, {shape.batch, shape.heads, shape.joints, shape.patches}, query_in,
                "grad_attention");
  const at::Tensor query = query_in.contiguous(), key = key_in.contiguous();
  const OptionalTensor value = contiguous(value_in), grad_context = contiguous(grad_context_in);
  const OptionalTensor grad_importance = contiguous(grad_importance_in);
  const OptionalTensor grad_attention =  // [B, P, R], a view where the gradient is patch-major as the output is
      grad_attention_in.has_value()
          ? OptionalTensor(grad_attention_in->flatten(1, 2).transpose(1, 2).contiguous())
          : std::nullopt;
  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  const auto [grad_key, grad_value] = empty_token_gradients(key, value, need_token_grads);

  dispatch_types(query.scalar_type(), [&](auto element, auto operand) {
    using scalar_t = decltype(element);
    using S = decltype(operand);
    using T = at::opmath_type<S>;
    const Attention<S> kernel(shape, static_cast<T>(scale));
    for_samples(shape.batch, [&](int64_t b) {
      const SampleInput<scalar_t, S> q(query, b), k(key, b), v(value, b);
      const SampleInput<scalar_t, S> dcontext(grad_context, b), dattention(grad_attention, b);
      const SampleInput<T, T> dimportance(grad_importance, b);
      const SampleOutput<scalar_t, T> dquery(grad_query, b), dkey(grad_key, b), dvalue(grad_value, b);
      kernel.backward({q.data(), k.data(), v.data() ? v.data() : k.data(), nullptr,
                       dcontext.data(), nullptr, dimportance.data(), dattention.data(), shape.rows(), nullptr, 0},
                      {dquery.data(), dkey.data(), v.data() ? dvalue.data() : dkey.data(), nullptr});
    });
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace liftbyimage::cpu
