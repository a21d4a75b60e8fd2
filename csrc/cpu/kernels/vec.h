// The vector of the level being compiled, on the compiler's own vector types (GCC and Clang): operators, broadcasts of
// scalars and fused multiply-adds come from the compiler, so this is all that kernels need. Everything is static: see
// levels.h.
#pragma once

#include "convert.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// A register tile of `tile_rows` x `panel_vectors` sums leaves room for the vectors of a panel and one broadcast.
#if defined(__AVX512F__)
constexpr int width = 16, panel_vectors = 4, tile_rows = 6;  // 24 + 4 + 1 of 32 registers
#elif defined(__AVX2__)
constexpr int width = 8, panel_vectors = 2, tile_rows = 6;  // 12 + 2 + 1 of 16
#else
constexpr int width = 4, panel_vectors = 2, tile_rows = 6;  // SSE (16 registers) and NEON (32)
#endif

typedef float vec __attribute__((vector_size(width * sizeof(float))));

static inline vec load(const float* p) {
  vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

static inline void store(float* p, vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Values in memory may be of 16 bits; arithmetic never is. A store rounds to nearest, ties to even.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef uint32_t bits32 __attribute__((vector_size(width * sizeof(uint32_t))));
typedef uint16_t bits16 __attribute__((vector_size(width * sizeof(uint16_t))));

static inline vec load(const bf16* p) {
  bits16 b;
  __builtin_memcpy(&b, p, sizeof(b));
  return (vec)(__builtin_convertvector(b, bits32) << 16);
}

static inline void store(bf16* p, vec v) {
  const bits32 u = (bits32)v;
  const bits32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bits32 nan = bits32{} + 0x7fc0u;  // the carry of the rounding could turn a NaN into an infinity
  const bits16 b = __builtin_convertvector(v != v ? nan : rounded, bits16);
  __builtin_memcpy(p, &b, sizeof(b));
}

// Also rounds to nearest, but subnormals become zero: in one instruction where the level has it, for results of
// arithmetic. What must stay the same value goes through `store`.
static inline void store_rounded(float* p, vec v) { store(p, v); }
static inline void store_rounded(bf16* p, vec v) {
#if defined(__AVX512BF16__)
  const __m256bh b = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &b, sizeof(b));
#else
  store(p, v);
#endif
}

static inline vec load(const f16* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec v;
  for (int i = 0; i < width; ++i) v[i] = f16_to_float_1(p[i].bits);
  return v;
#endif
}

static inline void store(f16* p, vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < width; ++i) p[i].bits = float_to_f16_1(v[i]);
#endif
}
static inline void store_rounded(f16* p, vec v) { store(p, v); }

// The first n < width values; the others are zero, or are not stored.
template <typename T>
static inline vec load_part(const T* p, int64_t n) {
  T values[width] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}

template <typename T>
static inline void store_part(T* p, vec v, int64_t n) {
  T values[width];
  store(values, v);
  for (int64_t i = 0; i < n; ++i) p[i] = values[i];
}

#if defined(__AVX512F__)
static inline vec load_part(const float* p, int64_t n) { return (vec)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
static inline vec load_part(const bf16* p, int64_t n) {
  bf16 values[width];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm256_maskz_loadu_epi16((1u << n) - 1, p));
  return load(values);
}
static inline void store_part(float* p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
static inline void store_part(bf16* p, vec v, int64_t n) {
  bf16 values[width];
  store(values, v);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bits);
}
#elif defined(__AVX2__)
static inline __m256i first_lanes(int64_t n) {
  static const int32_t lanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + 8 - n));
}
static inline vec load_part(const float* p, int64_t n) { return (vec)_mm256_maskload_ps(p, first_lanes(n)); }
static inline void store_part(float* p, vec v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#endif

// Asks for n values in the L1 cache. Kernels walk over maps in too many short runs at once for the hardware to foresee
// what comes next; maps of megabytes come from the L3 cache or memory.
template <typename T>
static inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
  asm volatile("");  // without it GCC 12 takes this for a function without effects and drops its calls
}

static inline vec broadcast(float x) { return x - vec{}; }  // x - 0 is x for every x

// NaN stays NaN: the instruction returns its second operand then.
static inline vec relu(vec v) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v);
#elif defined(__AVX2__)
  return (vec)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v);
#else
  return v < 0.0f ? vec{} : v;
#endif
}

// f(i, j) for every element of an array of vectors. By recursion, not by loops: only indices that are constant from the
// start let the compiler keep the array in registers for good. With unrolled loops GCC 12 zeroed 24 sums in memory
// first and stored them there again behind the inner loop; without that, 1x1 layers ran 1.03-1.06 times as fast.
template <int rows, int columns, int at = 0, typename F>
static inline __attribute__((always_inline)) void each(const F& f) {
  if constexpr (at < rows * columns) {
    f(at / columns, at % columns);
    each<rows, columns, at + 1>(f);
  }
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
