#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "../checks.h"
#include "linear_gradients.h"
#include "ops.h"
#include "parallel.h"
#include "sampling.h"
#include "small_tokens.h"
#include "tiles.h"

namespace liftbyimage::cpu {
namespace {

// What forward and backward read, and the places they find: tokens and maps of S, weights and arithmetic in T.
template <typename S>
struct ContextInputs {
  using T = at::opmath_type<S>;

  int64_t levels, joints, width, heads, samples, most_channels;
  LayerNorm<T> norm;
  Linear<T> weights, offsets;
  std::vector<Linear<T>> embeds;
  std::vector<LevelMap<const S>> maps;
  const S* tokens;     // [B, L, J, D]
  const S* pose;       // [B, J, D]
  const S* reference;  // [B, J, 2]

  int64_t places() const { return heads * samples; }

  // Where a joint of sample b lies in tokens [B, L, J, D].
  int64_t token_at(int64_t b, int64_t level, int64_t joint) const {
    return ((b * levels + level) * joints + joint) * width;
  }

  // target [count, D] = tokens + pose
  void add_pose(int64_t b, int64_t level, int64_t first, int64_t count, T* target) const {
    const S* token = tokens + token_at(b, level, first);
    const S* added = pose + (b * joints + first) * width;
    for_vectors<T>(count * width, [&](int64_t i, int64_t size) {
      (load_row<T>(token + i, size) + load_row<T>(added + i, size)).store(target + i, static_cast<int>(size));
    });
  }

  // weight [count, H · S] and offset [count, H · S, 2] of normalized tokens [count, D].
  void find_places(const T* normalized, int64_t count, T* weight, T* offset) const {
    apply_linear<T>(weights, 0, places(), normalized, count, nullptr, weight, places());
    apply_linear<T>(offsets, 0, 2 * places(), normalized, count, nullptr, offset, 2 * places());
    softmax(weight, count * heads);
    for_vectors<T>(2 * count * places(), [&](int64_t i, int64_t size) {
      at::vec::Vectorized<T>::loadu(offset + i, size).tanh().store(offset + i, static_cast<int>(size));
    });
  }

  // The map cells about the places of a joint of sample b, offset [H · S, 2].
  template <typename M>
  void find_corners(Corners<M, T>& corners, const SampleMap<M>& map, int64_t b, int64_t joint, const T* offset) const {
    const S* at = reference + 2 * (b * joints + joint);
    const T centre[2] = {static_cast<T>(at[0]), static_cast<T>(at[1])};
    corners.find(map, centre, offset, false);
  }

  // context [H, C], weight [H · S]; factors [S, 4] is scratch.
  void read(const Corners<const S, T>& corners, int64_t channels, const T* weight, T* factors, T* context) const {
    for (int64_t head = 0; head < heads; ++head) {
      corners.weigh(head * samples, samples, weight + head * samples, factors);
      sum_rows(corners.rows(head * samples), factors, 4 * samples, channels, context + head * channels);
    }
  }

 private:
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
};

template <typename S>
class ResidualContext {
 public:
  using T = at::opmath_type<S>;

  const ContextInputs<S>& in;
  S* tokens_out;  // [B, L, J, D]

  // Joints [first, first + count) of sample b in all levels; what is between input and output stays in the cache.
  void run(int64_t b, T scale, int64_t first, int64_t count) const {
    const int64_t places = in.places();
    const Buffer<T> scratch = uninitialized<T>(count * (in.width + 3 * places + in.heads * in.most_channels));
    T* normalized = scratch.get();                // [count, D]
    T* weight = normalized + count * in.width;    // [count, H · S]
    T* offset = weight + count * places;          // [count, H · S, 2]
    T* context = offset + 2 * count * places;     // [count, H, C]
    Corners<const S, T> corners(places, in.most_channels);
    std::vector<T> factors(4 * in.samples);
    for (int64_t level = 0; level < in.levels; ++level) {
      in.add_pose(b, level, first, count, normalized);
      for (int64_t joint = 0; joint < count; ++joint) {
        normalize_row(in.norm, normalized + joint * in.width, normalized + joint * in.width);
      }
      in.find_places(normalized, count, weight, offset);
      const SampleMap<const S> map = in.maps[level].sample(b);
      for (int64_t joint = 0; joint < count; ++joint) {
        in.find_corners(corners, map, b, first + joint, offset + 2 * joint * places);
        in.read(corners, map.channels, weight + joint * places, factors.data(),
                context + joint * in.heads * map.channels);
      }
      const int64_t start = in.token_at(b, level, first);
      embed(in.embeds[level], context, count, scale, in.tokens + start, tokens_out + start);
    }
  }

