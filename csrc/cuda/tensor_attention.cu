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
// The two warpgroups of `gather` share the tiles of tokens and little else: each may be most of a tile ahead of the
// other, so that one's exponentials run beside the other's products.
//
// No atomics; every sum has one order, given the sizes of the call. How a sample is shared out depends on the batch.
//
// Compiled for sm_90a alone. A build without it says LIFTBYIMAGE_WITHOUT_SM90A, and nothing is served here.

#include "tensor_attention.h"

#ifndef LIFTBYIMAGE_WITHOUT_SM90A

#include <cmath>
#include <cstring>

#include "common.h"
#include "hopper.h"
#include "warps.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kThreads = 2 * kWarpgroup;
constexpr int kWarps = kWarpgroup / kWarp;  // of a warpgroup
constexpr int kHalf = kTensorRows / 2;      // rows of one warpgroup of `gather`
constexpr int kBlocks = kHalf / 8;          // blocks of eight columns of a result
constexpr int kTile = 64;                   // patches
constexpr int kStages = 4;                  // tiles of tokens in flight in `gather`
constexpr float kHeadroom = 8.0f;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kTileBytes = kTile * kRowBytes;         // a column of a tile
constexpr int kHalfBytes = kHalf * kRowBytes;         // a column of 72 rows
constexpr int kRowsBytes = kTensorRows * kRowBytes;   // a column of all rows
constexpr int kPatchesPerProduct = 16;

// How a sample is shared out among blocks: no finer than this, and a block costs so many tiles beside its own.
constexpr int64_t kMaxShares = 64;
constexpr int64_t kGatherOverhead = 3;
constexpr int64_t kScatterOverhead = 5;
constexpr size_t kSharedLimit = 232448;  // bytes that a block may use

// Named barriers.
constexpr int kOwnBarrier = 1;    // + warpgroup: its own 128 threads
constexpr int kOtherBarrier = 3;  // + 2 · warpgroup + parity of the tile: what it is told by the other

struct Launch {
  TensorAttention params;
  int32_t shares;           // blocks of `gather` for one sample
  int32_t tiles_per_share;
  int32_t scatter_shares;
  int32_t scatter_tiles;    // of one share
  int32_t scatter_buffers;
  float* shift;             // [batch, kTensorRows], powers of 2
  float* log_total;         // [batch, kTensorRows], powers of 2; +inf beyond `rows`
  float* share_shift;       // [shares, batch, kTensorRows]
  float* share_total;       // [shares, batch, kTensorRows]
  float* share_context;     // [shares, batch, 2, columns, kBlocks, 128, 4], as registers lie
};

__device__ int warpgroup() { return threadIdx.x / kWarpgroup; }
__device__ int member() { return threadIdx.x % kWarpgroup; }
__device__ int warp() { return member() / kWarp; }
__device__ int lane() { return threadIdx.x % kWarp; }
__device__ int result_row() { return 16 * warp() + lane() / 4; }  // and the one 8 below
__device__ int result_column(int block) { return 8 * block + 2 * (lane() % 4); }  // and the one beside

__device__ char* aligned_shared_memory() {
  char* start = reinterpret_cast<char*>(shared_memory);
  return start + (kSwizzleBytes - shared_address(start) % kSwizzleBytes) % kSwizzleBytes;
}

// Copies `entries` rows of `width` elements into a tile, the threads `thread` of `threads` together; rows from `count`
// on, and what is beyond the width, become zero.
template <typename T, int kColumns>
__device__ void copy_tile(char* tile, int entries, const T* rows, int64_t stride, int count, int width, int thread,
                          int threads) {
  constexpr int kUnits = kColumns * kColumn / kUnit;
  for (int i = thread; i < entries * kUnits; i += threads) {
    const int row = i / kUnits;
    const int unit = i % kUnits;
    const bool valid = row < count && unit * kUnit < width;
    const T* source = valid ? rows + row * stride + unit * kUnit : rows;
    copy_unit(tile + unit / kUnit * entries * kRowBytes + swizzled(row, unit % kUnit), source, valid);
  }
}

