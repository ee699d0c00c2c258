// Image context around joints: feature maps of several levels read bilinearly at learned places; and the gradients.
//
//   kernel    one block owns                  its threads                          result
//   gather    a joint of a level              a head and a unit of channels each   context of all heads
//   places    a joint of a level              a warp per place, lanes on units     gradients of offsets and weights
//   scatter   256 units of a level's map      a pixel and a unit each              gradient of the map
//
// A unit is as many channels as 16 bytes hold where memory allows it (channels contiguous, strides and the number of
// channels whole units, addresses aligned), else one channel; strides are honoured, so no map is copied. One launch
// serves all levels.
//
// gather and places work out the joint's places once, into shared memory. scatter walks the places of its sample in
// order, 256 at a time, lists in shared memory those that reach the block's lines, and every thread adds up those that
// touch its pixel: each element is written once, without atomics, and every sum has one order.
//
// Places are clamped before they become integers, so no index leaves the map. A place that is not a number becomes
// index 0 with a fraction that is not a number, which spoils its own row; that row hands on no gradient.

#include "sample_context.h"

#include "common.h"
#include "warps.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kGatherThreads = 128;
constexpr int kScatterThreads = 256;
constexpr int kScatterWarps = kScatterThreads / kWarp;
constexpr float kFarOutside = 4.0f;  // grid units: outside any map of more than one pixel

// Where a place lies along one axis of a map.
struct OnAxis {
  int32_t below;   // the pixel at or before it
  float fraction;  // the way to the next pixel
  float slope;     // d pixel / d place
};

struct Place {
  OnAxis x;
  OnAxis y;
  float weight;
  int32_t row;  // j · H + h; −1: the place is not a number

  __device__ bool is_number() const { return row >= 0; }
};

__device__ OnAxis along_axis(float place, int32_t size, bool zeros) {
  const float reach = zeros ? kFarOutside : 1.0f;
  if (place > reach) place = reach;  // comparisons keep what is not a number
  if (place < -reach) place = -reach;
  const float last = static_cast<float>(size - 1);
  const float pixel = (place + 1.0f) / 2.0f * last;
  const float below = floorf(pixel);
  const bool moves = zeros || (pixel > 0.0f && pixel < last);
  return {pixel == pixel ? static_cast<int32_t>(below) : 0, pixel - below, moves ? last / 2.0f : 0.0f};
}

// The place numbered `place` = (j · H + h) · S + s of a sample and level.
template <typename T>
__device__ Place read_place(const SampleContextInputs& in, int64_t sample, int32_t level, int32_t place) {
  const int32_t row = place / in.samples;
  const T* reference = static_cast<const T*>(in.reference) + (sample * in.joints + row / in.heads) * 2;
  const int64_t index = (sample * in.levels + level) * in.joints * in.heads * in.samples + place;
  const T* offset = static_cast<const T*>(in.offsets) + index * 2;
  const float x = to_float(reference[0]) + to_float(offset[0]);
  const float y = to_float(reference[1]) + to_float(offset[1]);
  return {along_axis(x, in.level[level].width, in.zeros), along_axis(y, in.level[level].height, in.zeros),
          to_float(static_cast<const T*>(in.weights)[index]), x == x && y == y ? row : -1};
}

// kWidth values from consecutive addresses (16 bytes and aligned, or one), in float32.
template <typename T, int kWidth>
__device__ void load(const T* address, float (&values)[kWidth]) {
  T raw[kWidth];
  if constexpr (kWidth == 1) {
    raw[0] = *address;
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(address);
    memcpy(raw, &bits, sizeof(bits));
  }
  for (int i = 0; i < kWidth; ++i) values[i] = to_float(raw[i]);
}

template <typename T, int kWidth>
__device__ void store(T* address, const float (&values)[kWidth]) {
  T raw[kWidth];
  for (int i = 0; i < kWidth; ++i) from_float(values[i], raw[i]);
  if constexpr (kWidth == 1) {
    *address = raw[0];
  } else {
    uint4 bits;
    memcpy(&bits, raw, sizeof(bits));
    *reinterpret_cast<uint4*>(address) = bits;
  }
}

template <typename T>
constexpr int kUnit = 16 / sizeof(T);

__host__ __device__ inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
__device__ bool map_has_units(const ContextLevel& level) {
  const int64_t strides = level.batch_stride | level.line_stride | level.pixel_stride | level.channels;
  return level.channel_stride == 1 && strides % kUnit<T> == 0 && aligned(level.map);
}