 private:
  // tokens_out = tokens + scale · the embedded contexts [count, H, C] with heads side by side.
  void embed(const Linear<T>& layer, const T* context, int64_t count, T scale, const S* tokens, S* tokens_out) const {
    const int64_t head_width = in.width / in.heads;
    multiply_transposed(
        count * in.heads, head_width, layer.inputs, context, layer.inputs, layer.weight, layer.inputs,
        [&](int64_t row, int64_t column, const T* sums, int columns) __attribute__((always_inline)) {
          const int64_t at = row * head_width + column;
          for (int c = 0; c < columns; ++c) {
            const T embedded = sums[c] + layer.bias[column + c];
            tokens_out[at + c] = static_cast<S>(static_cast<T>(tokens[at + c]) + scale * embedded);
          }
        });
  }
};

// Where the gradients of the parameters lie in one buffer: [H · S · 3, D] of weights and offsets is one matrix.
struct ParameterLayout {
  int64_t norm_weight, norm_bias, asking_weight, asking_bias, size;
  std::vector<int64_t> embed_weights, embed_biases;

  ParameterLayout(int64_t width, int64_t places, int64_t head_width, const std::vector<int64_t>& channels) {
    size = 0;
    norm_weight = take(width);
    norm_bias = take(width);
    asking_weight = take(3 * places * width);
    asking_bias = take(3 * places);
    for (const int64_t inputs : channels) {
      embed_weights.push_back(take(head_width * inputs));
      embed_biases.push_back(take(head_width));
    }
  }

 private:
  // Aligned, as BLAS needs it for one result.
  int64_t take(int64_t count) {
    const int64_t first = size;
    size += 16 * divide_up(count, 16);
    return first;
  }
};

// As many as threads are of use, for their sums are added up in the end (90 kB each at D = 128).
constexpr int64_t most_sample_parts = 16;

// Gradients over the kept samples. A part of the batch belongs to one thread, which adds up its share of the gradients
// of the parameters; what lies between is computed again and stays in its cache.
template <typename S>
class ResidualContextBackward {
 public:
  using T = at::opmath_type<S>;

  const ContextInputs<S>& in;
  const ParameterLayout& layout;
  const T* asking_weight;  // [H · S · 3, D], those of weights, then those of offsets
  const KeptSamples<T>& kept;
  const S* grad_updated;  // [B, L, J, D]
  // As the tensors of the forward; null where not wanted.
  S* grad_tokens;
  S* grad_pose;
  S* grad_reference;
  std::vector<T*> grad_maps;  // [B, Hf, Wf, C] each

  // Kept samples [first, end); `parameters` are added to.
  void run(int64_t first, int64_t end, T* parameters) const {
    const int64_t most = std::min(end - first, chunk_samples()), rows = most * in.joints, places = in.places();
    Scratch scratch(in, rows);
    for (int64_t begin = first; begin < end; begin += most) {
      const int64_t count = std::min(most, end - begin);
      std::fill_n(scratch.grad_pose, rows * in.width, T(0));
      std::fill_n(scratch.grad_reference, 2 * rows, T(0));
      for (int64_t level = 0; level < in.levels; ++level) {
        prepare(begin, count, level, scratch);
        in.find_places(scratch.normalized, count * in.joints, scratch.weight, scratch.offset);
        differentiate_embedding(count, level, scratch);
        differentiate_sampling(begin, count, level, scratch);
        add_parameters(count * in.joints, level, scratch, parameters);
        differentiate_tokens(begin, count, level, scratch);
      }
      write(begin, count, scratch);
    }
  }

