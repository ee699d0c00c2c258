// What every CUDA launcher shares: element types, conversion to and from float, dynamic shared memory, launching.
// Free of torch headers, so that the .cu files compile with nvcc alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace liftbyimage::cuda {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

extern __shared__ float4 shared_memory[];

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void from_float(float value, float& out) { out = value; }
__device__ inline void from_float(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void from_float(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

template <typename T>
struct Type {
  using type = T;
};

// Calls function(Type<T>{}) for the element type T that `dtype` names.
template <typename Function>
cudaError_t dispatch_dtype(int32_t dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(Type<float>{});
    case kFloat16:
      return function(Type<__half>{});
    case kBFloat16:
      return function(Type<__nv_bfloat16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Lets a kernel have so much dynamic shared memory on the current device; asked of the driver when it is more than ever
// before.
inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  const cudaError_t no_device = cudaGetDevice(&device);
  if (no_device != cudaSuccess) return no_device;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

// Launches a one-dimensional grid; more than 48 KiB of shared memory has to be asked for explicitly.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Params& params) {
  constexpr int64_t kMaxBlocks = 2147483647;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  return error != cudaSuccess ? error : cudaGetLastError();
}

inline int64_t ceil_div(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

}  // namespace liftbyimage::cuda
