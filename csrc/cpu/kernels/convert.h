// 16-bit floating point to and from float32, for the level being compiled. Everything is static: see levels.h.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace resnet_fast::RESNET_FAST_LEVEL {

static inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

static inline float bf16_to_float(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

// Round to nearest even. A NaN becomes the quiet NaN 0x7fc0 (the carry of the rounding could turn it into an infinity).
static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t rounded = uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  return f != f ? uint16_t(0x7fc0) : rounded;
}

constexpr int f16_chunk = 16;

#if defined(__F16C__)

static inline void f16_to_float(const uint16_t* x, float* out) {
  for (int i = 0; i < f16_chunk; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
}

static inline void float_to_f16(const float* x, uint16_t* out) {
  for (int i = 0; i < f16_chunk; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
}

#else

// Both conversions scale by a power of two in float32, which shifts the exponent and, for subnormals, lets the FPU do
// the rounding (the method of Maratyszcza's FP16 library, MIT).
static inline float f16_to_float_1(uint16_t h) {
  const uint32_t w = uint32_t(h) << 16, sign = w & 0x80000000u, two_w = w + w;
  const float normal = bits_to_float((two_w >> 4) + (0xe0u << 23)) * bits_to_float(0x07800000u);  // * 2^-112
  const float subnormal = bits_to_float((two_w >> 17) | (126u << 23)) - 0.5f;
  return bits_to_float(sign | float_to_bits(two_w < (1u << 27) ? subnormal : normal));
}

static inline uint16_t float_to_f16_1(float f) {
  const uint32_t w = float_to_bits(f), two_w = w + w, sign = w & 0x80000000u;
  float base = bits_to_float(w & 0x7fffffffu) * bits_to_float(0x77800000u);  // * 2^112, overflows to infinity
  base *= bits_to_float(0x08800000u);                                        // * 2^-110
  uint32_t bias = two_w & 0xff000000u;
  if (bias < 0x71000000u) bias = 0x71000000u;
  base = bits_to_float((bias >> 1) + 0x07800000u) + base;
  const uint32_t bits = float_to_bits(base);
  const uint32_t nonsign = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  return uint16_t((sign >> 16) | (two_w > 0xff000000u ? 0x7e00u : nonsign));
}

static inline void f16_to_float(const uint16_t* x, float* out) {
  for (int i = 0; i < f16_chunk; ++i) out[i] = f16_to_float_1(x[i]);
}

static inline void float_to_f16(const float* x, uint16_t* out) {
  for (int i = 0; i < f16_chunk; ++i) out[i] = float_to_f16_1(x[i]);
}

#endif

}  // namespace resnet_fast::RESNET_FAST_LEVEL
