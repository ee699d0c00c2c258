// Attention of all heads to one set of tokens on Hopper's tensor cores (sm_90a), float16 and bfloat16.
//
//   A = softmax over patches of scale · Q Tᵀ    context = A T    patches_out = T + Aᵀ U    importance = mean of A
//
// Patches lie on the 64 side of every product and the R ≤ 144 rows on its N side, in two halves of 72: eight heads of
// 17 joints are 136 rows, and next to nothing is padding. The tokens are read twice, because the second phase needs the
// normaliser of whole rows:
//
//   gather     a block: a share of a sample's patches; each of its two warpgroups: 72 rows, alone with them
//
//                            72 rows                          72 rows
//                          ┌─────────┐                      ┌─────────┐
//              64 patches  │    S    │ = T Qᵀ      W × 72   │ context │ += Tᵀ · 2^(S − shift)
//                          └─────────┘                      └─────────┘
//                 registers → 2^x → shared memory             registers throughout
//
//   combine    joins the shares of one sample in their order (only where a sample has several)
//
//   scatter    a block: a share of a sample's patches; each warpgroup: every other tile of 64 patches, alone with it
//
//                           144 rows                           W
//                          ┌─────────┐                  ┌─────────────┐
//              64 patches  │    S    │ = T Qᵀ           │ patches_out │ = T + A U      A stays in registers
//                          └─────────┘                  └─────────────┘
//
// shift_r is a bound of the row's logits so far, raised only where a logit exceeds it by kHeadroom (powers of 2): what
// is summed stays below 2^kHeadroom times a patch's weight, and raising, which all sums must follow, becomes rare.
// The two warpgroups of `gather` share the tiles of tokens and nothing else. The exponentials of a tile run beside the
// product that sums the context of the tile before.
//
// No atomics; every sum has one order, given the sizes of the call. How a sample is shared out depends on the batch.
//
// Compiled for sm_90a alone. A build without it says LIFTBYIMAGE_WITHOUT_SM90A, and nothing is served here.

#include "tensor_attention.h"

#ifndef LIFTBYIMAGE_WITHOUT_SM90A

#include <cfloat>
#include <cmath>

#include "tensor_tiles.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kStages = 4;  // tiles of tokens in flight in `gather`
constexpr int kSlots = 3;   // columns of tokens in flight in a warpgroup of `scatter`
constexpr float kHeadroom = 8.0f;
constexpr float kNoShift = -FLT_MAX;  // of a row whose logits were all −∞: any other exceeds it, and −∞ weighs nothing

// What a block costs beside its tiles, in tiles.
constexpr int64_t kGatherOverhead = 3;
constexpr int64_t kScatterOverhead = 5;

// Blocks that share a multiprocessor, given how many columns wide the tokens are: their sums fit the registers of two
// (not those of an update).
constexpr int resident_blocks(int columns) { return columns == 1 ? 2 : 1; }

struct Launch {
  TensorAttention params;
  int32_t shares;           // blocks of `gather` for one sample
  int32_t tiles_per_share;
  int32_t scatter_shares;
  int32_t scatter_tiles;    // of one share
  int32_t result_bytes;     // of a warpgroup of `scatter`
  float* shift;             // [batch, kTensorRows], powers of 2
  float* log_total;         // [batch, kTensorRows], powers of 2
  float* share_shift;       // [shares, batch, kTensorRows]
  float* share_total;       // [shares, batch, kTensorRows]
  float* share_context;     // [shares, batch, 2, columns, kBlocks, 128, 4], as registers lie
};

template <typename T>
__device__ const T* tokens_of(const TensorAttention& params, int64_t sample, int64_t patch) {
  return static_cast<const T*>(params.tokens) + sample * params.tokens_batch_stride +
         patch * params.tokens_patch_stride;
}

// s [64 patches, 72 rows] = T Qᵀ; left under way.
template <typename T, int kColumns>
__device__ void multiply_scores(float (&s)[4 * kBlocks], const char* tile, const char* query) {
  const uint64_t tile_operand = operand(tile), query_operand = operand(query);
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int k = 0; k < kColumn / kStep; ++k)
      wgmma_shared<T, false>(s, tile_operand + advance(column * kTileBytes + 2 * kStep * k),
                             query_operand + advance(column * kHalfBytes + 2 * kStep * k), column > 0 || k > 0);
  wgmma_commit();
}

