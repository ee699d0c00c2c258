// Attention of all heads to one set of tokens on the tensor cores of any GPU from sm_80 on.
//
//   A = softmax over patches of scale · Q Tᵀ    context = A T    patches_out = T + Aᵀ U    importance = mean of A
//
// Every warp works alone on products of 16 rows (mma.h), with all that it sums in registers:
//
//   gather     a block: a share of a sample's patches, tile by tile; each of its warps: 16 rows
//
//                          tile                          W
//                        ┌─────┐                   ┌───────────┐
//              16 rows   │  S  │ = Q Tᵀ            │  context  │ += 2^(S − shift) · T
//                        └─────┘                   └───────────┘
//
//   combine    joins the shares of one sample in their order (only where a sample has several)
//
//   scatter    a block: a share of a sample's patches, all rows in shared memory; each of its warps: 16 patches at a time
//
//                           144 rows                         W
//                        ┌───────────┐               ┌─────────────┐
//              16        │     S     │ = T Qᵀ        │ patches_out │ = T + A U
//              patches   └───────────┘               └─────────────┘
//
//              The tokens go from device memory to registers, where they are an operand of S and what A U is added to.
//
// shift_r is a bound of the row's logits so far, raised only where a logit exceeds it by kHeadroom (powers of 2), as in
// tensor_attention.cu. No atomics; every sum has one order, given the sizes of the call.

#include "mma_attention.h"

#include <cfloat>
#include <cmath>

#include "mma_tiles.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kGatherThreads = kTensorRows / kStrip * kWarp;  // at most
constexpr int kStages = 3;  // tiles of tokens in shared memory
constexpr float kHeadroom = 8.0f;
constexpr float kNoShift = -FLT_MAX;  // of a row whose logits were all −∞: any other exceeds it, and −∞ weighs nothing

// What a block costs beside its tiles or strips, in such.
constexpr int64_t kGatherOverhead = 3;
constexpr int64_t kScatterOverhead = 2;

template <int kColumns>
constexpr int kContextBlocks = kColumns * kColumn / kBlock;
// Patches: few where the context takes most of the registers.
template <int kColumns>
constexpr int kTile = kColumns == 4 ? 16 : 32;
template <int kColumns>
constexpr int kTileBlocks = kTile<kColumns> / kBlock;
template <int kColumns>
constexpr int kTileColumnBytes = kTile<kColumns> * kRowBytes;

template <int kColumns>
using Context = float[kContextBlocks<kColumns>][4];  // [16 rows, W] as products leave them
template <int kColumns>
using Scores = float[kTileBlocks<kColumns>][4];  // [16 rows, tile]

// Blocks that share a multiprocessor.
constexpr int resident_blocks(int columns) { return columns == 1 ? 2 : 1; }

struct Launch {
  TensorAttention params;
  int32_t gather_warps;     // of a block, 16 rows each
  int32_t row_parts;        // blocks for all rows
  int32_t shares;           // of a sample's patches in `gather`
  int32_t tiles_per_share;
  int32_t scatter_shares;
  int32_t strips_per_share;
  float* shift;             // [batch, kTensorRows], powers of 2
  float* log_total;         // [batch, kTensorRows], powers of 2
  float* share_shift;       // [shares, batch, kTensorRows]
  float* share_total;       // [shares, batch, kTensorRows]
  float* share_context;     // [shares, batch, kTensorRows, width]
};

template <typename T>
__device__ const T* tokens_of(const TensorAttention& params, int64_t sample, int64_t patch) {
  return static_cast<const T*>(params.tokens) + sample * params.tokens_batch_stride +
         patch * params.tokens_patch_stride;
}

// Copies `count` rows into `entries` rows of columns, all threads of the block together; zeros where there is nothing.
template <typename T, int kColumns>
__device__ void stage_tile(int threads, char* columns, int entries, const T* rows, int64_t stride, int count,
                           int width) {
  constexpr int kUnits = kColumns * kRowBytes / 16;
  for (int i = threadIdx.x; i < entries * kUnits; i += threads) {
    const int row = i / kUnits, unit = i % kUnits;
    const bool valid = row < count && unit * kUnit < width;
    copy_unit(columns + unit / 8 * entries * kRowBytes + swizzled(row, unit % 8),
              valid ? rows + row * stride + unit * kUnit : rows, valid);
  }
}

