// A tile of rows (pixels) times a panel of filters, summed in registers. Compiled once per level (levels.h).
#include "gemm_tile.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

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

// What row `i` will replace, and the residual: a store waits for its line, and asking for all rows at once would hold
// up the panel. 1x1 convolutions took 0.96-0.97 of the time without at batch 8 (2 Cascade Lake cores).
template <typename Out>
static inline void prefetch_output(const TileOutput& o, int64_t i) {
  prefetch(static_cast<const Out*>(o.out) + i * o.out_stride, o.columns);
  if (o.residual) prefetch(static_cast<const Out*>(o.residual) + i * o.out_stride, o.columns);
}

template <int rows, int vectors, typename In, typename Out>
static __attribute__((flatten)) void sum_tile(const In* const* row, int64_t taps, int64_t offset, int64_t depth,
                                              const In* panel, const TileOutput& o, Ahead ahead) {
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
    const auto multiply_step = [&](int64_t at) {
      vec b[vectors], x;
      each<vectors, 1>([&](int j, int) { b[j] = panel_step(panel + j * width * step); });
      each<rows, vectors>([&](int i, int j) {
        if (j == 0) x = row_step(a[i] + at);
        sum[i][j] = multiply_add(panel, x, b[j], sum[i][j]);
      });
      panel += step_size;
    };
    const bool fetch = t == 0 && !o.in_cache;
    for (int part = fetch ? 0 : rows - 1; part < rows; ++part) {
      if (fetch) prefetch_output<Out>(o, part);
      const int64_t end = depth * (part + 1) / rows;
      // Two steps a pass: of the time of one, 0.99 in convolutions, 0.96 where another hyperthread keeps the core busy
      // (2 Cascade Lake cores, 1x1 at batch 1 and 8; the loop alone).
      for (; k + 2 * step <= end; k += 2 * step) {
        __builtin_prefetch(ahead.at);
        __builtin_prefetch(ahead.at + ahead.step);
        ahead.at += 2 * ahead.step;
        multiply_step(k);
        multiply_step(k + step);
      }
    }
    if (k + step <= depth) {
      multiply_step(k);
      k += step;
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

// By rows and vectors of the panel, less one each.
template <typename In, typename Out>
static GemmTile<In> tile_of(int64_t rows, int64_t vectors) {
  static_assert(tile_rows == 6);
#define RESNET_FAST_TILES(vectors)                                                                  \
  {                                                                                                 \
    sum_tile<1, vectors, In, Out>, sum_tile<2, vectors, In, Out>, sum_tile<3, vectors, In, Out>,    \
        sum_tile<4, vectors, In, Out>, sum_tile<5, vectors, In, Out>, sum_tile<6, vectors, In, Out> \
  }
  static constexpr GemmTile<In> of[panel_vectors][tile_rows] = {
      RESNET_FAST_TILES(1),
      RESNET_FAST_TILES(2),
#if defined(__AVX512F__)
      RESNET_FAST_TILES(3),
      RESNET_FAST_TILES(4),
#endif
  };
  return of[vectors - 1][rows - 1];
}

#define RESNET_FAST_TILE_OF(In, Out)                                                \
  GemmTile<In> gemm_tile_of(const In*, const Out*, int64_t rows, int64_t vectors) { \
    return tile_of<In, Out>(rows, vectors);                                         \
  }
RESNET_FAST_TILE_OF(float, float)
RESNET_FAST_TILE_OF(float, bf16)
RESNET_FAST_TILE_OF(float, f16)
#if defined(__AVX512BF16__)
RESNET_FAST_TILE_OF(bf16, float)
RESNET_FAST_TILE_OF(bf16, bf16)
#endif

}  // namespace resnet_fast::RESNET_FAST_LEVEL
