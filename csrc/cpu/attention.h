#pragma once

#include <cstdint>

// One attention A = softmax(Q Kᵀ) over patches, per sample, in tiles that stay in cache; the two ops share it.
//
// Symbols: R query rows, Hk key/value heads ("groups"), rows of group g are [g·R/Hk, (g+1)·R/Hk), P patches,
// E key width, F value width, D model width. Arithmetic is float or double; A is never stored whole: rows are
// taken in blocks whose scores fit a cache budget. Tiles and the order of every sum depend on the shape only, so a
// sample's result is the same bits for any number of threads and any batch.
namespace liftbyimage::cpu {

struct AttentionShape {
  int64_t batch, heads, joints, groups, patches, key_width, value_width, model_width;

  int64_t rows() const { return heads * joints; }
  int64_t group_rows() const { return rows() / groups; }
};

template <typename T>
struct ForwardInputs {
  const T* query;       // [R, E]
  const T* key;         // [Hk, P, E]
  const T* value;       // [Hk, P, F]
  const T* pose_value;  // [R, D], null: patches are not updated
  const T* patches;     // [P, D]
};

template <typename T>
struct ForwardOutputs {
  T* context;     // [R, F]
  T* importance;  // [P], null: not wanted
  T* lse;         // [R]
  T* patches;     // [P, D], null with pose_value
  T* attention;   // [P, R], null: not wanted
};

// Null gradients count as zero.
template <typename T>
struct BackwardInputs {
  const T* query;            // [R, E]
  const T* key;              // [Hk, P, E]
  const T* value;            // [Hk, P, F]
  const T* pose_value;       // [R, D]
  const T* grad_context;     // [R, F]
  const T* grad_patches;     // [P, D]
  const T* grad_importance;  // [P]
  const T* grad_attention;   // [P, R]
};

template <typename T>
struct BackwardOutputs {
  T* grad_query;       // [R, E]
  T* grad_key;         // [Hk, P, E], null: token gradients are not wanted
  T* grad_value;       // [Hk, P, F]; equal to grad_key where value is key, which then takes both gradients
  T* grad_pose_value;  // [R, D], null without pose_value
  bool patches_is_key;
};

template <typename T>
class Attention {
 public:
  Attention(const AttentionShape& shape, T scale) : shape_(shape), scale_(scale) {}

  void forward(const ForwardInputs<T>& in, const ForwardOutputs<T>& out) const;
  void backward(const BackwardInputs<T>& in, const BackwardOutputs<T>& out) const;

 private:
  AttentionShape shape_;
  T scale_;
};

}  // namespace liftbyimage::cpu