// s [16 rows, tile] = Q Tᵀ of the warp's rows.
template <typename T, int kColumns>
__device__ void multiply_scores(Scores<kColumns>& s, const char* query, int query_rows, const char* tile) {
  constexpr int kSteps = kRowBytes / 32;
  const int thread = recomputed(lane());
#pragma unroll
  for (int block = 0; block < kTileBlocks<kColumns>; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[block][i] = 0.0f;
#pragma unroll
  for (int column = 0; column < kColumns; ++column)
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t rows[4];
      load_matrices(rows, query + column * query_rows * kRowBytes +
                              swizzled(kStrip * block_warp() + thread % kStrip, 2 * step + thread / kStrip));
#pragma unroll
      for (int block = 0; block < kTileBlocks<kColumns>; block += 2) {
        uint32_t patches[4];
        load_matrices(patches, tile + column * kTileColumnBytes<kColumns> +
                                   swizzled(kBlock * (block + thread / 16) + thread % 8, 2 * step + thread / 8 % 2));
        mma<T>(s[block], rows, patches[0], patches[1]);
        mma<T>(s[block + 1], rows, patches[2], patches[3]);
      }
    }
}

// Calls function(block, lower, side) for every score that the thread holds of valid patches: that of row r + 8 · lower
// is s[block][2 · lower + side].
template <int kColumns, typename Function>
__device__ void for_each_score(int valid_patches, Function function) {
#pragma unroll
  for (int block = 0; block < kTileBlocks<kColumns>; ++block)
#pragma unroll
    for (int side = 0; side < 2; ++side)
      if (kBlock * block + 2 * lane_word() + side < valid_patches)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) function(block, lower, side);
}

// Joins values of the four threads that hold one row.
template <typename Join>
__device__ float join_row(float value, Join join) {
  value = join(value, __shfl_xor_sync(kFullWarp, value, 1));
  return join(value, __shfl_xor_sync(kFullWarp, value, 2));
}

__device__ float sum_row(float value) {
  return join_row(value, [](float a, float b) { return a + b; });
}

// Of the thread's rows r and r + 8.
struct RowSums {
  float shift[2] = {kNoShift, kNoShift};
  float total[2] = {};  // of the thread's own patches
};

// Raises the shift of every row of the warp to its largest logit so far, and the sums with it, where one logit exceeds
// its shift by more than kHeadroom. Rounded upwards, no logit exceeds the shift that is made of it, however large.
template <int kColumns>
__device__ void raise_shift(RowSums& sums, Context<kColumns>& context, const Scores<kColumns>& s,
                            float scale, int valid_patches) {
  float largest[2] = {kNoShift, kNoShift};
  for_each_score<kColumns>(valid_patches, [&](int block, int lower, int side) {
    largest[lower] = fmaxf(largest[lower], __fmul_ru(s[block][2 * lower + side], scale));
  });
  const bool exceeds = largest[0] > sums.shift[0] + kHeadroom || largest[1] > sums.shift[1] + kHeadroom;
  if (!__any_sync(kFullWarp, exceeds)) return;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    largest[lower] = join_row(largest[lower], [](float a, float b) { return fmaxf(a, b); });
    const float raised = fmaxf(sums.shift[lower], largest[lower]);
    const float shrink = fast_exp2(sums.shift[lower] - raised);
    sums.shift[lower] = raised;
    sums.total[lower] *= shrink;
#pragma unroll
    for (int block = 0; block < kContextBlocks<kColumns>; ++block) {
      context[block][2 * lower] *= shrink;
      context[block][2 * lower + 1] *= shrink;
    }
  }
}

// Scores become weights, 0 beyond the valid patches, which are summed per row.
template <int kColumns>
__device__ void weigh(Scores<kColumns>& s, RowSums& sums, float scale, int valid_patches) {
#pragma unroll
  for (int block = 0; block < kTileBlocks<kColumns>; ++block)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool valid = kBlock * block + 2 * lane_word() + i % 2 < valid_patches;
      s[block][i] = valid ? fast_exp2(fmaf(s[block][i], scale, -sums.shift[i / 2])) : 0.0f;
      sums.total[i / 2] += s[block][i];
    }
}