template <typename T>
__host__ __device__ bool gradient_has_units(const SampleContextBackward& params, int32_t index) {
  return params.inputs.level[index].channels % kUnit<T> == 0 && aligned(params.grad_contexts[index]);
}

// Channels of the four corners of a place, upper before lower and left before right; zero outside the map.
template <typename T, int kWidth>
struct Corners {
  float values[4][kWidth];

  __device__ Corners(const T* channels, const ContextLevel& level, const Place& place) {
    for (int corner = 0; corner < 4; ++corner) {
      const int32_t y = place.y.below + corner / 2;
      const int32_t x = place.x.below + corner % 2;
      if (y >= 0 && y < level.height && x >= 0 && x < level.width)
        load<T, kWidth>(channels + y * level.line_stride + x * level.pixel_stride, values[corner]);
      else
        for (int i = 0; i < kWidth; ++i) values[corner][i] = 0.0f;
    }
  }
};

template <typename T, int kWidth>
__device__ const T* channels_of(const ContextLevel& level, int64_t sample, int32_t unit) {
  return static_cast<const T*>(level.map) + sample * level.batch_stride + unit * kWidth * level.channel_stride;
}

// Block b · L · J + l · J + j.
struct JointOfLevel {
  int32_t joint;
  int32_t level;
  int64_t sample;

  __device__ explicit JointOfLevel(const SampleContextInputs& in)
      : joint(blockIdx.x % in.joints),
        level(blockIdx.x / in.joints % in.levels),
        sample(blockIdx.x / in.joints / in.levels) {}
};

// The H · S places of the block's joint, in shared memory.
template <typename T>
__device__ Place* share_places(const SampleContextInputs& in, const JointOfLevel& own) {
  Place* places = reinterpret_cast<Place*>(shared_memory);
  const int32_t count = in.heads * in.samples;
  for (int32_t i = threadIdx.x; i < count; i += kGatherThreads)
    places[i] = read_place<T>(in, own.sample, own.level, own.joint * count + i);
  __syncthreads();
  return places;
}

