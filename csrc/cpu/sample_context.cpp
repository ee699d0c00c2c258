#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "ops.h"
#include "parallel.h"
#include "sampling.h"
#include "tiles.h"

namespace liftbyimage::cpu {
namespace {

struct ContextShape {
  int64_t batch, levels, joints, heads, samples, most_channels;
  std::vector<int64_t> channels;

  int64_t places() const { return heads * samples; }
};

ContextShape context_shape(at::TensorList feature_maps, const at::Tensor& reference, const at::Tensor& offsets,
                           const at::Tensor& weights) {
  check_rank(offsets, 6, "offsets");
  check_floating(offsets, "offsets");
  check_strided(offsets, "offsets");
  ContextShape shape{offsets.size(0), offsets.size(1), offsets.size(2), offsets.size(3), offsets.size(4), 0, {}};
  check_shape(offsets, {shape.batch, shape.levels, shape.joints, shape.heads, shape.samples, 2}, "offsets");
  check_matches(reference, {shape.batch, shape.joints, 2}, offsets, "reference");
  check_matches(weights, {shape.batch, shape.levels, shape.joints, shape.heads, shape.samples}, offsets, "weights");
  TORCH_CHECK(static_cast<int64_t>(feature_maps.size()) == shape.levels, "feature_maps must be ", shape.levels,
              " tensors, got ", feature_maps.size());
  for (const at::Tensor& map : feature_maps) {
    check_rank(map, 4, "feature_maps");
    check_matches(map, {shape.batch, map.size(1), map.size(2), map.size(3)}, offsets, "feature_maps");
    shape.channels.push_back(map.size(1));
    shape.most_channels = std::max(shape.most_channels, map.size(1));
  }
  return shape;
}

std::vector<at::Tensor> contiguous(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.contiguous());
  }
  return result;
}

template <typename S>
std::vector<S*> pointers(const std::vector<at::Tensor>& tensors) {
  std::vector<S*> result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.mutable_data_ptr<S>());
  }
  return result;
}

// Forward and backward on tensors of S, with arithmetic in T.
template <typename S>
class SampleContext {
 public:
  using T = at::opmath_type<S>;

  SampleContext(const ContextShape& shape, const std::vector<at::Tensor>& maps, const at::Tensor& reference,
                const at::Tensor& offsets, const at::Tensor& weights, bool zeros)
      : shape_(shape),
        maps_(level_maps<S>(maps)),
        reference_(reference.const_data_ptr<S>()),
        offsets_(offsets.const_data_ptr<S>()),
        weights_(weights.const_data_ptr<S>()),
        zeros_(zeros) {}

  void forward(const std::vector<S*>& contexts) const {
    for_joints([&](int64_t begin, int64_t end) {
      Corners<const S, T> corners(shape_.places(), shape_.most_channels);
      std::vector<T> factors(4 * shape_.samples), sums(shape_.most_channels);
      for (int64_t joint = begin; joint < end; ++joint) {
        for (int64_t level = 0; level < shape_.levels; ++level) {
          const int64_t channels = shape_.channels[level];
          find(corners, maps_[level], joint, level);
          for (int64_t head = 0; head < shape_.heads; ++head) {
            corners.weigh(head * shape_.samples, shape_.samples, weights_of(joint, level, head), factors.data());
            write_sum(corners.rows(head * shape_.samples), factors.data(), channels, sums.data(),
                      contexts[level] + (joint * shape_.heads + head) * channels);
          }
        }
      }
    });
  }

  // Gradients of places and weights, null where unwanted.
  void backward(const std::vector<S*>& grad_contexts, S* grad_offsets, S* grad_weights) const {
    for_joints([&](int64_t begin, int64_t end) {
      Corners<const S, T> corners(shape_.places(), shape_.most_channels);
      std::vector<T> row(shape_.most_channels);
      for (int64_t joint = begin; joint < end; ++joint) {
        for (int64_t level = 0; level < shape_.levels; ++level) {
          const int64_t channels = shape_.channels[level];
          find(corners, maps_[level], joint, level);
          for (int64_t head = 0; head < shape_.heads; ++head) {
            const S* grad = grad_contexts[level] + (joint * shape_.heads + head) * channels;
            at::vec::convert(grad, row.data(), channels);
            place_gradients(corners, row.data(), joint, level, head, grad_offsets, grad_weights);
          }
        }
      }
    });
  }