// context [16 rows, W] += weights · T
template <typename T, int kColumns>
__device__ void accumulate_context(Context<kColumns>& context,
                                   const Scores<kColumns>& weights, const char* tile) {
  constexpr int kBlocksOfColumn = kColumn / kBlock;
#pragma unroll
  for (int step = 0; step < kTile<kColumns> / 16; ++step) {
    uint32_t rows[4];
    operand_of<T>(rows, weights, step);
#pragma unroll
    for (int block = 0; block < kContextBlocks<kColumns>; block += 2) {
      uint32_t b[4];
      load_across(b, tile + block / kBlocksOfColumn * kTileColumnBytes<kColumns>, step, block % kBlocksOfColumn,
                  swizzled);
      mma<T>(context[block], rows, b[0], b[1]);
      mma<T>(context[block + 1], rows, b[2], b[3]);
    }
  }
}

// What `scatter` and the caller read of a row, once its sum is complete.
__device__ void store_statistics(const Launch& launch, int64_t sample, int row, float shift, float total) {
  const TensorAttention& params = launch.params;
  const float log_total = log2f(total);
  launch.shift[sample * kTensorRows + row] = shift;
  launch.log_total[sample * kTensorRows + row] = log_total;
  params.lse[sample * params.rows + row] = (shift + log_total) * kLn2;
}

__device__ float2 statistics_of(const Launch& launch, int64_t sample, int row) {
  const TensorAttention& params = launch.params;
  if (row >= params.rows) return float2{0.0f, 0.0f};
  if (!params.given_lse)
    return float2{launch.shift[sample * kTensorRows + row], launch.log_total[sample * kTensorRows + row]};
  return float2{params.lse[sample * params.rows + row] * kLog2E, 0.0f};
}

// One row of the thread: its part of the context and its statistics, of a share or, where that is all, for good.
template <typename T, int kColumns>
__device__ void store_row(const Launch& launch, int64_t sample, int share, int row, int lower, float shift, float total,
                          const Context<kColumns>& context) {
  const TensorAttention& params = launch.params;
  const int64_t part = share * static_cast<int64_t>(params.batch) + sample;
  const bool whole = launch.shares == 1;
  if (row >= params.rows) return;
  if (lane_word() == 0) {
    if (whole) {
      store_statistics(launch, sample, row, shift, total);
    } else {
      launch.share_shift[part * kTensorRows + row] = shift;
      launch.share_total[part * kTensorRows + row] = total;
    }
  }
  T* out = static_cast<T*>(params.context) + (sample * params.rows + row) * params.width;
  float* partial = launch.share_context + (part * kTensorRows + row) * params.width;
#pragma unroll
  for (int block = 0; block < kContextBlocks<kColumns>; ++block) {
    const int at = kBlock * block + 2 * lane_word();
    const float first = context[block][2 * lower], second = context[block][2 * lower + 1];
    if (at >= params.width) continue;
    if (whole)
      *reinterpret_cast<uint32_t*>(out + at) = pack<T>(first / total, second / total);
    else
      *reinterpret_cast<float2*>(partial + at) = float2{first, second};
  }
}

// Block share + shares · (part + parts · sample); its warps' rows start at part · warps · 16.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kGatherThreads, resident_blocks(kColumns))
    gather_kernel(const __grid_constant__ Launch launch) {
  const TensorAttention& params = launch.params;
  const int share = blockIdx.x % launch.shares;
  const int part = blockIdx.x / launch.shares % launch.row_parts;
  const int64_t sample = blockIdx.x / launch.shares / launch.row_parts;
  const int threads = launch.gather_warps * kWarp, rows = launch.gather_warps * kStrip, first_row = part * rows;
  const int tiles = (params.patches + kTile<kColumns> - 1) / kTile<kColumns>;
  const int first = share * launch.tiles_per_share, end = min(first + launch.tiles_per_share, tiles);
  const float scale = params.scale * kLog2E;
  char* query = reinterpret_cast<char*>(shared_memory);  // [columns][rows][128 bytes]
  char* stages = query + kColumns * rows * kRowBytes;    // [stages][columns][tile][128 bytes]
  const auto stage_of = [&](int tile) { return stages + tile % kStages * kColumns * kTileColumnBytes<kColumns>; };
  const auto copy_tokens = [&](int tile) {
    if (tile < end)
      stage_tile<T, kColumns>(threads, stage_of(tile), kTile<kColumns>, tokens_of<T>(params, sample, tile * kTile<kColumns>),
                              params.tokens_patch_stride, params.patches - tile * kTile<kColumns>, params.width);
    commit_copies();
  };
  const int64_t rows_before = sample * params.rows + min(first_row, params.rows - 1);
  stage_tile<T, kColumns>(threads, query, rows, static_cast<const T*>(params.query) + rows_before * params.width, params.width,
                          params.rows - first_row, params.width);
  for (int tile = first; tile < first + kStages - 1; ++tile) copy_tokens(tile);

  RowSums sums;
  Context<kColumns> context = {};
  for (int tile = first; tile < end; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    copy_tokens(tile + kStages - 1);
    const int valid_patches = params.patches - tile * kTile<kColumns>;
    Scores<kColumns> s;
    multiply_scores<T, kColumns>(s, query, rows, stage_of(tile));
    raise_shift<kColumns>(sums, context, s, scale, valid_patches);
    weigh<kColumns>(s, sums, scale, valid_patches);
    accumulate_context<T, kColumns>(context, s, stage_of(tile));
  }
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int row = first_row + kStrip * block_warp() + lane_row() + kBlock * lower;
    const float total = sum_row(sums.total[lower]);
    store_row<T, kColumns>(launch, sample, share, row, lower, sums.shift[lower], total, context);
  }
}

