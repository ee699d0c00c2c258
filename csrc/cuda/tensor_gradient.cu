// The gradient of attention scores on Hopper's tensor cores (sm_90a), float16 and bfloat16:
//
//   dA = T dOᵀ + dX Uᵀ + g/R + dAttention          dS = scale · A ∘ (dA − δ)
//
// A block: a share of a sample's patches; each of its two warpgroups: every other tile of 64 patches, alone with it.
//
//                  144 rows
//                ┌─────────┐
//    64 patches  │   dA    │ = T dOᵀ + dX Uᵀ      one product over both widths, 64 columns of a tile at a time
//                └─────────┘
//
// A comes from device memory, where dS goes beside it: whole matrix products make the gradients of rows and tokens of
// the two (liftbyimage/ops/_tensor_cores.py). Compiled for sm_90a alone, as tensor_attention.cu.

#include "tensor_gradient.h"

#ifndef LIFTBYIMAGE_WITHOUT_SM90A

#include "tensor_tiles.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kSlots = 5;  // columns of a warpgroup in flight
constexpr int64_t kOverhead = 5;

// T with dO and dX with U: what is there of the two.
struct Factors {
  PatchRows tile;
  const void* rows;
};

struct Plan {
  TensorGradient params;
  Factors factors[2];
  int32_t count;  // of factors
  int32_t shares;
  int32_t tiles_per_share;
};

template <typename T>
__device__ const T* patch_of(const PatchRows& tensor, int64_t sample, int64_t patch) {
  return static_cast<const T*>(tensor.data) + sample * tensor.batch_stride + patch * tensor.patch_stride;
}

// Shared memory, from an address that is a multiple of 1024.
template <int kColumns>
struct Shared {
  int group = uniform_warpgroup();
  char* rows = aligned_shared_memory();            // [2][columns][144][64]
  char* slots = rows + 2 * kColumns * kRowsBytes;  // [2][slots][64][64]
  float* delta = reinterpret_cast<float*>(slots + 2 * kSlots * kTileBytes);

  static constexpr size_t kBytes =
      kSwizzleBytes + 2 * kColumns * kRowsBytes + 2 * kSlots * kTileBytes + sizeof(float) * kTensorRows;
};
static_assert(Shared<4>::kBytes <= kSharedLimit);

// Calls function(half, block, lower, row, patch) for each pair of neighbouring rows that the thread holds of a tile.
template <typename Function>
__device__ void for_each_pair(const TensorGradient& params, int patch, Function function) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int row = half * kHalf + result_column(block);
        const int at = patch + result_row() + 8 * lower;
        if (row < params.padded_rows && at < params.patches) function(half, block, lower, row, at);
      }
}

// What reaches every weight of a patch: g/R.
__device__ float outside_gradient(const TensorGradient& params, int64_t sample, int patch) {
  return params.grad_importance == nullptr ? 0.0f
                                           : params.grad_importance[sample * params.patches + patch] / params.rows;
}