 private:
  // Of the rows of a chunk in one level.
  struct Scratch {
    Scratch(const ContextInputs<S>& in, int64_t rows)
        : memory(uninitialized<T>(
              rows * (6 * in.width + 6 * in.places() + 2 * in.heads * in.most_channels + 4) + 16 * arrays)),
          next(memory.get()) {
      summed = take(rows * in.width);
      normalized = take(rows * in.width);
      grad_branch = take(rows * in.width);
      grad_normalized = take(rows * in.width);
      grad_pose = take(rows * in.width);
      zeros = take(in.width);
      std::fill_n(zeros, in.width, T(0));
      statistics = take(2 * rows);
      weight = take(rows * in.places());
      offset = take(2 * rows * in.places());
      grad_asked = take(3 * rows * in.places());
      context = take(rows * in.heads * in.most_channels);
      grad_context = take(rows * in.heads * in.most_channels);
      grad_reference = take(2 * rows);
    }

    static constexpr int64_t arrays = 13;
    Buffer<T> memory;
    T* next;
    T *summed, *normalized, *grad_branch, *grad_normalized, *grad_pose;  // [rows, D]
    T* zeros;                   // [D]
    T* statistics;              // [rows, 2], mean and reciprocal deviation
    T* weight;                  // [rows, H · S]
    T* offset;                  // [rows, H · S, 2]
    T* grad_asked;              // [rows, H · S · 3], before softmax and tanh
    T *context, *grad_context;  // [rows, H, C]
    T* grad_reference;          // [rows, 2]

   private:
    // BLAS sums in an order that depends on its operands' alignment.
    T* take(int64_t size) {
      T* taken = next;
      next += 16 * divide_up(size, 16);
      return taken;
    }
  };

  int64_t chunk_samples() const { return std::max<int64_t>(1, group_rows / in.joints); }

  void prepare(int64_t begin, int64_t count, int64_t level, Scratch& scratch) const {
    for (int64_t sample = 0; sample < count; ++sample) {
      const int64_t b = kept.samples[begin + sample], row = sample * in.joints;
      const T scale = kept.scales[begin + sample];
      in.add_pose(b, level, 0, in.joints, scratch.summed + row * in.width);
      const S* grad = grad_updated + in.token_at(b, level, 0);
      T* target = scratch.grad_branch + row * in.width;
      for_vectors<T>(in.joints * in.width, [&](int64_t i, int64_t size) {
        (load_row<T>(grad + i, size) * at::vec::Vectorized<T>(scale)).store(target + i, static_cast<int>(size));
      });
    }
    for (int64_t row = 0; row < count * in.joints; ++row) {
      const RowStatistics<T> found =
          normalize_row(in.norm, scratch.summed + row * in.width, scratch.normalized + row * in.width);
      scratch.statistics[2 * row] = found.mean;
      scratch.statistics[2 * row + 1] = found.reciprocal_deviation;
    }
  }

  void differentiate_embedding(int64_t count, int64_t level, Scratch& scratch) const {
    const int64_t head_width = in.width / in.heads, channels = in.maps[level].channels;
    gemm(Transpose::no, Transpose::no, count * in.joints * in.heads, channels, head_width, scratch.grad_branch,
         head_width, in.embeds[level].weight, channels, false, scratch.grad_context, channels);
  }

  // grad_asked, context again, and the gradients of reference and map.
  void differentiate_sampling(int64_t begin, int64_t count, int64_t level, Scratch& scratch) const {
    const int64_t places = in.places(), channels = in.maps[level].channels, size = in.heads * channels;
    Corners<const S, T> corners(places, channels);
    std::vector<T> factors(4 * in.samples);
    for (int64_t sample = 0; sample < count; ++sample) {
      const int64_t b = kept.samples[begin + sample];
      const SampleMap<const S> map = in.maps[level].sample(b);
      for (int64_t joint = 0; joint < in.joints; ++joint) {
        const int64_t row = sample * in.joints + joint;
        const T* weight = scratch.weight + row * places;
        const T* offset = scratch.offset + 2 * row * places;
        in.find_corners(corners, map, b, joint, offset);
        in.read(corners, channels, weight, factors.data(), scratch.context + row * size);
        differentiate_places_of(corners, channels, weight, offset, scratch.grad_context + row * size,
                                scratch.grad_asked + 3 * row * places, scratch.grad_reference + 2 * row);
      }
      if (grad_maps[level] != nullptr) {
        scatter(b, level, sample * in.joints, scratch);
      }
    }
  }