// A warp: one row of a sample.
template <typename T>
__global__ void __launch_bounds__(kWarp) combine_kernel(const __grid_constant__ Launch launch) {
  const TensorAttention& params = launch.params;
  const int row = blockIdx.x % params.rows;
  const int64_t sample = blockIdx.x / params.rows;
  const auto part = [&](int share) { return (share * static_cast<int64_t>(params.batch) + sample) * kTensorRows + row; };
  float shift = kNoShift, total = 0.0f;
  for (int share = 0; share < launch.shares; ++share) shift = fmaxf(shift, launch.share_shift[part(share)]);
  for (int share = 0; share < launch.shares; ++share)
    total += fast_exp2(launch.share_shift[part(share)] - shift) * launch.share_total[part(share)];
  if (lane() == 0) store_statistics(launch, sample, row, shift, total);
  T* out = static_cast<T*>(params.context) + (sample * params.rows + row) * params.width;
  for (int at = 2 * lane(); at < params.width; at += 2 * kWarp) {
    float2 sum = {0.0f, 0.0f};
    for (int share = 0; share < launch.shares; ++share) {
      const float weight = fast_exp2(launch.share_shift[part(share)] - shift);
      const float2 values = *reinterpret_cast<const float2*>(launch.share_context + part(share) * params.width + at);
      sum.x += weight * values.x;
      sum.y += weight * values.y;
    }
    *reinterpret_cast<uint32_t*>(out + at) = pack<T>(sum.x / total, sum.y / total);
  }
}

// Shared memory of `scatter`.
template <int kColumns, bool kUpdate>
struct ScatterShared {
  char* query = reinterpret_cast<char*>(shared_memory);   // [columns][144][128 bytes]
  char* pose_value = query + kColumns * kAllRowsBytes;    // the same
  float* shift = reinterpret_cast<float*>(pose_value + (kUpdate ? kColumns * kAllRowsBytes : 0));
  float* log_total = shift + kTensorRows;
};

// Tensors of all rows in shared memory: Q, and U for an update.
int held_by_scatter(const TensorAttention& params) { return params.pose_value == nullptr ? 1 : 2; }

// The rows of U into columns, as stage_rows; but within each group, word w of unit c becomes word c of unit w: then what
// a thread holds of the group's four blocks of results are neighbours, unit c.
template <typename T, int kColumns>
__device__ void stage_pose_value(char* columns, const T* rows, int count, int width) {
  constexpr int kUnits = kColumns * kRowBytes / 16;
  for (int i = threadIdx.x; i < kTensorRows * kUnits; i += kStripThreads) {
    const int position = i / kUnits, unit = i % kUnits, row = row_at(position);
    const bool valid = row < count && unit * kUnit < width;
    uint4 given = {};
    if (valid) given = *reinterpret_cast<const uint4*>(rows + row * width + unit * kUnit);
    uint32_t words[4];
    memcpy(words, &given, sizeof(words));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int target = unit % 8 / kUnitsOfGroup * kUnitsOfGroup + w;
      *reinterpret_cast<uint32_t*>(columns + unit / 8 * kAllRowsBytes + spread(position, target) +
                                   unit % kUnitsOfGroup * 4) = words[w];
    }
  }
}

