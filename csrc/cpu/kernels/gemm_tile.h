// The innermost loop of every convolution here: a tile of rows (pixels) times a panel of filters, summed in registers.
#pragma once

#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

constexpr int64_t panel_width = panel_vectors * width;

// How far ahead of the sums a panel is fetched into the L1 cache, in steps of the depth. In a network weights come from
// memory: layers of 7x7 and 14x14 maps at batch 1, with 96 MB of weights in turn, ran 1.1-1.2 times as fast with 64 to
// 400 steps as with none (2 Zen 3 cores).
constexpr int64_t prefetch_steps = 128;

// Depth that is summed at a time, before the next tile has its turn: so much of a panel stays in the L1 cache (16 KiB
// with AVX2) or, with AVX-512, in a quarter of a small L2 cache (128 KiB), from where it comes as fast: 512 steps were
// 1.02-1.03 times as fast as 256 there. Sums of sums lose less accuracy than one long sum, which Winograd's
// algorithm needs: it keeps to 256.
#if defined(__AVX512F__)
constexpr int64_t gemm_steps = 512, winograd_steps = 256;
#else
constexpr int64_t gemm_steps = 256, winograd_steps = 256;
#endif

// Rows are split into that many tiles as evenly as can be, since tiles of few rows wait for the sums' latency.
static inline int64_t tiles_of(int64_t rows) { return (rows + tile_rows - 1) / tile_rows; }

// Where a tile's sums start and go.
struct TileOutput {
  const float* start;  // [rows][vectors * width] with rows `start_stride` apart: 0 for a bias; null for zeros
  int64_t start_stride;
  void* out;             // [rows][columns]
  const void* residual;  // the same, or null
  int64_t out_stride;    // from row to row of both
  int64_t columns;       // filters that exist; those behind them are computed but not stored
  bool relu;
};

template <typename Out>
static inline void prefetch_residual(const TileOutput& o, int64_t rows) {
  if (o.residual == nullptr) return;
  for (int64_t i = 0; i < rows; ++i) prefetch(static_cast<const Out*>(o.residual) + i * o.out_stride, o.columns);
}

template <typename Out, int rows, int vectors>
static inline void store_tile(vec (&sum)[rows][vectors], const TileOutput& o) {
  const Out* residual = static_cast<const Out*>(o.residual);
  Out* out = static_cast<Out*>(o.out);
  if (o.start) each<rows, vectors>([&](int i, int j) { sum[i][j] += load(o.start + i * o.start_stride + j * width); });
  if (o.columns == vectors * width) {
    const auto at = [&](int i, int j) { return i * o.out_stride + j * width; };
    if (residual) each<rows, vectors>([&](int i, int j) { sum[i][j] += load(residual + at(i, j)); });
    if (o.relu) each<rows, vectors>([&](int i, int j) { sum[i][j] = relu(sum[i][j]); });
    each<rows, vectors>([&](int i, int j) { store_rounded(out + at(i, j), sum[i][j]); });
    return;
  }
  float values[rows * vectors * width];
  each<rows, vectors>([&](int i, int j) { store(values + (i * vectors + j) * width, sum[i][j]); });
  for (int i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < o.columns; j += width) {
      const int64_t left = o.columns - j, at = i * o.out_stride + j;
      vec v = load(values + i * vectors * width + j);
      if (left >= width) {
        if (residual) v += load(residual + at);
        store_rounded(out + at, o.relu ? relu(v) : v);
      } else {
        if (residual) v += load_part(residual + at, left);
        store_part(out + at, o.relu ? relu(v) : v, left);
      }
    }
  }
}

// A step of the depth takes a float of a row and of every filter, or a pair of bf16 values (the last one of an odd
// depth alone).
template <typename In>
constexpr int64_t per_step = sizeof(float) / sizeof(In);

static inline vec row_step(const float* row) { return broadcast(*row); }
static inline vec panel_step(const float* panel) { return load(panel); }
static inline vec multiply_add(const float*, vec row, vec panel, vec sum) { return sum + row * panel; }

#if defined(__AVX512BF16__)
static inline vec row_step(const bf16* row) {
  uint32_t pair;
  __builtin_memcpy(&pair, row, sizeof(pair));
  return (vec)(bits32{} + pair);
}
static inline vec panel_step(const bf16* panel) {
  vec pairs;
  __builtin_memcpy(&pairs, panel, sizeof(pairs));
  return pairs;
}
static inline vec multiply_add(const bf16*, vec row, vec panel, vec sum) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)panel);
}
#endif

// out = relu(start + sum over taps and depth of rows * panel + residual)
template <int rows, int vectors, typename In, typename Out>
static __attribute__((flatten)) void gemm_tile(const In* const* row,  // [taps][tile_rows]; row[tap][0] null: zeros
                                               int64_t taps,
                                               int64_t offset,  // into every row
                                               int64_t depth,
                                               const In* panel,  // [taps][depth / per_step][vectors * width][per_step]
                                               const TileOutput& o) {
  constexpr int64_t step = per_step<In>, step_size = step * vectors * width;
  vec sum[rows][vectors];
  each<rows, vectors>([&](int i, int j) { sum[i][j] = vec{}; });
  for (int64_t t = 0; t < taps; ++t, row += tile_rows) {
    if (row[0] == nullptr) {
      panel += depth * vectors * width;
      continue;
    }
    const In* a[rows];
    each<rows, 1>([&](int i, int) { a[i] = row[i] + offset; });
    int64_t k = 0;
    for (; k + step <= depth; k += step, panel += step_size) {
      __builtin_prefetch(panel + prefetch_steps * step_size);
      vec b[vectors], x;
      each<vectors, 1>([&](int j, int) { b[j] = panel_step(panel + j * width * step); });
      each<rows, vectors>([&](int i, int j) {
        if (j == 0) x = row_step(a[i] + k);
        sum[i][j] = multiply_add(panel, x, b[j], sum[i][j]);
      });
    }
    if constexpr (step > 1) {
      if (k == depth) continue;
      each<rows, vectors>(
          [&](int i, int j) { sum[i][j] += broadcast(bf16_to_float(a[i][k].bits)) * load(panel + j * width); });
      panel += vectors * width;
    }
  }
  store_tile<Out>(sum, o);
}

namespace {  // a static member would be a weak symbol

// By vectors of the panel and rows, less one each.
template <typename In, typename Out>
struct GemmTiles {
  typedef void (*Tile)(const In* const*, int64_t, int64_t, int64_t, const In*, const TileOutput&);
  static_assert(tile_rows == 6);
#define RESNET_FAST_TILES(vectors)                                                                 \
  {gemm_tile<1, vectors, In, Out>, gemm_tile<2, vectors, In, Out>, gemm_tile<3, vectors, In, Out>, \
   gemm_tile<4, vectors, In, Out>, gemm_tile<5, vectors, In, Out>, gemm_tile<6, vectors, In, Out>}
  static constexpr Tile of[panel_vectors][tile_rows] = {
      RESNET_FAST_TILES(1),
      RESNET_FAST_TILES(2),
#if defined(__AVX512F__)
      RESNET_FAST_TILES(3),
      RESNET_FAST_TILES(4),
#endif
  };
};

}  // namespace

// Vectors of the panel that starts at `filter`: the last one of a group is as narrow as its filters allow.
static inline int64_t vectors_of_panel(int64_t filters, int64_t filter) {
  const int64_t left = (filters - filter + width - 1) / width;
  return left < panel_vectors ? left : panel_vectors;
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
