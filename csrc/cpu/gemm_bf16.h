#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "gemm.h"

// Products of bfloat16 operands with float32 accumulation, for processors that have instructions for it.
namespace liftbyimage::cpu {

// Whether this build, torch and this processor have them; else bfloat16 is converted to float32 first.
bool has_bf16_products();

// As gemm in gemm.h. A float32 `a` is rounded to bfloat16. `add` keeps what is in C.
void gemm_bf16(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const float* a,
               int64_t lda, const c10::BFloat16* b, int64_t ldb, bool add, float* c, int64_t ldc);
void gemm_bf16(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const c10::BFloat16* a,
               int64_t lda, const c10::BFloat16* b, int64_t ldb, bool add, float* c, int64_t ldc);

}  // namespace liftbyimage::cpu
