// The gradient of attention scores on the tensor cores of any GPU from sm_80 on:
//
//   dA = T dOᵀ + dX Uᵀ + g/R + dAttention          dS = scale · A ∘ (dA − δ)
//
// A block: a share of a sample's patches, the rows of dO and U in shared memory; each of its warps: 16 patches at a time,
// alone with them.
//
//                  144 rows
//                ┌─────────┐
//    16 patches  │   dA    │ = T dOᵀ + dX Uᵀ      the patches in registers
//                └─────────┘
//
// A comes from device memory, where dS goes beside it: whole matrix products make the gradients of rows and tokens of
// the two (liftbyimage/ops/_tensor_cores.py).

#include "mma_gradient.h"

#include "mma_tiles.h"

namespace liftbyimage::cuda {
namespace {

constexpr int64_t kOverhead = 2;  // what a block costs beside its strips, in turns of its warps

// Blocks that share a multiprocessor.
constexpr int resident_blocks(int columns, int factors) { return columns * factors == 1 ? 2 : 1; }

// T with dO and dX with U: what is there of the two. Without rows: zero.
struct Factors {
  PatchRows patches;
  const void* rows;
};

struct Plan {
  TensorGradient params;
  Factors factors[2];
  int32_t shares;
  int32_t strips_per_share;
};

template <typename T>
__device__ const T* patch_of(const PatchRows& tensor, int64_t sample, int64_t patch) {
  return static_cast<const T*>(tensor.data) + sample * tensor.batch_stride + patch * tensor.patch_stride;
}

// Calls function(pair, lower, row, patch) for each four neighbouring rows that the thread holds of a strip.
template <typename Function>
__device__ void for_each_four(const TensorGradient& params, int patch, Function function) {
  const int word = recomputed(lane_word());  // what belongs to 36 rows is not kept in registers from strip to strip
#pragma unroll
  for (int pair = 0; pair < kRowBlocks / 2; ++pair)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = 2 * kBlock * pair + 4 * word, at = patch + lane_row() + kBlock * lower;
      if (row < params.padded_rows && at < params.patches) function(pair, lower, row, at);
    }
}

// What reaches every weight of a patch: g/R.
__device__ float outside_gradient(const TensorGradient& params, int64_t sample, int patch) {
  if (params.grad_importance == nullptr || patch >= params.patches) return 0.0f;
  return params.grad_importance[sample * params.patches + patch] / params.rows;
}

// The weights of one patch: A, and dS beside it.
template <typename T>
__device__ T* weights_of(const TensorGradient& params, int64_t sample, int patch) {
  return static_cast<T*>(params.weights) + (sample * params.patches + patch) * 2 * params.padded_rows;
}

template <typename T>
__device__ void store_gradient(const TensorGradient& params, int64_t sample, int patch, const StripScores& s,
                               const float* delta) {
  // With one patch A is 1 whatever its score, so dS is 0 and not a rounding error.
  const float scale = params.patches > 1 ? params.scale : 0.0f;
  const float outside[2] = {outside_gradient(params, sample, patch + lane_row()),
                            outside_gradient(params, sample, patch + lane_row() + kBlock)};
  for_each_four(params, patch, [&](int pair, int lower, int row, int at) {
    uint32_t attention[2], words[2];
    load_words(attention, weights_of<T>(params, sample, at) + row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float weight[2], gradient[2];
      unpack<T>(attention[half], weight[0], weight[1]);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int own = row + 2 * half + side;
        float arrived = s[2 * pair + half][2 * lower + side] + outside[lower];
        if (params.grad_attention.data != nullptr && own < params.rows)
          arrived += to_float(patch_of<T>(params.grad_attention, sample, at)[own]);
        gradient[side] = own < params.rows ? scale * weight[side] * (arrived - delta[own]) : 0.0f;
      }
      words[half] = pack<T>(gradient[0], gradient[1]);
    }
    store_words(weights_of<T>(params, sample, at) + params.padded_rows + row, words);
  });
}

