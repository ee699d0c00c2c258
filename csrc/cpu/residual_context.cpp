#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "ops.h"
#include "parallel.h"
#include "sampling.h"
#include "small_tokens.h"
#include "tiles.h"

namespace liftbyimage::cpu {
namespace {

// Tokens and maps of S, weights and arithmetic in T.
template <typename S>
class ResidualContext {
 public:
  using T = at::opmath_type<S>;

  int64_t levels, joints, width, heads, samples, most_channels;
  LayerNorm<T> norm;
  Linear<T> weights, offsets;
  std::vector<Linear<T>> embeds;
  std::vector<LevelMap<const S>> maps;
  const S* tokens;     // [B, L, J, D]
  const S* pose;       // [B, J, D]
  const S* reference;  // [B, J, 2]
  S* tokens_out;       // [B, L, J, D]

  // Joints [first, first + count) of sample b in all levels; what is between input and output stays in the cache.
  void run(int64_t b, int64_t first, int64_t count) const {
    const int64_t places = heads * samples;
    const Buffer<T> scratch = uninitialized<T>(count * (width + 3 * places + heads * most_channels));
    T* asking = scratch.get();                   // [count, D]
    T* weight = asking + count * width;          // [count, H · S]
    T* offset = weight + count * places;         // [count, H · S, 2]
    T* context = offset + 2 * count * places;    // [count, H, C]
    Corners<const S, T> corners(places, most_channels);
    std::vector<T> factors(4 * samples);
    for (int64_t level = 0; level < levels; ++level) {
      const int64_t start = ((b * levels + level) * joints + first) * width;
      ask(tokens + start, pose + (b * joints + first) * width, count, asking);
      apply_linear<T>(weights, 0, places, asking, count, nullptr, weight, places);
      apply_linear<T>(offsets, 0, 2 * places, asking, count, nullptr, offset, 2 * places);
      softmax(weight, count * heads);
      for_vectors<T>(2 * count * places, [&](int64_t i, int64_t size) {
        at::vec::Vectorized<T>::loadu(offset + i, size).tanh().store(offset + i, static_cast<int>(size));
      });
      const SampleMap<const S> map = maps[level].sample(b);
      for (int64_t joint = 0; joint < count; ++joint) {
        const S* at = reference + 2 * (b * joints + first + joint);
        const T centre[2] = {static_cast<T>(at[0]), static_cast<T>(at[1])};
        corners.find(map, centre, offset + 2 * joint * places, false);
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t row = joint * heads + head;
          corners.weigh(head * samples, samples, weight + row * samples, factors.data());
          sum_rows(corners.rows(head * samples), factors.data(), 4 * samples, map.channels,
                   context + row * map.channels);
        }
      }
      embed(embeds[level], context, count, tokens + start, tokens_out + start);
    }
  }

 private:
  // asking = LayerNorm(tokens + pose)
  void ask(const S* tokens, const S* pose, int64_t count, T* asking) const {
    for_vectors<T>(count * width, [&](int64_t i, int64_t size) {
      (load_row<T>(tokens + i, size) + load_row<T>(pose + i, size)).store(asking + i, static_cast<int>(size));
    });
    for (int64_t row = 0; row < count; ++row) {
      normalize_row(norm, asking + row * width, asking + row * width);
    }
  }

  // Over the samples of each row of x [rows, S].
  void softmax(T* x, int64_t rows) const {
    using Vec = at::vec::Vectorized<T>;
    for (int64_t row = 0; row < rows; ++row) {
      T* at = x + row * samples;
      const T most = *std::max_element(at, at + samples);
      std::transform(at, at + samples, at, [&](T value) { return value - most; });
    }
    for_vectors<T>(rows * samples, [&](int64_t i, int64_t size) {
      exp_vector<T>(Vec::loadu(x + i, size)).store(x + i, static_cast<int>(size));
    });
    for (int64_t row = 0; row < rows; ++row) {
      T* at = x + row * samples;
      const T total = std::accumulate(at, at + samples, T(0));
      std::transform(at, at + samples, at, [&](T value) { return value / total; });
    }
  }

  // tokens_out = tokens + the embedded contexts [count, H, C] with heads side by side.
  void embed(const Linear<T>& layer, const T* context, int64_t count, const S* tokens, S* tokens_out) const {
    const int64_t head_width = width / heads;
    multiply_transposed(
        count * heads, head_width, layer.inputs, context, layer.inputs, layer.weight, layer.inputs,
        [&](int64_t row, int64_t column, const T* sums, int columns) __attribute__((always_inline)) {
          const int64_t at = row * head_width + column;
          for (int c = 0; c < columns; ++c) {
            tokens_out[at + c] = static_cast<S>(static_cast<T>(tokens[at + c]) + (sums[c] + layer.bias[column + c]));
          }
        });
  }
};

std::vector<at::Tensor> in_arithmetic(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.to(at::toOpMathType(tensor.scalar_type())).contiguous());
  }
  return result;
}

}  // namespace