// Shared memory of `gather`, from an address that is a multiple of 1024.
template <int kColumns>
struct GatherShared {
  int group = uniform_warpgroup();
  char* start = aligned_shared_memory();
  char* query = start + group * kColumns * kHalfBytes;                           // own rows [columns][72][64]
  char* weights = start + 2 * kColumns * kHalfBytes + group * kHalfBytes;        // own [72 rows][64 patches]
  char* stages = start + 2 * (kColumns + 1) * kHalfBytes;                  // [stages][columns][64 patches][64]
  float* statistics = reinterpret_cast<float*>(stages + kStages * kColumns * kTileBytes);
  float* shift = statistics + group * kHalf;                              // own rows
  float* of_warps = statistics + 2 * kHalf + group * kWarps * kHalf;      // own [warps][72]
  int* raise = reinterpret_cast<int*>(statistics + (2 + 2 * kWarps) * kHalf) + group * kWarps;

  static constexpr size_t kBytes = kSwizzleBytes + 2 * (kColumns + 1) * kHalfBytes + kStages * kColumns * kTileBytes +
                                   sizeof(float) * (2 + 2 * kWarps) * kHalf + sizeof(int) * 2 * kWarps;

  __device__ char* stage(int tile) const { return stages + tile % kStages * kColumns * kTileBytes; }
};

// The values of one entry per thread row, joined over the eight lanes that hold the same columns.
template <typename Join>
__device__ float join_rows(float value, Join join) {
  for (int lanes = 4; lanes < kWarp; lanes *= 2) value = join(value, __shfl_xor_sync(kFullWarp, value, lanes));
  return value;
}

// Raises the shift of every row to its largest logit so far, and the sums with it. s holds scores; rounded upwards, no
// logit exceeds the shift that is made of it, however large.
template <int kColumns>
__device__ void raise_shift(const GatherShared<kColumns>& shared, const float (&s)[4 * kBlocks], float scale,
                            int valid_patches, float (&total)[2 * kBlocks], float (&context)[kColumns][4 * kBlocks]) {
  const bool first_valid = result_row() < valid_patches;
  const bool second_valid = result_row() + 8 < valid_patches;
  for (int block = 0; block < kBlocks; ++block)
    for (int side = 0; side < 2; ++side) {
      const float first = first_valid ? __fmul_ru(s[4 * block + side], scale) : kNoShift;
      const float second = second_valid ? __fmul_ru(s[4 * block + 2 + side], scale) : kNoShift;
      const float largest = join_rows(fmaxf(first, second), [](float a, float b) { return fmaxf(a, b); });
      if (lane() < 4) shared.of_warps[warp() * kHalf + result_column(block) + side] = largest;
    }
  wait_for_warpgroup();
  const int row = member();
  float before = 0.0f, after = 0.0f;
  if (row < kHalf) {
    before = after = shared.shift[row];
    for (int i = 0; i < kWarps; ++i) after = fmaxf(after, shared.of_warps[i * kHalf + row]);
  }
  wait_for_warpgroup();
  if (row < kHalf) {
    shared.shift[row] = after;
    shared.of_warps[row] = fast_exp2(before - after);
  }
  wait_for_warpgroup();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float shrink = shared.of_warps[result_column(block) + side];
      total[2 * block + side] *= shrink;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        context[column][4 * block + side] *= shrink;
        context[column][4 * block + 2 + side] *= shrink;
      }
    }
}

// s becomes scale · s − shift, −∞ beyond the valid patches; returns the largest.
template <int kColumns>
__device__ float shift_scores(const GatherShared<kColumns>& shared, float (&s)[4 * kBlocks], float scale,
                              int valid_patches) {
  const bool first_valid = result_row() < valid_patches;
  const bool second_valid = result_row() + 8 < valid_patches;
  float largest = -INFINITY;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = s[4 * block + i];
      score = fmaf(score, scale, -shared.shift[result_column(block) + i % 2]);
      if (i < 2 ? !first_valid : !second_valid) score = -INFINITY;
      largest = fmaxf(largest, score);
    }
  return largest;
}

// Whether one thread of the warpgroup says so.
template <int kColumns>
__device__ bool warpgroup_has(const GatherShared<kColumns>& shared, bool mine) {
  const bool any = __any_sync(kFullWarp, mine);
  if (lane() == 0) shared.raise[warp()] = any;
  wait_for_warpgroup();
  return shared.raise[0] | shared.raise[1] | shared.raise[2] | shared.raise[3];
}

// Shifted scores become weights, which are summed per row.
__device__ void weigh(float (&s)[4 * kBlocks], float (&total)[2 * kBlocks]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float& first = s[4 * block + side];
      float& second = s[4 * block + 2 + side];
      first = fast_exp2(first);
      second = fast_exp2(second);
      total[2 * block + side] += first + second;
    }
}

