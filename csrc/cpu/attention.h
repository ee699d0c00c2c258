#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

// One attention A = softmax(Q Kᵀ) over patches, per sample, in tiles that stay in cache; the two ops share it.
//
// Symbols: R query rows, Hk key/value heads ("groups"), rows of group g are [g·R/Hk, (g+1)·R/Hk), P patches,
// E key width, F value width, D model width. S is the type of what enters products (float, double, or bfloat16 where
// the processor multiplies it), T that of every sum and of the softmax (float or double). A is never stored whole:
// rows are taken in blocks whose scores fit a cache budget. Tiles and the order of every sum depend on the shape only,
// so a sample's result is the same bits for any number of threads and any batch.
namespace liftbyimage::cpu {

struct AttentionShape {
  int64_t batch, heads, joints, groups, patches, key_width, value_width, model_width;

  int64_t rows() const { return heads * joints; }
  int64_t group_rows() const { return rows() / groups; }
};

template <typename S>
struct ForwardInputs {
  const S* query;       // [R, E]
  const S* key;         // [Hk, P, E]
  const S* value;       // [Hk, P, F]
  const S* pose_value;  // [R, D], null: patches are not updated
  const S* patches;     // [P, D]
};

template <typename S>
struct ForwardOutputs {
  using T = at::opmath_type<S>;

  T* context;     // [R, F]
  T* importance;  // [P], null: not wanted
  T* lse;         // [R]
  T* patches;     // [P, D], null with pose_value
  S* attention;   // [P, attention_stride], the first R of each row; null: not wanted
  int64_t attention_stride;
  S* channels;    // [P, attention_stride], null: key [P, E] of the one group is not copied beside the attention
};

// Null gradients count as zero.
template <typename S>
struct BackwardInputs {
  using T = at::opmath_type<S>;

  const S* query;            // [R, E]
  const S* key;              // [Hk, P, E]
  const S* value;            // [Hk, P, F]
  const S* pose_value;       // [R, D]
  const S* grad_context;     // [R, F]
  const S* grad_patches;     // [P, D]
  const T* grad_importance;  // [P]
  const S* grad_attention;   // [P, attention_stride], the first R of each row
  int64_t attention_stride;
  const S* grad_tokens;      // [P, grad_tokens_stride], the first E of each row: joins grad_key of the one group
  int64_t grad_tokens_stride;
};

template <typename T>
struct BackwardOutputs {
  T* grad_query;       // [R, E]
  T* grad_key;         // [Hk, P, E], null: token gradients are not wanted
  T* grad_value;       // [Hk, P, F]; equal to grad_key where value is key, which then takes both gradients
  T* grad_pose_value;  // [R, D], null without pose_value
};

template <typename S>
class Attention {
 public:
  using T = at::opmath_type<S>;

  Attention(const AttentionShape& shape, T scale) : shape_(shape), scale_(scale) {}

  void forward(const ForwardInputs<S>& in, const ForwardOutputs<S>& out) const;
  void backward(const BackwardInputs<S>& in, const BackwardOutputs<T>& out) const;

 private:
  AttentionShape shape_;
  T scale_;
};

}  // namespace liftbyimage::cpu
