// The warpgroup matrix products of Hopper (sm_90a): d [64, N] (+)= A [64, 16] · B [16, N], accumulated in float32.
//
// The 128 threads of a warpgroup issue one together; it runs on its own until `wgmma_wait`. Thread t of the warpgroup
// holds the rows r = 16·(t / 32) + t % 32 / 4 and r + 8, and of each block j of eight columns two neighbours:
//
//   d[4·j + 0], d[4·j + 1]   row r        columns 8·j + 2·(t % 4) + {0, 1}
//   d[4·j + 2], d[4·j + 3]   row r + 8    the same columns
//
// An A operand in registers lies alike, two elements to a register: two neighbouring blocks of a result, rounded, are
// one. Operands in shared memory are named by a descriptor (hopper.h); a transposed one has its 64 or N side
// contiguous instead of its 16 side.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace liftbyimage::cuda {

#define LIFTBYIMAGE_REGISTERS_32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define LIFTBYIMAGE_RESULTS_32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), \
  "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define LIFTBYIMAGE_REGISTERS_36 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35}, "
#define LIFTBYIMAGE_RESULTS_36 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), \
  "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define LIFTBYIMAGE_WGMMA_SHARED_72(TYPE)                                                            \
  asm volatile(                                                                                      \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %38, 0;\n"                                 \
      "wgmma.mma_async.sync.aligned.m64n72k16.f32." TYPE "." TYPE " " LIFTBYIMAGE_REGISTERS_36       \
      "%36, %37, accumulate, 1, 1, %39, 0;\n}\n"                                                     \
      : LIFTBYIMAGE_RESULTS_36                                                                       \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeA)))
#define LIFTBYIMAGE_WGMMA_REGISTERS_64(TYPE)                                                         \
  asm volatile(                                                                                      \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %37, 0;\n"                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " LIFTBYIMAGE_REGISTERS_32       \
      "{%32, %33, %34, %35}, %36, accumulate, 1, 1, 1;\n}\n"                                         \
      : LIFTBYIMAGE_RESULTS_32                                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

// d [64, 72], A (transposed on request) and B in shared memory; B lies [72, 16].
template <typename T, bool kTransposeA>
__device__ void wgmma_shared(float (&d)[36], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>)
    LIFTBYIMAGE_WGMMA_SHARED_72("f16");
  else
    LIFTBYIMAGE_WGMMA_SHARED_72("bf16");
}

// d [64, 64], A in registers, B in shared memory; B lies [16, 64].
template <typename T>
__device__ void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>)
    LIFTBYIMAGE_WGMMA_REGISTERS_64("f16");
  else
    LIFTBYIMAGE_WGMMA_REGISTERS_64("bf16");
}

#undef LIFTBYIMAGE_REGISTERS_32
#undef LIFTBYIMAGE_RESULTS_32
#undef LIFTBYIMAGE_REGISTERS_36
#undef LIFTBYIMAGE_RESULTS_36
#undef LIFTBYIMAGE_WGMMA_SHARED_72
#undef LIFTBYIMAGE_WGMMA_REGISTERS_64

}  // namespace liftbyimage::cuda
