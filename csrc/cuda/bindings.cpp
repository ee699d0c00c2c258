// Registers the CUDA launchers under the schemas that `liftbyimage._C` defines. LibTorch's stable ABI only, so that one
// build loads with any torch >= 2.10, with CUDA or without. The Python edge has validated its arguments with full
// sentences; the checks here keep a direct call of a raw op from reading out of bounds.

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "mma_attention.h"
#include "mma_gradient.h"
#include "pose_guided_attention.h"
#include "prune_patches.h"
#include "sample_context.h"
#include "tensor_attention.h"
#include "tensor_gradient.h"

// Weak: CPU-only torch has no such symbol, yet the module must load there. Not hidden, or the linker makes it null.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace liftbyimage::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA streams");
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch gives no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

int32_t dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16 for the CUDA kernels");
  }
}

void check(const Tensor& tensor, const Sizes& expected, ScalarType dtype, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(expected.size()), name, " must have ", expected.size(),
                  " dimensions, got ", tensor.dim());
  for (size_t i = 0; i < expected.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == expected[i], name, " must have size ", expected[i], " in dimension ", i, ", got ",
                    tensor.size(i));
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on the CUDA device of the first argument");
}

void check_shim(AOTITorchError error) { STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "a call of torch failed"); }

int32_t shim_dtype(const Tensor& like, std::optional<ScalarType> dtype) {
  if (dtype == ScalarType::Float) return aoti_torch_dtype_float32();
  if (dtype == ScalarType::Long) return aoti_torch_dtype_int64();
  STD_TORCH_CHECK(!dtype.has_value(), "new tensors are float32, int64 or like another");
  int32_t code = 0;
  check_shim(aoti_torch_get_dtype(like.get(), &code));
  return code;
}

