// The innermost loop of most convolutions here, in gemm_tile.cpp: a tile of rows (pixels) times a panel of filters,
// summed in registers.
#pragma once

#include "multiply.h"

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

// Rows split into tiles as evenly as can be, since tiles of few rows wait for the sums' latency. One division for all
// of them: on Intel before Ice Lake it takes 40 to 90 cycles (Fog's instruction tables), a tile of 64 steps 770. With
// up to five divisions a tile, and outputs that were not fetched ahead, 1x1 convolutions took 1.03 times as long at
// batch 1 and 1.06 times at batch 8 (2 Cascade Lake cores).
struct Tiles {
  int64_t rows, count, least, longer;  // the first `longer` tiles have a row more than `least`
  explicit Tiles(int64_t rows)
      : rows(rows),
        count((rows + tile_rows - 1) / tile_rows),
        least(count == 0 ? 0 : rows / count),
        longer(rows - least * count) {}
  int64_t first_row(int64_t tile) const { return tile * least + (tile < longer ? tile : longer); }
  int64_t rows_of(int64_t tile) const { return least + (tile < longer); }
};

// Where a tile's sums start and go.
struct TileOutput {
  const float* start;  // [rows][vectors * width] with rows `start_stride` apart: 0 for a bias; null for zeros
  int64_t start_stride;
  void* out;             // [rows][columns]
  const void* residual;  // the same, or null
  int64_t out_stride;    // from row to row of both
  int64_t columns;       // filters that exist; those behind them are computed but not stored
  bool relu;
  bool in_cache = false;  // out and residual are; else each row of them is fetched as the sums proceed
};

// What a tile fetches into the caches while it computes: one address at each step of the depth.
struct Ahead {
  const char* at;
  int64_t step;  // bytes from one to the next
};

// What the tile itself will need.
template <typename In>
static inline Ahead ahead_in_panel(const In* panel, int64_t vectors) {
  const int64_t step = per_step<In> * vectors * width;
  return {reinterpret_cast<const char*>(panel + prefetch_steps * step), step * int64_t(sizeof(In))};
}

// The part that falls to each of `tiles` tiles of what lies behind a chunk of the weight, as much as the chunk: the
// first tile to come to it would wait for memory at every step, the others find it in the L2 cache. Of the time without
// it Winograd took 0.74-0.86 with 14x14 and 7x7 maps at batch 1 and 0.78 with 7x7 at batch 8, GEMM 0.83-0.90 with 7x7
// at batch 1 and 0.91-1.0 with 14x14 and 7x7 at batch 8 (ResNet-50 in float32, 2 Zen 5 cores).
template <typename In>
class AheadOfChunks {
 public:
  AheadOfChunks(int64_t columns, int64_t tiles)
      : row_(columns * int64_t(sizeof(In))), step_((row_ * per_step<In> + tiles - 1) / tiles) {}
  Ahead of(const In* chunk, int64_t depth, int64_t tile) const {
    const int64_t steps = (depth + per_step<In> - 1) / per_step<In>;
    return {reinterpret_cast<const char*>(chunk) + depth * row_ + tile * steps * step_, step_};
  }

 private:
  int64_t row_, step_;  // bytes: of the weight at one channel, of what a step fetches
};

// out = relu(start + sum over taps and depth of rows * panel + residual). The last value of an odd depth is multiplied
// alone.
template <typename In>
using GemmTile = void (*)(const In* const* row,  // [taps][tile_rows]; row[tap][0] null: zeros
                          int64_t taps,
                          int64_t offset,  // into every row
                          int64_t depth,
                          const In* panel,  // [taps][depth / per_step][vectors * width][per_step]
                          const TileOutput& o, Ahead ahead);

// The tile of a size, by the types of inputs and outputs. In gemm_tile.cpp: for each pair of types there are as many
// functions as sizes.
GemmTile<float> gemm_tile_of(const float*, const float*, int64_t rows, int64_t vectors);
GemmTile<float> gemm_tile_of(const float*, const bf16*, int64_t rows, int64_t vectors);
GemmTile<float> gemm_tile_of(const float*, const f16*, int64_t rows, int64_t vectors);
GemmTile<bf16> gemm_tile_of(const bf16*, const float*, int64_t rows, int64_t vectors);  // only with AVX-512 BF16
GemmTile<bf16> gemm_tile_of(const bf16*, const bf16*, int64_t rows, int64_t vectors);

template <typename In, typename Out>
static inline GemmTile<In> gemm_tile(int64_t rows, int64_t vectors) {
  return gemm_tile_of(static_cast<const In*>(nullptr), static_cast<const Out*>(nullptr), rows, vectors);
}

// Vectors of the panel that starts at `filter`: the last one of a group is as narrow as its filters allow.
static inline int64_t vectors_of_panel(int64_t filters, int64_t filter) {
  const int64_t left = (filters - filter + width - 1) / width;
  return left < panel_vectors ? left : panel_vectors;
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
