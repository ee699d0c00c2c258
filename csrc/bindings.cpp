#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/ops.h"

TORCH_LIBRARY(liftbyimage, m) {
  m.def(
      "attend_patches_forward(Tensor query, Tensor key, Tensor? value, float scale, bool need_attention,"
      " bool need_importance) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attend_patches_backward(Tensor? grad_context, Tensor? grad_importance, Tensor? grad_attention,"
      " Tensor query, Tensor key, Tensor? value, Tensor context, Tensor lse, float scale, bool need_token_grads)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "pose_guided_attention_forward(Tensor query, Tensor key, Tensor? value, Tensor pose_value, Tensor? patches,"
      " float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pose_guided_attention_backward(Tensor? grad_context, Tensor? grad_patches, Tensor? grad_importance,"
      " Tensor query, Tensor key, Tensor? value, Tensor pose_value, Tensor context, Tensor lse, float scale,"
      " bool need_token_grads, bool patches_is_key) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("guide_patches_forward(Tensor query, Tensor channels, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "guide_patches_backward(Tensor? grad_context, Tensor? grad_guided, Tensor query, Tensor channels, Tensor context,"
      " Tensor lse, float scale, bool need_channel_grads) -> (Tensor, Tensor)");
  m.def("prune_patches_forward(Tensor patches, Tensor importance, int keep) -> (Tensor, Tensor)");
  m.def("prune_patches_backward(Tensor grad_kept, Tensor index, int num_patches) -> Tensor");
  m.def(
      "joint_queries_forward(Tensor joints, Tensor in_proj_weight, Tensor in_proj_bias, Tensor out_proj_weight,"
      " Tensor out_proj_bias, Tensor norm_weight, Tensor norm_bias, Tensor query_weight, Tensor query_bias,"
      " Tensor? fold, int heads, float eps) -> (Tensor, Tensor)");
  m.def(
      "update_joints_forward(Tensor joints, Tensor context, Tensor? unfold, Tensor? value_bias,"
      " Tensor out_proj_weight, Tensor out_proj_bias, Tensor norm1_weight, Tensor norm1_bias, Tensor linear1_weight,"
      " Tensor linear1_bias, Tensor linear2_weight, Tensor linear2_bias, Tensor norm2_weight, Tensor norm2_bias,"
      " float eps) -> Tensor");
  m.def(
      "sample_context_forward(Tensor[] feature_maps, Tensor reference, Tensor offsets, Tensor weights, bool zeros)"
      " -> Tensor[]");
  m.def(
      "sample_context_backward(Tensor[] grad_contexts, Tensor[] feature_maps, Tensor reference, Tensor offsets,"
      " Tensor weights, bool zeros, bool need_places, bool need_weights, bool[] need_maps)"
      " -> (Tensor, Tensor, Tensor[])");
  m.def("attend_tokens_forward(Tensor query_key_value, int heads, float scale) -> Tensor");
  m.def("attend_tokens_backward(Tensor grad, Tensor query_key_value, int heads, float scale) -> Tensor");
  m.def(
      "residual_feed_forward_forward(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor linear1_weight,"
      " Tensor linear1_bias, Tensor linear2_weight, Tensor linear2_bias, Tensor? branch_scale, float eps, bool keep)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_feed_forward_backward(Tensor grad_updated, Tensor tokens, Tensor norm_weight, Tensor norm_bias,"
      " Tensor linear1_weight, Tensor linear1_bias, Tensor linear2_weight, Tensor linear2_bias, Tensor? branch_scale,"
      " Tensor hidden, Tensor statistics, bool[] wanted) -> Tensor[]");
  m.def(
      "residual_attention_forward(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor in_proj_weight,"
      " Tensor in_proj_bias, Tensor out_proj_weight, Tensor out_proj_bias, Tensor? branch_scale, int heads, float eps,"
      " bool keep) -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_attention_backward(Tensor grad_updated, Tensor tokens, Tensor norm_weight, Tensor norm_bias,"
      " Tensor in_proj_weight, Tensor in_proj_bias, Tensor out_proj_weight, Tensor out_proj_bias, Tensor? branch_scale,"
      " Tensor projected, Tensor statistics, int heads, bool[] wanted) -> Tensor[]");
  m.def(
      "residual_context_forward(Tensor tokens, Tensor pose, Tensor reference, Tensor[] feature_maps,"
      " Tensor norm_weight, Tensor norm_bias, Tensor weights_weight, Tensor weights_bias, Tensor offsets_weight,"
      " Tensor offsets_bias, Tensor[] embed_weights, Tensor[] embed_biases, Tensor? branch_scale, int heads,"
      " float eps) -> Tensor");
  m.def(
      "residual_context_backward(Tensor grad_tokens, Tensor tokens, Tensor pose, Tensor reference,"
      " Tensor[] feature_maps, Tensor norm_weight, Tensor norm_bias, Tensor weights_weight, Tensor weights_bias,"
      " Tensor offsets_weight, Tensor offsets_bias, Tensor[] embed_weights, Tensor[] embed_biases,"
      " Tensor? branch_scale, int heads, float eps, bool[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(liftbyimage, CPU, m) {
  m.impl("attend_patches_forward", &liftbyimage::cpu::attend_patches_forward);
  m.impl("attend_patches_backward", &liftbyimage::cpu::attend_patches_backward);
  m.impl("pose_guided_attention_forward", &liftbyimage::cpu::pose_guided_attention_forward);
  m.impl("pose_guided_attention_backward", &liftbyimage::cpu::pose_guided_attention_backward);
  m.impl("guide_patches_forward", &liftbyimage::cpu::guide_patches_forward);
  m.impl("guide_patches_backward", &liftbyimage::cpu::guide_patches_backward);
  m.impl("prune_patches_forward", &liftbyimage::cpu::prune_patches_forward);
  m.impl("prune_patches_backward", &liftbyimage::cpu::prune_patches_backward);
  m.impl("joint_queries_forward", &liftbyimage::cpu::joint_queries_forward);
  m.impl("update_joints_forward", &liftbyimage::cpu::update_joints_forward);
  m.impl("sample_context_forward", &liftbyimage::cpu::sample_context_forward);
  m.impl("sample_context_backward", &liftbyimage::cpu::sample_context_backward);
  m.impl("attend_tokens_forward", &liftbyimage::cpu::attend_tokens_forward);
  m.impl("attend_tokens_backward", &liftbyimage::cpu::attend_tokens_backward);
  m.impl("residual_feed_forward_forward", &liftbyimage::cpu::residual_feed_forward_forward);
  m.impl("residual_feed_forward_backward", &liftbyimage::cpu::residual_feed_forward_backward);
  m.impl("residual_attention_forward", &liftbyimage::cpu::residual_attention_forward);
  m.impl("residual_attention_backward", &liftbyimage::cpu::residual_attention_backward);
  m.impl("residual_context_forward", &liftbyimage::cpu::residual_context_forward);
  m.impl("residual_context_backward", &liftbyimage::cpu::residual_context_backward);
}

namespace {

const char* vector_isa() {
#if defined(CPU_CAPABILITY_AVX512)
  return "AVX512";
#elif defined(CPU_CAPABILITY_AVX2)
  return "AVX2";
#else
  return "DEFAULT";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["torch"] = TORCH_VERSION;
  info["march"] = LIFTBYIMAGE_MARCH;
  info["isa"] = vector_isa();
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = pybind11::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native CPU operators of liftbyimage; importing it registers torch.ops.liftbyimage.";
  m.def("build_info", &build_info, "Compiler, torch version, instruction set and OpenMP this module was built with.");
}
