// The vector of the level being compiled, on the compiler's own vector types (GCC and Clang): operators, broadcasts of
// scalars and fused multiply-adds come from the compiler, so this is all that kernels need. Everything is static: see
// levels.h.
#pragma once

#include <cstdint>

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

// The first n < width values; the others are zero, or are not stored.
static inline vec load_part(const float* p, int64_t n) {
  vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

static inline void store_part(float* p, vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

static inline vec broadcast(float x) { return x - vec{}; }  // x - 0 is x for every x

static inline vec relu(vec v) { return v < 0.0f ? vec{} : v; }  // NaN stays NaN

// f(i, j) for every element of an array of vectors that must end up in registers, which takes indices that are
// constant.
template <int rows, int columns, typename F>
static inline __attribute__((always_inline)) void each(const F& f) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) f(i, j);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
