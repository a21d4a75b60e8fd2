// Every PTX instruction that the kernels use, one function each; inline PTX stands nowhere else. Without nvcc this is
// the emulator's twin (tests/cuda_emulator), whose functions do the same on a CPU.
//
// Addresses in shared memory are 32-bit, from `shared_address`. "PTX ISA" below means NVIDIA's Parallel Thread
// Execution ISA manual; the layouts of fragments are in its chapter on matrix instructions.
#pragma once

#ifndef __CUDACC__
#include <emulated_ptx.h>
#else

#include <cuda.h>

#include <cstdint>

namespace resnet_fast::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// --- sm_80: asynchronous copies ---

// 16 bytes from global to shared memory, past L1, both 16-byte aligned; zeros (and `from` is not read) unless `valid`.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes this thread's group of the copies since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the last n.
template <int n>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// --- sm_80: matrices ---

// Four 8x8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8 (16 bytes, aligned) and gets from each
// matrix the elements 2 (i % 4), 2 (i % 4) + 1 of row i / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// As ldmatrix_x4, of transposed matrices: lane i gets the elements i / 4 of rows 2 (i % 4), 2 (i % 4) + 1.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// c += a b in float32, a [16, 16] and b [16, 8] in 16 bits, or a [16, 8] and b [8, 8] in TF32.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of a float32, rounded to TF32 to the nearest, ties away from zero. (mma_tf32 itself drops the low 13 bits.)
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

// --- sm_90: barriers of transactions ---
//
// An mbarrier is 8 bytes of shared memory, 8-aligned. A phase of it ends with its last expected arrival, once as many
// bytes have arrived as were expected. Arriving releases, waiting acquires.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After this thread's mbarrier_init, so that TMA sees it; the block's other threads need a __syncthreads as well.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over: 0 for the first, 1 for the second and, at once, for the one before all.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (over == 0);
}

// --- sm_90: threads ---

