#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include "../checks.h"
#include "ops.h"
#include "token_attention.h"

namespace liftbyimage::cpu {
namespace {

struct TokenShape {
  int64_t batch, tokens, heads, head_width;

  int64_t width() const { return heads * head_width; }
};

TokenShape token_shape(const at::Tensor& query_key_value, int64_t heads) {
  check_rank(query_key_value, 3, "query_key_value");
  check_floating(query_key_value, "query_key_value");
  check_strided(query_key_value, "query_key_value");
  const int64_t packed = query_key_value.size(2);
  TORCH_CHECK(packed % 3 == 0, "query_key_value must have a width 3D, got ", packed);
  TORCH_CHECK(heads >= 1 && packed / 3 % heads == 0, "heads must divide D = ", packed / 3, ", got ", heads);
  return {query_key_value.size(0), query_key_value.size(1), heads, packed / 3 / heads};
}

// target [rows, width] = source, both in rows of their own stride
template <typename From, typename To>
void convert_rows(const From* source, int64_t source_stride, int64_t rows, int64_t width, To* target,
                  int64_t target_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    at::vec::convert(source + row * source_stride, target + row * target_stride, width);
  }
}

// One group of heads, in place where the tensors have the type of the arithmetic, T, else through copies.
template <typename scalar_t>
class HeadGroup {
 public:
  using T = at::opmath_type<scalar_t>;
  static constexpr bool in_place = std::is_same_v<scalar_t, T>;

  HeadGroup(const TokenShape& shape, int64_t count, double scale)
      : attention_{shape.tokens, count, shape.head_width, static_cast<T>(scale)}, packed_stride_(3 * shape.width()) {}

  // packed [tokens, 3D], result [tokens, D], both from the first of the group's heads on
  void forward(const scalar_t* packed, scalar_t* result) const {
    const Buffer<T> scratch = uninitialized<T>(attention_.scratch_size() + (in_place ? 0 : 4 * part()));
    if constexpr (in_place) {
      attention_.forward(parts(packed, width(), packed_stride_), scratch.get(), result, width());
    } else {
      T* copies = scratch.get() + attention_.scratch_size();  // query, key, value, result, [tokens, group] each
      read(packed, 3, packed_stride_, copies);
      attention_.forward(parts(copies, part(), group()), scratch.get(), copies + 3 * part(), group());
      convert_rows(copies + 3 * part(), group(), tokens(), group(), result, width());
    }
  }

  // grad_packed as packed, grad as the result of forward
  void backward(const scalar_t* packed, const scalar_t* grad, scalar_t* grad_packed) const {
    const int64_t size = attention_.backward_scratch_size();
    const Buffer<T> scratch = uninitialized<T>(size + (in_place ? 0 : 7 * part()));
    if constexpr (in_place) {
      differentiate(parts(packed, width(), packed_stride_), grad, width(), scratch.get(), grad_packed, width());
    } else {
      T* copies = scratch.get() + size;  // query, key, value, the gradients of each, that of the result
      T* grads = copies + 3 * part();
      read(packed, 3, packed_stride_, copies);
      read(grad, 1, width(), copies + 6 * part());
      differentiate(parts(copies, part(), group()), copies + 6 * part(), group(), scratch.get(), grads, part());
      for (int64_t i = 0; i < 3; ++i) {
        convert_rows(grads + i * part(), group(), tokens(), group(), grad_packed + i * width(), packed_stride_);
      }
    }
  }

 private:
  int64_t tokens() const { return attention_.tokens; }
  int64_t group() const { return attention_.heads * attention_.head_width; }
  int64_t part() const { return tokens() * group(); }
  int64_t width() const { return packed_stride_ / 3; }

  static PackedTokens<T> parts(const T* packed, int64_t distance, int64_t stride) {
    return {packed, packed + distance, packed + 2 * distance, stride};
  }

  // copies [count, tokens, group] of parts a width apart
  void read(const scalar_t* source, int64_t count, int64_t stride, T* copies) const {
    for (int64_t i = 0; i < count; ++i) {
      convert_rows(source + i * width(), stride, tokens(), group(), copies + i * part(), group());
    }
  }

  void differentiate(const PackedTokens<T>& in, const T* grad, int64_t grad_stride, T* scratch, T* grads,
                     int64_t distance) const {
    attention_.backward(in, grad, grad_stride, scratch, nullptr, grads, grads + distance, grads + 2 * distance);
  }

  TokenAttention<T> attention_;
  int64_t packed_stride_;
};

}  // namespace

at::Tensor attend_tokens_forward(const at::Tensor& query_key_value_in, int64_t heads, double scale) {
  const TokenShape shape = token_shape(query_key_value_in, heads);
  const at::Tensor query_key_value = query_key_value_in.contiguous();
  const at::Tensor attended = at::empty({shape.batch, shape.tokens, shape.width()}, query_key_value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, attended.scalar_type(), "attend_tokens_forward", [&] {
    const scalar_t* packed = query_key_value.const_data_ptr<scalar_t>();
    scalar_t* result = attended.mutable_data_ptr<scalar_t>();
    for_head_groups(shape.batch, shape.tokens, heads, shape.head_width, [&](int64_t sample, int64_t first, int64_t count) {
      const int64_t row = sample * shape.tokens * shape.width(), column = first * shape.head_width;
      HeadGroup<scalar_t>(shape, count, scale).forward(packed + 3 * row + column, result + row + column);
    });
  });
  return attended;
}

at::Tensor attend_tokens_backward(const at::Tensor& grad_in, const at::Tensor& query_key_value_in, int64_t heads,
                                  double scale) {
  const TokenShape shape = token_shape(query_key_value_in, heads);
  check_matches(grad_in, {shape.batch, shape.tokens, shape.width()}, query_key_value_in, "grad");
  const at::Tensor query_key_value = query_key_value_in.contiguous(), grad = grad_in.contiguous();
  const at::Tensor grad_query_key_value = at::empty(query_key_value.sizes(), query_key_value.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "attend_tokens_backward", [&] {
    const scalar_t* packed = query_key_value.const_data_ptr<scalar_t>();
    const scalar_t* cotangent = grad.const_data_ptr<scalar_t>();
    scalar_t* result = grad_query_key_value.mutable_data_ptr<scalar_t>();
    for_head_groups(shape.batch, shape.tokens, heads, shape.head_width, [&](int64_t sample, int64_t first, int64_t count) {
      const int64_t row = sample * shape.tokens * shape.width(), column = first * shape.head_width;
      HeadGroup<scalar_t>(shape, count, scale)
          .backward(packed + 3 * row + column, cotangent + row + column, result + 3 * row + column);
    });
  });
  return grad_query_key_value;
}

}  // namespace liftbyimage::cpu