// Block share + shares · sample; strip first + warp + 8 · turn of the share.
template <typename T, int kColumns, int kFactors>
__global__ void __launch_bounds__(kStripThreads, resident_blocks(kColumns, kFactors))
    gradient_kernel(const __grid_constant__ Plan plan) {
  constexpr int kGroups = 2 * kColumns;
  const TensorGradient& params = plan.params;
  const int share = blockIdx.x % plan.shares;
  const int64_t sample = blockIdx.x / plan.shares;
  const int strips = (params.patches + kStrip - 1) / kStrip;
  const int end = min((share + 1) * plan.strips_per_share, strips);
  char* rows = reinterpret_cast<char*>(shared_memory);                                   // [factors][columns][144][128 bytes]
  float* delta = reinterpret_cast<float*>(rows + kFactors * kColumns * kAllRowsBytes);
  for (int factor = 0; factor < kFactors; ++factor) {
    const T* of_batch = static_cast<const T*>(plan.factors[factor].rows);
    const T* of_sample = of_batch == nullptr ? nullptr : of_batch + sample * params.rows * params.width;
    stage_rows<T, kColumns>(rows + factor * kColumns * kAllRowsBytes, of_sample, of_batch == nullptr ? 0 : params.rows,
                            params.width);
  }
  commit_copies();
  for (int row = threadIdx.x; row < kTensorRows; row += kStripThreads)
    delta[row] = row < params.rows ? params.delta[sample * params.rows + row] : 0.0f;
  const auto reader_of = [&](int factor, int strip) {
    const PatchRows& patches = plan.factors[factor].patches;
    return StripReader<T, kColumns>(patch_of<T>(patches, sample, 0), patches.patch_stride, strip * kStrip,
                                    params.patches, params.width);
  };
  wait_for_copies<0>();
  __syncthreads();

  for (int strip = share * plan.strips_per_share + block_warp(); strip < end; strip += kStripWarps) {
    const int patch = strip * kStrip;
    Group tokens[kGroups];
    const auto reader = reader_of(0, strip);
#pragma unroll
    for (int index = 0; index < kGroups; ++index) reader.read(tokens[index], index);
    StripScores s = {};
#pragma unroll
    for (int factor = 0; factor < kFactors; ++factor) {
      const auto next = reader_of(min(factor + 1, kFactors - 1), strip);
#pragma unroll
      for (int index = 0; index < kGroups; ++index) {
        multiply_group<T>(s, tokens[index], rows + factor * kColumns * kAllRowsBytes, index);
        if (factor + 1 < kFactors) next.read(tokens[index], index);
      }
    }
    store_gradient<T>(params, sample, patch, s, delta);
  }
}

// Products of a strip: one also where no gradient needs any.
int factors_of(const TensorGradient& params) {
  return params.grad_context != nullptr && params.grad_patches.data != nullptr ? 2 : 1;
}

Plan plan_of(const TensorGradient& params) {
  Plan plan{};
  plan.params = params;
  const Factors of_context = {params.tokens, params.grad_context}, of_update = {params.grad_patches, params.pose_value};
  const bool both = factors_of(params) == 2, update_alone = !both && params.grad_patches.data != nullptr;
  plan.factors[0] = update_alone ? of_update : of_context;
  plan.factors[1] = of_update;
  const int64_t turns = ceil_div(params.patches, kStrip * kStripWarps);
  plan.shares = choose_shares(turns, params.batch, 1, kOverhead);
  plan.strips_per_share = static_cast<int32_t>(ceil_div(turns, plan.shares) * kStripWarps);
  return plan;
}

template <typename T>
cudaError_t launch_width(const Plan& plan) {
  const TensorGradient& params = plan.params;
  const int factors = factors_of(params);
  return with_columns(params.width, [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    const auto kernel = factors == 2 ? gradient_kernel<T, kColumns, 2> : gradient_kernel<T, kColumns, 1>;
    return launch(kernel, static_cast<int64_t>(plan.shares) * params.batch, kStripThreads,
                  held_bytes(factors, kColumns), params.stream, plan);
  });
}

bool served(const PatchRows& rows) {
  const bool in_units = rows.batch_stride % kUnit == 0 && rows.patch_stride % kUnit == 0;
  return rows.data == nullptr || (aligned(rows.data) && in_units);
}

}  // namespace

bool mma_gradient_serves(const TensorGradient& params) {
  return (params.dtype == kFloat16 || params.dtype == kBFloat16) && params.rows <= kTensorRows &&
         params.padded_rows % kUnit == 0 && params.width <= kTensorWidth && params.width % kUnit == 0 &&
         served(params.tokens) && served(params.grad_patches) && aligned(params.grad_context) &&
         aligned(params.pose_value) && aligned(params.weights) && has_tensor_cores() &&
         rows_fit(factors_of(params), params.width);
}

extern "C" cudaError_t mma_gradient(const TensorGradient* params) {
  if (!mma_gradient_serves(*params)) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const Plan plan = plan_of(*params);
  return params->dtype == kFloat16 ? launch_width<__half>(plan) : launch_width<__nv_bfloat16>(plan);
}

}  // namespace liftbyimage::cuda