// Waits for `threads` threads, of whole warps, at barrier 1 to 15 (0 is that of __syncthreads).
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread has written to shared memory becomes visible to TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// From now on the warp has n registers per thread; executed by every warp of a warpgroup. (sm_90a)
template <int n>
__device__ __forceinline__ void setmaxnreg_inc() {
  static_assert(n >= 24 && n <= 256 && n % 8 == 0, "setmaxnreg takes a multiple of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n>
__device__ __forceinline__ void setmaxnreg_dec() {
  static_assert(n >= 24 && n <= 256 && n % 8 == 0, "setmaxnreg takes a multiple of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

// --- sm_90: TMA ---
//
// Addresses in shared memory are 128-byte aligned. `map` lies in global, constant or parameter memory; coordinates are
// those of its tensor, the contiguous dimension first.

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box from `at` on, to shared memory, its bytes counted by `barrier`.
template <int n>
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, const int (&at)[n]) {
  static_assert(n >= 1 && n <= 5, "tensors have 1 to 5 dimensions");
#define RESNET_FAST_TMA(dimensions, coordinates, ...)                                               \
  asm volatile("cp.async.bulk.tensor." dimensions                                                   \
               ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates \
               "}], [%2];" ::"r"(to),                                                               \
               "l"(map), "r"(barrier), __VA_ARGS__                                                  \
               : "memory")
  if constexpr (n == 1) {
    RESNET_FAST_TMA("1d", "%3", "r"(at[0]));
  } else if constexpr (n == 2) {
    RESNET_FAST_TMA("2d", "%3, %4", "r"(at[0]), "r"(at[1]));
  } else if constexpr (n == 3) {
    RESNET_FAST_TMA("3d", "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  } else if constexpr (n == 4) {
    RESNET_FAST_TMA("4d", "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  } else {
    RESNET_FAST_TMA("5d", "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
  }
#undef RESNET_FAST_TMA
}

// Pixels from `at` (channel, x, y, ..., image) on, row after row of the map's bounding box, each of them read `offset`
// (x, y, ...) further on: one tap of a filter for consecutive outputs of a convolution.
template <int n>
__device__ __forceinline__ void tma_load_im2col(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                                const int (&at)[n], const int (&offset)[n - 2]) {
  static_assert(n >= 3 && n <= 5, "images have 1 to 3 dimensions");
#define RESNET_FAST_TMA(dimensions, coordinates, offsets, ...)                                        \
  asm volatile("cp.async.bulk.tensor." dimensions                                                     \
               ".shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates \
               "}]"                                                                                   \
               ", [%2], {" offsets "};" ::"r"(to),                                                    \
               "l"(map), "r"(barrier), __VA_ARGS__                                                    \
               : "memory")
  if constexpr (n == 3) {
    RESNET_FAST_TMA("3d", "%3, %4, %5", "%6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "h"(uint16_t(offset[0])));
  } else if constexpr (n == 4) {
    RESNET_FAST_TMA("4d", "%3, %4, %5, %6", "%7, %8", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                    "h"(uint16_t(offset[0])), "h"(uint16_t(offset[1])));
  } else {
    RESNET_FAST_TMA("5d", "%3, %4, %5, %6, %7", "%8, %9, %10", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                    "r"(at[4]), "h"(uint16_t(offset[0])), "h"(uint16_t(offset[1])), "h"(uint16_t(offset[2])));
  }
#undef RESNET_FAST_TMA
}

// A box from shared memory, to `at`; what lies outside the tensor is left out.
template <int n>
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, const int (&at)[n]) {
  static_assert(n >= 1 && n <= 5, "tensors have 1 to 5 dimensions");
#define RESNET_FAST_TMA(dimensions, coordinates, ...)                                                      \
  asm volatile("cp.async.bulk.tensor." dimensions ".global.shared::cta.tile.bulk_group [%0, {" coordinates \
               "}], [%1];" ::"l"(map),                                                                     \
               "r"(from), __VA_ARGS__                                                                      \
               : "memory")
  if constexpr (n == 1) {
    RESNET_FAST_TMA("1d", "%2", "r"(at[0]));
  } else if constexpr (n == 2) {
    RESNET_FAST_TMA("2d", "%2, %3", "r"(at[0]), "r"(at[1]));
  } else if constexpr (n == 3) {
    RESNET_FAST_TMA("3d", "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  } else if constexpr (n == 4) {
    RESNET_FAST_TMA("4d", "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  } else {
    RESNET_FAST_TMA("5d", "%2, %3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
  }
#undef RESNET_FAST_TMA
}

// Closes this thread's group of the stores since the last one.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's groups but the last n have read their shared memory, which may then be written again.
template <int n>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}

// Waits until they are complete.
template <int n>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(n) : "memory");
}

// --- sm_90: matrices ---

// The reverse of ldmatrix_x4.
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(in[0]), "r"(in[1]),
               "r"(in[2]), "r"(in[3])
               : "memory");
}

// --- sm_90a: matrices of a warpgroup ---

// How 16-byte units are permuted within each row of so many bytes, by the row's number; as TMA writes it.
enum class Swizzle { none = 0, bytes_128 = 1, bytes_64 = 2, bytes_32 = 3 };

// An operand of wgmma in shared memory, [rows, depth] with depth contiguous ("K-major"), in groups of 8 rows that lie
// `stride_bytes` apart. With a swizzle of b bytes the rows of a group lie b bytes apart, `address` may be that of any
// 16-byte unit of the first row, and `leading_bytes` says nothing. Without one a group is two matrices of 8 rows of
// 16 bytes, `leading_bytes` apart. Groups with a swizzle of b bytes start at multiples of 8 b.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes,
                                                     Swizzle swizzle, uint32_t base_offset = 0) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t((leading_bytes & 0x3ffff) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffff) >> 4) << 32 | uint64_t(base_offset & 7) << 49 | uint64_t(swizzle) << 62;
}

// Before the first wgmma, and between other accesses to registers that a wgmma uses and that wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the warpgroup's group of the wgmmas since the last one.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for the groups but the last n; until then nothing may touch the accumulators, nor write to the operands.
template <int n>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

