// Pose-guided attention, forward and backward, on plain FMA instructions: the first, simple version.
//
//   A = exp(scale·Q Kᵀ − lse)    context = A V    patches_out = patches + Aᵀ U    importance = mean of A over rows
//
// One scheme serves all five kernels. A block owns 32 entries of one side (query rows or patches) and walks over
// the other side 64 entries at a time; A exists only as the 32 × 64 tile in the registers of its 128 threads.
//
//                 other side: 64 per step ──►
//               ┌────┬────┬─ ─ ─ ─ ─┬────┐
//   own side    │ 4×4│    │         │    │ ty = 0      thread (ty, tx) holds the 4 × 4 tile at rows 4·ty, columns 4·tx;
//   32 entries  ├────┼────┼─ ─ ─ ─ ─┼────┤             16 neighbouring lanes share own entries, so that a sum over
//               │    │    │         │    │ ty = 1…7    the other side is a shuffle among them
//               └────┴────┴─ ─ ─ ─ ─┴────┘
//                 tx = 0 … 15
//
//   add_dot_products   tile += own · otherᵀ             32 columns of both sides staged transposed in shared memory
//   accumulate         sums[32 × width] += tile · other  the tile through shared memory, `other` 64 columns at a time;
//                                                       sums stay in shared memory, each cell owned by one thread
//
//   kernel          owns     result
//   context         rows     online softmax → context, lse
//   update          patches  patches_out, importance               (needs the final lse: a second phase is forced)
//   grad_pose       rows     dA = dO Vᵀ + U dXᵀ + g/R,  δ = rowsum(A ∘ dA),  dU = A dX,  and what lse lost to rounding
//   grad_query      rows     dS = A ∘ (dA − δ),  dQ = scale·dS K
//   grad_tokens     patches  dK = scale·dSᵀ Q,  dV = Aᵀ dO         (one sum where value is key)
//
// Every output element is summed by one thread in a fixed order: no atomics, bitwise repeatable, independent of the
// rest of the batch. A and dA come out bit for bit alike in all kernels, so that dS is exactly zero where it should be.
// Where value is key the tile is staged twice; the second read comes from the cache.

#include "pose_guided_attention.h"

#include <cmath>

#include "common.h"
#include "warps.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 3;      // per multiprocessor: what shared memory allows at width 256 on sm_90
constexpr int kOwn = 32;
constexpr int kOther = 64;
constexpr int kCells = 4;       // a thread's tile is kCells × kCells
constexpr int kLanes = kOther / kCells;
constexpr int kDepth = 32;      // columns of a dot product staged at once
constexpr int kColumns = 64;    // columns of a sum updated at once
constexpr int kOwnStride = kOwn + 4;      // padded against bank conflicts, still 16-byte aligned
constexpr int kOtherStride = kOther + 4;
constexpr int kStaging = kOther * kColumns;
static_assert(kDepth * (kOwnStride + kOtherStride) <= kStaging, "the transposed chunks share the staging area");

using Tile = float[kCells][kCells];
using PerOwn = float[kCells];

__device__ int thread_own() { return threadIdx.x / kLanes * kCells; }
__device__ int thread_other() { return threadIdx.x % kLanes * kCells; }

// `count` rows of `width` elements; what lies outside reads as zero.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int count;
  int width;

  __device__ float at(int row, int column) const {
    return row < count && column < width ? to_float(data[row * stride + column]) : 0.0f;
  }
};

// One block's position: which tile of which group of which sample.
struct Position {
  int tile;
  int group;
  int batch;
};

__device__ Position position(int tiles, int groups) {
  const int block = blockIdx.x;
  return {block % tiles, block / tiles % groups, block / tiles / groups};
}

template <typename T>
__device__ Rows<T> row_tile(const void* data, const PoseGuidedAttentionInputs& in, Position at, int start, int width) {
  const int64_t first = (static_cast<int64_t>(at.batch) * in.groups + at.group) * in.rows + start;
  return {static_cast<const T*>(data) + first * width, width, in.rows - start, width};
}