// The weights into shared memory as [72 rows][64 patches].
template <typename T, int kColumns>
__device__ void store_weights(const GatherShared<kColumns>& shared, const float (&s)[4 * kBlocks]) {
  // Thread 8·m + i of a warp names row i of matrix m: of block m / 2, patches 8·(m % 2) … of the warp's sixteen.
  const int unit = 2 * warp() + lane() / 8 % 2;
#pragma unroll
  for (int block = 0; block + 1 < kBlocks; block += 2) {
    const uint32_t matrices[4] = {pack<T>(s[4 * block], s[4 * block + 1]), pack<T>(s[4 * block + 2], s[4 * block + 3]),
                                  pack<T>(s[4 * block + 4], s[4 * block + 5]),
                                  pack<T>(s[4 * block + 6], s[4 * block + 7])};
    store_transposed(shared.weights + swizzled(8 * (block + lane() / 16) + lane() % 8, unit), matrices);
  }
  constexpr int kLast = kBlocks - 1;
  static_assert(kBlocks % 2 == 1);
  const uint32_t matrices[2] = {pack<T>(s[4 * kLast], s[4 * kLast + 1]), pack<T>(s[4 * kLast + 2], s[4 * kLast + 3])};
  store_transposed(shared.weights + swizzled(8 * kLast + lane() % 8, unit), matrices);
}

// context [W, 72 rows] += Tᵀ weights; left under way.
template <typename T, int kColumns>
__device__ void accumulate_context(float (&context)[kColumns][4 * kBlocks], const char* tile, const char* weights) {
  const uint64_t tile_operand = operand(tile), weights_operand = operand(weights);
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int k = 0; k < kTile / kStep; ++k)
      wgmma_shared<T, true>(context[column], tile_operand + advance(column * kTileBytes + k * kStep * kRowBytes),
                            weights_operand + advance(2 * kStep * k), true);
  wgmma_commit();
}

// The sums of the warpgroup's rows over all of its threads, in shared.of_warps[0 … 71].
template <int kColumns>
__device__ void join_totals(const GatherShared<kColumns>& shared, const float (&total)[2 * kBlocks]) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float sum = join_rows(total[2 * block + side], [](float a, float b) { return a + b; });
      if (lane() < 4) shared.of_warps[warp() * kHalf + result_column(block) + side] = sum;
    }
  wait_for_warpgroup();
  const int row = member();
  float sum = 0.0f;
  if (row < kHalf)
    for (int i = 0; i < kWarps; ++i) sum += shared.of_warps[i * kHalf + row];
  wait_for_warpgroup();
  if (row < kHalf) shared.of_warps[row] = sum;
  wait_for_warpgroup();
}

// What `scatter` and the caller read of a row, once its sum is complete.
__device__ void store_statistics(const Launch& launch, int64_t sample, int row, float shift, float total) {
  const TensorAttention& params = launch.params;
  const float log_total = log2f(total);
  launch.shift[sample * kTensorRows + row] = shift;
  launch.log_total[sample * kTensorRows + row] = log_total;
  if (row < params.rows) params.lse[sample * params.rows + row] = (shift + log_total) * kLn2;
}

__device__ void load_statistics(const Launch& launch, int64_t sample, int row, float& shift, float& log_total) {
  const TensorAttention& params = launch.params;
  if (params.given_lse) {
    shift = row < params.rows ? params.lse[sample * params.rows + row] * kLog2E : 0.0f;
    log_total = 0.0f;
  } else {
    shift = launch.shift[sample * kTensorRows + row];
    log_total = launch.log_total[sample * kTensorRows + row];
  }
}