  // grad_asked [H · S · 3] of one joint, and what its offsets give grad_reference [2].
  void differentiate_places_of(const Corners<const S, T>& corners, int64_t channels, const T* weight, const T* offset,
                               const T* grad_context, T* grad_asked, T* grad_reference) const {
    T* grad_offset = grad_asked + in.places();
    for (int64_t head = 0; head < in.heads; ++head) {
      const int64_t first = head * in.samples;
      T along = 0;  // Σ over the head's samples of weight · its gradient
      differentiate_places(corners, first, in.samples, weight + first, grad_context + head * channels, channels,
                           [&](int64_t place, T of_weight, const std::array<T, 2>& of_offset) {
                             grad_asked[place] = of_weight;
                             along += weight[place] * of_weight;
                             for (int axis = 0; axis < 2; ++axis) {
                               const T o = offset[2 * place + axis];
                               grad_offset[2 * place + axis] = of_offset[axis] * (1 - o * o);
                               grad_reference[axis] += of_offset[axis];
                             }
                           });
      for (int64_t place = first; place < first + in.samples; ++place) {
        grad_asked[place] = weight[place] * (grad_asked[place] - along);
      }
    }
  }

  // The gradient of sample b of a level's map, from the rows of that sample.
  void scatter(int64_t b, int64_t level, int64_t first_row, const Scratch& scratch) const {
    const int64_t places = in.places();
    const LevelMap<const S>& map = in.maps[level];
    const int64_t channels = map.channels, size = map.height * map.width * channels;
    T* target = grad_maps[level] + b * size;
    std::fill_n(target, size, T(0));
    const SampleMap<T> grad_map{target, channels, map.height, map.width, map.width * channels, channels};
    Corners<T, T> corners(places, channels);
    std::vector<T> factors(4 * in.samples);
    for (int64_t joint = 0; joint < in.joints; ++joint) {
      const int64_t row = first_row + joint;
      in.find_corners(corners, grad_map, b, joint, scratch.offset + 2 * row * places);
      for (int64_t head = 0; head < in.heads; ++head) {
        scatter_sum(corners, head * in.samples, in.samples, scratch.weight + row * places + head * in.samples,
                    scratch.grad_context + (row * in.heads + head) * channels, channels, factors.data());
      }
    }
  }

  void add_parameters(int64_t rows, int64_t level, Scratch& scratch, T* parameters) const {
    using Vec = at::vec::Vectorized<T>;
    const int64_t head_width = in.width / in.heads, channels = in.maps[level].channels, asked = 3 * in.places();
    const T *grad_branch = scratch.grad_branch, *grad_asked = scratch.grad_asked;
    const T* grad_normalized = scratch.grad_normalized;
    gemm(Transpose::yes, Transpose::no, head_width, channels, rows * in.heads, grad_branch, head_width,
         scratch.context, channels, true, parameters + layout.embed_weights[level], channels);
    add_column_sums(rows * in.heads, head_width, grad_branch, parameters + layout.embed_biases[level]);
    gemm(Transpose::yes, Transpose::no, asked, in.width, rows, grad_asked, asked, scratch.normalized, in.width, true,
         parameters + layout.asking_weight, in.width);
    add_column_sums(rows, asked, grad_asked, parameters + layout.asking_bias);
    gemm(Transpose::no, Transpose::no, rows, in.width, asked, grad_asked, asked, asking_weight, in.width, false,
         scratch.grad_normalized, in.width);
    add_column_sums(rows, in.width, grad_normalized, parameters + layout.norm_bias);
    add_column_sums(rows, in.width, parameters + layout.norm_weight, [&](int64_t row, int64_t column, int64_t lanes) {
      const Vec difference =
          Vec::loadu(scratch.summed + row * in.width + column, lanes) - Vec(scratch.statistics[2 * row]);
      const Vec normal = difference * Vec(scratch.statistics[2 * row + 1]);
      return normal * Vec::loadu(grad_normalized + row * in.width + column, lanes);
    });
  }

