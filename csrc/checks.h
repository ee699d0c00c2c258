#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

// The Python edge has validated its arguments with full sentences; these keep a direct call of a raw op from
// reading out of bounds. Order of every check: shape, dtype, device, layout.
namespace liftbyimage {

inline void check_shape(const at::Tensor& tensor, at::IntArrayRef expected, const char* name) {
  TORCH_CHECK(tensor.sizes() == expected, name, " must have shape ", expected, ", got ", tensor.sizes());
}

inline void check_rank(const at::Tensor& tensor, int64_t rank, const char* name) {
  TORCH_CHECK(tensor.dim() == rank, name, " must have ", rank, " dimensions, got shape ", tensor.sizes());
  for (int64_t dim = 1; dim < rank; ++dim) {
    TORCH_CHECK(tensor.size(dim) > 0, name, " must be non-empty beyond its batch, got shape ", tensor.sizes());
  }
}

inline void check_floating(const at::Tensor& tensor, const char* name) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kDouble,
              name, " must be float32, float16, bfloat16 or float64, got ", dtype);
}

inline void check_strided(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.layout() == at::kStrided, name, " must be a dense tensor, got layout ", tensor.layout());
}

// `tensor` has the shape `expected` and shares dtype, device and dense layout with `like`.
inline void check_matches(const at::Tensor& tensor, at::IntArrayRef expected, const at::Tensor& like, const char* name) {
  check_shape(tensor, expected, name);
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(),
              name, " must have dtype ", like.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == like.device(), name, " must be on ", like.device(), ", got ", tensor.device());
  check_strided(tensor, name);
}

inline void check_matches(const std::optional<at::Tensor>& tensor, at::IntArrayRef expected, const at::Tensor& like,
                          const char* name) {
  if (tensor.has_value()) {
    check_matches(*tensor, expected, like, name);
  }
}

}  // namespace liftbyimage
