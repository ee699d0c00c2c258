// Stand-in for CUDA's runtime: launchers compiled by nvcc run on the CPU, and what they launch is written down.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace {

struct Launch {
  std::string symbol;
  unsigned threads;
  size_t shared;
};

// Kernels register themselves while the library is loaded, before objects of this file need exist.
std::map<const void*, std::string>& symbols() {
  static std::map<const void*, std::string> known;
  return known;
}

std::vector<Launch> launches;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* symbol, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  symbols()[host] = symbol;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// One H200.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const dim3 block = config->blockDim;
  launches.push_back({symbols().at(kernel), block.x * block.y * block.z, config->dynamicSmemBytes});
  return cudaSuccess;
}

// What only the <<<…>>> notation calls, in one version of CUDA or another.
void __cudaGetKernel() { std::abort(); }
void __cudaInitModule() { std::abort(); }
void __cudaLaunchKernel() { std::abort(); }
void __cudaPopCallConfiguration() { std::abort(); }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

int recorded() { return static_cast<int>(launches.size()); }

const char* recorded_symbol(int number) { return launches[number].symbol.c_str(); }

unsigned recorded_threads(int number) { return launches[number].threads; }

size_t recorded_shared(int number) { return launches[number].shared; }
}
