#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "ops.h"

namespace liftbyimage::cpu {
namespace {

constexpr int64_t copy_grain_bytes = 64 << 10;

// An unsigned integer in the order of the importance: -0 equals +0, NaN comes below everything.
template <typename Key, typename T>
Key order_key(T importance) {
  constexpr Key sign = Key(1) << (sizeof(Key) * 8 - 1);
  const T x = importance == T(0) ? T(0) : importance;
  Key bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const Key ordered = (bits & sign) != 0 ? static_cast<Key>(~bits) : static_cast<Key>(bits | sign);
  return std::isnan(x) ? Key(0) : ordered;
}

template <typename Key>
struct Threshold {
  Key key;       // of the last row kept
  int64_t ties;  // rows with exactly this key that are kept
};

// The keep-th largest key by radix select, 11 bits a pass from the top.
template <typename Key>
Threshold<Key> select_threshold(const std::vector<Key>& keys, int64_t keep) {
  constexpr int bits = sizeof(Key) * 8, digit_bits = 11;
  Key prefix = 0, decided = 0;  // decided: mask of the bits that `prefix` fixes
  int64_t remaining = keep;
  for (int shift = bits; shift > 0;) {
    const int width = std::min(digit_bits, shift);
    shift -= width;
    const Key digit_mask = (Key(1) << width) - 1;
    std::array<int32_t, 1 << digit_bits> histogram{};
    for (const Key key : keys) {
      histogram[(key >> shift) & digit_mask] += (key & decided) == prefix ? 1 : 0;
    }
    Key digit = digit_mask;
    while (histogram[digit] < remaining) {
      remaining -= histogram[digit--];
    }
    prefix |= digit << shift;
    decided |= digit_mask << shift;
  }
  return {prefix, remaining};
}

// Ascending indices of the `keep` largest of importance [P].
template <typename Key, typename T, typename scalar_t>
void select_rows(const scalar_t* importance, int64_t patches, int64_t keep, std::vector<Key>& keys, int64_t* index) {
  for (int64_t p = 0; p < patches; ++p) {
    keys[p] = order_key<Key>(static_cast<T>(importance[p]));
  }
  Threshold<Key> threshold = select_threshold(keys, keep);
  // The slot is written whether or not the row is kept: no branch on data.
  for (int64_t p = 0, kept = 0; kept < keep; ++p) {
    const bool tie = keys[p] == threshold.key && threshold.ties > 0;
    threshold.ties -= tie;
    index[kept] = p;
    kept += tie || keys[p] > threshold.key;
  }
}

void select_samples(const at::Tensor& importance, int64_t keep, const at::Tensor& index) {
  const int64_t batch = importance.size(0), patches = importance.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, importance.scalar_type(), "prune_patches_forward", [&] {
    using T = at::opmath_type<scalar_t>;
    using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
    const scalar_t* source = importance.const_data_ptr<scalar_t>();
    int64_t* target = index.mutable_data_ptr<int64_t>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<Key> keys(patches);
      for (int64_t b = begin; b < end; ++b) {
        select_rows<Key, T>(source + b * patches, patches, keep, keys, target + b * keep);
      }
    });
  });
}

int64_t rows_per_task(int64_t row_bytes) { return std::max<int64_t>(1, copy_grain_bytes / row_bytes); }

// A tensor whose rows are contiguous, whatever its outer strides.
at::Tensor with_dense_rows(const at::Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) == 1 ? tensor : tensor.contiguous();
}

// Rows [first, last) of one sample's gradient [P, D]: the kept ones copied, the others zero.
void scatter_rows(const char* grad_kept, const int64_t* index, int64_t keep, int64_t row_bytes, int64_t first,
                  int64_t last, char* grad) {
  int64_t k = std::lower_bound(index, index + keep, first) - index;
  for (int64_t p = first; p < last;) {
    const int64_t next = k < keep ? std::clamp(index[k], p, last) : last;
    std::memset(grad + p * row_bytes, 0, (next - p) * row_bytes);
    p = next;
    if (p < last) {
      std::memcpy(grad + p * row_bytes, grad_kept + k * row_bytes, row_bytes);
      ++p;
      ++k;
    }
  }
}

}  // namespace

Tensor2 prune_patches_forward(const at::Tensor& patches_in, const at::Tensor& importance_in, int64_t keep) {
  check_rank(patches_in, 3, "patches");
  const int64_t batch = patches_in.size(0), num_patches = patches_in.size(1), width = patches_in.size(2);
  check_shape(importance_in, {batch, num_patches}, "importance");
  TORCH_CHECK(keep >= 1 && keep <= num_patches, "keep must be in [1, ", num_patches, "], got ", keep);
  check_floating(importance_in, "importance");
  check_strided(patches_in, "patches");
  const at::Tensor importance = importance_in.contiguous(), patches = with_dense_rows(patches_in);
  const at::Tensor index = at::empty({batch, keep}, importance.options().dtype(at::kLong));
  const at::Tensor kept = at::empty({batch, keep, width}, patches.options());
  select_samples(importance, keep, index);

  const int64_t item = patches.element_size(), row_bytes = width * item;
  const int64_t batch_stride = patches.stride(0) * item, row_stride = patches.stride(1) * item;
  const char* source = static_cast<const char*>(patches.const_data_ptr());
  char* target = static_cast<char*>(kept.mutable_data_ptr());
  const int64_t* rows = index.const_data_ptr<int64_t>();
  at::parallel_for(0, batch * keep, rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(target + i * row_bytes, source + i / keep * batch_stride + rows[i] * row_stride, row_bytes);
    }
  });
  return {kept, index};
}

at::Tensor prune_patches_backward(const at::Tensor& grad_kept_in, const at::Tensor& index_in, int64_t num_patches) {
  check_rank(grad_kept_in, 3, "grad_kept");
  const int64_t batch = grad_kept_in.size(0), keep = grad_kept_in.size(1), width = grad_kept_in.size(2);
  check_shape(index_in, {batch, keep}, "index");
  TORCH_CHECK(num_patches >= keep, "num_patches must be at least ", keep, ", got ", num_patches);
  TORCH_CHECK(index_in.scalar_type() == at::kLong, "index must be int64, got ", index_in.scalar_type());
  const at::Tensor grad_kept = grad_kept_in.contiguous(), index = index_in.contiguous();
  const at::Tensor grad = at::empty({batch, num_patches, width}, grad_kept.options());

  const int64_t row_bytes = width * grad.element_size();
  const char* source = static_cast<const char*>(grad_kept.const_data_ptr());
  char* target = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t* rows = index.const_data_ptr<int64_t>();
  at::parallel_for(0, batch * num_patches, rows_per_task(row_bytes), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / num_patches, first = begin % num_patches;
      const int64_t last = std::min(num_patches, first + end - begin);
      scatter_rows(source + b * keep * row_bytes, rows + b * keep, keep, row_bytes, first, last,
                   target + b * num_patches * row_bytes);
      begin += last - first;
    }
  });
  return grad;
}

}  // namespace liftbyimage::cpu