// Normalises and writes the context of the warpgroup's rows, through the shared memory of its query.
template <typename T, int kColumns>
__device__ void store_context(const Launch& launch, int64_t sample, const GatherShared<kColumns>& shared,
                              const float (&context)[kColumns][4 * kBlocks]) {
  const TensorAttention& params = launch.params;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const float left = 1.0f / shared.of_warps[result_column(block)];
    const float right = 1.0f / shared.of_warps[result_column(block) + 1];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const float(&c)[4 * kBlocks] = context[column];
      const uint32_t matrices[2] = {pack<T>(c[4 * block] * left, c[4 * block + 1] * right),
                                    pack<T>(c[4 * block + 2] * left, c[4 * block + 3] * right)};
      const int unit = 2 * warp() + lane() / 8 % 2;
      store_transposed(shared.query + column * kHalfBytes + swizzled(8 * block + lane() % 8, unit), matrices);
    }
  }
  wait_for_warpgroup();
  constexpr int kUnits = kColumns * kColumn / kUnit;
  T* out = static_cast<T*>(params.context) + sample * params.rows * params.width;
  for (int i = member(); i < kHalf * kUnits; i += kWarpgroup) {
    const int own = i / kUnits, unit = i % kUnits, row = warpgroup() * kHalf + own;
    if (row >= params.rows || unit * kUnit >= params.width) continue;
    const char* from = shared.query + unit / kUnit * kHalfBytes + swizzled(own, unit % kUnit);
    *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * params.width + unit * kUnit) =
        *reinterpret_cast<const uint4*>(from);
  }
}

template <int kColumns>
__device__ void store_share(const Launch& launch, int64_t sample, int share, const GatherShared<kColumns>& shared,
                            const float (&context)[kColumns][4 * kBlocks]) {
  const int64_t part = static_cast<int64_t>(share) * launch.params.batch + sample;
  const int row = member();
  if (row < kHalf) {
    launch.share_shift[part * kTensorRows + warpgroup() * kHalf + row] = shared.shift[row];
    launch.share_total[part * kTensorRows + warpgroup() * kHalf + row] = shared.of_warps[row];
  }
  float4* out = reinterpret_cast<float4*>(launch.share_context) +
                (part * 2 + warpgroup()) * kColumns * kBlocks * kWarpgroup + member();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const float(&c)[4 * kBlocks] = context[column];
      out[(column * kBlocks + block) * kWarpgroup] =
          float4{c[4 * block], c[4 * block + 1], c[4 * block + 2], c[4 * block + 3]};
    }
}

// Block share + shares · sample.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, resident_blocks(kColumns))
    gather_kernel(const __grid_constant__ Launch launch) {
  const TensorAttention& params = launch.params;
  const int share = blockIdx.x % launch.shares;
  const int64_t sample = blockIdx.x / launch.shares;
  const int tiles = (params.patches + kTile - 1) / kTile;
  const int first = share * launch.tiles_per_share;
  const int end = min(first + launch.tiles_per_share, tiles);
  const float scale = params.scale * kLog2E;
  const GatherShared<kColumns> shared;
  const int own_rows = params.rows - shared.group * kHalf;
  const int64_t rows_before = (sample * params.rows + (own_rows > 0 ? shared.group * kHalf : 0)) * params.width;
  TileCopier<T, kColumns, kHalf, kWarpgroup>(member(), params.width, params.width)
      .copy(shared.query, static_cast<const T*>(params.query) + rows_before, own_rows);
  const T* tokens = tokens_of<T>(params, sample, 0);
  const auto copy_tokens = [&](int tile) {
    const int patch = tile * kTile;
    if (tile < end)
      TileCopier<T, kColumns, kTile, kThreads>(threadIdx.x, params.tokens_patch_stride, params.width)
          .copy(shared.stage(tile), tokens + patch * params.tokens_patch_stride, params.patches - patch);
    commit_copies();
  };
  for (int tile = first; tile < first + kStages - 1; ++tile) copy_tokens(tile);
  for (int row = member(); row < kHalf; row += kWarpgroup) shared.shift[row] = kNoShift;
  wait_for_copies<kStages - 2>();
  publish_to_tensor_cores();
  __syncthreads();

  float total[2 * kBlocks] = {};
  float context[kColumns][4 * kBlocks] = {};
  float s[4 * kBlocks] = {};
  multiply_scores<T, kColumns>(s, shared.stage(first), shared.query);
  wgmma_wait();
  for (int tile = first; tile < end; ++tile) {
    // The scores of `tile` are there; the context of the tile before is under way, beside the exponentials.
    const int valid_patches = params.patches - tile * kTile;
    while (warpgroup_has(shared, shift_scores(shared, s, scale, valid_patches) > kHeadroom)) {  // rarely
      multiply_scores<T, kColumns>(s, shared.stage(tile), shared.query);
      wgmma_wait();
      raise_shift(shared, s, scale, valid_patches, total, context);
      wait_for_warpgroup();
    }
    weigh(s, total);
    wgmma_wait();
    store_weights<T, kColumns>(shared, s);
    wait_for_copies<kStages - 3>();
    publish_to_tensor_cores();
    __syncthreads();  // weights and the next tile are there, and nobody reads the tile before any more
    copy_tokens(tile + kStages - 1);
    multiply_scores<T, kColumns>(s, shared.stage(tile + 1), shared.query);  // after the last tile, of no use
    accumulate_context<T, kColumns>(context, shared.stage(tile), shared.weights);
    wgmma_wait<1>();
  }
  wgmma_wait();

  join_totals(shared, total);
  if (launch.shares > 1) return store_share(launch, sample, share, shared, context);
  const int row = member();
  if (row < kHalf)
    store_statistics(launch, sample, warpgroup() * kHalf + row, shared.shift[row], shared.of_warps[row]);
  store_context<T, kColumns>(launch, sample, shared, context);
}