  void differentiate_tokens(int64_t begin, int64_t count, int64_t level, Scratch& scratch) const {
    using Vec = at::vec::Vectorized<T>;
    for (int64_t row = 0; row < count * in.joints; ++row) {
      const int64_t at = in.token_at(kept.samples[begin + row / in.joints], level, row % in.joints);
      const RowStatistics<T> statistics{scratch.statistics[2 * row], scratch.statistics[2 * row + 1]};
      T* grad = scratch.grad_normalized + row * in.width;  // then that of the sum, then that of the token
      T* pose = scratch.grad_pose + row * in.width;
      normalize_row_backward(in.norm, statistics, scratch.summed + row * in.width, grad, scratch.zeros, grad);
      for_vectors<T>(in.width, [&](int64_t i, int64_t size) {
        const Vec of_sum = Vec::loadu(grad + i, size);
        (Vec::loadu(pose + i, size) + of_sum).store(pose + i, static_cast<int>(size));
        (load_row<T>(grad_updated + at + i, size) + of_sum).store(grad + i, static_cast<int>(size));
      });
      if (grad_tokens != nullptr) {
        at::vec::convert(grad, grad_tokens + at, in.width);
      }
    }
  }

  void write(int64_t begin, int64_t count, const Scratch& scratch) const {
    for (int64_t sample = 0; sample < count; ++sample) {
      const int64_t b = kept.samples[begin + sample], size = in.joints * in.width;
      if (grad_pose != nullptr) {
        at::vec::convert(scratch.grad_pose + sample * size, grad_pose + b * size, size);
      }
      if (grad_reference != nullptr) {
        at::vec::convert(scratch.grad_reference + 2 * sample * in.joints, grad_reference + 2 * b * in.joints,
                         2 * in.joints);
      }
    }
  }
};

std::vector<at::Tensor> in_arithmetic(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) {
    const at::Tensor dense = tensor.to(at::toOpMathType(tensor.scalar_type())).contiguous();
    result.push_back(is_aligned(dense.const_data_ptr()) ? dense : dense.clone());
  }
  return result;
}

struct Parameter {
  std::vector<int64_t> sizes;
  int64_t first;  // of its gradient in the buffer of all
};

// The tensors of a call, checked, dense, and the parameters in the type of the arithmetic.
struct ContextArguments {
  int64_t batch, levels, joints, width, heads, places;
  double eps;
  at::Tensor tokens, pose, reference;
  std::vector<at::Tensor> maps, weights, matrices, biases;
  std::vector<int64_t> channels;

  ContextArguments(const at::Tensor& tokens_in, const at::Tensor& pose_in, const at::Tensor& reference_in,
                   at::TensorList feature_maps, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                   const at::Tensor& weights_weight, const at::Tensor& weights_bias, const at::Tensor& offsets_weight,
                   const at::Tensor& offsets_bias, at::TensorList embed_weights, at::TensorList embed_biases,
                   const OptionalTensor& branch_scale, int64_t heads, double eps)
      : heads(heads), eps(eps) {
    check_rank(tokens_in, 4, "tokens");
    check_floating(tokens_in, "tokens");
    check_rank(weights_weight, 2, "weights_weight");
    batch = tokens_in.size(0), levels = tokens_in.size(1), joints = tokens_in.size(2), width = tokens_in.size(3);
    places = weights_weight.size(0);
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
    check_matches(branch_scale, {batch}, tokens_in, "branch_scale");
    for (int64_t level = 0; level < levels; ++level) {
      const at::Tensor& map = feature_maps[level];
      check_rank(map, 4, "feature_maps");
      check_matches(map, {batch, map.size(1), map.size(2), map.size(3)}, tokens_in, "feature_maps");
      check_matches(embed_weights[level], {width / heads, map.size(1)}, tokens_in, "embed_weights");
      check_matches(embed_biases[level], {width / heads}, tokens_in, "embed_biases");
      channels.push_back(map.size(1));
    }
    tokens = tokens_in.contiguous(), pose = pose_in.contiguous(), reference = reference_in.contiguous();
    maps = with_dense_channels(feature_maps);
    weights = in_arithmetic({norm_weight, norm_bias, weights_weight, weights_bias, offsets_weight, offsets_bias});
    matrices = in_arithmetic(embed_weights), biases = in_arithmetic(embed_biases);
  }