// s becomes A; returns its sums over the rows, of patches r and r + 8.
__device__ float2 weigh(StripScores& s, const float* shift, const float* log_total, float scale, int rows) {
  float2 sums = {0.0f, 0.0f};
  for_each_row([&](int row, int block, int side) {
    float& first = s[block][side];
    float& second = s[block][2 + side];
    // Two differences: the log-sum-exp as one number would round large logits away.
    first = fast_exp2(fmaf(first, scale, -shift[row]) - log_total[row]);
    second = fast_exp2(fmaf(second, scale, -shift[row]) - log_total[row]);
    if (row >= rows) first = second = 0.0f;
    sums.x += first;
    sums.y += second;
  });
  return sums;
}

__device__ void store_importance(const TensorAttention& params, int64_t sample, int patch, float2 sums) {
  sums = float2{sum_row(sums.x), sum_row(sums.y)};
  float* importance = params.importance + sample * params.patches;
  const int at = patch + lane_row();
  if (lane_word() == 0 && at < params.patches) importance[at] = sums.x / params.rows;
  if (lane_word() == 0 && at + kBlock < params.patches) importance[at + kBlock] = sums.y / params.rows;
}

// One group of the strip: tokens + A U, to device memory.
template <typename T>
__device__ void store_update(const TensorAttention& params, int64_t sample, int patch, const Group& tokens,
                             const StripScores& attention, const char* pose_value, int index) {
  constexpr int kBlocks = kGroup / kBlock;
  float update[kBlocks][4] = {};
#pragma unroll
  for (int step = 0; step < kTensorRows / 16; ++step) {
    uint32_t a[4];
    operand_of<T>(a, attention, step);
#pragma unroll
    for (int block = 0; block < kBlocks; block += 2) {
      uint32_t b[4];
      load_across(b, pose_value + index / 2 * kAllRowsBytes, step, index % 2 * kUnitsOfGroup + block, spread);
      mma<T>(update[block], a, b[0], b[1]);
      mma<T>(update[block + 1], a, b[2], b[3]);
    }
  }
  const int at = index * kGroup + lane_word() * kUnit;
  T* out = static_cast<T*>(params.patches_out) + (sample * params.patches + patch + lane_row()) * params.width + at;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    if (at >= params.width || patch + lane_row() + kBlock * lower >= params.patches) continue;
    uint32_t words[4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      float first, second;
      unpack<T>(tokens[lower][block], first, second);
      words[block] = pack<T>(first + update[block][2 * lower], second + update[block][2 * lower + 1]);
    }
    store_words(out + lower * kBlock * params.width, words);
  }
}

// `count` neighbouring elements, at most those of the words; in one piece where that is `aligned` and all are wanted.
template <typename T, int kWords>
__device__ void store_neighbours(T* out, const uint32_t (&words)[kWords], int count, bool aligned) {
  constexpr int kElements = kWords * 4 / sizeof(T);
  if (aligned && count >= kElements) return store_words(out, words);
  T elements[kElements];
  memcpy(elements, words, sizeof(elements));
#pragma unroll
  for (int i = 0; i < kElements; ++i)
    if (i < count) out[i] = elements[i];
}

// A thread's rows of [tokens | A] in device memory: of patches r and r + 8 of a strip.
template <typename T>
class AttentionRows {
 public:
  __device__ AttentionRows(const TensorAttention& params, int64_t sample, int patch)
      : params_(params), patch_(patch + lane_row()),
        first_(static_cast<T*>(params.attention) + (sample * params.patches + patch_) * params.attention_stride),
        aligned_(reinterpret_cast<uintptr_t>(params.attention) % 16 == 0 &&
                  params.attention_stride % kUnit == 0) {}

  __device__ void store_tokens(const Group& tokens, int index) const {
    const int at = index * kGroup + lane_word() * kUnit;
#pragma unroll
    for (int lower = 0; lower < 2; ++lower)
      if (valid(lower)) store_neighbours(row(lower) + at, tokens[lower], params_.channels - at, aligned_);
  }