template <typename T>
__device__ Rows<T> patch_tile(const PatchTensor& tensor, const PoseGuidedAttentionInputs& in, Position at, int start,
                              int width) {
  const int64_t first = at.batch * tensor.batch_stride + at.group * tensor.group_stride + start * tensor.patch_stride;
  return {static_cast<const T*>(tensor.data) + first, tensor.patch_stride, in.patches - start, width};
}

__device__ float4 load4(const float* address) { return *reinterpret_cast<const float4*>(address); }

__device__ void add_outer_product(Tile& tile, float4 own, float4 other) {
  const float a[kCells] = {own.x, own.y, own.z, own.w};
  const float b[kCells] = {other.x, other.y, other.z, other.w};
#pragma unroll
  for (int i = 0; i < kCells; ++i)
#pragma unroll
    for (int j = 0; j < kCells; ++j) tile[i][j] = fmaf(a[i], b[j], tile[i][j]);
}

template <int kEntries, int kStride, typename T>
__device__ void stage_transposed(float* staging, const Rows<T>& rows, int column) {
  for (int i = threadIdx.x; i < kEntries * kDepth; i += kThreads)
    staging[i % kDepth * kStride + i / kDepth] = rows.at(i / kDepth, column + i % kDepth);
}

// tile[i][j] += ⟨own row i, other row j⟩, summed chunk by chunk: one long chain would round more.
template <typename T>
__device__ void add_dot_products(Tile& tile, const Rows<T>& own, const Rows<T>& other, float* staging) {
  float* own_columns = staging;
  float* other_columns = staging + kDepth * kOwnStride;
  for (int column = 0; column < own.width; column += kDepth) {
    __syncthreads();
    stage_transposed<kOwn, kOwnStride>(own_columns, own, column);
    stage_transposed<kOther, kOtherStride>(other_columns, other, column);
    __syncthreads();
    Tile chunk = {};
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k)
      add_outer_product(chunk, load4(own_columns + k * kOwnStride + thread_own()),
                        load4(other_columns + k * kOtherStride + thread_other()));
#pragma unroll
    for (int i = 0; i < kCells; ++i)
#pragma unroll
      for (int j = 0; j < kCells; ++j) tile[i][j] += chunk[i][j];
  }
}

// Sums [kOwn, width] in shared memory; a thread only ever touches its own cells, so they need no barrier.
class Sums {
 public:
  __device__ Sums(float* memory, int width) : memory_(memory), width_(width), stride_(padded(width)) {
    for (int column = 0; column < width; column += kColumns)
      for (int i = 0; i < kCells; ++i) *cells(i, column) = float4{0.0f, 0.0f, 0.0f, 0.0f};
  }

  __host__ __device__ static int padded(int width) { return (width + kColumns - 1) / kColumns * kColumns; }

  // sums = decay · sums + weightsᵀ · other, with weights [kOther, kOwnStride] as store_weights leaves them
  template <typename T>
  __device__ void accumulate(const PerOwn& decay, const float* weights, const Rows<T>& other, float* staging) {
    for (int column = 0; column < width_; column += kColumns) {
      __syncthreads();
      for (int i = threadIdx.x; i < kOther * kColumns; i += kThreads)
        staging[i] = other.at(i / kColumns, column + i % kColumns);
      __syncthreads();
      Tile tile = {};
#pragma unroll 8
      for (int k = 0; k < kOther; ++k)
        add_outer_product(tile, load4(weights + k * kOwnStride + thread_own()),
                          load4(staging + k * kColumns + thread_other()));
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        float4& cell = *cells(i, column);
        cell.x = fmaf(cell.x, decay[i], tile[i][0]);
        cell.y = fmaf(cell.y, decay[i], tile[i][1]);
        cell.z = fmaf(cell.z, decay[i], tile[i][2]);
        cell.w = fmaf(cell.w, decay[i], tile[i][3]);
      }
    }
  }

  // Calls function(i, column, value) for the thread's cells inside the first `count` rows; i counts the thread's rows.
  template <typename Function>
  __device__ void for_each(int count, Function function) const {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      if (thread_own() + i >= count) continue;
      for (int start = thread_other(); start < width_; start += kColumns)
        for (int column = start; column < min(start + kCells, width_); ++column)
          function(i, column, memory_[(thread_own() + i) * stride_ + column]);
    }
  }

 private:
  __device__ float4* cells(int i, int column) const {
    return reinterpret_cast<float4*>(memory_ + (thread_own() + i) * stride_ + column + thread_other());
  }

  float* memory_;
  int width_;
  int stride_;
};