template <typename T>
__device__ const T* tokens_of(const TensorAttention& params, int64_t sample, int64_t patch) {
  return static_cast<const T*>(params.tokens) + sample * params.tokens_batch_stride +
         patch * params.tokens_patch_stride;
}

// s [64 patches, 72 rows] = T Qᵀ
template <typename T, int kColumns>
__device__ void multiply_scores(float (&s)[4 * kBlocks], const char* tile, const char* query, int query_column_bytes) {
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int k = 0; k < kColumn / kPatchesPerProduct; ++k)
      wgmma_shared<T, false>(s, operand(shared_address(tile + column * kTileBytes) + 32 * k),
                             operand(shared_address(query + column * query_column_bytes) + 32 * k),
                             column > 0 || k > 0);
  wgmma_commit();
  wgmma_wait();
}

// Shared memory of `gather`, from an address that is a multiple of 1024.
template <int kColumns>
struct GatherShared {
  char* start = aligned_shared_memory();
  char* query = start + warpgroup() * kColumns * kHalfBytes;               // own rows [columns][72][64]
  char* weights = start + 2 * kColumns * kHalfBytes + warpgroup() * kHalfBytes;  // own [72 rows][64 patches]
  char* stages = start + 2 * (kColumns + 1) * kHalfBytes;                  // [stages][columns][64 patches][64]
  float* statistics = reinterpret_cast<float*>(stages + kStages * kColumns * kTileBytes);
  float* shift = statistics + warpgroup() * kHalf;                         // own rows
  float* of_warps = statistics + 2 * kHalf + warpgroup() * kWarps * kHalf;  // own [warps][72]
  int* raise = reinterpret_cast<int*>(statistics + (2 + 2 * kWarps) * kHalf) + warpgroup() * kWarps;

  static constexpr size_t kBytes = kSwizzleBytes + 2 * (kColumns + 1) * kHalfBytes + kStages * kColumns * kTileBytes +
                                   sizeof(float) * (2 + 2 * kWarps) * kHalf + sizeof(int) * 2 * kWarps;

  __device__ char* stage(int tile) const { return stages + tile % kStages * kColumns * kTileBytes; }
};

__device__ void wait_for_warpgroup() { wait_at_barrier(kOwnBarrier + warpgroup(), kWarpgroup); }

// What to subtract: nothing while every logit of the row was −∞.
__device__ float finite_shift(float shift) { return shift == -INFINITY ? 0.0f : shift; }

// The values of one entry per thread row, joined over the eight lanes that hold the same columns.
template <typename Join>
__device__ float join_rows(float value, Join join) {
  for (int lanes = 4; lanes < kWarp; lanes *= 2) value = join(value, __shfl_xor_sync(kFullWarp, value, lanes));
  return value;
}