// Block share + shares · sample; tile first + 2 · turn of the share.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(const __grid_constant__ Plan plan) {
  const TensorGradient& params = plan.params;
  const int share = blockIdx.x % plan.shares;
  const int64_t sample = blockIdx.x / plan.shares;
  const int tiles = (params.patches + kTile - 1) / kTile;
  const Shared<kColumns> shared;
  const int first = share * plan.tiles_per_share + shared.group;
  const int end = min((share + 1) * plan.tiles_per_share, tiles);
  const int turns = max(0, (end - first + 1) / 2);
  const int columns_of_tile = plan.count * kColumns;
  const TileCopier<T, kColumns, kTensorRows, kThreads> row_copier(threadIdx.x, params.width, params.width);
  for (int i = 0; i < plan.count; ++i)
    row_copier.copy(shared.rows + i * kColumns * kRowsBytes,
                    static_cast<const T*>(plan.factors[i].rows) + sample * params.rows * params.width, params.rows);
  commit_copies();
  const auto copy_column = [&](int n, char* slot) {
    const int patch = (first + n / columns_of_tile * 2) * kTile, column = n % columns_of_tile;
    const PatchRows& tile = plan.factors[column / kColumns].tile;
    const int at = column % kColumns * kColumn;
    TileCopier<T, 1, kTile, kWarpgroup>(member(), tile.patch_stride, params.width - at)
        .copy(slot, patch_of<T>(tile, sample, patch) + at, params.patches - patch);
  };
  ColumnStream<kSlots, decltype(copy_column)> columns(shared.slots + shared.group * kSlots * kTileBytes,
                                                      turns * columns_of_tile, copy_column);
  for (int row = threadIdx.x; row < kTensorRows; row += kThreads)
    shared.delta[row] = row < params.rows ? params.delta[sample * params.rows + row] : 0.0f;
  wait_for_copies<kSlots - 1>();
  publish_to_tensor_cores();
  __syncthreads();

  // With one patch A is 1 whatever its score, so dS is 0 and not a rounding error.
  const float scale = params.patches > 1 ? params.scale : 0.0f;
  for (int turn = 0; turn < turns; ++turn) {
    const int patch = (first + 2 * turn) * kTile;
    T* weights = static_cast<T*>(params.weights) + sample * params.patches * 2 * params.padded_rows;
    uint32_t attention[2][kBlocks][2];
    for_each_pair(params, patch, [&](int half, int block, int lower, int row, int at) {
      attention[half][block][lower] =
          *reinterpret_cast<const uint32_t*>(weights + static_cast<int64_t>(at) * 2 * params.padded_rows + row);
    });
    Scores s = {};
    for (int factor = 0; factor < plan.count; ++factor)
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        multiply_column<T>(s, columns.next(), shared.rows + (factor * kColumns + column) * kRowsBytes, true);
        wgmma_wait();
      }
    const int last = params.patches - 1;
    const float outside[2] = {outside_gradient(params, sample, min(patch + result_row(), last)),
                              outside_gradient(params, sample, min(patch + result_row() + 8, last))};
    for_each_pair(params, patch, [&](int half, int block, int lower, int row, int at) {
      float weight[2], gradient[2];
      unpack<T>(attention[half][block][lower], weight[0], weight[1]);
      for (int side = 0; side < 2; ++side) {
        float arrived = s[half][4 * block + 2 * lower + side] + outside[lower];
        if (params.grad_attention.data != nullptr && row + side < params.rows)
          arrived += to_float(patch_of<T>(params.grad_attention, sample, at)[row + side]);
        gradient[side] = row + side < params.rows ? scale * weight[side] * (arrived - shared.delta[row + side]) : 0.0f;
      }
      *reinterpret_cast<uint32_t*>(weights + (static_cast<int64_t>(at) * 2 + 1) * params.padded_rows + row) =
          pack<T>(gradient[0], gradient[1]);
    });
  }
}

Plan plan_of(const TensorGradient& params) {
  Plan plan{};
  plan.params = params;
  if (params.grad_context != nullptr) plan.factors[plan.count++] = {params.tokens, params.grad_context};
  if (params.grad_patches.data != nullptr) plan.factors[plan.count++] = {params.grad_patches, params.pose_value};
  plan.shares = choose_shares(tiles_of(params.patches), params.batch, 1, kOverhead);
  plan.tiles_per_share = static_cast<int32_t>(ceil_div(tiles_of(params.patches), plan.shares));
  return plan;
}

template <typename T>
cudaError_t launch_width(const Plan& plan) {
  const TensorGradient& params = plan.params;
  const auto with = [&](auto kernel, size_t bytes) {
    return launch(kernel, static_cast<int64_t>(plan.shares) * params.batch, kThreads, bytes, params.stream, plan);
  };
  switch (columns_of(params.width)) {
    case 1:
      return with(gradient_kernel<T, 1>, Shared<1>::kBytes);
    case 2:
      return with(gradient_kernel<T, 2>, Shared<2>::kBytes);
    case 3:
      return with(gradient_kernel<T, 3>, Shared<3>::kBytes);
    default:
      return with(gradient_kernel<T, 4>, Shared<4>::kBytes);
  }
}

bool served(const PatchRows& rows) {
  const bool in_units = rows.batch_stride % kUnit == 0 && rows.patch_stride % kUnit == 0;
  return rows.data == nullptr || (aligned(rows.data) && in_units);
}

}  // namespace

bool tensor_gradient_serves(const TensorGradient& params) {
  return (params.dtype == kFloat16 || params.dtype == kBFloat16) && params.rows <= kTensorRows &&
         params.padded_rows % kUnit == 0 && params.width <= kTensorWidth && params.width % kUnit == 0 &&
         served(params.tokens) && served(params.grad_patches) && aligned(params.grad_context) &&
         aligned(params.pose_value) && on_hopper();
}

extern "C" cudaError_t tensor_gradient(const TensorGradient* params) {
  if (!tensor_gradient_serves(*params)) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const Plan plan = plan_of(*params);
  return params->dtype == kFloat16 ? launch_width<__half>(plan) : launch_width<__nv_bfloat16>(plan);
}

}  // namespace liftbyimage::cuda

#else

namespace liftbyimage::cuda {

bool tensor_gradient_serves(const TensorGradient&) { return false; }
extern "C" cudaError_t tensor_gradient(const TensorGradient*) { return cudaErrorNotSupported; }

}  // namespace liftbyimage::cuda

#endif