  __device__ void store_scores(const StripScores& s) const {
#pragma unroll
    for (int pair = 0; pair < kRowBlocks / 2; ++pair)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int at = 2 * kBlock * pair + 4 * lane_word();
        uint32_t words[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) words[i] = pack<T>(s[2 * pair + i][2 * lower], s[2 * pair + i][2 * lower + 1]);
        if (valid(lower))
          store_neighbours(row(lower) + params_.channels + at, words, params_.attention_rows - at, aligned_);
      }
  }

 private:
  __device__ bool valid(int lower) const { return patch_ + kBlock * lower < params_.patches; }
  __device__ T* row(int lower) const { return first_ + lower * kBlock * params_.attention_stride; }

  const TensorAttention& params_;
  int patch_;
  T* first_;
  bool aligned_;
};

// Block share + shares · sample; strip first + warp + 8 · turn of the share.
template <typename T, int kColumns, bool kUpdate>
__global__ void __launch_bounds__(kStripThreads, kUpdate ? 1 : resident_blocks(kColumns))
    scatter_kernel(const __grid_constant__ Launch launch) {
  constexpr int kGroups = 2 * kColumns;
  const TensorAttention& params = launch.params;
  const int share = blockIdx.x % launch.scatter_shares;
  const int64_t sample = blockIdx.x / launch.scatter_shares;
  const float scale = params.scale * kLog2E;
  const ScatterShared<kColumns, kUpdate> shared;
  const int64_t rows_before = sample * params.rows * params.width;
  stage_rows<T, kColumns>(shared.query, static_cast<const T*>(params.query) + rows_before, params.rows, params.width);
  commit_copies();
  if constexpr (kUpdate)
    stage_pose_value<T, kColumns>(shared.pose_value, static_cast<const T*>(params.pose_value) + rows_before,
                                  params.rows, params.width);
  for (int row = threadIdx.x; row < kTensorRows; row += kStripThreads) {
    const float2 statistics = statistics_of(launch, sample, row);
    shared.shift[row] = statistics.x;
    shared.log_total[row] = statistics.y;
  }
  wait_for_copies<0>();
  __syncthreads();

  const int first = share * launch.strips_per_share;
  const int end = min(first + launch.strips_per_share, (params.patches + kStrip - 1) / kStrip);
  for (int strip = first + block_warp(); strip < end; strip += kStripWarps) {
    const int patch = strip * kStrip;
    const StripReader<T, kColumns> reader(tokens_of<T>(params, sample, 0), params.tokens_patch_stride, patch,
                                          params.patches, params.width);
    const AttentionRows<T> rows(params, sample, patch);
    Group tokens[kGroups];
#pragma unroll
    for (int index = 0; index < kGroups; ++index) reader.read(tokens[index], index);
    StripScores s = {};
#pragma unroll
    for (int index = 0; index < kGroups; ++index) {
      multiply_group<T>(s, tokens[index], shared.query, index);
      if (!kUpdate && params.channels > 0) rows.store_tokens(tokens[index], index);
    }
    const float2 sums = weigh(s, shared.shift, shared.log_total, scale, params.rows);
    if (params.importance != nullptr) store_importance(params, sample, patch, sums);
    if constexpr (kUpdate) {
#pragma unroll
      for (int index = 0; index < kGroups; ++index)
        store_update<T>(params, sample, patch, tokens[index], s, shared.pose_value, index);
    } else if (params.attention != nullptr) {
      rows.store_scores(s);
    }
  }
}