at::Tensor residual_context_forward(const at::Tensor& tokens_in, const at::Tensor& pose_in,
                                    const at::Tensor& reference_in, at::TensorList feature_maps,
                                    const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                    const at::Tensor& weights_weight, const at::Tensor& weights_bias,
                                    const at::Tensor& offsets_weight, const at::Tensor& offsets_bias,
                                    at::TensorList embed_weights, at::TensorList embed_biases, int64_t heads,
                                    double eps) {
  check_rank(tokens_in, 4, "tokens");
  check_floating(tokens_in, "tokens");
  check_rank(weights_weight, 2, "weights_weight");
  const int64_t batch = tokens_in.size(0), levels = tokens_in.size(1), joints = tokens_in.size(2);
  const int64_t width = tokens_in.size(3), places = weights_weight.size(0);
  TORCH_CHECK(heads >= 1 && width % heads == 0 && places >= heads && places % heads == 0,
              "heads must divide D = ", width, " and the rows of weights_weight = ", places, ", got ", heads);
  TORCH_CHECK(static_cast<int64_t>(feature_maps.size()) == levels && embed_weights.size() == feature_maps.size() &&
                  embed_biases.size() == feature_maps.size(),
              "feature_maps, embed_weights and embed_biases must be ", levels, " tensors each");
  check_matches(tokens_in, tokens_in.sizes(), tokens_in, "tokens");
  check_matches(pose_in, {batch, joints, width}, tokens_in, "pose");
  check_matches(reference_in, {batch, joints, 2}, tokens_in, "reference");
  check_matches(norm_weight, {width}, tokens_in, "norm_weight");
  check_matches(norm_bias, {width}, tokens_in, "norm_bias");
  check_matches(weights_weight, {places, width}, tokens_in, "weights_weight");
  check_matches(weights_bias, {places}, tokens_in, "weights_bias");
  check_matches(offsets_weight, {2 * places, width}, tokens_in, "offsets_weight");
  check_matches(offsets_bias, {2 * places}, tokens_in, "offsets_bias");
  int64_t most_channels = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const at::Tensor& map = feature_maps[level];
    check_rank(map, 4, "feature_maps");
    check_matches(map, {batch, map.size(1), map.size(2), map.size(3)}, tokens_in, "feature_maps");
    check_matches(embed_weights[level], {width / heads, map.size(1)}, tokens_in, "embed_weights");
    check_matches(embed_biases[level], {width / heads}, tokens_in, "embed_biases");
    most_channels = std::max(most_channels, map.size(1));
  }
  const at::Tensor tokens = tokens_in.contiguous(), pose = pose_in.contiguous();
  const at::Tensor reference = reference_in.contiguous();
  const std::vector<at::Tensor> maps = with_dense_channels(feature_maps), weights = in_arithmetic(
      {norm_weight, norm_bias, weights_weight, weights_bias, offsets_weight, offsets_bias});
  const std::vector<at::Tensor> matrices = in_arithmetic(embed_weights), biases = in_arithmetic(embed_biases);
  const at::Tensor tokens_out = at::empty(tokens.sizes(), tokens.options());

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tokens.scalar_type(), "residual_context_forward", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto weight = [&](int64_t i) { return weights[i].const_data_ptr<T>(); };
    std::vector<Linear<T>> embeds;
    for (int64_t level = 0; level < levels; ++level) {
      embeds.push_back({matrices[level].const_data_ptr<T>(), biases[level].const_data_ptr<T>(), maps[level].size(1)});
    }
    const ResidualContext<scalar_t> kernel{levels,
                                           joints,
                                           width,
                                           heads,
                                           places / heads,
                                           most_channels,
                                           {weight(0), weight(1), width, static_cast<T>(eps)},
                                           {weight(2), weight(3), width},
                                           {weight(4), weight(5), width},
                                           embeds,
                                           level_maps<scalar_t>(maps),
                                           tokens.const_data_ptr<scalar_t>(),
                                           pose.const_data_ptr<scalar_t>(),
                                           reference.const_data_ptr<scalar_t>(),
                                           tokens_out.mutable_data_ptr<scalar_t>()};
    // Threads over samples where that keeps them all busy, else over pieces of each sample's joints.
    const int64_t threads = at::get_num_threads();
    const bool whole = batch % threads == 0 || batch >= 4 * threads;
    const int64_t size = whole ? joints : divide_up(joints, std::min(threads, divide_up(joints, 4)));
    const int64_t pieces = divide_up(joints, size);
    parallel_tasks(batch * pieces, 1, [&](int64_t i) {
      const int64_t first = i % pieces * size;
      kernel.run(i / pieces, first, std::min(size, joints - first));
    });
  });
  return tokens_out;
}

}  // namespace liftbyimage::cpu
