// What csrc/cuda/bindings.cpp asks of a torch with CUDA, answered for CPU tensors, so that the binding itself can run
// over the emulated kernels: the CPU is the one CUDA device, and its stream is null.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
}
