// Instruction-set levels. Every file in csrc/cpu/kernels/ is compiled once per level, with that level's flags and
// RESNET_FAST_LEVEL set to its name, into a namespace of that name; the table in levels.cpp lists the results and one
// entry is picked at first use. Kernel files include no C++ library header and nothing inline from outside their
// namespace: a shared inline function built for AVX-512 could be linked into the portable path.
#pragma once

#include <cstdint>

namespace resnet_fast {

struct Kernels {
  void (*add_relu_f32)(const float* a, const float* b, float* out, int64_t n);
  void (*add_relu_bf16)(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n);
  void (*add_relu_f16)(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n);
  bool (*all_finite_32)(const uint32_t* x, int64_t n, uint32_t exponent_mask);
  bool (*all_finite_16)(const uint16_t* x, int64_t n, uint16_t exponent_mask);
};

// What a kernel file of one level exports.
#define RESNET_FAST_DECLARE_LEVEL(level)                                              \
  namespace level {                                                                   \
  void add_relu_f32(const float* a, const float* b, float* out, int64_t n);           \
  void add_relu_bf16(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n); \
  void add_relu_f16(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n);  \
  bool all_finite_32(const uint32_t* x, int64_t n, uint32_t exponent_mask);           \
  bool all_finite_16(const uint16_t* x, int64_t n, uint16_t exponent_mask);           \
  }

RESNET_FAST_DECLARE_LEVEL(portable)
RESNET_FAST_DECLARE_LEVEL(avx2)
RESNET_FAST_DECLARE_LEVEL(avx512)

// The kernels of the level in use: the best one this CPU has, or the one that RESNET_FAST_CPU_LEVEL names.
const Kernels& kernels();

}  // namespace resnet_fast
