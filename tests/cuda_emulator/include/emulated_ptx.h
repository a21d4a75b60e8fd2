// The twin of csrc/cuda/ptx.cuh: the same functions, on a CPU.
#pragma once

#include <cstdint>

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

}  // namespace resnet_fast::ptx
