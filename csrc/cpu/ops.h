#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// Native CPU implementations of the op schemas in csrc/bindings.cpp.
namespace liftbyimage::cpu {

using OptionalTensor = std::optional<at::Tensor>;
using Tensor2 = std::tuple<at::Tensor, at::Tensor>;
using Tensor3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Tensor4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// -> context [B,H,J,F], importance [B,P] or [0], attention [B,H,J,P] or [0], lse [B,H,J]
Tensor4 attend_patches_forward(const at::Tensor& query, const at::Tensor& key, const OptionalTensor& value,
                               double scale, bool need_attention, bool need_importance);

// -> grad_query [B,H,J,E], grad_key [B,Hk,P,E], grad_value [B,Hk,P,F]
Tensor3 attend_patches_backward(const OptionalTensor& grad_context, const OptionalTensor& grad_importance,
                                const OptionalTensor& grad_attention, const at::Tensor& query, const at::Tensor& key,
                                const OptionalTensor& value, const at::Tensor& context, const at::Tensor& lse,
                                double scale, bool need_token_grads);

// -> context [B,H,J,F], patches_out [B,P,D], importance [B,P], lse [B,H,J]
Tensor4 pose_guided_attention_forward(const at::Tensor& query, const at::Tensor& key, const OptionalTensor& value,
                                      const at::Tensor& pose_value, const OptionalTensor& patches, double scale);

// -> grad_query [B,H,J,E], grad_key [B,Hk,P,E], grad_value [B,Hk,P,F], grad_pose_value [B,H,J,D]
Tensor4 pose_guided_attention_backward(const OptionalTensor& grad_context, const OptionalTensor& grad_patches,
                                       const OptionalTensor& grad_importance, const at::Tensor& query,
                                       const at::Tensor& key, const OptionalTensor& value,
                                       const at::Tensor& pose_value, const at::Tensor& context,
                                       const at::Tensor& lse, double scale, bool need_token_grads,
                                       bool patches_is_key);

// -> context [B,H,J,W], guided [B,P,W+H*J], lse [B,H,J]
Tensor3 guide_patches_forward(const at::Tensor& query, const at::Tensor& channels, double scale);

// -> grad_query [B,H,J,W], grad_channels [B,P,W] or [0]
Tensor2 guide_patches_backward(const OptionalTensor& grad_context, const OptionalTensor& grad_guided,
                               const at::Tensor& query, const at::Tensor& channels, const at::Tensor& context,
                               const at::Tensor& lse, double scale, bool need_channel_grads);

// -> kept [B,K,D], index [B,K] ascending
Tensor2 prune_patches_forward(const at::Tensor& patches, const at::Tensor& importance, int64_t keep);

// -> grad_patches [B,P,D]
at::Tensor prune_patches_backward(const at::Tensor& grad_kept, const at::Tensor& index, int64_t num_patches);

// -> joints_out [B,J,D], queries [B,H,J,W]
Tensor2 joint_queries_forward(const at::Tensor& joints, const at::Tensor& in_proj_weight,
                              const at::Tensor& in_proj_bias, const at::Tensor& out_proj_weight,
                              const at::Tensor& out_proj_bias, const at::Tensor& norm_weight,
                              const at::Tensor& norm_bias, const at::Tensor& query_weight,
                              const at::Tensor& query_bias, const OptionalTensor& fold, int64_t heads, double eps);

// -> joints_out [B,J,D]
at::Tensor update_joints_forward(const at::Tensor& joints, const at::Tensor& context, const OptionalTensor& unfold,
                                 const OptionalTensor& value_bias, const at::Tensor& out_proj_weight,
                                 const at::Tensor& out_proj_bias, const at::Tensor& norm1_weight,
                                 const at::Tensor& norm1_bias, const at::Tensor& linear1_weight,
                                 const at::Tensor& linear1_bias, const at::Tensor& linear2_weight,
                                 const at::Tensor& linear2_bias, const at::Tensor& norm2_weight,
                                 const at::Tensor& norm2_bias, double eps);

// -> a context [B,J,H,C_l] for each level
std::vector<at::Tensor> sample_context_forward(at::TensorList feature_maps, const at::Tensor& reference,
                                               const at::Tensor& offsets, const at::Tensor& weights, bool zeros);

// -> grad_offsets [B,L,J,H,S,2] or [0], grad_weights [B,L,J,H,S] or [0], grad_maps [B,C_l,Hf_l,Wf_l] or [0]
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> sample_context_backward(
    at::TensorList grad_contexts, at::TensorList feature_maps, const at::Tensor& reference, const at::Tensor& offsets,
    const at::Tensor& weights, bool zeros, bool need_places, bool need_weights, c10::List<bool> need_maps);

// -> attended [B,T,D]
at::Tensor attend_tokens_forward(const at::Tensor& query_key_value, int64_t heads, double scale);

// -> grad_query_key_value [B,T,3D]
at::Tensor attend_tokens_backward(const at::Tensor& grad, const at::Tensor& query_key_value, int64_t heads,
                                  double scale);

// -> updated [B,T,D], hidden [B,T,F] and statistics [B,T,2] or [0] each
Tensor3 residual_feed_forward_forward(const at::Tensor& tokens, const at::Tensor& norm_weight,
                                      const at::Tensor& norm_bias, const at::Tensor& linear1_weight,
                                      const at::Tensor& linear1_bias, const at::Tensor& linear2_weight,
                                      const at::Tensor& linear2_bias, const OptionalTensor& branch_scale, double eps,
                                      bool keep);

// -> gradients of the wanted among the forward's tensors, in their order; branch_scale has none
std::vector<at::Tensor> residual_feed_forward_backward(
    const at::Tensor& grad_updated, const at::Tensor& tokens, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, const at::Tensor& linear1_weight, const at::Tensor& linear1_bias,
    const at::Tensor& linear2_weight, const at::Tensor& linear2_bias, const OptionalTensor& branch_scale,
    const at::Tensor& hidden, const at::Tensor& statistics, c10::List<bool> wanted);

// -> updated [B,T,D], projected [B,T,3D] and statistics [B,T,2] or [0] each
Tensor3 residual_attention_forward(const at::Tensor& tokens, const at::Tensor& norm_weight,
                                   const at::Tensor& norm_bias, const at::Tensor& in_proj_weight,
                                   const at::Tensor& in_proj_bias, const at::Tensor& out_proj_weight,
                                   const at::Tensor& out_proj_bias, const OptionalTensor& branch_scale, int64_t heads,
                                   double eps, bool keep);

// -> gradients of the wanted among the forward's tensors, in their order; branch_scale has none
std::vector<at::Tensor> residual_attention_backward(
    const at::Tensor& grad_updated, const at::Tensor& tokens, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, const at::Tensor& in_proj_weight, const at::Tensor& in_proj_bias,
    const at::Tensor& out_proj_weight, const at::Tensor& out_proj_bias, const OptionalTensor& branch_scale,
    const at::Tensor& projected, const at::Tensor& statistics, int64_t heads, c10::List<bool> wanted);

// -> tokens_out [B,L,J,D]
at::Tensor residual_context_forward(const at::Tensor& tokens, const at::Tensor& pose, const at::Tensor& reference,
                                    at::TensorList feature_maps, const at::Tensor& norm_weight,
                                    const at::Tensor& norm_bias, const at::Tensor& weights_weight,
                                    const at::Tensor& weights_bias, const at::Tensor& offsets_weight,
                                    const at::Tensor& offsets_bias, at::TensorList embed_weights,
                                    at::TensorList embed_biases, const OptionalTensor& branch_scale, int64_t heads,
                                    double eps);

// -> gradients of the wanted among the forward's tensors, in their order; branch_scale has none
std::vector<at::Tensor> residual_context_backward(
    const at::Tensor& grad_tokens, const at::Tensor& tokens, const at::Tensor& pose, const at::Tensor& reference,
    at::TensorList feature_maps, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
    const at::Tensor& weights_weight, const at::Tensor& weights_bias, const at::Tensor& offsets_weight,
    const at::Tensor& offsets_bias, at::TensorList embed_weights, at::TensorList embed_biases,
    const OptionalTensor& branch_scale, int64_t heads, double eps, c10::List<bool> wanted);

}  // namespace liftbyimage::cpu
