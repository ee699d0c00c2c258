// Launchers of context sampling. Plain structs, no torch: the caller owns every buffer and knows every size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace liftbyimage::cuda {

constexpr int kMaxLevels = 8;

// A feature map [batch, channels, height, width]; strides in elements.
struct ContextLevel {
  const void* map;
  int64_t batch_stride;
  int64_t channel_stride;
  int64_t line_stride;
  int64_t pixel_stride;
  int32_t channels;
  int32_t height;
  int32_t width;
};

struct SampleContextInputs {
  int32_t dtype;
  int32_t batch;
  int32_t levels;  // 1 … kMaxLevels
  int32_t joints;
  int32_t heads;
  int32_t samples;
  bool zeros;             // of the corners of a place those outside the map count 0; else places stop at the border
  const void* reference;  // [batch, joints, 2]
  const void* offsets;    // [batch, levels, joints, heads, samples, 2]
  const void* weights;    // [batch, levels, joints, heads, samples]
  ContextLevel level[kMaxLevels];
  cudaStream_t stream;
};

struct SampleContextForward {
  SampleContextInputs inputs;
  void* contexts[kMaxLevels];  // [batch, joints, heads, channels]
};

struct SampleContextBackward {
  SampleContextInputs inputs;
  const void* grad_contexts[kMaxLevels];  // [batch, joints, heads, channels]
  void* grad_offsets;                     // like offsets; null: not wanted
  void* grad_weights;                     // like weights; null: not wanted
  void* grad_maps[kMaxLevels];            // [batch, height, width, channels]; null: not wanted
};

extern "C" cudaError_t sample_context_forward(const SampleContextForward* params);
extern "C" cudaError_t sample_context_backward(const SampleContextBackward* params);

}  // namespace liftbyimage::cuda