// Block (block of eight rows + 9 · column) + … · warpgroup + … · sample, of 128 threads: the registers of one block.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kWarpgroup, 1) combine_kernel(const __grid_constant__ Launch launch) {
  const TensorAttention& params = launch.params;
  const int block = blockIdx.x % kBlocks;
  const int column = blockIdx.x / kBlocks % kColumns;
  const int half = blockIdx.x / kBlocks / kColumns % 2;
  const int64_t sample = blockIdx.x / kBlocks / kColumns / 2;
  const int row = half * kHalf + result_column(block);  // and the one after
  float shift[2] = {kNoShift, kNoShift}, total[2] = {};
  float sum[4] = {};
  for (int share = 0; share < launch.shares; ++share)
    for (int side = 0; side < 2; ++side)
      shift[side] = fmaxf(shift[side], launch.share_shift[(static_cast<int64_t>(share) * params.batch + sample) *
                                                              kTensorRows + row + side]);
  for (int share = 0; share < launch.shares; ++share) {
    const int64_t part = static_cast<int64_t>(share) * params.batch + sample;
    const float4 values = reinterpret_cast<const float4*>(
        launch.share_context)[(((part * 2 + half) * kColumns + column) * kBlocks + block) * kWarpgroup + member()];
    float weight[2];
    for (int side = 0; side < 2; ++side) {
      weight[side] = fast_exp2(launch.share_shift[part * kTensorRows + row + side] - shift[side]);
      total[side] += weight[side] * launch.share_total[part * kTensorRows + row + side];
    }
    sum[0] += weight[0] * values.x;
    sum[1] += weight[1] * values.y;
    sum[2] += weight[0] * values.z;
    sum[3] += weight[1] * values.w;
  }
  if (column == 0 && member() < 4)
    for (int side = 0; side < 2; ++side) store_statistics(launch, sample, row + side, shift[side], total[side]);
  T* out = static_cast<T*>(params.context) + sample * params.rows * params.width;
  for (int i = 0; i < 4; ++i) {
    const int target = row + i % 2;
    const int at = column * kColumn + result_row() + i / 2 * 8;
    if (target < params.rows && at < params.width)
      from_float(sum[i] / total[i % 2], out[static_cast<int64_t>(target) * params.width + at]);
  }
}

// Shared memory of `scatter`, from an address that is a multiple of 1024.
template <int kColumns, bool kUpdate>
struct ScatterShared {
  int group = uniform_warpgroup();
  char* query = aligned_shared_memory();                             // [columns][144][64]
  char* pose_value = query + kColumns * kRowsBytes;                  // the same
  char* slots = pose_value + (kUpdate ? kColumns * kRowsBytes : 0);  // [2][slots][64][64]
  float* shift = reinterpret_cast<float*>(slots + 2 * kSlots * kTileBytes);
  float* log_total = shift + kTensorRows;
  char* results = reinterpret_cast<char*>(log_total + kTensorRows);  // [2]: two columns of a tile, or its attention
};

size_t result_bytes(const TensorAttention& params) {
  const size_t update = params.pose_value == nullptr ? 0 : 2 * kTileBytes;
  const size_t attention = params.attention == nullptr ? 0 : kTile * (params.channels + params.attention_rows) * 2;
  return update + attention;
}

size_t scatter_bytes(const TensorAttention& params) {
  const size_t rows = static_cast<size_t>(columns_of(params.width)) * kRowsBytes;
  return kSwizzleBytes + (params.pose_value == nullptr ? 1 : 2) * rows + 2 * kSlots * kTileBytes +
         sizeof(float) * 2 * kTensorRows + 2 * result_bytes(params);
}

