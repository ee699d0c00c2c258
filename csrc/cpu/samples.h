#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "gemm_bf16.h"
#include "parallel.h"
#include "tiles.h"

// One sample of a tensor, aligned and in the type of the arithmetic: in place where it is so already, else a copy.
namespace liftbyimage::cpu {

template <typename From, typename To>
void convert_parallel(const From* from, To* to, int64_t size) {
  constexpr int64_t chunk = 1 << 14;
  parallel_tasks(divide_up(size, chunk), 4, [&](int64_t i) {
    at::vec::convert(from + i * chunk, to + i * chunk, std::min(chunk, size - i * chunk));
  });
}

template <typename scalar_t, typename T>
class SampleInput {
 public:
  // `tensor` is contiguous, batch first; an absent one reads as null.
  SampleInput(const std::optional<at::Tensor>& tensor, int64_t batch_index) {
    if (!tensor.has_value()) {
      return;
    }
    const int64_t size = tensor->numel() / tensor->size(0);
    const scalar_t* source = tensor->const_data_ptr<scalar_t>() + batch_index * size;
    if constexpr (std::is_same_v<scalar_t, T>) {
      if (is_aligned(source)) {
        data_ = source;
        return;
      }
    }
    copy_ = uninitialized<T>(size);
    convert_parallel(source, copy_.get(), size);
    data_ = copy_.get();
  }

  const T* data() const { return data_; }

 private:
  Buffer<T> copy_;
  const T* data_ = nullptr;
};

template <typename scalar_t, typename T>
class SampleOutput {
 public:
  // `tensor` is contiguous, batch first; an undefined or unwanted (one-dimensional) one is null.
  SampleOutput(const at::Tensor& tensor, int64_t batch_index) {
    if (!tensor.defined() || tensor.dim() < 2) {
      return;
    }
    size_ = tensor.numel() / tensor.size(0);
    target_ = tensor.mutable_data_ptr<scalar_t>() + batch_index * size_;
    if constexpr (std::is_same_v<scalar_t, T>) {
      if (is_aligned(target_)) {
        data_ = target_;
        return;
      }
    }
    copy_ = uninitialized<T>(size_);
    data_ = copy_.get();
  }

  // The finished sample goes into the tensor at the end of its scope.
  ~SampleOutput() {
    if (copy_) {
      convert_parallel(copy_.get(), target_, size_);
    }
  }
  SampleOutput(const SampleOutput&) = delete;
  SampleOutput& operator=(const SampleOutput&) = delete;

  T* data() const { return data_; }

 private:
  Buffer<T> copy_;
  scalar_t* target_ = nullptr;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// f(scalar_t(), S()) for tensors of `dtype`, which enter products as S.
template <typename F>
void dispatch_types(at::ScalarType dtype, const F& f) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "attention", [&] {
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      if (has_bf16_products()) {
        f(scalar_t(), at::BFloat16());
        return;
      }
    }
    f(scalar_t(), at::opmath_type<scalar_t>());
  });
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(tensor->contiguous()) : std::nullopt;
}

}  // namespace liftbyimage::cpu