  // Gradient of sample b of a level's map, target [Hf, Wf, C].
  void map_gradient(int64_t level, int64_t b, const S* grad_contexts, S* target) const {
    const LevelMap<const S>& map = maps_[level];
    const int64_t channels = map.channels, size = channels * map.height * map.width;
    const auto sums_in = [&](T* sums) {
      return SampleMap<T>{sums, channels, map.height, map.width, map.width * channels, channels};
    };
    if constexpr (std::is_same_v<S, T>) {
      scatter(level, b, grad_contexts, sums_in(target));
    } else {
      const Buffer<T> sums = uninitialized<T>(size);
      scatter(level, b, grad_contexts, sums_in(sums.get()));
      at::vec::convert(sums.get(), target, size);
    }
  }

 private:
  const ContextShape& shape_;
  const std::vector<LevelMap<const S>> maps_;
  const S* reference_;
  const S* offsets_;
  const S* weights_;
  bool zeros_;

  // f(begin, end) over the joints of all samples; a joint's levels differ in work, joints do not.
  template <typename F>
  void for_joints(const F& f) const {
    at::parallel_for(0, shape_.batch * shape_.joints, 2, f);
  }

  // Index of the first of a joint's places in a level, as in weights [B, L, J, H, S].
  int64_t first_place(int64_t joint, int64_t level) const {
    const int64_t b = joint / shape_.joints;
    return ((b * shape_.levels + level) * shape_.joints + joint % shape_.joints) * shape_.places();
  }

  void find(Corners<const S, T>& corners, const LevelMap<const S>& map, int64_t joint, int64_t level) const {
    corners.find(map.sample(joint / shape_.joints), reference_ + 2 * joint,
                 offsets_ + 2 * first_place(joint, level), zeros_);
  }

  void scatter(int64_t level, int64_t b, const S* grad_contexts, const SampleMap<T>& grad_map) const {
    Corners<T, T> corners(shape_.places(), grad_map.channels);
    std::vector<T> row(grad_map.channels), factors(4 * shape_.samples);
    std::fill_n(grad_map.data, grad_map.height * grad_map.row_stride, T(0));
    for (int64_t joint = b * shape_.joints; joint < (b + 1) * shape_.joints; ++joint) {
      corners.find(grad_map, reference_ + 2 * joint, offsets_ + 2 * first_place(joint, level), zeros_);
      for (int64_t head = 0; head < shape_.heads; ++head) {
        at::vec::convert(grad_contexts + (joint * shape_.heads + head) * grad_map.channels, row.data(),
                         grad_map.channels);
        scatter_sum(corners, head * shape_.samples, shape_.samples, weights_of(joint, level, head), row.data(),
                    grad_map.channels, factors.data());
      }
    }
  }

  const S* weights_of(int64_t joint, int64_t level, int64_t head) const {
    return weights_ + first_place(joint, level) + head * shape_.samples;
  }

  void write_sum(const S* const* rows, const T* factors, int64_t channels, T* sums, S* target) const {
    if constexpr (std::is_same_v<S, T>) {
      sum_rows(rows, factors, 4 * shape_.samples, channels, target);
    } else {
      sum_rows(rows, factors, 4 * shape_.samples, channels, sums);
      at::vec::convert(sums, target, channels);
    }
  }

  void place_gradients(const Corners<const S, T>& corners, const T* grad, int64_t joint, int64_t level, int64_t head,
                       S* grad_offsets, S* grad_weights) const {
    const int64_t start = first_place(joint, level);
    differentiate_places(corners, head * shape_.samples, shape_.samples, weights_of(joint, level, head), grad,
                         shape_.channels[level], [&](int64_t place, T of_weight, const std::array<T, 2>& of_offset) {
                           if (grad_weights != nullptr) {
                             grad_weights[start + place] = static_cast<S>(of_weight);
                           }
                           if (grad_offsets != nullptr) {
                             grad_offsets[2 * (start + place)] = static_cast<S>(of_offset[0]);
                             grad_offsets[2 * (start + place) + 1] = static_cast<S>(of_offset[1]);
                           }
                         });
  }
};

}  // namespace

