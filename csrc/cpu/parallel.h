#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

#include "gemm.h"

namespace liftbyimage::cpu {

// f(i) for i in [0, count), at least `grain` of them per thread. Runs in the caller's thread when nested.
template <typename F>
void parallel_tasks(int64_t count, int64_t grain, const F& f) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const SerialBlas serial;
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  });
}

// The same with every thread's tasks last first: what a thread left in its cache, it meets first.
template <typename F>
void parallel_tasks_last_first(int64_t count, int64_t grain, const F& f) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const SerialBlas serial;
    for (int64_t i = end; i-- > begin;) {
      f(i);
    }
  });
}

// f(b) for every sample: threads over samples where that keeps them all busy, else threads inside each sample.
template <typename F>
void for_samples(int64_t batch, const F& f) {
  const int64_t threads = at::get_num_threads();
  if (batch % threads == 0 || batch >= 4 * threads) {
    parallel_tasks(batch, 1, f);
  } else {
    for (int64_t b = 0; b < batch; ++b) {
      f(b);
    }
  }
}

}  // namespace liftbyimage::cpu