// Raises the shift of every row to its largest logit so far, and the sums with it.
template <int kColumns>
__device__ void raise_shift(const GatherShared<kColumns>& shared, const float (&s)[4 * kBlocks], float scale,
                            int valid_patches, float (&total)[2 * kBlocks], float (&context)[kColumns][4 * kBlocks]) {
  const bool first_valid = result_row() < valid_patches;
  const bool second_valid = result_row() + 8 < valid_patches;
  for (int block = 0; block < kBlocks; ++block)
    for (int side = 0; side < 2; ++side) {
      const float first = first_valid ? s[4 * block + side] * scale : -INFINITY;
      const float second = second_valid ? s[4 * block + 2 + side] * scale : -INFINITY;
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
    shared.of_warps[row] = before == -INFINITY ? 0.0f : fast_exp2(before - after);
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

// Whether a logit of this thread exceeds its row's shift by more than the headroom (any does while there is no shift).
template <int kColumns>
__device__ bool exceeds_shift(const GatherShared<kColumns>& shared, const float (&s)[4 * kBlocks], float scale,
                              int valid_patches) {
  float first = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float shift = shared.shift[result_column(block) + side];
      first = fmaxf(first, fmaf(s[4 * block + side], scale, -shift));
      second = fmaxf(second, fmaf(s[4 * block + 2 + side], scale, -shift));
    }
  return (result_row() < valid_patches && first > kHeadroom) ||
         (result_row() + 8 < valid_patches && second > kHeadroom);
}

// The weights 2^(scale · s − shift) of one tile: summed per row, and into shared memory as [72 rows][64 patches].
template <typename T, int kColumns>
__device__ void store_weights(const GatherShared<kColumns>& shared, float (&s)[4 * kBlocks], float scale,
                              int valid_patches, float (&total)[2 * kBlocks]) {
  const bool first_valid = result_row() < valid_patches;
  const bool second_valid = result_row() + 8 < valid_patches;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float shift = finite_shift(shared.shift[result_column(block) + side]);
      float& first = s[4 * block + side];
      float& second = s[4 * block + 2 + side];
      first = first_valid ? fast_exp2(fmaf(first, scale, -shift)) : 0.0f;
      second = second_valid ? fast_exp2(fmaf(second, scale, -shift)) : 0.0f;
      total[2 * block + side] += first + second;
    }
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

// context [W, 72 rows] += Tᵀ weights
template <typename T, int kColumns>
__device__ void accumulate_context(float (&context)[kColumns][4 * kBlocks], const char* tile, const char* weights) {
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int k = 0; k < kTile / kPatchesPerProduct; ++k)
      wgmma_shared<T, true>(
          context[column],
          operand(shared_address(tile + column * kTileBytes) + k * kPatchesPerProduct * kRowBytes),
          operand(shared_address(weights) + 32 * k), true);
  wgmma_commit();
  wgmma_wait();
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
__global__ void __launch_bounds__(kThreads, 1) gather_kernel(const __grid_constant__ Launch launch) {
  const TensorAttention& params = launch.params;
  const int share = blockIdx.x % launch.shares;
  const int64_t sample = blockIdx.x / launch.shares;
  const int tiles = (params.patches + kTile - 1) / kTile;
  const int first = share * launch.tiles_per_share;
  const int end = min(first + launch.tiles_per_share, tiles);
  const float scale = params.scale * kLog2E;
  const GatherShared<kColumns> shared;
  const int other = 1 - warpgroup();

  const int own_rows = params.rows - warpgroup() * kHalf;
  const T* query = static_cast<const T*>(params.query) + (sample * params.rows + warpgroup() * kHalf) * params.width;
  copy_tile<T, kColumns>(shared.query, kHalf, own_rows > 0 ? query : static_cast<const T*>(params.query), params.width,
                         own_rows, params.width, member(), kWarpgroup);
  const auto copy_tokens = [&](int tile) {
    if (tile < end)
      copy_tile<T, kColumns>(shared.stage(tile), kTile, tokens_of<T>(params, sample, static_cast<int64_t>(tile) * kTile),
                             params.tokens_patch_stride, params.patches - tile * kTile, params.width, threadIdx.x,
                             kThreads);
    commit_copies();
  };
  copy_tokens(first);
  copy_tokens(first + 1);
  for (int row = member(); row < kHalf; row += kWarpgroup) shared.shift[row] = -INFINITY;
  wait_for_copies<1>();
  publish_to_tensor_cores();
  arrive_at_barrier(kOtherBarrier + 2 * other + (first + 1) % 2, kThreads);

  float total[2 * kBlocks] = {};
  float context[kColumns][4 * kBlocks] = {};
  for (int tile = first; tile < end; ++tile) {
    // Is told by the other warpgroup that its part of `tile` has come and that it is done with tile − 2, whose place
    // the copy of tile + 2 takes; tells it the same, a tile on. First the one, then the other: so no message is sent
    // before the last but one, at the same barrier, was taken.
    wait_for_copies<0>();
    publish_to_tensor_cores();
    wait_at_barrier(kOtherBarrier + 2 * warpgroup() + (tile + 1) % 2, kThreads);
    arrive_at_barrier(kOtherBarrier + 2 * other + tile % 2, kThreads);
    copy_tokens(tile + 2);

    float s[4 * kBlocks];
    const int valid_patches = params.patches - tile * kTile;
    multiply_scores<T, kColumns>(s, shared.stage(tile), shared.query, kHalfBytes);
    const bool any = __any_sync(kFullWarp, exceeds_shift(shared, s, scale, valid_patches));
    if (lane() == 0) shared.raise[warp()] = any;
    wait_for_warpgroup();
    if (shared.raise[0] | shared.raise[1] | shared.raise[2] | shared.raise[3])
      raise_shift(shared, s, scale, valid_patches, total, context);
    store_weights<T, kColumns>(shared, s, scale, valid_patches, total);
    publish_to_tensor_cores();
    wait_for_warpgroup();
    accumulate_context<T, kColumns>(context, shared.stage(tile), shared.weights);
  }
  // The other's last message is taken, so that no barrier is left half full.
  wait_at_barrier(kOtherBarrier + 2 * warpgroup() + (end + 1) % 2, kThreads);

  join_totals(shared, total);
  if (launch.shares > 1) return store_share(launch, sample, share, shared, context);
  const int row = member();
  if (row < kHalf)
    store_statistics(launch, sample, warpgroup() * kHalf + row, finite_shift(shared.shift[row]), shared.of_warps[row]);
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
  float shift[2] = {-INFINITY, -INFINITY}, total[2] = {};
  float sum[4] = {};
  for (int share = 0; share < launch.shares; ++share)
    for (int side = 0; side < 2; ++side)
      shift[side] = fmaxf(shift[side], launch.share_shift[(static_cast<int64_t>(share) * params.batch + sample) *
                                                              kTensorRows + row + side]);
  for (int side = 0; side < 2; ++side) shift[side] = finite_shift(shift[side]);
  for (int share = 0; share < launch.shares; ++share) {
    const int64_t part = static_cast<int64_t>(share) * params.batch + sample;
    const float4 values = reinterpret_cast<const float4*>(
        launch.share_context)[(((part * 2 + half) * kColumns + column) * kBlocks + block) * kWarpgroup + member()];
    float weight[2];
    for (int side = 0; side < 2; ++side) {
      const float of_share = launch.share_shift[part * kTensorRows + row + side];
      weight[side] = of_share == -INFINITY ? 1.0f : fast_exp2(of_share - shift[side]);  // 1: zeros, or NaN
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
  int buffers;  // tiles per warpgroup: 2, so that one comes while the other is worked on, where there is room
  char* query = aligned_shared_memory();                             // [columns][144][64]
  char* pose_value = query + kColumns * kRowsBytes;                  // the same
  char* tiles = pose_value + (kUpdate ? kColumns * kRowsBytes : 0);  // [2][buffers][columns][64][64]
  float* shift = reinterpret_cast<float*>(tiles + 2 * buffers * kColumns * kTileBytes);
  float* log_total = shift + kTensorRows;
  char* staging = reinterpret_cast<char*>(log_total + kTensorRows);  // [2][64][channels + rows] elements

  __device__ char* tile(int turn) const {
    return tiles + (warpgroup() * buffers + turn % buffers) * kColumns * kTileBytes;
  }
};

// s of both halves becomes A; returns its sums over the rows, of the thread's two patches.
__device__ float2 weigh(float (&s)[2][4 * kBlocks], const float* shift, const float* log_total, float scale, int rows) {
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

// tile = tile + A U, in place.
template <typename T, int kColumns>
__device__ void update_tile(char* tile, const float (&s)[2][4 * kBlocks], const char* pose_value) {
  constexpr int kSteps = kTensorRows / 16;
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
  float update[kColumns][32];
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma_registers<T>(update[column], attention[step],
                         operand(shared_address(pose_value + column * kRowsBytes) + step * 16 * kRowBytes), step > 0);
  wgmma_commit();
  wgmma_wait();
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int block = 0; block < kColumn / 8; ++block)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        T* at = reinterpret_cast<T*>(tile + column * kTileBytes + swizzled(result_row() + 8 * lower, block)) +
                2 * (lane() % 4);
        const float* add = &update[column][4 * block + 2 * lower];
        *reinterpret_cast<uint32_t*>(at) = pack<T>(to_float(at[0]) + add[0], to_float(at[1]) + add[1]);
      }
}

// Calls function(row, unit) for the 16-byte units of a tile's first `count` rows, within the width.
template <int kColumns, typename Function>
__device__ void for_each_unit(int count, int width, Function function) {
  constexpr int kUnits = kColumns * kColumn / kUnit;
  for (int i = member(); i < kTile * kUnits; i += kWarpgroup) {
    const int row = i / kUnits, unit = i % kUnits;
    if (row < count && unit * kUnit < width) function(row, unit);
  }
}

template <int kColumns>
__device__ const uint4& unit_of(const char* tile, int row, int unit) {
  return *reinterpret_cast<const uint4*>(tile + unit / kUnit * kTileBytes + swizzled(row, unit % kUnit));
}

// [tokens | A] of one tile through shared memory: its rows lie one after the other in device memory, whatever their
// width.
template <typename T, int kColumns>
__device__ void store_attention(const TensorAttention& params, int64_t sample, int patch, const char* tile,
                                char* staging, const float (&s)[2][4 * kBlocks]) {
  const int width = params.channels + params.rows;
  const int count = min(kTile, params.patches - patch);
  T* rows = reinterpret_cast<T*>(staging);
  if (params.channels > 0)
    for_each_unit<kColumns>(count, params.width, [&](int row, int unit) {
      const uint4 given = unit_of<kColumns>(tile, row, unit);
      memcpy(rows + row * width + unit * kUnit, &given, sizeof(given));
    });
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const int row = half * kHalf + result_column(i / 4) + i % 2;
      const int at = (result_row() + i / 2 % 2 * 8) * width + params.channels + row;
      if (row < params.rows) from_float(s[half][i], rows[at]);
    }
  wait_for_warpgroup();
  T* out = static_cast<T*>(params.attention) + (sample * params.patches + patch) * width;
  const int elements = count * width;
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0 && elements % kUnit == 0) {
    for (int i = member(); i < elements / kUnit; i += kWarpgroup)
      reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(rows)[i];
  } else {
    for (int i = member(); i < elements; i += kWarpgroup) out[i] = rows[i];
  }
}

