// The twin of csrc/cuda/ptx.cuh: the same functions, on a CPU.
#pragma once

#include <cstdint>

#include "cuda.h"
#include "cuda_runtime.h"

namespace resnet_fast::ptx {

uint32_t shared_address(const void* p);

// --- sm_80 (ampere.cpp) ---
void cp_async_16(uint32_t to, const void* from, bool valid);
void cp_async_commit();
void cp_async_wait_groups(int n);
template <int n>
void cp_async_wait() {
  cp_async_wait_groups(n);
}
void ldmatrix_x4(uint32_t (&out)[4], uint32_t row);
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
uint32_t round_to_tf32(uint32_t x);

// --- sm_90 (hopper.cpp) ---
void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void barrier_sync(int barrier, int threads);
void fence_proxy_async();
void set_max_registers(int n);
template <int n>
void setmaxnreg_inc() {
  set_max_registers(n);
}
template <int n>
void setmaxnreg_dec() {
  set_max_registers(n);
}
void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t row);
void stmatrix_x4(uint32_t row, const uint32_t (&in)[4]);

// --- sm_90: TMA (tma.cpp) ---
void tma_prefetch_map(const CUtensorMap* map);
void tma_load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int n, const int* at);
void tma_load_pixels(uint32_t to, const CUtensorMap* map, uint32_t barrier, int n, const int* at, const int* offset);
void tma_store_box(const CUtensorMap* map, uint32_t from, int n, const int* at);
void tma_store_commit();
void tma_store_wait_groups(int n, bool only_read);
template <int n>
void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, const int (&at)[n]) {
  tma_load_box(to, map, barrier, n, at);
}
template <int n>
void tma_load_im2col(uint32_t to, const CUtensorMap* map, uint32_t barrier, const int (&at)[n],
                     const int (&offset)[n - 2]) {
  tma_load_pixels(to, map, barrier, n, at, offset);
}
template <int n>
void tma_store(const CUtensorMap* map, uint32_t from, const int (&at)[n]) {
  tma_store_box(map, from, n, at);
}
template <int n>
void tma_store_wait_read() {
  tma_store_wait_groups(n, true);
}
template <int n>
void tma_store_wait() {
  tma_store_wait_groups(n, false);
}

// --- sm_90a: matrices of a warpgroup (wgmma.cpp) ---
enum class Swizzle { none = 0, bytes_128 = 1, bytes_64 = 2, bytes_32 = 3 };
uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle,
                          uint32_t base_offset = 0);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait_groups(int n);
template <int n>
void wgmma_wait() {
  wgmma_wait_groups(n);
}
template <int n>
void wgmma_ready(float (&)[n]) {}
enum class WgmmaType { bf16, fp16, tf32 };
void wgmma(WgmmaType type, float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate);
#define EMULATED_WGMMA(name, type)                                                     \
  template <int half_n>                                                                \
  void name(float (&d)[half_n], uint64_t a, uint64_t b, bool accumulate) {             \
    wgmma(type, d, half_n * 2, nullptr, a, b, accumulate);                             \
  }                                                                                    \
  template <int half_n>                                                                \
  void name(float (&d)[half_n], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
    wgmma(type, d, half_n * 2, a, 0, b, accumulate);                                   \
  }
EMULATED_WGMMA(wgmma_bf16, WgmmaType::bf16)
EMULATED_WGMMA(wgmma_fp16, WgmmaType::fp16)
EMULATED_WGMMA(wgmma_tf32, WgmmaType::tf32)
#undef EMULATED_WGMMA

}  // namespace resnet_fast::ptx