// s becomes A; returns its sums over the rows, of the thread's two patches.
__device__ float2 weigh(Scores& s, const float* shift, const float* log_total, float scale, int rows) {
  float2 sums = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const bool whole = half * kHalf + 8 * block + 8 <= rows;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int row = half * kHalf + result_column(block) + side;
        float& first = s[half][4 * block + side];
        float& second = s[half][4 * block + 2 + side];
        // Two differences: the log-sum-exp as one number would round large logits away.
        first = fast_exp2(fmaf(first, scale, -shift[row]) - log_total[row]);
        second = fast_exp2(fmaf(second, scale, -shift[row]) - log_total[row]);
        if (!whole && row >= rows) first = second = 0.0f;
        sums.x += first;
        sums.y += second;
      }
    }
  return sums;
}

// Sums over the four lanes that hold one patch.
__device__ float join_columns(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

__device__ void store_importance(const TensorAttention& params, int64_t sample, int patch, float2 sums) {
  sums = float2{join_columns(sums.x), join_columns(sums.y)};
  float* importance = params.importance + sample * params.patches + patch;
  const int row = result_row();
  if (lane() % 4 == 0 && patch + row < params.patches) importance[row] = sums.x / params.rows;
  if (lane() % 4 == 0 && patch + row + 8 < params.patches) importance[row + 8] = sums.y / params.rows;
}

// The tokens of one column of a tile as the update is laid out: two elements to a register, [block][row r, row r + 8].
__device__ void load_column(uint32_t (&tokens)[16], const char* column) {
#pragma unroll
  for (int pair = 0; pair < 16; ++pair)
    tokens[pair] = *reinterpret_cast<const uint32_t*>(column + swizzled(result_row() + pair % 2 * 8, pair / 2) +
                                                      4 * (lane() % 4));
}

// tokens + A U of one tile, to device memory.
template <typename T, int kColumns>
__device__ void store_update(const TensorAttention& params, int64_t sample, int patch, const Scores& s,
                             const uint32_t (&tokens)[kColumns][16], const char* pose_value, char* results) {
  constexpr int kSteps = kTensorRows / kStep;
  uint32_t attention[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int block = 2 * step + part / 2;
      const float(&values)[4 * kBlocks] = s[block / kBlocks];
      const int at = 4 * (block % kBlocks) + 2 * (part % 2);
      attention[step][part] = pack<T>(values[at], values[at + 1]);
    }
  float updated[kColumns][32];
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int pair = 0; pair < 16; ++pair)
      unpack<T>(tokens[column][pair], updated[column][2 * pair], updated[column][2 * pair + 1]);
  const uint64_t pose_operand = operand(pose_value);
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma_registers<T>(updated[column], attention[step],
                         pose_operand + advance(column * kRowsBytes + step * kStep * kRowBytes), true);
  wgmma_commit();
  wgmma_wait();
  // Whole units to device memory: a place in a row of 128 bytes for each thread, and every sixteenth row.
  constexpr int kRowsOfPass = kWarpgroup / kUnit;
  const int first_row = member() / kUnit, unit = member() % kUnit, place = swizzled(first_row, unit);
  T* out = static_cast<T*>(params.patches_out) + (sample * params.patches + patch) * params.width;
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    char* result = results + column % 2 * kTileBytes;
#pragma unroll
    for (int block = 0; block < kColumn / 8; ++block)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const float* pair = &updated[column][4 * block + 2 * lower];
        *reinterpret_cast<uint32_t*>(result + swizzled(result_row() + 8 * lower, block) + 4 * (lane() % 4)) =
            pack<T>(pair[0], pair[1]);
      }
    wait_for_warpgroup();  // also: the column before the last has been read
    const int at = column * kColumn + unit * kUnit;
#pragma unroll
    for (int pass = 0; pass < kTile / kRowsOfPass; ++pass) {
      const int row = first_row + pass * kRowsOfPass;
      if (patch + row < params.patches && at < params.width)
        *reinterpret_cast<uint4*>(out + row * params.width + at) =
            *reinterpret_cast<const uint4*>(result + place + pass * kRowsOfPass * kRowBytes);
    }
  }
}