// How the rows and patches are shared out, and where everything lies in the workspace. No row parts: they do not fit.
template <int kColumns>
Launch plan(const TensorAttention& params) {
  Launch launch{};
  launch.params = params;
  const int64_t strips = ceil_div(params.rows, kStrip), tiles = ceil_div(params.patches, kTile<kColumns>);
  const int64_t tile_bytes = static_cast<int64_t>(kStages) * kColumns * kTileColumnBytes<kColumns>;
  const int64_t row_bytes = static_cast<int64_t>(kColumns) * kStrip * kRowBytes;
  const int64_t fitting = (device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - tile_bytes) / row_bytes;
  if (fitting < 1) return launch;
  launch.row_parts = static_cast<int32_t>(ceil_div(strips, fitting));
  launch.gather_warps = static_cast<int32_t>(ceil_div(strips, launch.row_parts));
  launch.shares = choose_shares(tiles, params.batch * launch.row_parts, resident_blocks(kColumns), kGatherOverhead);
  launch.tiles_per_share = static_cast<int32_t>(ceil_div(tiles, launch.shares));
  launch.shares = static_cast<int32_t>(ceil_div(tiles, launch.tiles_per_share));  // none is empty
  const int64_t turns = ceil_div(params.patches, kStrip * kStripWarps);
  launch.scatter_shares =
      choose_shares(turns, params.batch, params.pose_value == nullptr ? resident_blocks(kColumns) : 1, kScatterOverhead);
  launch.strips_per_share = static_cast<int32_t>(ceil_div(turns, launch.scatter_shares) * kStripWarps);
  if (params.given_lse) return launch;
  const int64_t rows = static_cast<int64_t>(params.batch) * kTensorRows;
  const int64_t shares = launch.shares > 1 ? launch.shares : 0;
  launch.share_context = params.workspace;  // first: read as float2
  launch.shift = launch.share_context + shares * rows * params.width;
  launch.log_total = launch.shift + rows;
  launch.share_shift = launch.log_total + rows;
  launch.share_total = launch.share_shift + shares * rows;
  return launch;
}

template <typename T, int kColumns, bool kUpdate>
cudaError_t launch_scatter(const Launch& launch_plan) {
  const TensorAttention& params = launch_plan.params;
  return launch(scatter_kernel<T, kColumns, kUpdate>, static_cast<int64_t>(launch_plan.scatter_shares) * params.batch,
                kStripThreads, held_bytes(kUpdate ? 2 : 1, kColumns), params.stream, launch_plan);
}

template <typename T, int kColumns>
cudaError_t launch_all(const Launch& launch_plan) {
  const TensorAttention& params = launch_plan.params;
  const int64_t batch = params.batch;
  const size_t gather_bytes = static_cast<size_t>(kColumns) * (launch_plan.gather_warps * kStrip * kRowBytes +
                                                               kStages * kTileColumnBytes<kColumns>);
  cudaError_t error = cudaSuccess;
  if (!params.given_lse)
    error = launch(gather_kernel<T, kColumns>, launch_plan.shares * launch_plan.row_parts * batch,
                   launch_plan.gather_warps * kWarp, gather_bytes, params.stream, launch_plan);
  if (error == cudaSuccess && !params.given_lse && launch_plan.shares > 1)
    error = launch(combine_kernel<T>, batch * params.rows, kWarp, 0, params.stream, launch_plan);
  if (error != cudaSuccess) return error;
  if (params.pose_value != nullptr) return launch_scatter<T, kColumns, true>(launch_plan);
  if (params.importance != nullptr || params.attention != nullptr)
    return launch_scatter<T, kColumns, false>(launch_plan);
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_width(const TensorAttention& params) {
  return with_columns(params.width, [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    return launch_all<T, kColumns>(plan<kColumns>(params));
  });
}

Launch plan_of(const TensorAttention& params) {
  return with_columns(params.width, [&](auto columns) { return plan<decltype(columns)::value>(params); });
}

}  // namespace

bool mma_attention_serves(const TensorAttention& params) {
  return (params.dtype == kFloat16 || params.dtype == kBFloat16) && params.rows <= kTensorRows &&
         params.width <= kTensorWidth && params.width % kUnit == 0 && params.tokens_batch_stride % kUnit == 0 &&
         params.tokens_patch_stride % kUnit == 0 && aligned(params.query) && aligned(params.tokens) &&
         aligned(params.pose_value) && aligned(params.context) && aligned(params.patches_out) && has_tensor_cores() &&
         rows_fit(held_by_scatter(params), params.width) && plan_of(params).row_parts > 0;
}

int64_t mma_attention_workspace(const TensorAttention& params) {
  const Launch launch = plan_of(params);
  const int64_t rows = static_cast<int64_t>(params.batch) * kTensorRows;
  const int64_t of_share = rows * (params.width + 2);
  return params.given_lse ? 0 : 2 * rows + (launch.shares > 1 ? launch.shares * of_share : 0);
}

extern "C" cudaError_t mma_attention_forward(const TensorAttention* params) {
  if (!mma_attention_serves(*params)) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  return params->dtype == kFloat16 ? launch_width<__half>(*params) : launch_width<__nv_bfloat16>(*params);
}

}  // namespace liftbyimage::cuda