// Shared memory: | weights [kOther, kOwnStride] | staging | sums … |
struct Shared {
  float* weights = reinterpret_cast<float*>(shared_memory);
  float* staging = weights + kOther * kOwnStride;
  float* sums = staging + kStaging;
};

size_t shared_bytes(int first_width, int second_width = 0) {
  const int sums = kOwn * (Sums::padded(first_width) + Sums::padded(second_width));
  return sizeof(float) * (kOther * kOwnStride + kStaging + sums);
}

// Publishes a tile as weights of `accumulate`, which opens with the barrier that makes it visible.
__device__ void store_weights(float* weights, const Tile& tile) {
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kCells; ++j)
    *reinterpret_cast<float4*>(weights + (thread_other() + j) * kOwnStride + thread_own()) =
        float4{tile[0][j], tile[1][j], tile[2][j], tile[3][j]};
}

__device__ float sum_over_others(float value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

__device__ float max_over_others(float value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

// The thread's four entries of a per-row or per-patch vector; zero where absent or out of range.
__device__ void load_entries(PerOwn& entries, const float* vector, int first, int count) {
#pragma unroll
  for (int i = 0; i < kCells; ++i) entries[i] = vector != nullptr && first + i < count ? vector[first + i] : 0.0f;
}

__device__ int64_t first_row(const PoseGuidedAttentionInputs& in, Position at) {
  return (static_cast<int64_t>(at.batch) * in.groups + at.group) * in.rows;
}

// Rounded before anything is subtracted: contracted into one FMA, A would differ from what was normalised.
__device__ float logit(float score, float scale) { return __fmul_rn(score, scale); }

// `residual`: what lse lost to rounding. At logits around 1e4 that is 5e-4, an error of as much in every weight.
__device__ float attention_weight(float score, float scale, float lse, float residual) {
  return expf(logit(score, scale) - lse - residual);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) context_kernel(const PoseGuidedAttentionForward params) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  const Position at = position((in.rows + kOwn - 1) / kOwn, in.groups);
  const int start = at.tile * kOwn;
  const Rows<T> query = row_tile<T>(in.query, in, at, start, in.key_width);
  const Shared shared;
  Sums context(shared.sums, in.value_width);
  PerOwn maximum, total, decay;
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    maximum[i] = -INFINITY;
    total[i] = 0.0f;
  }

  for (int patch = 0; patch < in.patches; patch += kOther) {
    Tile tile = {};
    add_dot_products(tile, query, patch_tile<T>(in.key, in, at, patch, in.key_width), shared.staging);
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      float tile_maximum = maximum[i];
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        tile[i][j] = patch + thread_other() + j < in.patches ? logit(tile[i][j], in.scale) : -INFINITY;
        tile_maximum = fmaxf(tile_maximum, tile[i][j]);
      }
      tile_maximum = max_over_others(tile_maximum);
      // While all logits are -Inf, subtracting their maximum would turn exp(-Inf) = 0 into NaN.
      const float reference = tile_maximum == -INFINITY ? 0.0f : tile_maximum;
      decay[i] = expf(maximum[i] - reference);
      maximum[i] = tile_maximum;
      float tile_total = 0.0f;
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        tile[i][j] = expf(tile[i][j] - reference);
        tile_total += tile[i][j];
      }
      total[i] = total[i] * decay[i] + sum_over_others(tile_total);
    }
    store_weights(shared.weights, tile);
    context.accumulate(decay, shared.weights, patch_tile<T>(in.value, in, at, patch, in.value_width), shared.staging);
  }

  const int64_t row = first_row(in, at) + start + thread_own();
  const int count = in.rows - start;
  T* out = static_cast<T*>(params.context) + row * in.value_width;
  context.for_each(count, [&](int i, int column, float sum) {
    from_float(sum / total[i], out[static_cast<int64_t>(i) * in.value_width + column]);
  });
  if (thread_other() == 0)
    for (int i = 0; i < kCells && thread_own() + i < count; ++i) {
      const float lse = maximum[i] + logf(total[i]);
      params.lse[row + i] = lse;
      params.residual[row + i] = maximum[i] - lse + logf(total[i]);
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(const PoseGuidedAttentionForward params) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  Position at = position((in.patches + kOwn - 1) / kOwn, 1);
  const int start = at.tile * kOwn;
  const Shared shared;
  Sums update(shared.sums, in.model_width);
  const PerOwn no_decay = {1.0f, 1.0f, 1.0f, 1.0f};
  PerOwn importance = {};

  for (at.group = 0; at.group < in.groups; ++at.group) {
    const Rows<T> key = patch_tile<T>(in.key, in, at, start, in.key_width);
    const int64_t rows_before = first_row(in, at);
    for (int row = 0; row < in.rows; row += kOther) {
      Tile tile = {};
      add_dot_products(tile, key, row_tile<T>(in.query, in, at, row, in.key_width), shared.staging);
      PerOwn lse, residual;
      load_entries(lse, params.lse + rows_before, row + thread_other(), in.rows);
      load_entries(residual, params.residual + rows_before, row + thread_other(), in.rows);
#pragma unroll
      for (int i = 0; i < kCells; ++i)
#pragma unroll
        for (int j = 0; j < kCells; ++j) {
          const bool valid = row + thread_other() + j < in.rows;
          tile[i][j] = valid ? attention_weight(tile[i][j], in.scale, lse[j], residual[j]) : 0.0f;
          importance[i] += tile[i][j];
        }
      store_weights(shared.weights, tile);
      update.accumulate(no_decay, shared.weights, row_tile<T>(in.pose_value, in, at, row, in.model_width),
                        shared.staging);
    }
  }

  at.group = 0;
  const Rows<T> tokens = patch_tile<T>(params.tokens, in, at, start, in.model_width);
  const int64_t patch = static_cast<int64_t>(at.batch) * in.patches + start + thread_own();
  const int count = in.patches - start;
  T* out = static_cast<T*>(params.patches_out) + patch * in.model_width;
  update.for_each(count, [&](int i, int column, float sum) {
    from_float(tokens.at(thread_own() + i, column) + sum, out[static_cast<int64_t>(i) * in.model_width + column]);
  });
  const float mean = 1.0f / (static_cast<float>(in.groups) * static_cast<float>(in.rows));
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    const float sum = sum_over_others(importance[i]);
    if (thread_other() == 0 && thread_own() + i < count) params.importance[patch + i] = sum * mean;
  }
}

