// The 7x7 convolution with stride 2 on one to four channels, a ResNet's first layer, by Winograd's algorithm. Compiled
// once per level (levels.h).
//
// Pixels of even and odd rows and columns are four phases of the padded image, each a quarter of its size. On them as
// channels the convolution has 4x4 taps (of eight rows and columns the last one is zero) and stride 1, so F(3x3, 4x4)
// applies: 36 products of 4 C values for 9 outputs, 16 C an output instead of 49 C. F(4x4, 4x4) would have 12.25 C but
// errs twice as much, and what errs here goes through the whole network: random ResNet-101's logits at batch 8 were off
// by 5.6e-6 (torch's by 2.5e-6).
#include "../levels.h"
#include "gemm_tile.h"
#include "winograd.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

constexpr int tile_size = stem_tile, taps = stem_taps, size = stem_size;

static inline int64_t lanes_of(int64_t channels) { return (4 * channels + width - 1) / width * width; }

// From one product to the next; see conv_winograd.cpp.
static inline int64_t input_stride(int64_t channels) { return tile_rows * lanes_of(channels) + 16; }
constexpr int64_t output_stride = tile_rows * panel_width + 16;

int64_t winograd_stem_scratch(int64_t channels) {
  return size * size * (input_stride(channels) + output_stride) * int64_t(sizeof(float));
}

template <int channels>
static void copy_phases(const float* row, int64_t positions, float* to) {
  for (int64_t x = 0; x < positions; ++x)
    __builtin_memcpy(to + x * lanes_of(channels), row + x * 2 * channels, 2 * channels * sizeof(float));
}

// The even and odd pixels of a row, [2 * positions][channels], into two of the four phases, [positions][lanes].
void stem_phases(const float* row, int64_t channels, int64_t positions, float* to) {
  if (channels == 1) copy_phases<1>(row, positions, to);
  if (channels == 2) copy_phases<2>(row, positions, to);
  if (channels == 3) copy_phases<3>(row, positions, to);
  if (channels == 4) copy_phases<4>(row, positions, to);
}

// Tiles [first, first + count) into [size^2][count][lanes].
static void input_tiles(const StemRows& rows, int64_t first, int64_t count, float* transformed) {
  const int64_t lanes = lanes_of(rows.channels), stride = input_stride(rows.channels);
  for (int64_t tile = 0; tile < count; ++tile) {
    for (int64_t lane = 0; lane < lanes; lane += width) {
      const int64_t from = (first + tile) * tile_size * lanes + lane;
      float* to = transformed + tile * lanes + lane;
      transform_input<tile_size, taps>([&](int i, int j) { return load(rows.input[i] + from + j * lanes); },
                                       [&](int i, int j, vec v) { store(to + (i * size + j) * stride, v); });
    }
  }
}

// A tile of outputs at filters [filter, filter + width) from its products.
template <typename Out>
static inline void output_tile(const StemRows& rows, const float* products, int64_t tile, int64_t filter, vec* check) {
  const vec bias = load(rows.bias + filter);
  const int64_t filters = rows.filters - filter, x = tile * tile_size, columns = rows.pixels - x;
  Out* output = static_cast<Out*>(rows.output) + x * rows.filters + filter;
  transform_output<tile_size, taps>(products, output_stride, check, [&](int i, const vec* row) {
    if (i >= rows.rows) return;
    for (int j = 0; j < tile_size; ++j) {
      if (j >= columns) break;
      Out* to = output + (i * rows.pixels + j) * rows.filters;
      const vec y = rows.relu ? relu(row[j] + bias) : row[j] + bias;
      filters >= width ? store_rounded(to, y) : store_part(to, y, filters);
    }
  });
}

// As many tiles at a time as a tile of the products has rows: they, the transformed input (16 KB for 3 channels) and
// the weight (110 KB for 64 filters) stay in the L2 cache.
template <typename Out>
static bool stem_rows(const StemRows& rows, float* scratch) {
  const int64_t depth = 4 * rows.channels, lanes = lanes_of(rows.channels), stride = input_stride(rows.channels);
  const Tiles groups(rows.tiles);
  float* products = scratch + size * size * stride;
  vec check{};
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t first = groups.first_row(group), count = groups.rows_of(group);
    input_tiles(rows, first, count, scratch);
    for (int64_t filter = 0; filter < rows.filters; filter += panel_width) {
      const int64_t vectors = vectors_of_panel(rows.filters, filter), columns = vectors * width;
      const float* panel = rows.weight + filter * size * size * depth;
      const TileOutput out{nullptr, 0, nullptr, nullptr, columns, columns, false, true};
      const AheadOfChunks<float> ahead(columns, 1);
      const GemmTile<float> multiply = gemm_tile<float, float>(count, vectors);
      for (int xi = 0; xi < size * size; ++xi, panel += depth * columns) {
        const float* row[tile_rows];
        for (int64_t i = 0; i < count; ++i) row[i] = scratch + xi * stride + i * lanes;
        TileOutput o = out;
        o.out = products + xi * output_stride;
        // The row of the point at infinity is the last one of the taps, which odd rows do not have.
        const int64_t used = xi / size == size - 1 ? depth / 2 : depth;
        multiply(row, 1, 0, used, panel, o, ahead.of(panel, depth, 0));
      }
      for (int64_t tile = 0; tile < count; ++tile)
        for (int64_t j = 0; j < columns; j += width)
          output_tile<Out>(rows, products + tile * columns + j, first + tile, filter + j, &check);
    }
  }
  return is_finite(check);
}

bool winograd_stem(const StemRows& rows, float* scratch) {
  if (rows.output_type == Storage::f32) return stem_rows<float>(rows, scratch);
  if (rows.output_type == Storage::bf16) return stem_rows<bf16>(rows, scratch);
  return stem_rows<f16>(rows, scratch);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
