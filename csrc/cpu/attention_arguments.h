#pragma once

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "../checks.h"
#include "attention.h"
#include "ops.h"

// Sizes and allocations that the attention ops share.
namespace liftbyimage::cpu {

inline AttentionShape attention_shape(const at::Tensor& query, const at::Tensor& key, const OptionalTensor& value) {
  check_rank(query, 4, "query");
  check_rank(key, 4, "key");
  check_floating(query, "query");
  check_strided(query, "query");
  const int64_t batch = query.size(0), heads = query.size(1), groups = key.size(1), patches = key.size(2);
  TORCH_CHECK(groups == 1 || groups == heads, "key must have 1 or ", heads, " heads, got shape ", key.sizes());
  check_matches(key, {batch, groups, patches, query.size(3)}, query, "key");
  if (value.has_value()) {
    check_rank(*value, 4, "value");
    check_matches(*value, {batch, groups, patches, value->size(3)}, query, "value");
  }
  const int64_t value_width = value.has_value() ? value->size(3) : key.size(3);
  return {batch, heads, query.size(2), groups, patches, query.size(3), value_width, 0};
}

inline void check_saved(const AttentionShape& shape, const at::Tensor& query, const at::Tensor& context,
                        const at::Tensor& lse) {
  check_matches(context, {shape.batch, shape.heads, shape.joints, shape.value_width}, query, "context");
  check_shape(lse, {shape.batch, shape.heads, shape.joints}, "lse");
  const auto dtype = at::toOpMathType(query.scalar_type());
  TORCH_CHECK(lse.scalar_type() == dtype, "lse must have dtype ", dtype, ", got ", lse.scalar_type());
}

// grad_key and grad_value; [0] where not wanted, or where value is key and grad_key takes both.
inline std::pair<at::Tensor, at::Tensor> empty_token_gradients(const at::Tensor& key, const OptionalTensor& value,
                                                               bool wanted) {
  const at::Tensor none = at::empty({0}, key.options());
  return {wanted ? at::empty(key.sizes(), key.options()) : none,
          wanted && value.has_value() ? at::empty(value->sizes(), key.options()) : at::empty({0}, key.options())};
}

}  // namespace liftbyimage::cpu
