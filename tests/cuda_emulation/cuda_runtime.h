// Stand-in for CUDA's header of this name: the part that csrc/cuda uses, run by emulate.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulate.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx;
inline dim3 blockIdx;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace liftbyimage::cuda {
alignas(1024) inline float4 shared_memory[emulate::kHopperSharedLimit / sizeof(float4)];
}

#define CUDART_VERSION 0

inline const char* cudaGetErrorString(cudaError_t) { return "a launcher refused its arguments"; }

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return static_cast<size_t>(bytes) <= emulate::shared_limit() ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kMultiprocessors = 6;  // few: samples are shared out among several blocks where the batch is smaller
  *value = attribute == cudaDevAttrMultiProcessorCount            ? kMultiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(emulate::shared_limit())
           : attribute == cudaDevAttrComputeCapabilityMajor       ? emulate::capability / 10
                                                                  : emulate::capability % 10;
  return cudaSuccess;
}

template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  if (config->gridDim.x == 0 || config->dynamicSmemBytes > emulate::shared_limit()) return cudaErrorInvalidConfiguration;
  emulate::run_grid(
      config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
      reinterpret_cast<char*>(liftbyimage::cuda::shared_memory),
      [](unsigned block, unsigned thread) {
        blockIdx.x = block;
        threadIdx.x = thread;
      },
      [&] { kernel(params); });
  return cudaSuccess;
}

#define __syncthreads() emulate::Block::current()->sync_block(__LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulate_shuffle_xor(mask, value, lanes, __LINE__)
#define __shfl_sync(mask, value, lane) emulate_shuffle(mask, value, lane, __LINE__)
#define __any_sync(mask, value) emulate_any(mask, value, __LINE__)
#define __shfl_up_sync(mask, value, lanes) emulate_shuffle_up(mask, value, lanes, __LINE__)

template <typename T>
T emulate_shuffle(unsigned mask, T value, int lane, int line) {
  return emulate::Block::current()->exchange(mask, value, line, [&](auto handed_in) { return handed_in(lane); });
}

template <typename T>
T emulate_shuffle_xor(unsigned mask, T value, int lanes, int line) {
  emulate::Block& block = *emulate::Block::current();
  const int from = block.lane() ^ lanes;
  return block.exchange(mask, value, line, [&](auto handed_in) { return handed_in(from); });
}

template <typename T>
T emulate_shuffle_up(unsigned mask, T value, int lanes, int line) {
  emulate::Block& block = *emulate::Block::current();
  const int from = block.lane() >= lanes ? block.lane() - lanes : block.lane();
  return block.exchange(mask, value, line, [&](auto handed_in) { return handed_in(from); });
}

inline bool emulate_any(unsigned mask, bool value, int line) {
  emulate::Block& block = *emulate::Block::current();
  return block.exchange(mask, static_cast<int>(value), line, [](auto handed_in) {
    int any = 0;
    for (int lane = 0; lane < emulate::kWarpSize; ++lane) any |= handed_in(lane);
    return any;
  }) != 0;
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline float __fmul_ru(float a, float b) {
  const float product = a * b;
  return product < static_cast<double>(a) * b ? std::nextafter(product, INFINITY) : product;
}

inline float __fmul_rn(float a, float b) { return a * b; }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