// [tokens | A] of one tile to device memory, in whole units where rows consist of such.
template <typename T>
__device__ void store_attention(const TensorAttention& params, int64_t sample, int patch, char* results,
                                const Scores& s) {
  const int width = params.channels + params.attention_rows;
  const int count = min(kTile, params.patches - patch);
  T* rows = reinterpret_cast<T*>(results);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const int row = half * kHalf + result_column(i / 4) + i % 2;
      const int at = (result_row() + i / 2 % 2 * 8) * width + params.channels + row;
      if (row < params.attention_rows) from_float(s[half][i], rows[at]);
    }
  const int units = params.channels / kUnit;
  for (int i = member(); i < count * units; i += kWarpgroup) {
    const int row = i / units, unit = i % units;
    const uint4 given = *reinterpret_cast<const uint4*>(tokens_of<T>(params, sample, patch + row) + unit * kUnit);
    memcpy(rows + row * width + unit * kUnit, &given, sizeof(given));
  }
  wait_for_warpgroup();
  T* out = static_cast<T*>(params.attention) + (sample * params.patches + patch) * params.attention_stride;
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0 && params.attention_stride % kUnit == 0 && width % kUnit == 0) {
    for (int i = member(); i < count * (width / kUnit); i += kWarpgroup) {
      const int row = i / (width / kUnit), unit = i % (width / kUnit);
      reinterpret_cast<uint4*>(out + row * params.attention_stride)[unit] =
          reinterpret_cast<const uint4*>(rows + row * width)[unit];
    }
  } else {
    for (int i = member(); i < count * width; i += kWarpgroup)
      out[i / width * params.attention_stride + i % width] = rows[i];
  }
}

// Block share + shares · sample; tile first + 2 · turn of the share.
template <typename T, int kColumns, bool kUpdate>
__global__ void __launch_bounds__(kThreads, kUpdate ? 1 : resident_blocks(kColumns))
    scatter_kernel(const __grid_constant__ Launch launch) {
  const TensorAttention& params = launch.params;
  const int share = blockIdx.x % launch.scatter_shares;
  const int64_t sample = blockIdx.x / launch.scatter_shares;
  const int tiles = (params.patches + kTile - 1) / kTile;
  const ScatterShared<kColumns, kUpdate> shared;
  const int first = share * launch.scatter_tiles + shared.group;
  const int end = min((share + 1) * launch.scatter_tiles, tiles);
  const int turns = max(0, (end - first + 1) / 2);
  const float scale = params.scale * kLog2E;
  const int64_t rows_before = sample * params.rows * params.width;
  const TileCopier<T, kColumns, kTensorRows, kThreads> row_copier(threadIdx.x, params.width, params.width);
  row_copier.copy(shared.query, static_cast<const T*>(params.query) + rows_before, params.rows);
  if constexpr (kUpdate)
    row_copier.copy(shared.pose_value, static_cast<const T*>(params.pose_value) + rows_before, params.rows);
  commit_copies();
  const auto copy_column = [&](int n, char* slot) {
    const int patch = (first + n / kColumns * 2) * kTile, at = n % kColumns * kColumn;
    TileCopier<T, 1, kTile, kWarpgroup>(member(), params.tokens_patch_stride, params.width - at)
        .copy(slot, tokens_of<T>(params, sample, patch) + at, params.patches - patch);
  };
  ColumnStream<kSlots, decltype(copy_column)> columns(shared.slots + shared.group * kSlots * kTileBytes,
                                                      turns * kColumns, copy_column);
  for (int row = threadIdx.x; row < kTensorRows; row += kThreads)
    load_statistics(launch, sample, row, shared.shift[row], shared.log_total[row]);
  wait_for_copies<kSlots - 1>();
  publish_to_tensor_cores();
  __syncthreads();

  char* results = shared.results + shared.group * launch.result_bytes;
  for (int turn = 0; turn < turns; ++turn) {
    const int patch = (first + 2 * turn) * kTile;
    Scores s = {};
    uint32_t tokens[kColumns][16];
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const char* tile_column = columns.next();
      multiply_column<T>(s, tile_column, shared.query + column * kRowsBytes, column > 0);
      if constexpr (kUpdate) load_column(tokens[column], tile_column);
      wgmma_wait();
    }
    const float2 sums = weigh(s, shared.shift, shared.log_total, scale, params.rows);
    if (params.importance != nullptr) store_importance(params, sample, patch, sums);
    if constexpr (kUpdate)
      store_update<T, kColumns>(params, sample, patch, s, tokens, shared.pose_value, results);
    else if (params.attention != nullptr)
      store_attention<T>(params, sample, patch, results, s);
  }
}

