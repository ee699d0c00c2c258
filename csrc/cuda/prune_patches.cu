// Keep the most important patches of each sample, in ascending order of their index; and the gradient of that.
//
// Forward, one block per share of a sample's slots; each repeats the selection, then writes and copies its own slots:
//
//   importance [P] ─► order-preserving 32-bit keys (NaN → 0, the lowest; −0 → +0), cached in shared memory if P ≤ 8192
//   radix select      up to 4 passes × 8 bits from the top: histogram of the keys that share the prefix found so far,
//                     suffix sums over its 256 bins ─► next digit of the keep-th largest key, the threshold;
//                     done as soon as all keys of that prefix are kept: the prefix itself then separates
//   compaction        each thread counts a run of neighbours, one prefix sum over the threads
//                       slot(p) = #{q < p: key > threshold} + min(#{q < p: key = threshold}, ties still wanted)
//                     so that ties go to the lower index and slots ascend with p
//   gather            rows copied in the widest unit (16, 4 or 2 bytes) that divides addresses, strides and length
//
// A sample has one share where the batch fills the multiprocessors; choose_slots says how many where it does not.
//
// Backward, one block per 64 rows: the index is ascending, so a binary search inverts it; each row of the gradient is
// written exactly once, with its slot's row or with zeros.
//
// The histogram uses integer atomics only: counts do not depend on their order, the result is bitwise repeatable.

#include "prune_patches.h"

#include <algorithm>

#include "common.h"
#include "warps.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kBins = 256;
constexpr int kBinsOfLane = kBins / kWarp;
constexpr int kCachedPatches = 8192;
constexpr int kScatterThreads = 256;
constexpr int kScatterRows = 64;

// A digit, and how many of the counted keys have a greater one and this one.
struct Found {
  int digit;
  int above;
  int count;
};

// Shared memory: | histogram | warp sums | found | keys … |
struct SelectShared {
  int* histogram = reinterpret_cast<int*>(shared_memory);
  int64_t* warp_sums = reinterpret_cast<int64_t*>(histogram + kBins);
  Found* found = reinterpret_cast<Found*>(warp_sums + kSelectWarps);
  uint32_t* keys = reinterpret_cast<uint32_t*>(found + 1);
};

size_t select_shared_bytes(int patches) {
  const int cached = patches <= kCachedPatches ? patches : 0;
  return sizeof(int) * kBins + sizeof(int64_t) * kSelectWarps + sizeof(Found) + sizeof(uint32_t) * cached;
}

// The forward's arguments, and how a sample's slots are shared out among blocks.
struct PruneLaunch {
  PrunePatchesForward params;
  int32_t shares;  // blocks of a sample
  int32_t slots;   // of a share; the last may have fewer
};

// Slots of a share: as few as let the shares of all samples run at once, each on a multiprocessor of its own. Their
// selections then take the time of one. But no share is less than kShareBytes, which its threads move in two units of
// 16 bytes each: beside the selection, whose threads read every key once per pass, less would save nothing.
int32_t choose_slots(const PrunePatchesForward& params) {
  constexpr int64_t kShareBytes = kSelectThreads * 2 * sizeof(uint4);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t at_once = std::max<int64_t>(multiprocessors / params.batch, 1);
  const int64_t worthwhile = std::max<int64_t>(params.keep * params.row_bytes / kShareBytes, 1);
  return static_cast<int32_t>(ceil_div(params.keep, std::min(at_once, worthwhile)));
}

