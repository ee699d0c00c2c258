#pragma once

#include <cstdint>

// The BLAS that torch carries: libtorch_cpu exports the Fortran symbols.
extern "C" {
void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
            const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
            const int* ldc);
void dgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const double* alpha,
            const double* a, const int* lda, const double* b, const int* ldb, const double* beta, double* c,
            const int* ldc);
// Weak: absent where torch was built on another BLAS.
int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));
}

namespace liftbyimage::cpu {

enum class Transpose : char { no = 'N', yes = 'T' };

// Row major: C [m, n] = op(A) [m, k] · op(B) [k, n], added to C or not, where lda, ldb, ldc are row strides as stored.
// Without `add` C is never read.
template <typename T>
void gemm(Transpose transpose_a, Transpose transpose_b, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda,
          const T* b, int64_t ldb, bool add, T* c, int64_t ldc) {
  // A row-major product is the column-major product of the swapped operands.
  const char first = static_cast<char>(transpose_b), second = static_cast<char>(transpose_a);
  const int columns = static_cast<int>(n), rows = static_cast<int>(m), inner = static_cast<int>(k);
  const int first_stride = static_cast<int>(ldb), second_stride = static_cast<int>(lda);
  const int result_stride = static_cast<int>(ldc);
  const T alpha = 1, beta = add ? 1 : 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    sgemm_(&first, &second, &columns, &rows, &inner, &alpha, b, &first_stride, a, &second_stride, &beta, c,
           &result_stride);
  } else {
    dgemm_(&first, &second, &columns, &rows, &inner, &alpha, b, &first_stride, a, &second_stride, &beta, c,
           &result_stride);
  }
}

// One BLAS thread per calling thread: the tiles are the parallelism, and one thread count means one result.
class SerialBlas {
 public:
  SerialBlas() : previous_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~SerialBlas() {
    if (MKL_Set_Num_Threads_Local) {
      MKL_Set_Num_Threads_Local(previous_);
    }
  }
  SerialBlas(const SerialBlas&) = delete;
  SerialBlas& operator=(const SerialBlas&) = delete;

 private:
  int previous_;
};

}  // namespace liftbyimage::cpu
