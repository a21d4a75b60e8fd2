// Direct convolution for a network's first layer: one to four input channels. Compiled once per level (levels.h).
//
// The caller copies each input row once, channel by channel within a pixel and with the padding around. What a row of
// the kernel meets lies side by side there, so it is one long product with the filters, of 7 * 3 values for ResNet's
// stem, and the tiles of conv_gemm.cpp compute it. (oneDNN vectorises over input channels, of which there are 3 here.)
#include "../levels.h"
#include "gemm_tile.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

constexpr int64_t most_taps = 256;

// Tiles whose input (8 KiB for the 7x7 stem) and one panel of filters (9 KiB with AVX2) fit into the L1 cache, also
// where two hyperthreads share it.
constexpr int64_t tiles_at_a_time = 8;

template <typename Out, typename In>
static void conv_row_of(const ConvRow& row) {
  const In* at[most_taps * tile_rows];  // of the first tile; the others lie behind it
  for (int64_t t = 0; t < row.taps; ++t) {
    const In* tap = static_cast<const In*>(row.input[t]);
    for (int64_t i = 0; i < tile_rows; ++i) at[t * tile_rows + i] = tap == nullptr ? tap : tap + i * row.pixel_step;
  }
  const Tiles tiles(row.pixels);
  for (int64_t first = 0; first < tiles.count; first += tiles_at_a_time) {
    const int64_t last = first + tiles_at_a_time < tiles.count ? first + tiles_at_a_time : tiles.count;
    for (int64_t filter = 0; filter < row.filters; filter += panel_width) {
      const int64_t vectors = vectors_of_panel(row.filters, filter), left = row.filters - filter;
      const int64_t columns = left < vectors * width ? left : vectors * width;
      const In* panel = static_cast<const In*>(row.weight) + filter * row.taps * row.depth;
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t pixel = tiles.first_row(tile), rows = tiles.rows_of(tile);
        Out* out = static_cast<Out*>(row.output) + pixel * row.filters + filter;
        const TileOutput o{row.bias + filter, 0, out, nullptr, row.filters, columns, row.relu};
        gemm_tile<In, Out>(rows, vectors)(at, row.taps, pixel * row.pixel_step, row.depth, panel, o,
                                          ahead_in_panel(panel, vectors));
      }
    }
  }
}

template <typename In>
static void conv_row_of(const ConvRow& row) {
  if (row.output_type == Storage::f32) return conv_row_of<float, In>(row);
  if (row.output_type == Storage::bf16) return conv_row_of<bf16, In>(row);
  if constexpr (per_step<In> == 1) conv_row_of<f16, In>(row);
}

void conv_row(const ConvRow& row) {
#if defined(__AVX512BF16__)
  if (row.weight_type == Storage::bf16) return conv_row_of<bf16>(row);
#endif
  conv_row_of<float>(row);
}

static inline void convert(float from, float* to) { *to = from; }
static inline void convert(bf16 from, float* to) { *to = bf16_to_float(from.bits); }
static inline void convert(f16 from, float* to) { *to = load_part(&from, 1)[0]; }
static inline void convert(bf16 from, bf16* to) { *to = from; }

template <typename T, typename To>
static void convert(const T* from, int64_t step, int64_t n, To* to) {
  int64_t i = 0;
  if constexpr (sizeof(To) == sizeof(float)) {
    if (step == 1)
      for (; i + width <= n; i += width) store(to + i, load(from + i));
  }
  for (; i < n; ++i) convert(from[i * step], to + i);
}

template <int channels, typename To>
static void interleave(const To (*planes)[64], int64_t pixels, To* to) {
  for (int64_t x = 0; x < pixels; ++x)
    for (int64_t c = 0; c < channels; ++c) to[x * channels + c] = planes[c][x];
}

template <typename T, typename To>
static void read_pixels_as(const PixelRow& row, To* to) {
  const T* from = static_cast<const T*>(row.pixels);
  if (row.channel_step == 1 && row.pixel_step == row.channels) return convert(from, 1, row.width * row.channels, to);
  To planes[4][64];
  for (int64_t x = 0, n; x < row.width; x += n, to += n * row.channels) {
    n = row.width - x < 64 ? row.width - x : 64;
    for (int64_t c = 0; c < row.channels; ++c)
      convert(from + x * row.pixel_step + c * row.channel_step, row.pixel_step, n, planes[c]);
    if (row.channels == 1) interleave<1>(planes, n, to);
    if (row.channels == 2) interleave<2>(planes, n, to);
    if (row.channels == 3) interleave<3>(planes, n, to);
    if (row.channels == 4) interleave<4>(planes, n, to);
  }
}

// [width][channels] into `to`: of the same type for bf16 weights, else of float.
void read_pixels(const PixelRow& row, Storage weight_type, void* to) {
  if (weight_type == Storage::bf16) return read_pixels_as<bf16>(row, static_cast<bf16*>(to));
  float* out = static_cast<float*>(to);
  if (row.type == Storage::f32) return read_pixels_as<float>(row, out);
  if (row.type == Storage::bf16) return read_pixels_as<bf16>(row, out);
  read_pixels_as<f16>(row, out);
}

extern const int64_t conv_row_taps = most_taps;

}  // namespace resnet_fast::RESNET_FAST_LEVEL