// Block share + shares · sample; tile first + 2 · turn + warpgroup of the share.
template <typename T, int kColumns, bool kUpdate>
__global__ void __launch_bounds__(kThreads, 1) scatter_kernel(const __grid_constant__ Launch launch) {
  const TensorAttention& params = launch.params;
  const int share = blockIdx.x % launch.scatter_shares;
  const int64_t sample = blockIdx.x / launch.scatter_shares;
  const int tiles = (params.patches + kTile - 1) / kTile;
  const int first = share * launch.scatter_tiles + warpgroup();
  const int end = min((share + 1) * launch.scatter_tiles, tiles);
  const float scale = params.scale * kLog2E;
  const ScatterShared<kColumns, kUpdate> shared{launch.scatter_buffers};
  const int64_t rows_before = sample * params.rows * params.width;
  const auto copy_tokens = [&](int turn) {
    const int tile = first + 2 * turn;
    if (tile < end)
      copy_tile<T, kColumns>(shared.tile(turn), kTile, tokens_of<T>(params, sample, static_cast<int64_t>(tile) * kTile),
                             params.tokens_patch_stride, params.patches - tile * kTile, params.width, member(),
                             kWarpgroup);
    commit_copies();
  };
  copy_tile<T, kColumns>(shared.query, kTensorRows, static_cast<const T*>(params.query) + rows_before, params.width,
                         params.rows, params.width, threadIdx.x, kThreads);
  if constexpr (kUpdate)
    copy_tile<T, kColumns>(shared.pose_value, kTensorRows, static_cast<const T*>(params.pose_value) + rows_before,
                           params.width, params.rows, params.width, threadIdx.x, kThreads);
  copy_tokens(0);
  for (int row = threadIdx.x; row < kTensorRows; row += kThreads) {
    shared.shift[row] = launch.shift[sample * kTensorRows + row];
    shared.log_total[row] = launch.log_total[sample * kTensorRows + row];
  }
  wait_for_copies<0>();
  publish_to_tensor_cores();
  __syncthreads();

  for (int turn = 0; first + 2 * turn < end; ++turn) {
    const int patch = (first + 2 * turn) * kTile;
    char* tile = shared.tile(turn);
    if (shared.buffers > 1) copy_tokens(turn + 1);
    float s[2][4 * kBlocks];
    multiply_scores<T, kColumns>(s[0], tile, shared.query, kRowsBytes);
    multiply_scores<T, kColumns>(s[1], tile, shared.query + kHalfBytes, kRowsBytes);
    float2 sums = weigh(s, shared.shift, shared.log_total, scale, params.rows);
    if (params.importance != nullptr) {
      sums = float2{join_columns(sums.x), join_columns(sums.y)};
      float* importance = params.importance + sample * params.patches + patch;
      const int row = result_row();
      if (lane() % 4 == 0 && patch + row < params.patches) importance[row] = sums.x / params.rows;
      if (lane() % 4 == 0 && patch + row + 8 < params.patches) importance[row + 8] = sums.y / params.rows;
    }
    if (params.attention != nullptr)
      store_attention<T, kColumns>(params, sample, patch, tile,
                                   shared.staging + warpgroup() * kTile * (params.channels + params.rows) * sizeof(T),
                                   s);
    if constexpr (kUpdate) {
      update_tile<T, kColumns>(tile, s, shared.pose_value);
      wait_for_warpgroup();
      T* out = static_cast<T*>(params.patches_out) + (sample * params.patches + patch) * params.width;
      for_each_unit<kColumns>(params.patches - patch, params.width, [&](int row, int unit) {
        *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * params.width + unit * kUnit) =
            unit_of<kColumns>(tile, row, unit);
      });
    }
    wait_for_warpgroup();
    if (shared.buffers == 1) copy_tokens(turn + 1);
    wait_for_copies<0>();
    publish_to_tensor_cores();
    wait_for_warpgroup();
  }
}