template <typename T, int kWidth>
__device__ void gather(const SampleContextForward& params, const JointOfLevel& own, const Place* places) {
  const SampleContextInputs& in = params.inputs;
  const ContextLevel& level = in.level[own.level];
  const int32_t units = level.channels / kWidth;
  T* context = static_cast<T*>(params.contexts[own.level]) +
               (own.sample * in.joints + own.joint) * in.heads * level.channels;
  for (int32_t item = threadIdx.x; item < in.heads * units; item += kGatherThreads) {
    const int32_t head = item / units;
    const T* channels = channels_of<T, kWidth>(level, own.sample, item % units);
    float sum[kWidth] = {};
    for (int32_t s = 0; s < in.samples; ++s) {
      const Place& place = places[head * in.samples + s];
      const Corners<T, kWidth> corners(channels, level, place);
      for (int corner = 0; corner < 4; ++corner) {
        const float share = place.weight * (corner / 2 ? place.y.fraction : 1.0f - place.y.fraction) *
                            (corner % 2 ? place.x.fraction : 1.0f - place.x.fraction);
        for (int i = 0; i < kWidth; ++i) sum[i] += share * corners.values[corner][i];
      }
    }
    store<T, kWidth>(context + item * kWidth, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kGatherThreads, 1) gather_kernel(const SampleContextForward params) {
  const JointOfLevel own(params.inputs);
  const Place* places = share_places<T>(params.inputs, own);
  if (map_has_units<T>(params.inputs.level[own.level]))
    gather<T, kUnit<T>>(params, own, places);
  else
    gather<T, 1>(params, own, places);
}

__device__ float warp_sum(float value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

template <typename T, int kWidth>
__device__ void place_gradients(const SampleContextBackward& params, const JointOfLevel& own, const Place* places) {
  const SampleContextInputs& in = params.inputs;
  const ContextLevel& level = in.level[own.level];
  const int32_t units = level.channels / kWidth;
  const int32_t count = in.heads * in.samples;
  const int64_t first = ((own.sample * in.levels + own.level) * in.joints + own.joint) * count;
  const int32_t lane = threadIdx.x % kWarp;
  for (int32_t i = threadIdx.x / kWarp; i < count; i += kGatherThreads / kWarp) {
    const Place& place = places[i];
    const int32_t head = i / in.samples;
    const T* grad_context = static_cast<const T*>(params.grad_contexts[own.level]) +
                            ((own.sample * in.joints + own.joint) * in.heads + head) * level.channels;
    const float right = place.x.fraction, lower = place.y.fraction;
    float read = 0.0f, along_x = 0.0f, along_y = 0.0f;
    for (int32_t unit = lane; unit < units; unit += kWarp) {
      const Corners<T, kWidth> corners(channels_of<T, kWidth>(level, own.sample, unit), level, place);
      float grad[kWidth];
      load<T, kWidth>(grad_context + unit * kWidth, grad);
      for (int c = 0; c < kWidth; ++c) {
        const float upper_left = corners.values[0][c], upper_right = corners.values[1][c];
        const float lower_left = corners.values[2][c], lower_right = corners.values[3][c];
        const float upper = upper_left * (1.0f - right) + upper_right * right;
        const float under = lower_left * (1.0f - right) + lower_right * right;
        read += grad[c] * (upper * (1.0f - lower) + under * lower);
        // Differences before sums: what neighbours have in common cancels exactly.
        along_x += grad[c] * ((upper_right - upper_left) * (1.0f - lower) + (lower_right - lower_left) * lower);
        along_y += grad[c] * ((lower_left - upper_left) * (1.0f - right) + (lower_right - upper_right) * right);
      }
    }
    read = warp_sum(read);
    along_x = warp_sum(along_x) * place.weight * place.x.slope;
    along_y = warp_sum(along_y) * place.weight * place.y.slope;
    // Where the slope is zero, so is the gradient, whatever the corners hold.
    along_x = place.x.slope == 0.0f ? 0.0f : along_x;
    along_y = place.y.slope == 0.0f ? 0.0f : along_y;
    bool known = true;
    for (int32_t s = 0; s < in.samples; ++s) known = known && places[head * in.samples + s].is_number();
    if (lane == 0 && params.grad_weights != nullptr)
      from_float(known ? read : 0.0f, static_cast<T*>(params.grad_weights)[first + i]);
    if (lane == 0 && params.grad_offsets != nullptr) {
      T* grad_offset = static_cast<T*>(params.grad_offsets) + (first + i) * 2;
      from_float(known ? along_x : 0.0f, grad_offset[0]);
      from_float(known ? along_y : 0.0f, grad_offset[1]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kGatherThreads, 1) places_kernel(const SampleContextBackward params) {
  const JointOfLevel own(params.inputs);
  const Place* places = share_places<T>(params.inputs, own);
  if (map_has_units<T>(params.inputs.level[own.level]) && gradient_has_units<T>(params, own.level))
    place_gradients<T, kUnit<T>>(params, own, places);
  else
    place_gradients<T, 1>(params, own, places);
}

// Shared memory of `scatter`: | warp sums | places that reach the block's lines |
struct ScatterShared {
  int* warp_sums = reinterpret_cast<int*>(shared_memory);
  Place* places = reinterpret_cast<Place*>(warp_sums + kScatterWarps);
};

constexpr size_t kScatterSharedBytes = sizeof(int) * kScatterWarps + sizeof(Place) * kScatterThreads;

template <typename T>
__device__ bool row_is_known(const SampleContextInputs& in, int64_t sample, int32_t level, int32_t row) {
  bool known = true;
  for (int32_t s = 0; s < in.samples; ++s)
    known = known && read_place<T>(in, sample, level, row * in.samples + s).is_number();
  return known;
}

template <typename T, int kWidth>
__device__ void scatter(const SampleContextBackward& params, int64_t sample, int32_t index, int32_t tile) {
  const SampleContextInputs& in = params.inputs;
  const ContextLevel& level = in.level[index];
  const ScatterShared shared;
  const int32_t units = level.channels / kWidth;
  const int64_t first = static_cast<int64_t>(tile) * kScatterThreads;
  const int64_t item = first + threadIdx.x;
  const int32_t pixel = static_cast<int32_t>(item / units);
  const int32_t unit = static_cast<int32_t>(item % units);
  const int32_t x = pixel % level.width;
  const int32_t y = pixel / level.width;
  const int32_t first_line = static_cast<int32_t>(first / units / level.width);
  const int32_t last_line = static_cast<int32_t>((first + kScatterThreads - 1) / units / level.width);
  const T* grad_context = static_cast<const T*>(params.grad_contexts[index]) +
                          sample * in.joints * in.heads * level.channels + unit * kWidth;
  const int32_t count = in.joints * in.heads * in.samples;
  float sum[kWidth] = {};
  for (int32_t start = 0; start < count; start += kScatterThreads) {
    const int32_t own = start + static_cast<int32_t>(threadIdx.x);
    Place place{};
    bool reaches = false;
    if (own < count) {
      place = read_place<T>(in, sample, index, own);
      reaches = place.y.below + 1 >= first_line && place.y.below <= last_line &&
                row_is_known<T>(in, sample, index, own / in.samples);
    }
    int listed;
    const int before = inclusive_scan<kScatterWarps, int>(reaches, shared.warp_sums, listed) - reaches;
    if (reaches) shared.places[before] = place;
    __syncthreads();
    for (int i = 0; i < listed; ++i) {
      const Place& near = shared.places[i];
      const int32_t right = x - near.x.below;
      const int32_t lower = y - near.y.below;
      if (right < 0 || right > 1 || lower < 0 || lower > 1) continue;
      const float share = near.weight * (right ? near.x.fraction : 1.0f - near.x.fraction) *
                          (lower ? near.y.fraction : 1.0f - near.y.fraction);
      float grad[kWidth];
      load<T, kWidth>(grad_context + static_cast<int64_t>(near.row) * level.channels, grad);
      for (int c = 0; c < kWidth; ++c) sum[c] += share * grad[c];
    }
    __syncthreads();
  }
  if (y < level.height) {
    const int64_t target = sample * level.height * level.width + pixel;
    store<T, kWidth>(static_cast<T*>(params.grad_maps[index]) + target * level.channels + unit * kWidth, sum);
  }
}

// Blocks that a level's gradient takes per sample; none where it is not wanted.
template <typename T>
__host__ __device__ int32_t scatter_tiles(const SampleContextBackward& params, int32_t index) {
  const ContextLevel& level = params.inputs.level[index];
  if (params.grad_maps[index] == nullptr) return 0;
  const int32_t unit = gradient_has_units<T>(params, index) ? kUnit<T> : 1;
  const int64_t items = static_cast<int64_t>(level.height) * level.width * (level.channels / unit);
  return static_cast<int32_t>((items + kScatterThreads - 1) / kScatterThreads);
}

template <typename T>
__global__ void __launch_bounds__(kScatterThreads, 1) scatter_kernel(const SampleContextBackward params) {
  const SampleContextInputs& in = params.inputs;
  const int64_t sample = blockIdx.x % in.batch;
  int32_t tile = blockIdx.x / in.batch;
  int32_t index = 0;
  for (int32_t tiles; tile >= (tiles = scatter_tiles<T>(params, index)); ++index) tile -= tiles;
  if (gradient_has_units<T>(params, index))
    scatter<T, kUnit<T>>(params, sample, index, tile);
  else
    scatter<T, 1>(params, sample, index, tile);
}

cudaError_t check(const SampleContextInputs& in) {
  const bool valid = in.levels >= 1 && in.levels <= kMaxLevels && in.joints >= 1 && in.heads >= 1 && in.samples >= 1;
  return valid ? cudaSuccess : cudaErrorInvalidValue;
}

size_t place_bytes(const SampleContextInputs& in) { return sizeof(Place) * in.heads * in.samples; }

int64_t joints_of_levels(const SampleContextInputs& in) {
  return static_cast<int64_t>(in.batch) * in.levels * in.joints;
}

}  // namespace

extern "C" cudaError_t sample_context_forward(const SampleContextForward* params) {
  const SampleContextInputs& in = params->inputs;
  if (const cudaError_t error = check(in); error != cudaSuccess) return error;
  if (in.batch == 0) return cudaSuccess;
  return dispatch_dtype(in.dtype, [&](auto type) {
    return launch(gather_kernel<typename decltype(type)::type>, joints_of_levels(in), kGatherThreads, place_bytes(in),
                  in.stream, *params);
  });
}

extern "C" cudaError_t sample_context_backward(const SampleContextBackward* params) {
  const SampleContextInputs& in = params->inputs;
  if (const cudaError_t error = check(in); error != cudaSuccess) return error;
  if (in.batch == 0) return cudaSuccess;
  return dispatch_dtype(in.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (params->grad_offsets != nullptr || params->grad_weights != nullptr) {
      const cudaError_t error = launch(places_kernel<T>, joints_of_levels(in), kGatherThreads, place_bytes(in),
                                       in.stream, *params);
      if (error != cudaSuccess) return error;
    }
    int64_t tiles = 0;
    for (int32_t index = 0; index < in.levels; ++index) tiles += scatter_tiles<T>(*params, index);
    if (tiles == 0) return cudaSuccess;
    return launch(scatter_kernel<T>, tiles * in.batch, kScatterThreads, kScatterSharedBytes, in.stream, *params);
  });
}

}  // namespace liftbyimage::cuda
