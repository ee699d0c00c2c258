#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "linear_gradients.h"
#include "small_tokens.h"

// The ends of a pre-norm branch with stochastic depth, updated = tokens + scale · branch(LayerNorm(tokens)), over the
// samples whose branch is computed. Their rows are counted without the others.
namespace liftbyimage::cpu {

// S is the type of tensors, T that of sums.
template <typename S, typename T>
struct ResidualBranch {
  int64_t count, width;  // tokens of a sample, D
  LayerNorm<T> norm;
  const KeptSamples<T>& kept;
  const S* tokens;  // [B, T, D], as updated
  S* updated;
  T* statistics;    // [B, T, 2], null: not kept

  // Where row `row` of the kept samples from `first` on lies among all tokens.
  int64_t token_of(int64_t first, int64_t row) const { return kept.samples[first + row / count] * count + row % count; }

  void normalize(int64_t first, int64_t rows, S* normalized) const {
    constexpr int64_t grain = 24;  // a row takes about 0.1 µs, waking a thread a few
    for_columns(rows, grain, [&](int64_t begin, int64_t size) {
      const Buffer<T> wide = std::is_same_v<S, T> ? nullptr : uninitialized<T>(width);
      for (int64_t row = begin; row < begin + size; ++row) {
        const int64_t token = token_of(first, row);
        const RowStatistics<T> found = normalize_token(tokens + token * width, normalized + row * width, wide.get());
        if (statistics != nullptr) {
          statistics[2 * token] = found.mean;
          statistics[2 * token + 1] = found.reciprocal_deviation;
        }
      }
    });
  }

  // `size` columns of a row of the branch, which are overwritten, join the residual.
  void add(int64_t first, int64_t row, int64_t column, T* y, int64_t size) const {
    const int64_t at = token_of(first, row) * width + column;
    const T scale = kept.scales[first + row / count];
    T residual[panel_columns];
    at::vec::convert(tokens + at, residual, size);
    for (int64_t c = 0; c < size; ++c) {
      y[c] = residual[c] + scale * y[c];
    }
    at::vec::convert(y, updated + at, size);
  }

 private:
  RowStatistics<T> normalize_token(const S* token, S* target, T* wide) const {
    if constexpr (std::is_same_v<S, T>) {
      return normalize_row(norm, token, target);
    } else {
      at::vec::convert(token, wide, width);
      const RowStatistics<T> found = normalize_row(norm, wide, wide);
      at::vec::convert(wide, target, width);
      return found;
    }
  }
};

// Of the parameters of a branch with two linear layers; null where not wanted. Those of biases and of the norm start at
// zero, the others need not.
template <typename T>
struct BranchGradients {
  T* norm_weight;
  T* norm_bias;
  T* weight1;
  T* bias1;
  T* weight2;
  T* bias2;
};

// The tensors of a branch's gradients: tokens, norm weight and bias, weight and bias of each linear layer; undefined
// where not wanted.
using BranchTensors = std::array<at::Tensor, 7>;

// f(part, gradients) for every part of the rows; the parts' gradients are then summed in their order.
template <typename T, typename F>
void for_parts(int64_t parts, const BranchTensors& tensors, const F& f) {
  const auto gradients = [&](const auto& of) { return BranchGradients<T>{of(1), of(2), of(3), of(4), of(5), of(6)}; };
  if (parts == 1) {
    f(int64_t(0), gradients([&](int i) { return tensors[i].defined() ? tensors[i].mutable_data_ptr<T>() : nullptr; }));
    return;
  }
  constexpr int64_t line = 64 / sizeof(T);
  std::array<int64_t, 8> starts = {};  // of each tensor in the sums of a part, the end last
  for (size_t i = 1; i < tensors.size(); ++i) {
    starts[i + 1] = starts[i] + (tensors[i].defined() ? line * divide_up(tensors[i].numel(), line) : 0);
  }
  const int64_t size = starts[tensors.size()];
  const Buffer<T> sums = uninitialized<T>(parts * size);
  parallel_tasks(parts, 1, [&](int64_t part) {
    T* own = sums.get() + part * size;
    std::fill_n(own, size, T(0));
    f(part, gradients([&](int i) { return tensors[i].defined() ? own + starts[i] : nullptr; }));
  });
  for (size_t i = 1; i < tensors.size(); ++i) {
    if (!tensors[i].defined()) {
      continue;
    }
    T* target = tensors[i].mutable_data_ptr<T>();
    for_columns(tensors[i].numel(), 4096, [&](int64_t first, int64_t count) {
      const T* source = sums.get() + starts[i] + first;
      std::copy_n(source, count, target + first);
      for (int64_t part = 1; part < parts; ++part) {
        scale_row(target + first, source + part * size, T(1), count, true);
      }
    });
  }
}

template <typename T>
struct ResidualBranchBackward {
  int64_t count, width;
  LayerNorm<T> norm;
  const KeptSamples<T>& kept;
  const T* tokens;       // [B, T, D], as grad_updated
  const T* grad_updated;
  const T* statistics;   // [B, T, 2]
  T* grad_tokens;        // null: not wanted