int columns_of(const TensorAttention& params) { return static_cast<int>(ceil_div(params.width, kColumn)); }

int64_t tiles_of(const TensorAttention& params) { return ceil_div(params.patches, kTile); }

// Blocks for one sample: fewest tiles one after the other, where a block costs `overhead` tiles beside its own.
int32_t choose_shares(const TensorAttention& params, int64_t overhead) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int64_t best_cost = INT64_MAX;
  int32_t best = 1;
  for (int64_t shares = 1; shares <= tiles_of(params) && shares <= kMaxShares; ++shares) {
    const int64_t waves = ceil_div(shares * params.batch, multiprocessors);
    const int64_t cost = waves * (ceil_div(tiles_of(params), shares) + overhead) + shares / 4;
    if (cost < best_cost) {
      best_cost = cost;
      best = static_cast<int32_t>(shares);
    }
  }
  return best;
}

size_t scatter_bytes(const TensorAttention& params, int buffers) {
  const size_t columns = columns_of(params);
  const size_t staging = params.attention == nullptr ? 0 : kTile * (params.channels + params.rows) * 2;
  return kSwizzleBytes + (params.pose_value == nullptr ? 1 : 2) * columns * kRowsBytes +
         2 * (buffers * columns * kTileBytes + staging) + sizeof(float) * 2 * kTensorRows;
}