// The gradient that arrives at importance, as a gradient of each attention weight.
__device__ void load_importance_gradient(PerOwn& entries, const PoseGuidedAttentionBackward& params, Position at,
                                         int first) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  const float* gradient = params.grad_importance;
  if (gradient != nullptr) gradient += static_cast<int64_t>(at.batch) * in.patches;
  load_entries(entries, gradient, first, in.patches);
  const float mean = 1.0f / (static_cast<float>(in.groups) * static_cast<float>(in.rows));
#pragma unroll
  for (int i = 0; i < kCells; ++i) entries[i] *= mean;
}

__device__ Position sample_of(Position at) { return {at.tile, 0, at.batch}; }

// grad[i][j] += ⟨V, dO⟩ + ⟨dX, U⟩ for the block's own and other entries: dA without the importance term.
template <typename T>
__device__ void add_attention_gradient(Tile& grad, const PoseGuidedAttentionBackward& params, Position at, int own_row,
                                       int own_patch, bool own_is_row, float* staging) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  if (params.grad_context != nullptr) {
    const Rows<T> grad_context = row_tile<T>(params.grad_context, in, at, own_row, in.value_width);
    const Rows<T> value = patch_tile<T>(in.value, in, at, own_patch, in.value_width);
    if (own_is_row)
      add_dot_products(grad, grad_context, value, staging);
    else
      add_dot_products(grad, value, grad_context, staging);
  }
  if (params.grad_patches.data != nullptr) {
    const Rows<T> pose_value = row_tile<T>(in.pose_value, in, at, own_row, in.model_width);
    const Rows<T> grad_patches =
        patch_tile<T>(params.grad_patches, in, sample_of(at), own_patch, in.model_width);
    if (own_is_row)
      add_dot_products(grad, pose_value, grad_patches, staging);
    else
      add_dot_products(grad, grad_patches, pose_value, staging);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) grad_pose_kernel(const PoseGuidedAttentionBackward params) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  const Position at = position((in.rows + kOwn - 1) / kOwn, in.groups);
  const int start = at.tile * kOwn;
  const int count = in.rows - start;
  const int64_t row = first_row(in, at) + start + thread_own();
  const Rows<T> query = row_tile<T>(in.query, in, at, start, in.key_width);
  const Shared shared;
  Sums grad_pose(shared.sums, in.model_width);
  const PerOwn no_decay = {1.0f, 1.0f, 1.0f, 1.0f};
  PerOwn lse, total = {}, delta = {};
  load_entries(lse, params.lse + first_row(in, at), start + thread_own(), in.rows);

  for (int patch = 0; patch < in.patches; patch += kOther) {
    Tile tile = {};
    Tile grad = {};
    add_dot_products(tile, query, patch_tile<T>(in.key, in, at, patch, in.key_width), shared.staging);
    add_attention_gradient<T>(grad, params, at, start, patch, true, shared.staging);
    PerOwn grad_importance;
    load_importance_gradient(grad_importance, params, at, patch + thread_other());
#pragma unroll
    for (int i = 0; i < kCells; ++i)
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        const bool valid = patch + thread_other() + j < in.patches;
        tile[i][j] = valid ? attention_weight(tile[i][j], in.scale, lse[i], 0.0f) : 0.0f;
        total[i] += tile[i][j];
        delta[i] = fmaf(tile[i][j], grad[i][j] + grad_importance[j], delta[i]);
      }
    if (params.grad_patches.data == nullptr) continue;
    store_weights(shared.weights, tile);
    grad_pose.accumulate(no_decay, shared.weights,
                         patch_tile<T>(params.grad_patches, in, sample_of(at), patch, in.model_width), shared.staging);
  }

