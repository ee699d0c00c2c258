// Keep the most important patches of each sample, in ascending order of their index; and the gradient of that.
//
// Forward, one block per sample:
//
//   importance [P] ─► order-preserving 32-bit keys (NaN → 0, the lowest; −0 → +0), cached in shared memory if P ≤ 8192
//   radix select      4 passes × 8 bits from the top: histogram of the keys that share the prefix found so far,
//                     suffix sums over its 256 bins ─► next digit of the keep-th largest key, the threshold
//   compaction        512 patches per step: two prefix sums packed in one integer
//                       slot(p) = #{q < p: key > threshold} + min(#{q < p: key = threshold}, ties still wanted)
//                     so that ties go to the lower index and slots ascend with p
//   gather            rows copied in the widest unit (16, 4 or 2 bytes) that divides addresses, strides and length
//
// Backward, one block per 64 rows: the index is ascending, so a binary search inverts it; each row of the gradient is
// written exactly once, with its slot's row or with zeros.
//
// The histogram uses integer atomics only: counts do not depend on their order, the result is bitwise repeatable.

#include "prune_patches.h"

#include "common.h"
#include "warps.h"

namespace liftbyimage::cuda {
namespace {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kBins = 256;
constexpr int kCachedPatches = 8192;
constexpr int kScatterThreads = 256;
constexpr int kScatterRows = 64;

// Shared memory: | histogram | warp sums | digit, count above it | keys … |
struct SelectShared {
  int* histogram = reinterpret_cast<int*>(shared_memory);
  int* warp_sums = histogram + kBins;
  int* found = warp_sums + kSelectWarps;
  uint32_t* keys = reinterpret_cast<uint32_t*>(found + 2);
};

size_t select_shared_bytes(int patches) {
  const int cached = patches <= kCachedPatches ? patches : 0;
  return sizeof(int) * (kBins + kSelectWarps + 2 + cached);
}

__device__ uint32_t order_key(float importance) {
  if (importance != importance) return 0;
  const uint32_t bits = importance == 0.0f ? 0 : __float_as_uint(importance);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <typename T>
struct Keys {
  const T* importance;
  uint32_t* cache;  // null: too many patches; a thread reads only what it wrote

  __device__ uint32_t operator[](int patch) const {
    return cache != nullptr ? cache[patch] : order_key(to_float(importance[patch]));
  }
};

// The keep-th largest key; `ties` receives how many keys equal to it belong to the kept.
template <typename T>
__device__ uint32_t select_threshold(const Keys<T>& keys, int patches, int keep, const SelectShared& shared,
                                     int& ties) {
  const int thread = threadIdx.x;
  uint32_t prefix = 0;
  uint32_t prefix_mask = 0;
  ties = keep;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < kBins) shared.histogram[thread] = 0;
    __syncthreads();
    for (int patch = thread; patch < patches; patch += kSelectThreads) {
      const uint32_t key = keys[patch];
      if ((key & prefix_mask) == prefix) atomicAdd(&shared.histogram[key >> shift & 0xffu], 1);
    }
    __syncthreads();
    const int digit = kBins - 1 - thread;
    const int count = digit >= 0 ? shared.histogram[digit] : 0;
    int total;
    const int at_least = inclusive_scan<kSelectWarps>(count, shared.warp_sums, total);
    const int above = at_least - count;
    if (above < ties && at_least >= ties) {
      shared.found[0] = digit;
      shared.found[1] = above;
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(shared.found[0]) << shift;
    prefix_mask |= 0xffu << shift;
    ties -= shared.found[1];
  }
  return prefix;
}

template <typename T>
__device__ void write_index(const Keys<T>& keys, int patches, uint32_t threshold, int ties, int* warp_sums,
                            int64_t* index) {
  int greater_before = 0;
  int equal_before = 0;
  for (int start = 0; start < patches; start += kSelectThreads) {
    const int patch = start + threadIdx.x;
    const uint32_t key = patch < patches ? keys[patch] : 0;
    const bool greater = patch < patches && key > threshold;
    const bool equal = patch < patches && key == threshold;
    const int packed = greater + (equal << 16);
    int total;
    const int before = inclusive_scan<kSelectWarps>(packed, warp_sums, total) - packed;
    const int equals = equal_before + (before >> 16);
    if (greater || (equal && equals < ties)) index[greater_before + (before & 0xffff) + min(equals, ties)] = patch;
    greater_before += total & 0xffff;
    equal_before += total >> 16;
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
__device__ void gather(const PrunePatchesForward& params, const char* rows, char* kept, const int64_t* index) {
  for_each_unit<kSelectThreads>(params.keep, params.row_bytes / sizeof(Unit), [&](int slot, int64_t unit) {
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
__global__ void __launch_bounds__(kSelectThreads, 1) select_kernel(const PrunePatchesForward params) {
  const int64_t sample = blockIdx.x;
  const SelectShared shared;
  const T* importance = static_cast<const T*>(params.importance) + sample * params.patches;
  int64_t* index = params.index + sample * params.keep;
  const Keys<T> keys = {importance, params.patches <= kCachedPatches ? shared.keys : nullptr};
  if (keys.cache != nullptr)
    for (int patch = threadIdx.x; patch < params.patches; patch += kSelectThreads)
      keys.cache[patch] = order_key(to_float(importance[patch]));

  int ties;
  const uint32_t threshold = select_threshold(keys, params.patches, params.keep, shared, ties);
  write_index(keys, params.patches, threshold, ties, shared.warp_sums, index);
  __syncthreads();

  const char* rows = static_cast<const char*>(params.rows) + sample * params.rows_batch_stride;
  char* kept = static_cast<char*>(params.kept) + sample * params.keep * params.row_bytes;
  switch (unit_bytes(rows, kept, params.row_bytes | params.rows_patch_stride)) {
    case 16:
      return gather<uint4>(params, rows, kept, index);
    case 4:
      return gather<uint32_t>(params, rows, kept, index);
    default:
      return gather<uint16_t>(params, rows, kept, index);
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
  return dispatch_dtype(params->importance_dtype, [&](auto type) {
    return launch(select_kernel<typename decltype(type)::type>, params->batch, kSelectThreads,
                  select_shared_bytes(params->patches), params->stream, *params);
  });
}

extern "C" cudaError_t prune_patches_backward(const PrunePatchesBackward* params) {
  if (params->row_bytes % 2 != 0) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(params->patches, kScatterRows) * params->batch;
  return launch(scatter_kernel, blocks, kScatterThreads, sizeof(int) * kScatterRows, params->stream, *params);
}

}  // namespace liftbyimage::cuda