// By the shim, because torch::stable::new_empty finds its op by name and boxes the arguments at each call.
Tensor empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
  Sizes strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim > 1; --dim)
    strides[dim - 2] = strides[dim - 1] * std::max<int64_t>(sizes[dim - 1], 1);
  int32_t device_type = 0;
  check_shim(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  check_shim(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                      shim_dtype(like, dtype), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// Asks torch only where there is something to copy.
Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A patch-side tensor is used in place as long as its width is contiguous.
Tensor width_contiguous(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

PatchTensor grouped(const Tensor& tensor) {  // [B, Hk, P, width]
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

PatchTensor ungrouped(const Tensor& tensor) {  // [B, P, width]
  return {tensor.data_ptr(), tensor.stride(0), 0, tensor.stride(1)};
}

// The tensors that both directions read, made fit for the kernels, and what the kernels are told about them.
struct Attention {
  Tensor query, key, pose_value;
  OptionalTensor value;
  PoseGuidedAttentionInputs inputs;
  Sizes context_sizes, row_sizes, patches_sizes, importance_sizes;

  Attention(const Tensor& query_in, const Tensor& key_in, const OptionalTensor& value_in, const Tensor& pose_value_in,
            double scale)
      : query(packed(query_in)),
        key(width_contiguous(key_in)),
        pose_value(packed(pose_value_in)) {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && pose_value.dim() == 4,
                    "query, key and pose_value must have 4 dimensions");
    const ScalarType dtype = query.scalar_type();
    const int64_t batch = query.size(0), heads = query.size(1), joints = query.size(2), key_width = query.size(3);
    const int64_t groups = key.size(1), patches = key.size(2), model_width = pose_value.size(3);
    STD_TORCH_CHECK(groups == 1 || groups == heads, "key must have 1 or ", heads, " heads, got ", groups);
    STD_TORCH_CHECK(heads > 0 && joints > 0 && patches > 0, "heads, joints and patches must be at least 1");
    check(key, {batch, groups, patches, key_width}, dtype, query, "key");
    check(pose_value, {batch, heads, joints, model_width}, dtype, query, "pose_value");
    int64_t value_width = key_width;
    if (value_in.has_value()) {
      STD_TORCH_CHECK(value_in->dim() == 4, "value must have 4 dimensions, got ", value_in->dim());
      value_width = value_in->size(3);
      check(*value_in, {batch, groups, patches, value_width}, dtype, query, "value");
      value = width_contiguous(*value_in);
    }
    for (const int64_t width : {key_width, value_width, model_width})
      STD_TORCH_CHECK(width <= kMaxWidth, "the CUDA kernels serve widths up to ", kMaxWidth, ", got ", width);
    for (const int64_t size : {batch, heads * joints, patches})
      STD_TORCH_CHECK(size <= INT32_MAX, "the CUDA kernels serve sizes up to ", INT32_MAX, ", got ", size);

    inputs.dtype = dtype_of(query, "query");
    inputs.batch = static_cast<int32_t>(batch);
    inputs.groups = static_cast<int32_t>(groups);
    inputs.rows = static_cast<int32_t>(heads * joints / groups);
    inputs.patches = static_cast<int32_t>(patches);
    inputs.key_width = static_cast<int32_t>(key_width);
    inputs.value_width = static_cast<int32_t>(value_width);
    inputs.model_width = static_cast<int32_t>(model_width);
    inputs.scale = static_cast<float>(scale);
    inputs.query = query.data_ptr();
    inputs.key = grouped(key);
    inputs.value = value.has_value() ? grouped(*value) : inputs.key;
    inputs.pose_value = pose_value.data_ptr();
    inputs.stream = current_stream(query);

    row_sizes = {batch, heads, joints};
    context_sizes = {batch, heads, joints, value_width};
    patches_sizes = {batch, patches, model_width};
    importance_sizes = {batch, patches};
  }

  void check_patches_is_key() const {
    STD_TORCH_CHECK(inputs.groups == 1 && inputs.key_width == inputs.model_width,
                    "patches may be key itself only where key has one head of pose_value's width");
  }
};

// Copied where the rows of a tensor [B, P, width] or [B, 1, P, width] do not start at multiples of 16 bytes.
Tensor aligned_rows(const Tensor& tensor) {
  const int64_t size = static_cast<int64_t>(tensor.element_size()), last = tensor.dim() - 1;
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.stride(last) == 1 &&
                       tensor.stride(0) * size % 16 == 0 && tensor.stride(last - 1) * size % 16 == 0;
  if (aligned) return tensor;
  Sizes sizes;
  for (int64_t dim = 0; dim <= last; ++dim) sizes.push_back(tensor.size(dim));
  Tensor copy = empty(tensor, sizes);
  torch::stable::copy_(copy, tensor);
  return copy;
}

constexpr char kTensorCoreNeeds[] =
    ": the CUDA kernel serves float16 and bfloat16 where the GPU has tensor cores for both (compute capability 8.0) and"
    " shared memory for the rows, up to ";

// Kernels of one attention, those for a whole warpgroup (Hopper) before those for a warp.
struct TensorCores {
  bool (*serves)(const TensorAttention&);
  int64_t (*workspace)(const TensorAttention&);
  cudaError_t (*forward)(const TensorAttention*);
};
constexpr TensorCores kTensorCores[] = {
    {tensor_attention_serves, tensor_attention_workspace, tensor_attention_forward},
    {mma_attention_serves, mma_attention_workspace, mma_attention_forward}};

// The first that serves the call, or null.
const TensorCores* tensor_cores_for(const TensorAttention& params) {
  for (const TensorCores& kernels : kTensorCores)
    if (kernels.serves(params)) return &kernels;
  return nullptr;
}

// One token tensor [B, P, width] or [B, 1, P, width] that is key and value of all heads, and the buffers of its
// attention.
struct SharedTokens {
  Tensor query, tokens;
  OptionalTensor pose_value;
  Tensor context, lse;
  TensorAttention params{};

  SharedTokens(const Tensor& query_in, const Tensor& tokens_in, double scale)
      : query(packed(query_in)), tokens(tokens_in) {
    STD_TORCH_CHECK(query.dim() == 4 && (tokens.dim() == 3 || tokens.dim() == 4),
                    "query must have 4 dimensions and the tokens 3, or 4 with one head");
    tokens = aligned_rows(tokens);
    const int64_t batch = query.size(0), rows = query.size(1) * query.size(2), width = query.size(3);
    const int64_t patch_dim = tokens.dim() - 2, patches = tokens.size(patch_dim);
    check(tokens, patch_dim == 1 ? Sizes{batch, patches, width} : Sizes{batch, 1, patches, width}, query.scalar_type(),
          query, "the tokens");
    STD_TORCH_CHECK(rows > 0 && patches > 0 && width > 0, "heads, joints, patches and width must be at least 1");
    for (const int64_t size : {batch, rows, patches, width})
      STD_TORCH_CHECK(size <= INT32_MAX, "the CUDA kernels serve sizes up to ", INT32_MAX, ", got ", size);
    params.dtype = dtype_of(query, "query");
    params.batch = static_cast<int32_t>(batch);
    params.rows = static_cast<int32_t>(rows);
    params.patches = static_cast<int32_t>(patches);
    params.width = static_cast<int32_t>(width);
    params.scale = static_cast<float>(scale);
    params.query = query.data_ptr();
    params.tokens = tokens.data_ptr();
    params.tokens_batch_stride = tokens.stride(0);
    params.tokens_patch_stride = tokens.stride(patch_dim);
    params.stream = current_stream(query);
    context = empty(query, {batch, query.size(1), query.size(2), width});
    lse = empty(query, {batch, query.size(1), query.size(2)}, ScalarType::Float);
    params.context = context.data_ptr();
    params.lse = static_cast<float*>(lse.data_ptr());
  }

  Tensor add_importance() {
    const Tensor importance = empty(query, {params.batch, params.patches}, ScalarType::Float);
    params.importance = static_cast<float*>(importance.data_ptr());
    return importance;
  }

  // [B, P, channels + rows]: `channels` columns of the tokens, then the attention.
  Tensor add_attention(int32_t channels) {
    const Tensor attention = empty(query, {params.batch, params.patches, channels + params.rows});
    params.attention = attention.data_ptr();
    params.attention_stride = channels + params.rows;
    params.attention_rows = params.rows;
    params.channels = channels;
    return attention;
  }

  Tensor add_update(const Tensor& pose_value_in) {
    pose_value = packed(pose_value_in);
    check(*pose_value, {query.size(0), query.size(1), query.size(2), query.size(3)}, query.scalar_type(), query,
          "pose_value");
    const Tensor patches_out = empty(query, {params.batch, params.patches, params.width});
    params.pose_value = pose_value->data_ptr();
    params.patches_out = patches_out.data_ptr();
    return patches_out;
  }

  void run(const char* op) {
    const TensorCores* kernels = tensor_cores_for(params);
    STD_TORCH_CHECK(kernels != nullptr, op, kTensorCoreNeeds, kTensorRows,
                    " query rows and widths that are multiples of 8 up to ", kTensorWidth);
    const Tensor workspace = empty(query, {kernels->workspace(params)}, ScalarType::Float);
    params.workspace = static_cast<float*>(workspace.data_ptr());
    check_launch(kernels->forward(&params), op);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_forward(Tensor query, Tensor key, OptionalTensor value, double scale,
                                                          bool need_attention, bool need_importance) {
  STD_TORCH_CHECK(key.dim() == 4 && key.size(1) == 1 && !value.has_value(),
                  "attend_patches_forward: the CUDA kernel serves one head of tokens that are key and value");
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  SharedTokens attention(query, key, scale);
  const Tensor none = empty(query, {0});
  const Tensor importance = need_importance ? attention.add_importance() : empty(query, {0}, ScalarType::Float);
  Tensor weights = none;
  if (need_attention) {
    const Tensor patch_major = attention.add_attention(0);  // [B, P, H · J]
    weights = torch::stable::view(torch::stable::transpose(patch_major, 1, 2),
                                  {query.size(0), query.size(1), query.size(2), key.size(2)});
  }
  attention.run("attend_patches_forward");
  return {attention.context, importance, weights, attention.lse};
}

std::tuple<Tensor, Tensor, Tensor> guide_forward(Tensor query, Tensor channels, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  SharedTokens attention(query, channels, scale);
  const Tensor guided = attention.add_attention(attention.params.width);
  attention.run("guide_patches_forward");
  return {attention.context, guided, attention.lse};
}

// A of given lse, as weights [B, P, 2, padded rows]: A is the first of two, the second is left for dS.
Tensor weigh_patches(Tensor query, Tensor tokens, Tensor lse, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  SharedTokens attention(query, tokens, scale);
  auto& params = attention.params;
  check(lse, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float, query, "lse");
  const Tensor row_lse = packed(lse);
  const int64_t padded_rows = ceil_div(params.rows, 8) * 8;
  const Tensor weights = empty(query, {params.batch, params.patches, 2, padded_rows});
  params.lse = static_cast<float*>(row_lse.data_ptr());
  params.given_lse = true;
  params.attention = weights.data_ptr();
  params.attention_stride = 2 * padded_rows;
  params.attention_rows = static_cast<int32_t>(padded_rows);
  attention.run("weigh_patches");
  return weights;
}

PatchRows patch_rows(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// Writes dS beside A.
void differentiate_scores(Tensor weights, OptionalTensor grad_context, OptionalTensor grad_patches,
                          OptionalTensor grad_importance, OptionalTensor grad_attention, Tensor tokens,
                          OptionalTensor pose_value, Tensor delta, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  STD_TORCH_CHECK(tokens.dim() == 3 && weights.dim() == 4 && delta.dim() == 3,
                  "the tokens must have 3 dimensions, weights 4 and delta 3");
  const int64_t batch = tokens.size(0), patches = tokens.size(1), width = tokens.size(2);
  const int64_t heads = delta.size(1), joints = delta.size(2), padded_rows = weights.size(3);
  const ScalarType dtype = tokens.scalar_type();
  check(weights, {batch, patches, 2, padded_rows}, dtype, tokens, "weights");
  check(delta, {batch, heads, joints}, ScalarType::Float, tokens, "delta");
  STD_TORCH_CHECK(heads * joints <= padded_rows && weights.is_contiguous(),
                  "weights must be contiguous and hold every row");
  const Tensor row_delta = packed(delta);
  tokens = aligned_rows(tokens);
  TensorGradient params{};
  params.dtype = dtype_of(tokens, "the tokens");
  params.batch = static_cast<int32_t>(batch);
  params.rows = static_cast<int32_t>(heads * joints);
  params.patches = static_cast<int32_t>(patches);
  params.width = static_cast<int32_t>(width);
  params.scale = static_cast<float>(scale);
  params.tokens = patch_rows(tokens);
  params.delta = static_cast<const float*>(row_delta.data_ptr());
  params.weights = weights.data_ptr();
  params.padded_rows = static_cast<int32_t>(padded_rows);
  params.stream = current_stream(tokens);
  if (grad_context.has_value()) {
    check(*grad_context, {batch, heads, joints, width}, dtype, tokens, "grad_context");
    grad_context = packed(*grad_context);
    params.grad_context = grad_context->data_ptr();
  }
  if (grad_patches.has_value()) {
    STD_TORCH_CHECK(pose_value.has_value(), "grad_patches needs pose_value");
    check(*grad_patches, {batch, patches, width}, dtype, tokens, "grad_patches");
    check(*pose_value, {batch, heads, joints, width}, dtype, tokens, "pose_value");
    grad_patches = aligned_rows(*grad_patches);
    pose_value = packed(*pose_value);
    params.grad_patches = patch_rows(*grad_patches);
    params.pose_value = pose_value->data_ptr();
  }
  if (grad_importance.has_value()) {
    check(*grad_importance, {batch, patches}, ScalarType::Float, tokens, "grad_importance");
    grad_importance = packed(*grad_importance);
    params.grad_importance = static_cast<const float*>(grad_importance->data_ptr());
  }
  if (grad_attention.has_value()) {
    check(*grad_attention, {batch, patches, heads * joints}, dtype, tokens, "grad_attention");
    grad_attention = width_contiguous(*grad_attention);
    params.grad_attention = patch_rows(*grad_attention);
  }
  const bool by_warpgroups = tensor_gradient_serves(params);
  STD_TORCH_CHECK(by_warpgroups || mma_gradient_serves(params), "differentiate_scores", kTensorCoreNeeds, kTensorRows,
                  " query rows and widths that are multiples of 8 up to ", kTensorWidth);
  check_launch(by_warpgroups ? tensor_gradient(&params) : mma_gradient(&params), "differentiate_scores");
}

// Pose-guided attention on tensor cores, or nothing where they do not serve the call.
std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> attention_on_tensor_cores(const Tensor& query,
                                                                                    const Tensor& key,
                                                                                    const Tensor& pose_value,
                                                                                    double scale) {
  if (query.dim() != 4 || key.dim() != 4 || pose_value.dim() != 4 || key.size(1) != 1) return std::nullopt;
  if (query.size(3) != pose_value.size(3) || query.scalar_type() == ScalarType::Float) return std::nullopt;
  if (query.size(1) * query.size(2) > kTensorRows || query.size(3) > kTensorWidth) return std::nullopt;
  SharedTokens attention(query, key, scale);
  const Tensor patches_out = attention.add_update(pose_value);
  const Tensor importance = attention.add_importance();
  if (tensor_cores_for(attention.params) == nullptr) return std::nullopt;
  attention.run("pose_guided_attention_forward");
  return std::make_tuple(attention.context, patches_out, importance, attention.lse);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward(Tensor query, Tensor key, OptionalTensor value,
                                                             Tensor pose_value, OptionalTensor patches, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  if (!value.has_value() && !patches.has_value())
    if (const auto results = attention_on_tensor_cores(query, key, pose_value, scale)) return *results;
  const Attention attention(query, key, value, pose_value, scale);
  const ScalarType dtype = query.scalar_type();
  PoseGuidedAttentionForward params{};
  params.inputs = attention.inputs;
  OptionalTensor tokens;
  if (patches.has_value()) {
    check(*patches, attention.patches_sizes, dtype, query, "patches");
    tokens = width_contiguous(*patches);
    params.tokens = ungrouped(*tokens);
  } else {
    attention.check_patches_is_key();
    params.tokens = attention.inputs.key;
  }
  const Tensor context = empty(query, attention.context_sizes);
  const Tensor patches_out = empty(query, attention.patches_sizes);
  const Tensor importance = empty(query, attention.importance_sizes, ScalarType::Float);
  const Tensor lse = empty(query, attention.row_sizes, ScalarType::Float);
  const Tensor residual = empty(query, attention.row_sizes, ScalarType::Float);
  params.context = context.data_ptr();
  params.patches_out = patches_out.data_ptr();
  params.importance = static_cast<float*>(importance.data_ptr());
  params.lse = static_cast<float*>(lse.data_ptr());
  params.residual = static_cast<float*>(residual.data_ptr());
  check_launch(pose_guided_attention_forward(&params), "pose_guided_attention_forward");
  return {context, patches_out, importance, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(OptionalTensor grad_context, OptionalTensor grad_patches,
                                                              OptionalTensor grad_importance, Tensor query, Tensor key,
                                                              OptionalTensor value, Tensor pose_value, Tensor context,
                                                              Tensor lse, double scale, bool need_token_grads,
                                                              bool patches_is_key) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Attention attention(query, key, value, pose_value, scale);
  const ScalarType dtype = query.scalar_type();
  if (patches_is_key) attention.check_patches_is_key();
  check(context, attention.context_sizes, dtype, query, "context");
  check(lse, attention.row_sizes, ScalarType::Float, query, "lse");
  const Tensor row_lse = packed(lse);
  const Tensor residual = empty(query, attention.row_sizes, ScalarType::Float);
  const Tensor delta = empty(query, attention.row_sizes, ScalarType::Float);
  PoseGuidedAttentionBackward params{};
  params.inputs = attention.inputs;
  params.lse = static_cast<const float*>(row_lse.data_ptr());
  params.residual = static_cast<float*>(residual.data_ptr());
  params.delta = static_cast<float*>(delta.data_ptr());
  params.patches_is_key = patches_is_key;
  if (grad_context.has_value()) {
    check(*grad_context, attention.context_sizes, dtype, query, "grad_context");
    grad_context = packed(*grad_context);
    params.grad_context = grad_context->data_ptr();
  }
  if (grad_patches.has_value()) {
    check(*grad_patches, attention.patches_sizes, dtype, query, "grad_patches");
    grad_patches = width_contiguous(*grad_patches);
    params.grad_patches = ungrouped(*grad_patches);
  }
  if (grad_importance.has_value()) {
    check(*grad_importance, attention.importance_sizes, ScalarType::Float, query, "grad_importance");
    grad_importance = packed(*grad_importance);
    params.grad_importance = static_cast<const float*>(grad_importance->data_ptr());
  }
  const bool separate_value = need_token_grads && value.has_value();
  const auto& in = attention.inputs;
  const Sizes key_sizes = {in.batch, in.groups, in.patches, in.key_width};
  const Sizes value_sizes = {in.batch, in.groups, in.patches, in.value_width};
  const Sizes none = {0};
  const Tensor grad_query = empty(query, {query.size(0), query.size(1), query.size(2), query.size(3)});
  const Tensor grad_key = empty(query, need_token_grads ? key_sizes : none);
  const Tensor grad_value = empty(query, separate_value ? value_sizes : none);
  const Tensor grad_pose_value =
      empty(query, {query.size(0), query.size(1), query.size(2), static_cast<int64_t>(in.model_width)});
  params.grad_query = grad_query.data_ptr();
  params.grad_key = need_token_grads ? grad_key.data_ptr() : nullptr;
  params.grad_value = separate_value ? grad_value.data_ptr() : nullptr;
  params.grad_pose_value = grad_pose_value.data_ptr();
  check_launch(pose_guided_attention_backward(&params), "pose_guided_attention_backward");
  return {grad_query, grad_key, grad_value, grad_pose_value};
}

std::tuple<Tensor, Tensor> prune_forward(Tensor patches, Tensor importance, int64_t keep) {
  STD_TORCH_CHECK(patches.dim() == 3, "patches must have 3 dimensions, got ", patches.dim());
  const int64_t batch = patches.size(0), num_patches = patches.size(1), width = patches.size(2);
  STD_TORCH_CHECK(keep >= 1 && keep <= num_patches, "keep must be between 1 and ", num_patches, ", got ", keep);
  STD_TORCH_CHECK(batch <= INT32_MAX && num_patches <= INT32_MAX, "batch and patches must fit 32 bits");
  check(importance, {batch, num_patches}, importance.scalar_type(), patches, "importance");
  const torch::stable::accelerator::DeviceGuard guard(patches.get_device_index());
  const int64_t size = static_cast<int64_t>(patches.element_size());
  const Tensor rows = width_contiguous(patches);
  const Tensor scores = packed(importance);
  const Tensor kept = empty(patches, {batch, keep, width});
  const Tensor index = empty(patches, {batch, keep}, ScalarType::Long);
  PrunePatchesForward params{};
  params.importance_dtype = dtype_of(importance, "importance");
  params.batch = static_cast<int32_t>(batch);
  params.patches = static_cast<int32_t>(num_patches);
  params.keep = static_cast<int32_t>(keep);
  params.row_bytes = width * size;
  params.rows = rows.data_ptr();
  params.rows_batch_stride = rows.stride(0) * size;
  params.rows_patch_stride = rows.stride(1) * size;
  params.importance = scores.data_ptr();
  params.kept = kept.data_ptr();
  params.index = static_cast<int64_t*>(index.data_ptr());
  params.stream = current_stream(patches);
  check_launch(prune_patches_forward(&params), "prune_patches_forward");
  return {kept, index};
}

Tensor prune_backward(Tensor grad_kept, Tensor index, int64_t num_patches) {
  STD_TORCH_CHECK(grad_kept.dim() == 3, "grad_kept must have 3 dimensions, got ", grad_kept.dim());
  const int64_t batch = grad_kept.size(0), keep = grad_kept.size(1), width = grad_kept.size(2);
  STD_TORCH_CHECK(num_patches >= 1 && num_patches <= INT32_MAX && batch <= INT32_MAX && keep <= INT32_MAX,
                  "num_patches must be between 1 and ", INT32_MAX, ", got ", num_patches);
  check(index, {batch, keep}, ScalarType::Long, grad_kept, "index");
  const torch::stable::accelerator::DeviceGuard guard(grad_kept.get_device_index());
  const Tensor rows = packed(grad_kept);
  const Tensor slots = packed(index);
  const Tensor grad_patches = empty(grad_kept, {batch, num_patches, width});
  PrunePatchesBackward params{};
  params.batch = static_cast<int32_t>(batch);
  params.patches = static_cast<int32_t>(num_patches);
  params.keep = static_cast<int32_t>(keep);
  params.row_bytes = width * static_cast<int64_t>(grad_kept.element_size());
  params.grad_kept = rows.data_ptr();
  params.index = static_cast<const int64_t*>(slots.data_ptr());
  params.grad_rows = grad_patches.data_ptr();
  params.stream = current_stream(grad_kept);
  check_launch(prune_patches_backward(&params), "prune_patches_backward");
  return grad_patches;
}

// The tensors that both directions read, made fit for the kernels, and what the kernels are told about them.
struct Context {
  Tensors feature_maps;
  Tensor reference, offsets, weights;
  SampleContextInputs inputs{};
  Sizes offsets_sizes, weights_sizes;
  std::vector<Sizes> context_sizes;

  Context(const Tensors& feature_maps_in, const Tensor& reference_in, const Tensor& offsets_in,
          const Tensor& weights_in, bool zeros)
      : feature_maps(feature_maps_in),
        reference(packed(reference_in)),
        offsets(packed(offsets_in)),
        weights(packed(weights_in)) {
    STD_TORCH_CHECK(offsets.dim() == 6, "offsets must have 6 dimensions, got ", offsets.dim());
    const ScalarType dtype = offsets.scalar_type();
    const int64_t batch = offsets.size(0), levels = offsets.size(1), joints = offsets.size(2);
    const int64_t heads = offsets.size(3), samples = offsets.size(4);
    weights_sizes = {batch, levels, joints, heads, samples};
    offsets_sizes = {batch, levels, joints, heads, samples, 2};
    STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels && static_cast<int64_t>(feature_maps.size()) == levels,
                    "feature_maps and offsets must have one number of levels, at most ", kMaxLevels, ", got ",
                    feature_maps.size(), " and ", levels);
    STD_TORCH_CHECK(joints > 0 && heads > 0 && samples > 0, "joints, heads and samples must be at least 1");
    STD_TORCH_CHECK(joints * heads * samples <= INT32_MAX && batch <= INT32_MAX, "batch and places must fit 32 bits");
    check(offsets, offsets_sizes, dtype, offsets, "offsets");
    check(reference, {batch, joints, 2}, dtype, offsets, "reference");
    check(weights, weights_sizes, dtype, offsets, "weights");
    inputs.dtype = dtype_of(offsets, "offsets");
    inputs.batch = static_cast<int32_t>(batch);
    inputs.levels = static_cast<int32_t>(levels);
    inputs.joints = static_cast<int32_t>(joints);
    inputs.heads = static_cast<int32_t>(heads);
    inputs.samples = static_cast<int32_t>(samples);
    inputs.zeros = zeros;
    inputs.reference = reference.data_ptr();
    inputs.offsets = offsets.data_ptr();
    inputs.weights = weights.data_ptr();
    inputs.stream = current_stream(offsets);
    for (int64_t level = 0; level < levels; ++level) {
      const Tensor& map = feature_maps[level];
      STD_TORCH_CHECK(map.dim() == 4, "feature_maps must have 4 dimensions, got ", map.dim());
      const int64_t channels = map.size(1), height = map.size(2), width = map.size(3);
      check(map, {batch, channels, height, width}, dtype, offsets, "feature_maps");
      STD_TORCH_CHECK(channels > 0 && height > 0 && width > 0 && channels * height * width <= INT32_MAX,
                      "a feature map must have at least 1 and at most ", INT32_MAX, " elements per sample");
      context_sizes.push_back({batch, joints, heads, channels});
      inputs.level[level] = {map.data_ptr(),  map.stride(0), map.stride(1), map.stride(2), map.stride(3),
                             static_cast<int32_t>(channels), static_cast<int32_t>(height), static_cast<int32_t>(width)};
    }
  }
};

Tensors context_forward(Tensors feature_maps, Tensor reference, Tensor offsets, Tensor weights, bool zeros) {
  const torch::stable::accelerator::DeviceGuard guard(offsets.get_device_index());
  const Context context(feature_maps, reference, offsets, weights, zeros);
  SampleContextForward params{};
  params.inputs = context.inputs;
  Tensors contexts;
  for (const Sizes& sizes : context.context_sizes) contexts.push_back(empty(offsets, sizes));
  for (size_t level = 0; level < contexts.size(); ++level) params.contexts[level] = contexts[level].data_ptr();
  check_launch(sample_context_forward(&params), "sample_context_forward");
  return contexts;
}

std::tuple<Tensor, Tensor, Tensors> context_backward(Tensors grad_contexts, Tensors feature_maps, Tensor reference,
                                                     Tensor offsets, Tensor weights, bool zeros, bool need_places,
                                                     bool need_weights, std::vector<bool> need_maps) {
  const torch::stable::accelerator::DeviceGuard guard(offsets.get_device_index());
  const Context context(feature_maps, reference, offsets, weights, zeros);
  const size_t levels = feature_maps.size();
  STD_TORCH_CHECK(grad_contexts.size() == levels && need_maps.size() == levels,
                  "grad_contexts and need_maps must have ", levels, " elements");
  SampleContextBackward params{};
  params.inputs = context.inputs;
  const Sizes none = {0};
  const Tensor grad_offsets = empty(offsets, need_places ? context.offsets_sizes : none);
  const Tensor grad_weights = empty(offsets, need_weights ? context.weights_sizes : none);
  params.grad_offsets = need_places ? grad_offsets.data_ptr() : nullptr;
  params.grad_weights = need_weights ? grad_weights.data_ptr() : nullptr;
  Tensors grad_maps;
  for (size_t level = 0; level < levels; ++level) {
    check(grad_contexts[level], context.context_sizes[level], offsets.scalar_type(), offsets, "grad_contexts");
    grad_contexts[level] = packed(grad_contexts[level]);
    params.grad_contexts[level] = grad_contexts[level].data_ptr();
    if (!need_maps[level]) {
      grad_maps.push_back(empty(offsets, none));
      continue;
    }
    const Tensor& map = feature_maps[level];
    const Tensor rows = empty(offsets, {map.size(0), map.size(2), map.size(3), map.size(1)});  // channels last
    params.grad_maps[level] = rows.data_ptr();
    grad_maps.push_back(torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3));
  }
  check_launch(sample_context_backward(&params), "sample_context_backward");
  return {grad_offsets, grad_weights, grad_maps};
}

}  // namespace
}  // namespace liftbyimage::cuda

// Steps of the backward on tensor cores (liftbyimage/ops/_tensor_cores.py).
STABLE_TORCH_LIBRARY_FRAGMENT(liftbyimage, m) {
  m.def("weigh_patches(Tensor query, Tensor tokens, Tensor lse, float scale) -> Tensor");
  m.def(
      "differentiate_scores(Tensor(a!) weights, Tensor? grad_context, Tensor? grad_patches, Tensor? grad_importance,"
      " Tensor? grad_attention, Tensor tokens, Tensor? pose_value, Tensor delta, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(liftbyimage, CUDA, m) {
  m.impl("attend_patches_forward", TORCH_BOX(&liftbyimage::cuda::attend_forward));
  m.impl("guide_patches_forward", TORCH_BOX(&liftbyimage::cuda::guide_forward));
  m.impl("weigh_patches", TORCH_BOX(&liftbyimage::cuda::weigh_patches));
  m.impl("differentiate_scores", TORCH_BOX(&liftbyimage::cuda::differentiate_scores));
  m.impl("pose_guided_attention_forward", TORCH_BOX(&liftbyimage::cuda::attention_forward));
  m.impl("pose_guided_attention_backward", TORCH_BOX(&liftbyimage::cuda::attention_backward));
  m.impl("prune_patches_forward", TORCH_BOX(&liftbyimage::cuda::prune_forward));
  m.impl("prune_patches_backward", TORCH_BOX(&liftbyimage::cuda::prune_backward));
  m.impl("sample_context_forward", TORCH_BOX(&liftbyimage::cuda::context_forward));
  m.impl("sample_context_backward", TORCH_BOX(&liftbyimage::cuda::context_backward));
}

namespace {

#define LIFTBYIMAGE_QUOTE(text) #text
#define LIFTBYIMAGE_QUOTE_VALUE(macro) LIFTBYIMAGE_QUOTE(macro)

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* cuda = PyUnicode_FromFormat("%d.%d", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  return Py_BuildValue("{s:N,s:s}", "cuda", cuda, "architectures",
                       LIFTBYIMAGE_QUOTE_VALUE(LIFTBYIMAGE_CUDA_ARCHITECTURES));
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "The CUDA version and the architectures (joined by +) this module was built for."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_cuda",
                      "Native CUDA operators of liftbyimage; importing it registers them.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