__device__ uint32_t order_key(float importance) {
  if (importance != importance) return 0;
  const uint32_t bits = importance == 0.0f ? 0 : __float_as_uint(importance);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <typename T>
struct Keys {
  const T* importance;
  uint32_t* cache;  // null: too many patches

  __device__ uint32_t operator[](int patch) const {
    return cache != nullptr ? cache[patch] : order_key(to_float(importance[patch]));
  }
};

// By one warp: finds the digit of the wanted-th largest of the counted keys, and leaves the histogram empty.
__device__ void find_digit(const SelectShared& shared, int wanted) {
  int* bins = shared.histogram + kBins - (threadIdx.x + 1) * kBinsOfLane;
  int counts[kBinsOfLane];
  int sum = 0;
  for (int bin = 0; bin < kBinsOfLane; ++bin) {
    sum += counts[bin] = bins[bin];
    bins[bin] = 0;
  }
  int above = warp_inclusive_scan(sum) - sum;
  for (int bin = kBinsOfLane - 1; bin >= 0; --bin) {
    if (above < wanted && above + counts[bin] >= wanted)
      *shared.found = {static_cast<int>(bins + bin - shared.histogram), above, counts[bin]};
    above += counts[bin];
  }
}

// A threshold such that the kept are the keys above it and `ties` of those equal to it, or all where they are fewer.
// The histogram is empty before and after.
template <typename T>
__device__ uint32_t select_threshold(const Keys<T>& keys, int patches, int keep, const SelectShared& shared,
                                     int& ties) {
  uint32_t prefix = 0;
  uint32_t prefix_mask = 0;
  ties = keep;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int patch = threadIdx.x; patch < patches; patch += kSelectThreads) {
      const uint32_t key = keys[patch];
      if ((key & prefix_mask) == prefix) atomicAdd(&shared.histogram[key >> shift & 0xffu], 1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(shared, ties);
    __syncthreads();
    const Found found = *shared.found;
    prefix |= static_cast<uint32_t>(found.digit) << shift;
    prefix_mask |= 0xffu << shift;
    ties -= found.above;
    if (ties == found.count) break;
  }
  return prefix;
}

// Writes index[slot] for the slots from first_slot up to end_slot.
template <typename T>
__device__ void write_index(const Keys<T>& keys, int patches, uint32_t threshold, int ties, int64_t* warp_sums,
                            int first_slot, int end_slot, int64_t* index) {
  const int run = (patches + kSelectThreads - 1) / kSelectThreads | 1;  // odd: the lanes' keys lie in different banks
  const int first = min(static_cast<int>(threadIdx.x) * run, patches);
  const int end = min(first + run, patches);
  int greater = 0;
  int equal = 0;
  for (int patch = first; patch < end; ++patch) {
    greater += keys[patch] > threshold;
    equal += keys[patch] == threshold;
  }
  const int64_t packed = greater + (static_cast<int64_t>(equal) << 32);
  int64_t total;
  const int64_t before = inclusive_scan<kSelectWarps>(packed, warp_sums, total) - packed;
  greater = static_cast<int>(before);
  equal = static_cast<int>(before >> 32);
  for (int patch = first; patch < end; ++patch) {
    const uint32_t key = keys[patch];
    const bool tie = key == threshold;
    const int slot = greater + min(equal, ties);
    const bool kept = key > threshold || (tie && equal < ties);
    if (kept && slot >= first_slot && slot < end_slot) index[slot] = patch;
    greater += key > threshold;
    equal += tie;
  }
}

// Calls function(row, unit) for every unit of `rows` rows, consecutive threads on consecutive units, without divisions.
template <int kThreads, typename Function>
__device__ void for_each_unit(int rows, int64_t units, Function function) {
  if (units == 0) return;
  const int64_t row_step = kThreads / units;
  const int64_t unit_step = kThreads % units;
  int64_t row = threadIdx.x / units;
  int64_t unit = threadIdx.x % units;
  while (row < rows) {
    function(static_cast<int>(row), unit);
    row += row_step;
    unit += unit_step;
    if (unit >= units) {
      unit -= units;
      ++row;
    }
  }
}

template <typename Unit>
__device__ void gather(const PrunePatchesForward& params, const char* rows, char* kept, const int64_t* index,
                       int slots) {
  for_each_unit<kSelectThreads>(slots, params.row_bytes / sizeof(Unit), [&](int slot, int64_t unit) {
    const char* from = rows + index[slot] * params.rows_patch_stride;
    char* to = kept + slot * params.row_bytes;
    reinterpret_cast<Unit*>(to)[unit] = reinterpret_cast<const Unit*>(from)[unit];
  });
}

// The widest unit in bytes that divides every address: 16, 4 or 2.
__device__ int unit_bytes(const void* first, const void* second, int64_t strides) {
  const uint64_t all = reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second) |
                       static_cast<uint64_t>(strides);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 2;
}

