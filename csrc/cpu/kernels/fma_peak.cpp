// The most arithmetic that a core can do, for measuring it: independent multiply-adds that never leave the registers.
// Compiled once per level (levels.h).
#include "../levels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace resnet_fast::RESNET_FAST_LEVEL {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;  // SSE and NEON
#endif
constexpr int sums = 12;  // two FMA units with a latency of 4 or 5 need 10; with both factors 14 of 16 registers

typedef float vec __attribute__((vector_size(width * sizeof(float))));

const int64_t fma_f32_flops = int64_t(2) * width * sums;

float fma_f32(int64_t n, float factor) {
  const vec a = factor - vec{}, b = 1.0f - a;  // x = x * a + (1 - a) tends to 1, so nothing overflows or goes subnormal
  vec sum[sums];
  for (int i = 0; i < sums; ++i) sum[i] = a + float(i);
  for (int64_t t = 0; t < n; ++t)
    for (int i = 0; i < sums; ++i) sum[i] = sum[i] * a + b;
  float total = 0;
  for (int i = 0; i < sums; ++i)
    for (int j = 0; j < width; ++j) total += sum[i][j];
  return total;
}

#if defined(__AVX512F__)
const int64_t fma_bf16_flops = int64_t(4) * width * sums;  // a pair of products a lane

// Only called where the CPU has the instruction (fma_peak.cpp above this folder).
__attribute__((target("avx512bf16"))) float fma_bf16(int64_t n, float factor) {
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0x1p-60f), _mm512_set1_ps(-0x1p-60f));
  __m512 sum[sums];
  for (int i = 0; i < sums; ++i) sum[i] = _mm512_set1_ps(float(i + 1));
  for (int64_t t = 0; t < n; ++t)
    for (int i = 0; i < sums; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
  float total = 0;
  for (int i = 0; i < sums; ++i) total += _mm512_reduce_add_ps(sum[i]);
  return total;
}
#else
const int64_t fma_bf16_flops = 0;
float fma_bf16(int64_t, float) { return 0.0f; }
#endif

}  // namespace resnet_fast::RESNET_FAST_LEVEL