  template <typename S>
  ContextInputs<S> inputs() const {
    using T = at::opmath_type<S>;
    const auto weight = [&](int64_t i) { return weights[i].const_data_ptr<T>(); };
    std::vector<Linear<T>> embeds;
    for (int64_t level = 0; level < levels; ++level) {
      embeds.push_back({matrices[level].const_data_ptr<T>(), biases[level].const_data_ptr<T>(), channels[level]});
    }
    return {levels,
            joints,
            width,
            heads,
            places / heads,
            *std::max_element(channels.begin(), channels.end()),
            {weight(0), weight(1), width, static_cast<T>(eps)},
            {weight(2), weight(3), width},
            {weight(4), weight(5), width},
            embeds,
            level_maps<S>(maps),
            tokens.const_data_ptr<S>(),
            pose.const_data_ptr<S>(),
            reference.const_data_ptr<S>()};
  }

  // In the order of the arguments.
  std::vector<Parameter> parameters(const ParameterLayout& layout) const {
    std::vector<Parameter> result = {
        {{width}, layout.norm_weight},
        {{width}, layout.norm_bias},
        {{places, width}, layout.asking_weight},
        {{places}, layout.asking_bias},
        {{2 * places, width}, layout.asking_weight + places * width},
        {{2 * places}, layout.asking_bias + places}};
    for (int64_t level = 0; level < levels; ++level) {
      result.push_back({{width / heads, channels[level]}, layout.embed_weights[level]});
    }
    for (int64_t level = 0; level < levels; ++level) {
      result.push_back({{width / heads}, layout.embed_biases[level]});
    }
    return result;
  }
};

// target [size] = Σ over parts of partials [parts, stride], in their order.
template <typename T, typename S>
void sum_parts(const T* partials, int64_t parts, int64_t stride, int64_t size, S* target) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t grain = 1 << 12;
  for_columns(size, grain, [&](int64_t first, int64_t count) {
    T sums[grain];
    for_vectors<T>(count, [&](int64_t i, int64_t lanes) {
      Vec sum(0);
      for (int64_t part = 0; part < parts; ++part) {
        sum = sum + Vec::loadu(partials + part * stride + first + i, lanes);
      }
      sum.store(sums + i, static_cast<int>(lanes));
    });
    at::vec::convert(sums, target + first, count);
  });
}

}  // namespace

at::Tensor residual_context_forward(const at::Tensor& tokens, const at::Tensor& pose, const at::Tensor& reference,
                                    at::TensorList feature_maps, const at::Tensor& norm_weight,
                                    const at::Tensor& norm_bias, const at::Tensor& weights_weight,
                                    const at::Tensor& weights_bias, const at::Tensor& offsets_weight,
                                    const at::Tensor& offsets_bias, at::TensorList embed_weights,
                                    at::TensorList embed_biases, const OptionalTensor& branch_scale, int64_t heads,
                                    double eps) {
  const ContextArguments arguments(tokens, pose, reference, feature_maps, norm_weight, norm_bias, weights_weight,
                                   weights_bias, offsets_weight, offsets_bias, embed_weights, embed_biases,
                                   branch_scale, heads, eps);
  const at::Tensor tokens_out = at::empty(tokens.sizes(), tokens.options());

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tokens.scalar_type(), "residual_context_forward", [&] {
    const KeptSamples<at::opmath_type<scalar_t>> kept(branch_scale, arguments.batch);
    if (kept.size() < arguments.batch) {
      tokens_out.copy_(arguments.tokens);
    }
    const ContextInputs<scalar_t> inputs = arguments.inputs<scalar_t>();
    const ResidualContext<scalar_t> kernel{inputs, tokens_out.mutable_data_ptr<scalar_t>()};
    // Threads over samples where that keeps them all busy, else over pieces of each sample's joints.
    const int64_t joints = arguments.joints, threads = at::get_num_threads();
    const bool whole = kept.size() % threads == 0 || kept.size() >= 4 * threads;
    const int64_t size = whole ? joints : divide_up(joints, std::min(threads, divide_up(joints, 4)));
    const int64_t pieces = divide_up(joints, size);
    parallel_tasks(kept.size() * pieces, 1, [&](int64_t i) {
      const int64_t sample = i / pieces, first = i % pieces * size;
      kernel.run(kept.samples[sample], kept.scales[sample], first, std::min(size, joints - first));
    });
  });
  return tokens_out;
}