template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 1) select_kernel(const PruneLaunch launch) {
  const PrunePatchesForward& params = launch.params;
  const int64_t sample = blockIdx.x / launch.shares;
  const int first_slot = blockIdx.x % launch.shares * launch.slots;
  const int slots = min(launch.slots, params.keep - first_slot);
  const SelectShared shared;
  const T* importance = static_cast<const T*>(params.importance) + sample * params.patches;
  int64_t* index = params.index + sample * params.keep;
  const Keys<T> keys = {importance, params.patches <= kCachedPatches ? shared.keys : nullptr};
  if (threadIdx.x < kBins) shared.histogram[threadIdx.x] = 0;
  if (keys.cache != nullptr)
    for (int patch = threadIdx.x; patch < params.patches; patch += kSelectThreads)
      keys.cache[patch] = order_key(to_float(importance[patch]));
  __syncthreads();

  int ties;
  const uint32_t threshold = select_threshold(keys, params.patches, params.keep, shared, ties);
  write_index(keys, params.patches, threshold, ties, shared.warp_sums, first_slot, first_slot + slots, index);
  __syncthreads();

  const char* rows = static_cast<const char*>(params.rows) + sample * params.rows_batch_stride;
  char* kept = static_cast<char*>(params.kept) + (sample * params.keep + first_slot) * params.row_bytes;
  switch (unit_bytes(rows, kept, params.row_bytes | params.rows_patch_stride)) {
    case 16:
      return gather<uint4>(params, rows, kept, index + first_slot, slots);
    case 4:
      return gather<uint32_t>(params, rows, kept, index + first_slot, slots);
    default:
      return gather<uint16_t>(params, rows, kept, index + first_slot, slots);
  }
}

// The slot that holds `patch`, or −1.
__device__ int find_slot(const int64_t* index, int keep, int64_t patch) {
  int low = 0;
  int high = keep;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (index[middle] < patch)
      low = middle + 1;
    else
      high = middle;
  }
  return low < keep && index[low] == patch ? low : -1;
}

template <typename Unit>
__device__ void scatter(const PrunePatchesBackward& params, const char* grad_kept, char* grad_rows, const int* slots,
                        int rows) {
  for_each_unit<kScatterThreads>(rows, params.row_bytes / sizeof(Unit), [&](int row, int64_t unit) {
    const int slot = slots[row];
    const char* from = grad_kept + slot * params.row_bytes;
    char* to = grad_rows + row * params.row_bytes;
    reinterpret_cast<Unit*>(to)[unit] = slot < 0 ? Unit{} : reinterpret_cast<const Unit*>(from)[unit];
  });
}

__global__ void __launch_bounds__(kScatterThreads, 1) scatter_kernel(const PrunePatchesBackward params) {
  int* slots = reinterpret_cast<int*>(shared_memory);
  const int tiles = (params.patches + kScatterRows - 1) / kScatterRows;
  const int64_t sample = blockIdx.x / tiles;
  const int first = blockIdx.x % tiles * kScatterRows;
  const int rows = min(kScatterRows, params.patches - first);
  if (static_cast<int>(threadIdx.x) < rows)
    slots[threadIdx.x] = find_slot(params.index + sample * params.keep, params.keep, first + threadIdx.x);
  __syncthreads();

  const char* grad_kept = static_cast<const char*>(params.grad_kept) + sample * params.keep * params.row_bytes;
  char* grad_rows = static_cast<char*>(params.grad_rows) + (sample * params.patches + first) * params.row_bytes;
  switch (unit_bytes(grad_kept, grad_rows, params.row_bytes)) {
    case 16:
      return scatter<uint4>(params, grad_kept, grad_rows, slots, rows);
    case 4:
      return scatter<uint32_t>(params, grad_kept, grad_rows, slots, rows);
    default:
      return scatter<uint16_t>(params, grad_kept, grad_rows, slots, rows);
  }
}

}  // namespace

extern "C" cudaError_t prune_patches_forward(const PrunePatchesForward* params) {
  if (params->keep < 1 || params->keep > params->patches || params->row_bytes % 2 != 0) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const int32_t slots = choose_slots(*params);
  const PruneLaunch plan = {*params, static_cast<int32_t>(ceil_div(params->keep, slots)), slots};
  return dispatch_dtype(params->importance_dtype, [&](auto type) {
    return launch(select_kernel<typename decltype(type)::type>, static_cast<int64_t>(params->batch) * plan.shares,
                  kSelectThreads, select_shared_bytes(params->patches), params->stream, plan);
  });
}

extern "C" cudaError_t prune_patches_backward(const PrunePatchesBackward* params) {
  if (params->row_bytes % 2 != 0) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(params->patches, kScatterRows) * params->batch;
  return launch(scatter_kernel, blocks, kScatterThreads, sizeof(int) * kScatterRows, params->stream, *params);
}

}  // namespace liftbyimage::cuda