  int64_t token_of(int64_t row) const { return kept.samples[row / count] * count + row % count; }

  // Whether the gradient of the branch's input is of use.
  bool wants_normalized(const BranchGradients<T>& grads) const {
    return grad_tokens != nullptr || grads.norm_weight != nullptr || grads.norm_bias != nullptr;
  }

  // The gradient of the branch's result, and its input again, [size, D] each, for the kept rows [first, first + size).
  void begin(int64_t first, int64_t size, T* grad_branch, T* normalized) const {
    parallel_tasks(size, 24, [&](int64_t row) {
      const int64_t token = token_of(first + row);
      scale_row(grad_branch + row * width, grad_updated + token * width, kept.scales[(first + row) / count], width,
                false);
      normalize_row(norm, statistics_at(token), tokens + token * width, normalized + row * width);
    });
  }

  // What the gradient of the branch's input [size, D] gives tokens and layer norm.
  void finish(int64_t first, int64_t size, const T* grad_normalized, const BranchGradients<T>& grads) const {
    using Vec = at::vec::Vectorized<T>;
    if (grad_tokens != nullptr) {
      parallel_tasks(size, 24, [&](int64_t row) {
        const int64_t token = token_of(first + row), at = token * width;
        normalize_row_backward(norm, statistics_at(token), tokens + at, grad_normalized + row * width,
                               grad_updated + at, grad_tokens + at);
      });
    }
    if (grads.norm_bias != nullptr) {
      add_column_sums(size, width, grad_normalized, grads.norm_bias);
    }
    if (grads.norm_weight != nullptr) {
      add_column_sums(size, width, grads.norm_weight, [&](int64_t row, int64_t column, int64_t lanes) {
        const int64_t token = token_of(first + row);
        const RowStatistics<T> found = statistics_at(token);
        const Vec normal =
            (Vec::loadu(tokens + token * width + column, lanes) - Vec(found.mean)) * Vec(found.reciprocal_deviation);
        return normal * Vec::loadu(grad_normalized + row * width + column, lanes);
      });
    }
  }

 private:
  RowStatistics<T> statistics_at(int64_t token) const { return {statistics[2 * token], statistics[2 * token + 1]}; }
};

inline at::ScalarType sums_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Dense and aligned: BLAS sums in an order that depends on its operands' alignment.
inline at::Tensor operand(const at::Tensor& tensor, at::ScalarType type) {
  const at::Tensor dense = tensor.to(type).contiguous();
  return is_aligned(dense.const_data_ptr()) ? dense : dense.clone();
}

// Of a branch's backward pass: empty where `any` sample is kept and all is written, else zeros.
inline BranchTensors branch_tensors(const std::array<const at::Tensor*, 7>& inputs, const c10::List<bool>& wanted,
                                    const at::TensorOptions& options, bool any) {
  BranchTensors grads;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (wanted[i]) {
      const bool written = any && inputs[i]->dim() > 1;  // biases and norms are added to
      grads[i] = written ? at::empty(inputs[i]->sizes(), options) : at::zeros(inputs[i]->sizes(), options);
    }
  }
  return grads;
}

// Those wanted, as the op returns them.
inline std::vector<at::Tensor> defined_tensors(const BranchTensors& tensors, at::ScalarType type) {
  std::vector<at::Tensor> results;
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined()) {
      results.push_back(tensor.to(type));
    }
  }
  return results;
}

}  // namespace liftbyimage::cpu