std::vector<at::Tensor> sample_context_forward(at::TensorList feature_maps, const at::Tensor& reference_in,
                                               const at::Tensor& offsets_in, const at::Tensor& weights_in,
                                               bool zeros) {
  const ContextShape shape = context_shape(feature_maps, reference_in, offsets_in, weights_in);
  const std::vector<at::Tensor> maps = with_dense_channels(feature_maps);
  const at::Tensor reference = reference_in.contiguous(), offsets = offsets_in.contiguous();
  const at::Tensor weights = weights_in.contiguous();
  std::vector<at::Tensor> contexts;
  for (const int64_t channels : shape.channels) {
    contexts.push_back(at::empty({shape.batch, shape.joints, shape.heads, channels}, offsets.options()));
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, offsets.scalar_type(), "sample_context_forward", [&] {
    SampleContext<scalar_t>(shape, maps, reference, offsets, weights, zeros).forward(pointers<scalar_t>(contexts));
  });
  return contexts;
}

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> sample_context_backward(
    at::TensorList grad_contexts_in, at::TensorList feature_maps, const at::Tensor& reference_in,
    const at::Tensor& offsets_in, const at::Tensor& weights_in, bool zeros, bool need_places, bool need_weights,
    c10::List<bool> need_maps) {
  const ContextShape shape = context_shape(feature_maps, reference_in, offsets_in, weights_in);
  TORCH_CHECK(grad_contexts_in.size() == feature_maps.size() && need_maps.size() == feature_maps.size(),
              "grad_contexts and need_maps must be ", shape.levels, " each");
  for (int64_t level = 0; level < shape.levels; ++level) {
    check_matches(grad_contexts_in[level], {shape.batch, shape.joints, shape.heads, shape.channels[level]}, offsets_in,
                  "grad_contexts");
  }
  const std::vector<at::Tensor> grad_contexts = contiguous(grad_contexts_in);
  const at::Tensor reference = reference_in.contiguous(), offsets = offsets_in.contiguous();
  const at::Tensor weights = weights_in.contiguous(), none = at::empty({0}, offsets.options());
  const at::Tensor grad_offsets = need_places ? at::empty(offsets.sizes(), offsets.options()) : none;
  const at::Tensor grad_weights = need_weights ? at::empty(weights.sizes(), weights.options()) : none.clone();
  std::vector<at::Tensor> grad_maps;
  std::vector<int64_t> wanted;  // levels
  for (int64_t level = 0; level < shape.levels; ++level) {
    const at::Tensor& map = feature_maps[level];
    grad_maps.push_back(need_maps[level] ? empty_channels_last(map, map.scalar_type()) : none.clone());
    if (need_maps[level]) {
      wanted.push_back(level);
    }
  }
  const bool reads_maps = need_places || need_weights;
  const std::vector<at::Tensor> maps = reads_maps ? with_dense_channels(feature_maps) : feature_maps.vec();

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, offsets.scalar_type(), "sample_context_backward", [&] {
    const SampleContext<scalar_t> kernel(shape, maps, reference, offsets, weights, zeros);
    const std::vector<scalar_t*> grads = pointers<scalar_t>(grad_contexts);
    if (reads_maps) {
      kernel.backward(grads, need_places ? grad_offsets.mutable_data_ptr<scalar_t>() : nullptr,
                      need_weights ? grad_weights.mutable_data_ptr<scalar_t>() : nullptr);
    }
    // A sample of a level belongs to one thread, which adds in a fixed order.
    parallel_tasks(shape.batch * static_cast<int64_t>(wanted.size()), 1, [&](int64_t i) {
      const int64_t b = i / static_cast<int64_t>(wanted.size()), level = wanted[i % wanted.size()];
      scalar_t* target = grad_maps[level].mutable_data_ptr<scalar_t>();
      kernel.map_gradient(level, b, grads[level], target + b * (grad_maps[level].numel() / shape.batch));
    });
  });
  return {grad_offsets, grad_weights, grad_maps};
}

}  // namespace liftbyimage::cpu