#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    total[i] = sum_over_others(total[i]);
    delta[i] = sum_over_others(delta[i]) / total[i];
    if (thread_other() == 0 && thread_own() + i < count) {
      params.residual[row + i] = logf(total[i]);
      params.delta[row + i] = delta[i];
    }
  }
  T* out = static_cast<T*>(params.grad_pose_value) + row * in.model_width;
  grad_pose.for_each(count, [&](int i, int column, float sum) {
    from_float(sum / total[i], out[static_cast<int64_t>(i) * in.model_width + column]);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) grad_query_kernel(const PoseGuidedAttentionBackward params) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  const Position at = position((in.rows + kOwn - 1) / kOwn, in.groups);
  const int start = at.tile * kOwn;
  const Rows<T> query = row_tile<T>(in.query, in, at, start, in.key_width);
  const Shared shared;
  Sums grad_query(shared.sums, in.key_width);
  const PerOwn no_decay = {1.0f, 1.0f, 1.0f, 1.0f};
  PerOwn lse, residual, delta;
  load_entries(lse, params.lse + first_row(in, at), start + thread_own(), in.rows);
  load_entries(residual, params.residual + first_row(in, at), start + thread_own(), in.rows);
  load_entries(delta, params.delta + first_row(in, at), start + thread_own(), in.rows);

  for (int patch = 0; patch < in.patches; patch += kOther) {
    const Rows<T> key = patch_tile<T>(in.key, in, at, patch, in.key_width);
    Tile tile = {};
    Tile grad = {};
    add_dot_products(tile, query, key, shared.staging);
    add_attention_gradient<T>(grad, params, at, start, patch, true, shared.staging);
    PerOwn grad_importance;
    load_importance_gradient(grad_importance, params, at, patch + thread_other());
#pragma unroll
    for (int i = 0; i < kCells; ++i)
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        const float attention = attention_weight(tile[i][j], in.scale, lse[i], residual[i]);
        const bool valid = patch + thread_other() + j < in.patches;
        tile[i][j] = valid ? attention * (grad[i][j] + grad_importance[j] - delta[i]) : 0.0f;
      }
    store_weights(shared.weights, tile);
    grad_query.accumulate(no_decay, shared.weights, key, shared.staging);
  }

  T* out = static_cast<T*>(params.grad_query) + (first_row(in, at) + start + thread_own()) * in.key_width;
  grad_query.for_each(in.rows - start, [&](int i, int column, float sum) {
    from_float(sum * in.scale, out[static_cast<int64_t>(i) * in.key_width + column]);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) grad_tokens_kernel(const PoseGuidedAttentionBackward params) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  const Position at = position((in.patches + kOwn - 1) / kOwn, in.groups);
  const int start = at.tile * kOwn;
  const int64_t rows_before = first_row(in, at);
  const Rows<T> key = patch_tile<T>(in.key, in, at, start, in.key_width);
  const bool value_is_key = params.grad_value == nullptr;
  const Shared shared;
  Sums grad_key(shared.sums, in.key_width);
  Sums grad_value = value_is_key ? grad_key : Sums(shared.sums + kOwn * Sums::padded(in.key_width), in.value_width);
  const PerOwn no_decay = {1.0f, 1.0f, 1.0f, 1.0f};
  PerOwn grad_importance;
  load_importance_gradient(grad_importance, params, at, start + thread_own());

  for (int row = 0; row < in.rows; row += kOther) {
    const Rows<T> query = row_tile<T>(in.query, in, at, row, in.key_width);
    Tile tile = {};
    Tile grad = {};
    add_dot_products(tile, key, query, shared.staging);
    add_attention_gradient<T>(grad, params, at, row, start, false, shared.staging);
    PerOwn lse, residual, delta;
    load_entries(lse, params.lse + rows_before, row + thread_other(), in.rows);
    load_entries(residual, params.residual + rows_before, row + thread_other(), in.rows);
    load_entries(delta, params.delta + rows_before, row + thread_other(), in.rows);
#pragma unroll
    for (int i = 0; i < kCells; ++i)
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        const bool valid = row + thread_other() + j < in.rows;
        tile[i][j] = valid ? attention_weight(tile[i][j], in.scale, lse[j], residual[j]) : 0.0f;
        grad[i][j] = valid ? tile[i][j] * (grad[i][j] + grad_importance[i] - delta[j]) * in.scale : 0.0f;
      }
    if (params.grad_context != nullptr) {
      store_weights(shared.weights, tile);
      grad_value.accumulate(no_decay, shared.weights, row_tile<T>(params.grad_context, in, at, row, in.value_width),
                            shared.staging);
    }
    store_weights(shared.weights, grad);
    grad_key.accumulate(no_decay, shared.weights, query, shared.staging);
  }

  const int count = in.patches - start;
  const int64_t patch = (static_cast<int64_t>(at.batch) * in.groups + at.group) * in.patches + start + thread_own();
  const bool add_patches = params.patches_is_key && params.grad_patches.data != nullptr;
  T* out_key = static_cast<T*>(params.grad_key) + patch * in.key_width;
  const Rows<T> grad_patches = patch_tile<T>(params.grad_patches, in, sample_of(at), start, in.model_width);
  grad_key.for_each(count, [&](int i, int column, float sum) {
    const float passed_on = add_patches ? grad_patches.at(thread_own() + i, column) : 0.0f;
    from_float(sum + passed_on, out_key[static_cast<int64_t>(i) * in.key_width + column]);
  });
  if (value_is_key) return;
  T* out_value = static_cast<T*>(params.grad_value) + patch * in.value_width;
  grad_value.for_each(count, [&](int i, int column, float sum) {
    from_float(sum, out_value[static_cast<int64_t>(i) * in.value_width + column]);
  });
}