// How the work is shared out, and where everything lies in the workspace.
Launch plan(const TensorAttention& params) {
  Launch launch{};
  launch.params = params;
  const int32_t resident = resident_blocks(columns_of(params.width));
  launch.shares = choose_shares(tiles_of(params.patches), params.batch, resident, kGatherOverhead);
  launch.tiles_per_share = static_cast<int32_t>(ceil_div(tiles_of(params.patches), launch.shares));
  launch.shares = static_cast<int32_t>(ceil_div(tiles_of(params.patches), launch.tiles_per_share));  // none is empty
  launch.scatter_shares = choose_shares(tiles_of(params.patches), params.batch,
                                        params.pose_value == nullptr ? resident : 1, kScatterOverhead);
  launch.scatter_tiles = static_cast<int32_t>(ceil_div(tiles_of(params.patches), launch.scatter_shares));
  launch.result_bytes = static_cast<int32_t>(result_bytes(params));
  if (params.given_lse) return launch;
  const int64_t rows = static_cast<int64_t>(params.batch) * kTensorRows;
  const int64_t shares = launch.shares > 1 ? launch.shares : 0;
  launch.share_context = params.workspace;  // first: read as float4
  launch.shift = launch.share_context + shares * rows * columns_of(params.width) * kColumn;
  launch.log_total = launch.shift + rows;
  launch.share_shift = launch.log_total + rows;
  launch.share_total = launch.share_shift + shares * rows;
  return launch;
}

template <typename T, int kColumns>
cudaError_t launch_scatter(const Launch& launch_plan) {
  const TensorAttention& params = launch_plan.params;
  if (params.pose_value == nullptr && params.importance == nullptr && params.attention == nullptr) return cudaSuccess;
  const auto kernel = params.pose_value != nullptr ? scatter_kernel<T, kColumns, true>
                                                   : scatter_kernel<T, kColumns, false>;
  return launch(kernel, static_cast<int64_t>(launch_plan.scatter_shares) * params.batch, kThreads,
                scatter_bytes(params), params.stream, launch_plan);
}

template <typename T, int kColumns>
cudaError_t launch_all(const Launch& launch_plan) {
  const TensorAttention& params = launch_plan.params;
  const int64_t batch = params.batch;
  cudaError_t error = cudaSuccess;
  if (!params.given_lse)
    error = launch(gather_kernel<T, kColumns>, launch_plan.shares * batch, kThreads, GatherShared<kColumns>::kBytes,
                   params.stream, launch_plan);
  if (error == cudaSuccess && !params.given_lse && launch_plan.shares > 1)
    error = launch(combine_kernel<T, kColumns>, batch * 2 * kColumns * kBlocks, kWarpgroup, 0, params.stream,
                   launch_plan);
  return error == cudaSuccess ? launch_scatter<T, kColumns>(launch_plan) : error;
}

template <typename T>
cudaError_t launch_width(const Launch& launch_plan) {
  switch (columns_of(launch_plan.params.width)) {
    case 1:
      return launch_all<T, 1>(launch_plan);
    case 2:
      return launch_all<T, 2>(launch_plan);
    case 3:
      return launch_all<T, 3>(launch_plan);
    default:
      return launch_all<T, 4>(launch_plan);
  }
}

}  // namespace

bool tensor_attention_serves(const TensorAttention& params) {
  return (params.dtype == kFloat16 || params.dtype == kBFloat16) && params.rows <= kTensorRows &&
         params.width <= kTensorWidth && params.width % kUnit == 0 && params.tokens_batch_stride % kUnit == 0 &&
         params.tokens_patch_stride % kUnit == 0 && aligned(params.query) && aligned(params.tokens) &&
         aligned(params.pose_value) && aligned(params.context) && aligned(params.patches_out) &&
         scatter_bytes(params) <= kSharedLimit && on_hopper();
}

int64_t tensor_attention_workspace(const TensorAttention& params) {
  const Launch launch = plan(params);
  const int64_t rows = static_cast<int64_t>(params.batch) * kTensorRows;
  const int64_t of_share = rows * (columns_of(params.width) * kColumn + 2);
  return params.given_lse ? 0 : 2 * rows + (launch.shares > 1 ? launch.shares * of_share : 0);
}

extern "C" cudaError_t tensor_attention_forward(const TensorAttention* params) {
  if (!tensor_attention_serves(*params)) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const Launch launch_plan = plan(*params);
  return params->dtype == kFloat16 ? launch_width<__half>(launch_plan) : launch_width<__nv_bfloat16>(launch_plan);
}

}  // namespace liftbyimage::cuda

#else

namespace liftbyimage::cuda {

bool tensor_attention_serves(const TensorAttention&) { return false; }
int64_t tensor_attention_workspace(const TensorAttention&) { return 0; }
extern "C" cudaError_t tensor_attention_forward(const TensorAttention*) { return cudaErrorNotSupported; }

}  // namespace liftbyimage::cuda

#endif