// How the work is shared out, and where everything lies in the workspace.
Launch plan(const TensorAttention& params) {
  Launch launch{};
  launch.params = params;
  launch.shares = choose_shares(params, kGatherOverhead);
  launch.tiles_per_share = static_cast<int32_t>(ceil_div(tiles_of(params), launch.shares));
  launch.shares = static_cast<int32_t>(ceil_div(tiles_of(params), launch.tiles_per_share));  // none is empty
  launch.scatter_shares = choose_shares(params, kScatterOverhead);
  launch.scatter_buffers = scatter_bytes(params, 2) <= kSharedLimit ? 2 : 1;
  launch.scatter_tiles = static_cast<int32_t>(ceil_div(tiles_of(params), launch.scatter_shares));
  const int64_t rows = static_cast<int64_t>(params.batch) * kTensorRows;
  launch.share_context = params.workspace;  // first: read as float4
  launch.shift = params.workspace + (launch.shares > 1 ? launch.shares * rows * columns_of(params) * kColumn : 0);
  launch.log_total = launch.shift + rows;
  launch.share_shift = launch.log_total + rows;
  launch.share_total = launch.share_shift + (launch.shares > 1 ? launch.shares * rows : 0);
  return launch;
}

template <typename T, int kColumns>
cudaError_t launch_all(const Launch& launch_plan) {
  const TensorAttention& params = launch_plan.params;
  const int64_t batch = params.batch;
  cudaError_t error = launch(gather_kernel<T, kColumns>, launch_plan.shares * batch, kThreads,
                             GatherShared<kColumns>::kBytes, params.stream, launch_plan);
  if (error != cudaSuccess) return error;
  if (launch_plan.shares > 1)
    error = launch(combine_kernel<T, kColumns>, batch * 2 * kColumns * kBlocks, kWarpgroup, 0, params.stream,
                   launch_plan);
  if (error != cudaSuccess) return error;
  if (params.pose_value == nullptr && params.importance == nullptr && params.attention == nullptr) return cudaSuccess;
  const auto kernel = params.pose_value != nullptr ? scatter_kernel<T, kColumns, true>
                                                   : scatter_kernel<T, kColumns, false>;
  return launch(kernel, launch_plan.scatter_shares * batch, kThreads,
                scatter_bytes(params, launch_plan.scatter_buffers), params.stream, launch_plan);
}

template <typename T>
cudaError_t launch_width(const Launch& launch_plan) {
  switch (columns_of(launch_plan.params)) {
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

bool on_hopper() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

bool tensor_attention_serves(const TensorAttention& params) {
  return (params.dtype == kFloat16 || params.dtype == kBFloat16) && params.rows <= kTensorRows &&
         params.width <= kTensorWidth && params.width % kUnit == 0 && params.tokens_batch_stride % kUnit == 0 &&
         params.tokens_patch_stride % kUnit == 0 && aligned(params.query) && aligned(params.tokens) &&
         aligned(params.pose_value) && aligned(params.context) && aligned(params.patches_out) && scatter_bytes(params, 1) <= kSharedLimit && on_hopper();
}

int64_t tensor_attention_workspace(const TensorAttention& params) {
  const Launch launch = plan(params);
  const int64_t rows = static_cast<int64_t>(params.batch) * kTensorRows;
  const int64_t of_share = rows * (columns_of(params) * kColumn + 2);
  return 2 * rows + (launch.shares > 1 ? launch.shares * of_share : 0);
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
