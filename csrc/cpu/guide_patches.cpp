#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include "../checks.h"
#include "attention.h"
#include "attention_arguments.h"
#include "ops.h"
#include "samples.h"

namespace liftbyimage::cpu {
namespace {

// One group whose keys and values are the channels.
AttentionShape guide_shape(const at::Tensor& query, const at::Tensor& channels) {
  check_rank(channels, 3, "channels");
  return attention_shape(query, channels.unsqueeze(1), std::nullopt);
}

}  // namespace

Tensor3 guide_patches_forward(const at::Tensor& query_in, const at::Tensor& channels_in, double scale) {
  const AttentionShape shape = guide_shape(query_in, channels_in);
  const at::Tensor query = query_in.contiguous(), channels = channels_in.contiguous();
  const auto options = query.options(), statistics = options.dtype(at::toOpMathType(query.scalar_type()));
  const int64_t width = shape.key_width, guided_width = width + shape.rows();
  const at::Tensor context = at::empty(query.sizes(), options);
  const at::Tensor guided = at::empty({shape.batch, shape.patches, guided_width}, options);
  const at::Tensor lse = at::empty({shape.batch, shape.heads, shape.joints}, statistics);

  dispatch_types(query.scalar_type(), [&](auto element, auto operand) {
    using scalar_t = decltype(element);
    using S = decltype(operand);
    using T = at::opmath_type<S>;
    const Attention<S> kernel(shape, static_cast<T>(scale));
    for_samples(shape.batch, [&](int64_t b) {
      const SampleInput<scalar_t, S> q(query, b), x(channels, b);
      const SampleOutput<scalar_t, T> out_context(context, b);
      const SampleOutput<scalar_t, S> out_guided(guided, b);
      const SampleOutput<T, T> out_lse(lse, b);
      kernel.forward({q.data(), x.data(), x.data(), nullptr, nullptr},
                     {out_context.data(), nullptr, out_lse.data(), nullptr, out_guided.data() + width, guided_width,
                      out_guided.data()});
    });
  });
  return {context, guided, lse};
}

Tensor2 guide_patches_backward(const OptionalTensor& grad_context_in, const OptionalTensor& grad_guided_in,
                               const at::Tensor& query_in, const at::Tensor& channels_in, const at::Tensor& context,
                               const at::Tensor& lse, double scale, bool need_channel_grads) {
  const AttentionShape shape = guide_shape(query_in, channels_in);
  const int64_t width = shape.key_width, guided_width = width + shape.rows();
  check_saved(shape, query_in, context, lse);
  check_matches(grad_context_in, context.sizes(), query_in, "grad_context");
  check_matches(grad_guided_in, {shape.batch, shape.patches, guided_width}, query_in, "grad_guided");
  const at::Tensor query = query_in.contiguous(), channels = channels_in.contiguous();
  const OptionalTensor grad_context = contiguous(grad_context_in), grad_guided = contiguous(grad_guided_in);
  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  const at::Tensor grad_channels = need_channel_grads ? at::empty(channels.sizes(), channels.options())
                                                      : at::empty({0}, channels.options());

  dispatch_types(query.scalar_type(), [&](auto element, auto operand) {
    using scalar_t = decltype(element);
    using S = decltype(operand);
    using T = at::opmath_type<S>;
    const Attention<S> kernel(shape, static_cast<T>(scale));
    for_samples(shape.batch, [&](int64_t b) {
      const SampleInput<scalar_t, S> q(query, b), x(channels, b), dcontext(grad_context, b), dguided(grad_guided, b);
      const SampleOutput<scalar_t, T> dquery(grad_query, b), dchannels(grad_channels, b);
      const S* dattention = dguided.data() ? dguided.data() + width : nullptr;
      kernel.backward({q.data(), x.data(), x.data(), nullptr, dcontext.data(), nullptr, nullptr, dattention,
                       guided_width, dguided.data(), guided_width},
                      {dquery.data(), dchannels.data(), dchannels.data(), nullptr});
    });
  });
  return {grad_query, grad_channels};
}

}  // namespace liftbyimage::cpu