// The compiler takes accumulators for ready once wgmma is issued: after the wait that makes them so this keeps it from
// having moved their use to before.
template <int n>
__device__ __forceinline__ void wgmma_ready(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d [64, n] = a b^T, or += with `accumulate`, in float32: wgmma_bf16 and wgmma_fp16 with a [64, 16] and b [n, 16],
// wgmma_tf32 with a [64, 8] and b [n, 8], whose low 13 bits it drops. One function for each n, which is that of d. A
// thread's d[4 j + 2 h + i] is element 8 j + 2 (lane % 4) + i of row 16 warp + lane / 4 + 8 h; `a` is a descriptor, or
// warp by warp the registers of mma_bf16's (mma_tf32's) a.
//
// The lists: first(0) next(1) next(2) ... next(count - 1).
// clang-format off
#define RESNET_FAST_TEN(x, t) x(t##0) x(t##1) x(t##2) x(t##3) x(t##4) x(t##5) x(t##6) x(t##7) x(t##8) x(t##9)
#define RESNET_FAST_LIST_4(f, x) f(0) x(1) x(2) x(3)
#define RESNET_FAST_LIST_8(f, x) RESNET_FAST_LIST_4(f, x) x(4) x(5) x(6) x(7)
#define RESNET_FAST_LIST_16(f, x) RESNET_FAST_LIST_8(f, x) x(8) x(9) x(10) x(11) x(12) x(13) x(14) x(15)
#define RESNET_FAST_LIST_20(f, x) RESNET_FAST_LIST_16(f, x) x(16) x(17) x(18) x(19)
#define RESNET_FAST_LIST_30(f, x) RESNET_FAST_LIST_20(f, x) RESNET_FAST_TEN(x, 2)
#define RESNET_FAST_LIST_32(f, x) RESNET_FAST_LIST_30(f, x) x(30) x(31)
#define RESNET_FAST_LIST_40(f, x) RESNET_FAST_LIST_30(f, x) RESNET_FAST_TEN(x, 3)
#define RESNET_FAST_LIST_48(f, x) RESNET_FAST_LIST_40(f, x) x(40) x(41) x(42) x(43) x(44) x(45) x(46) x(47)
#define RESNET_FAST_LIST_60(f, x) RESNET_FAST_LIST_40(f, x) RESNET_FAST_TEN(x, 4) RESNET_FAST_TEN(x, 5)
#define RESNET_FAST_LIST_64(f, x) RESNET_FAST_LIST_60(f, x) x(60) x(61) x(62) x(63)
#define RESNET_FAST_LIST_80(f, x) RESNET_FAST_LIST_60(f, x) RESNET_FAST_TEN(x, 6) RESNET_FAST_TEN(x, 7)
#define RESNET_FAST_LIST_90(f, x) RESNET_FAST_LIST_80(f, x) RESNET_FAST_TEN(x, 8)
#define RESNET_FAST_LIST_96(f, x) RESNET_FAST_LIST_90(f, x) x(90) x(91) x(92) x(93) x(94) x(95)
#define RESNET_FAST_LIST_110(f, x) RESNET_FAST_LIST_90(f, x) RESNET_FAST_TEN(x, 9) RESNET_FAST_TEN(x, 10)
#define RESNET_FAST_LIST_120(f, x) RESNET_FAST_LIST_110(f, x) RESNET_FAST_TEN(x, 11)
#define RESNET_FAST_LIST_128(f, x) \
  RESNET_FAST_LIST_120(f, x) x(120) x(121) x(122) x(123) x(124) x(125) x(126) x(127)
#define RESNET_FAST_FIRST_NAME(i) "%" #i
#define RESNET_FAST_NEXT_NAME(i) ", %" #i
#define RESNET_FAST_FIRST_REGISTER(i) "+f"(d[i])
#define RESNET_FAST_NEXT_REGISTER(i) , "+f"(d[i])
// clang-format on
#define RESNET_FAST_NAMES(count) RESNET_FAST_LIST_##count(RESNET_FAST_FIRST_NAME, RESNET_FAST_NEXT_NAME)
#define RESNET_FAST_REGISTERS(count) RESNET_FAST_LIST_##count(RESNET_FAST_FIRST_REGISTER, RESNET_FAST_NEXT_REGISTER)

// The first `count` operands are d, i0 to i5 are the next numbers. 1, 1: a and b as they are, not negated.
#define RESNET_FAST_WGMMA_OF(name, shape, of_a_and_b, of_b, count, i0, i1, i2, i3, i4, i5)                           \
  __device__ __forceinline__ void name(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) {                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned." shape                \
                 " {" RESNET_FAST_NAMES(count) "}, %" #i0 ", %" #i1 ", p, 1, 1" of_a_and_b ";\n}"                    \
                 : RESNET_FAST_REGISTERS(count)                                                                      \
                 : "l"(a), "l"(b), "r"(int(accumulate)));                                                            \
  }                                                                                                                  \
  __device__ __forceinline__ void name(float (&d)[count], const uint32_t (&a)[4], uint64_t b, bool accumulate) {     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned." shape                \
                 " {" RESNET_FAST_NAMES(count) "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1" of_b \
                                               ";\n}"                                                                \
                 : RESNET_FAST_REGISTERS(count)                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));                        \
  }
// 0 for each operand in shared memory that could be transposed.
#define RESNET_FAST_WGMMA(n, ...)                                                               \
  RESNET_FAST_WGMMA_OF(wgmma_bf16, "m64n" #n "k16.f32.bf16.bf16", ", 0, 0", ", 0", __VA_ARGS__) \
  RESNET_FAST_WGMMA_OF(wgmma_fp16, "m64n" #n "k16.f32.f16.f16", ", 0, 0", ", 0", __VA_ARGS__)   \
  RESNET_FAST_WGMMA_OF(wgmma_tf32, "m64n" #n "k8.f32.tf32.tf32", "", "", __VA_ARGS__)
RESNET_FAST_WGMMA(8, 4, 4, 5, 6, 7, 8, 9)
RESNET_FAST_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
RESNET_FAST_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
RESNET_FAST_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
RESNET_FAST_WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
RESNET_FAST_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
RESNET_FAST_WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
RESNET_FAST_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
#undef RESNET_FAST_WGMMA
#undef RESNET_FAST_WGMMA_OF

}  // namespace resnet_fast::ptx

#endif