bool widths_supported(const PoseGuidedAttentionInputs& in) {
  return in.key_width <= kMaxWidth && in.value_width <= kMaxWidth && in.model_width <= kMaxWidth;
}

template <typename T>
cudaError_t launch_forward(const PoseGuidedAttentionForward& params) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  const int64_t row_blocks = ceil_div(in.rows, kOwn) * in.groups * in.batch;
  const int64_t patch_blocks = ceil_div(in.patches, kOwn) * in.batch;
  const cudaError_t error =
      launch(context_kernel<T>, row_blocks, kThreads, shared_bytes(in.value_width), in.stream, params);
  if (error != cudaSuccess) return error;
  return launch(update_kernel<T>, patch_blocks, kThreads, shared_bytes(in.model_width), in.stream, params);
}

template <typename T>
cudaError_t launch_backward(const PoseGuidedAttentionBackward& params) {
  const PoseGuidedAttentionInputs& in = params.inputs;
  const int64_t row_blocks = ceil_div(in.rows, kOwn) * in.groups * in.batch;
  const int64_t patch_blocks = ceil_div(in.patches, kOwn) * in.groups * in.batch;
  cudaError_t error =
      launch(grad_pose_kernel<T>, row_blocks, kThreads, shared_bytes(in.model_width), in.stream, params);
  if (error != cudaSuccess) return error;
  error = launch(grad_query_kernel<T>, row_blocks, kThreads, shared_bytes(in.key_width), in.stream, params);
  if (error != cudaSuccess || params.grad_key == nullptr) return error;
  const int value_width = params.grad_value == nullptr ? 0 : in.value_width;
  return launch(grad_tokens_kernel<T>, patch_blocks, kThreads, shared_bytes(in.key_width, value_width), in.stream,
                params);
}

}  // namespace

extern "C" cudaError_t pose_guided_attention_forward(const PoseGuidedAttentionForward* params) {
  if (!widths_supported(params->inputs)) return cudaErrorInvalidValue;
  if (params->inputs.batch == 0) return cudaSuccess;
  return dispatch_dtype(params->inputs.dtype,
                        [&](auto type) { return launch_forward<typename decltype(type)::type>(*params); });
}

extern "C" cudaError_t pose_guided_attention_backward(const PoseGuidedAttentionBackward* params) {
  if (!widths_supported(params->inputs)) return cudaErrorInvalidValue;
  if (params->inputs.batch == 0) return cudaSuccess;
  return dispatch_dtype(params->inputs.dtype,
                        [&](auto type) { return launch_backward<typename decltype(type)::type>(*params); });
}

}  // namespace liftbyimage::cuda