std::vector<at::Tensor> residual_context_backward(
    const at::Tensor& grad_updated_in, const at::Tensor& tokens, const at::Tensor& pose, const at::Tensor& reference,
    at::TensorList feature_maps, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
    const at::Tensor& weights_weight, const at::Tensor& weights_bias, const at::Tensor& offsets_weight,
    const at::Tensor& offsets_bias, at::TensorList embed_weights, at::TensorList embed_biases,
    const OptionalTensor& branch_scale, int64_t heads, double eps, c10::List<bool> wanted) {
  const ContextArguments arguments(tokens, pose, reference, feature_maps, norm_weight, norm_bias, weights_weight,
                                   weights_bias, offsets_weight, offsets_bias, embed_weights, embed_biases,
                                   branch_scale, heads, eps);
  check_matches(grad_updated_in, tokens.sizes(), tokens, "grad_tokens");
  const int64_t levels = arguments.levels, count = 9 + 3 * levels;
  TORCH_CHECK(static_cast<int64_t>(wanted.size()) == count + 1 && !wanted[count], "wanted must have ", count + 1,
              " entries, the last of them false");
  const at::Tensor grad_updated = grad_updated_in.contiguous();
  const at::Tensor asking_weight = at::cat({arguments.weights[2], arguments.weights[4]});
  const ParameterLayout layout(arguments.width, arguments.places, arguments.width / heads, arguments.channels);
  std::vector<at::Tensor> grads(count);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tokens.scalar_type(), "residual_context_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const KeptSamples<T> kept(branch_scale, arguments.batch);
    const std::array<const at::Tensor*, 3> positions = {&tokens, &pose, &reference};
    for (int64_t i = 0; i < 3; ++i) {
      if (wanted[i]) {
        grads[i] = at::empty(positions[i]->sizes(), tokens.options());
      }
    }
    std::vector<T*> grad_maps(levels, nullptr);
    for (int64_t level = 0; level < levels; ++level) {
      if (wanted[3 + level]) {
        grads[3 + level] = empty_channels_last(feature_maps[level], asking_weight.scalar_type());
        grad_maps[level] = grads[3 + level].mutable_data_ptr<T>();
      }
    }
    if (kept.size() < arguments.batch) {
      for (int64_t i = 0; i < 3 + levels; ++i) {
        if (grads[i].defined()) {
          i == 0 ? grads[i].copy_(grad_updated) : grads[i].zero_();
        }
      }
    }
    const auto target = [&](int64_t i) { return grads[i].defined() ? grads[i].mutable_data_ptr<scalar_t>() : nullptr; };
    const ContextInputs<scalar_t> inputs = arguments.inputs<scalar_t>();
    const ResidualContextBackward<scalar_t> kernel{inputs,
                                                   layout,
                                                   asking_weight.const_data_ptr<T>(),
                                                   kept,
                                                   grad_updated.const_data_ptr<scalar_t>(),
                                                   target(0),
                                                   target(1),
                                                   target(2),
                                                   grad_maps};
    const int64_t part = divide_up(std::max<int64_t>(kept.size(), 1), most_sample_parts);
    const int64_t parts = divide_up(kept.size(), part);
    const at::Tensor partials = at::zeros({parts, layout.size}, asking_weight.options());
    T* sums = partials.mutable_data_ptr<T>();
    parallel_tasks(parts, 1, [&](int64_t i) {
      kernel.run(i * part, std::min((i + 1) * part, kept.size()), sums + i * layout.size);
    });
    size_t at = 3 + levels;
    for (const Parameter& parameter : arguments.parameters(layout)) {
      if (wanted[at]) {
        grads[at] = at::empty(parameter.sizes, tokens.options());
        sum_parts(sums + parameter.first, parts, layout.size, grads[at].numel(), target(at));
      }
      ++at;
    }
  });
  std::vector<at::Tensor> results;
  for (const at::Tensor& grad : grads) {
    if (grad.defined()) {
      results.push_back(grad.to(tokens.scalar_type()));
    }
  }
  return results;
}

}  // namespace liftbyimage::cpu
