// Convolution as a matrix product (implicit GEMM): output pixels are the rows, filters the columns, kernel
// positions times channels the depth. Compiled once per level (levels.h).
//
// Nothing is gathered: each tile reads its input pixels through pointers, one per row and kernel position, which point
// at zeros where the kernel meets padding (the indirection of Dukhan, "The Indirect Convolution Algorithm", 2019). So
// stride, padding and dilation cost nothing in the inner loop.
#include "../levels.h"
#include "gemm_tile.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Pointers to what the kernel meets at output pixel [n, p, q], `tile_rows` apart.
template <typename T>
static inline void find_row(const ConvShape& s, const T* input, const T* zeros, int64_t n, int64_t p, int64_t q,
                            const T** at) {
  for (int64_t r = 0; r < s.r; ++r) {
    const int64_t y = p * s.stride[0] - s.padding[0] + r * s.dilation[0];
    const T* line = input + (n * s.h + y) * s.w * s.c;
    for (int64_t t = 0; t < s.s; ++t, at += tile_rows) {
      const int64_t x = q * s.stride[1] - s.padding[1] + t * s.dilation[1];
      *at = y >= 0 && y < s.h && x >= 0 && x < s.w ? line + x * s.c : zeros;
    }
  }
}

// Pointers of output pixels [begin, end) to their input pixels: [tiles][taps][tile_rows]. The first one of a tile is
// null where all of the tile meets padding: there is nothing to multiply (of 3x3 with stride 2 into 7x7 outputs 4 %).
template <typename T>
static void find_rows(const Conv& conv, int64_t group, int64_t begin, int64_t end, const T** row) {
  const ConvShape& s = conv.shape;
  const T* zeros = static_cast<const T*>(conv.zeros);
  const T* input = static_cast<const T*>(conv.input) + group * (s.c / s.groups);
  const Tiles tiles(end - begin);
  const int64_t taps = s.r * s.s;
  if (taps == 1 && s.stride[0] == 1 && s.stride[1] == 1 && s.p == s.h && s.q == s.w) {  // pixel for pixel
    input += begin * s.c;
    for (int64_t tile = 0; tile < tiles.count; ++tile, row += tile_rows)
      for (int64_t i = 0; i < tiles.rows_of(tile); ++i, input += s.c) row[i] = input;
    return;
  }
  int64_t n = begin / (s.p * s.q), p = begin / s.q % s.p, q = begin % s.q;
  for (int64_t tile = 0; tile < tiles.count; ++tile, row += taps * tile_rows) {
    const int64_t rows = tiles.rows_of(tile);
    for (int64_t i = 0; i < rows; ++i) {
      find_row(s, input, zeros, n, p, q, row + i);
      if (++q == s.q) q = 0, ++p;
      if (p == s.p) p = 0, ++n;
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T** at = row + tap * tile_rows;
      int64_t i = 0;
      while (i < rows && at[i] == zeros) ++i;
      if (i == rows) at[0] = nullptr;
    }
  }
}

// Whether pixels are copied before they are multiplied, once for all panels.
static inline bool copies(const Conv& conv) { return conv.input_type != conv.weight_type || conv.norm.mean; }

// The same for 1x1 kernels whose pixels are widened or normalised: they lie in `copy` then.
template <typename T, typename In>
static void copy_rows(const Conv& conv, int64_t group, int64_t begin, int64_t end, const In** row, In* copy) {
  const int64_t depth = conv.shape.c / conv.shape.groups;
  const NormVectors& norm = conv.norm;
  const Tiles tiles(end - begin);
  find_rows(conv, group, begin, end, reinterpret_cast<const T**>(row));
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    for (int64_t i = 0; i < tiles.rows_of(tile); ++i, copy += depth) {
      const In** at = row + tile * tile_rows + i;
      const T* from = reinterpret_cast<const T*>(*at);
      if (from == nullptr) break;
      for (int64_t k = 0; k < depth; k += width) {
        const int64_t n = depth - k;
        vec v = n < width ? load_part(from + k, n) : load(from + k);
        if (norm.mean) v = relu((v - load(norm.mean + k)) * load(norm.scale + k) + load(norm.shift + k));
        n < width ? store_part(copy + k, v, n) : store_rounded(copy + k, v);
      }
      *at = copy;
    }
  }
}

int64_t conv_gemm_scratch(const Conv& conv, int64_t pixels) {
  const ConvShape& s = conv.shape;
  const int64_t rows = Tiles(pixels).count * tile_rows;
  const int64_t copied = copies(conv) ? s.c / s.groups : 0;
  return rows * (s.r * s.s * int64_t(sizeof(float*)) + (panel_width + copied) * int64_t(sizeof(float)));
}

template <typename In>
constexpr int64_t depth_chunk = gemm_steps * per_step<In>;

// What the loops below agree on: some output pixels of one group.
template <typename In>
struct Block {
  const Conv& conv;
  int64_t taps, depth;     // kernel positions, channels of the group
  int64_t filters, first;  // of the group; its first one
  const In* weight;        // of the group
  int64_t begin;           // its first output pixel
  Tiles tiles;             // of output pixels
  const In** row;          // [tiles.count][taps][tile_rows]
};

// Where a tile's finished sums go.
template <typename Out, typename In>
static inline TileOutput output_of(const Block<In>& b, int64_t pixel, int64_t filter, int64_t columns) {
  const int64_t k = b.conv.shape.k, at = (b.begin + pixel) * k + b.first + filter, left = b.filters - filter;
  const Out* residual = b.conv.residual ? static_cast<const Out*>(b.conv.residual) + at : nullptr;
  return {nullptr, 0, static_cast<Out*>(b.conv.output) + at, residual, k, left < columns ? left : columns, b.conv.relu};
}

// What tile `tile` reads of kernel positions [tap, tap + taps) and channels [k, k + depth).
template <typename In>
static inline void prefetch_rows(const Block<In>& b, int64_t tile, int64_t tap, int64_t taps, int64_t k,
                                 int64_t depth) {
  if (tile == b.tiles.count) return;
  const int64_t rows = b.tiles.rows_of(tile);
  for (int64_t t = tap; t < tap + taps; ++t) {
    const In* const* row = b.row + (tile * b.taps + t) * tile_rows;
    if (row[0] == nullptr) continue;
    for (int64_t i = 0; i < rows; ++i) prefetch(row[i] + k, depth);
  }
}

// Tile by tile, where the depth can be summed at once: each takes all panels in turn, so that outputs are written, and
// the residual read, row after row. Panel by panel, 128 to 512 channels at 28x28 took 1.26 times as long (2 Zen 3
// cores, batch 8). What is prefetched makes 64 to 256 channels at 56x56 1.2 times as fast, with a residual 1.5 times (2
// Zen 5 cores, batch 8).
template <typename Out, typename In>
static void sum_by_tile(const Block<In>& b, int64_t filter_begin, int64_t filter_end) {
  for (int64_t tile = 0; tile < b.tiles.count; ++tile) {
    const int64_t pixel = b.tiles.first_row(tile), rows = b.tiles.rows_of(tile);
    prefetch_rows(b, tile + 1, 0, b.taps, 0, b.depth);
    for (int64_t filter = filter_begin; filter < filter_end; filter += panel_width) {
      const int64_t vectors = vectors_of_panel(b.filters, filter);
      TileOutput o = output_of<Out>(b, pixel, filter, vectors * width);
      o.start = b.conv.bias + b.first + filter;
      const In* panel = b.weight + filter * b.taps * b.depth;
      gemm_tile<In, Out>(rows, vectors)(b.row + tile * b.taps * tile_rows, b.taps, 0, b.depth, panel, o,
                                        ahead_in_panel(panel, vectors));
    }
  }
}

// Panel by panel: each chunk of one is summed for all tiles in turn, while it is in the L1 cache.
template <typename Out, typename In>
static void sum_by_panel(const Block<In>& b, int64_t filter_begin, int64_t filter_end, float* partial) {
  const int64_t chunk = b.depth < depth_chunk<In> ? b.depth : depth_chunk<In>;
  const int64_t chunk_taps = b.depth < depth_chunk<In> ? depth_chunk<In> / b.depth : 1;
  for (int64_t filter = filter_begin; filter < filter_end; filter += panel_width) {
    const int64_t vectors = vectors_of_panel(b.filters, filter), columns = vectors * width;
    const In* panel = b.weight + filter * b.taps * b.depth;
    const AheadOfChunks<In> ahead(columns, b.tiles.count);
    for (int64_t tap = 0; tap < b.taps; tap += chunk_taps) {
      const int64_t taps = tap + chunk_taps < b.taps ? chunk_taps : b.taps - tap;
      for (int64_t k = 0; k < b.depth; k += chunk) {
        const int64_t depth = k + chunk < b.depth ? chunk : b.depth - k;
        const bool is_first = tap == 0 && k == 0, is_last = tap + taps == b.taps && k + depth == b.depth;
        const In* weight = panel + (tap * b.depth + k) * columns;
        const auto tile_of = is_last ? gemm_tile<In, Out> : gemm_tile<In, float>;
        for (int64_t tile = 0; tile < b.tiles.count; ++tile) {
          const int64_t pixel = b.tiles.first_row(tile), rows = b.tiles.rows_of(tile);
          float* sums = partial + pixel * columns;
          TileOutput o{sums, columns, sums, nullptr, columns, columns, false, true};
          if (is_last) o = output_of<Out>(b, pixel, filter, columns);
          o.start = is_first ? b.conv.bias + b.first + filter : sums;
          o.start_stride = is_first ? 0 : columns;
          tile_of(rows, vectors)(b.row + (tile * b.taps + tap) * tile_rows, taps, k, depth, weight, o,
                                 ahead.of(weight, taps * depth, tile));
        }
      }
    }
  }
}

// Whether to go panel by panel, each fetched while the one before it is multiplied: there are more of them than the L2
// cache holds, or they come from memory and are needed once. At batch 1 512 to 2048 channels at 7x7 took 0.83 of the
// time (2 Zen 5 cores, float32); 256 to 1024 channels in bfloat16, 512 KiB, took 1.04 times as long.
template <typename In>
static bool panel_by_panel(const Block<In>& b, int64_t filters) {
  const ConvShape& s = b.conv.shape;
  constexpr int64_t most_bytes = 640 << 10;  // of panels
  const int64_t depth = b.taps * b.depth, bytes = filters * depth * int64_t(sizeof(In));
  return depth > depth_chunk<In> || bytes > most_bytes || filters <= panel_width || b.tiles.rows == s.n * s.p * s.q;
}

template <typename Out, typename In>
static void multiply(const Block<In>& b, int64_t filter_begin, int64_t filter_end, float* partial) {
  if (panel_by_panel(b, filter_end - filter_begin)) return sum_by_panel<Out>(b, filter_begin, filter_end, partial);
  sum_by_tile<Out>(b, filter_begin, filter_end);
}

// `row` points into the maps or, in float32, to pixels widened to it.
template <typename In>
static void multiply(const Conv& conv, int64_t group, int64_t pixel_begin, int64_t pixels, int64_t filter_begin,
                     int64_t filter_end, const In** row, float* partial) {
  const ConvShape& s = conv.shape;
  const int64_t taps = s.r * s.s, depth = s.c / s.groups, filters = s.k / s.groups;
  const int64_t padded = (filters + width - 1) / width * width;
  const In* weight = static_cast<const In*>(conv.weight) + group * padded * taps * depth;
  const Block<In> block{conv, taps, depth, filters, group * filters, weight, pixel_begin, Tiles(pixels), row};
  if (conv.output_type == Storage::f32) return multiply<float>(block, filter_begin, filter_end, partial);
  if (conv.output_type == Storage::bf16) return multiply<bf16>(block, filter_begin, filter_end, partial);
  if constexpr (per_step<In> == 1) multiply<f16>(block, filter_begin, filter_end, partial);
}

void conv_gemm(const Conv& conv, int64_t group, int64_t pixel_begin, int64_t pixel_end, int64_t filter_begin,
               int64_t filter_end, void* scratch) {
  const int64_t pixels = pixel_end - pixel_begin, rows = Tiles(pixels).count * tile_rows;
  const float** row = static_cast<const float**>(scratch);
  float* partial = reinterpret_cast<float*>(row + rows * conv.shape.r * conv.shape.s);
  float* copy = partial + rows * panel_width;
#if defined(__AVX512BF16__)
  if (conv.weight_type == Storage::bf16) {
    const bf16** bf16_row = static_cast<const bf16**>(scratch);
    if (copies(conv)) {
      copy_rows<bf16>(conv, group, pixel_begin, pixel_end, bf16_row, reinterpret_cast<bf16*>(copy));
    } else {
      find_rows(conv, group, pixel_begin, pixel_end, bf16_row);
    }
    return multiply(conv, group, pixel_begin, pixels, filter_begin, filter_end, bf16_row, partial);
  }
#endif
  if (!copies(conv)) {
    find_rows(conv, group, pixel_begin, pixel_end, row);
  } else if (conv.input_type == Storage::f32) {
    copy_rows<float>(conv, group, pixel_begin, pixel_end, row, copy);
  } else if (conv.input_type == Storage::bf16) {
    copy_rows<bf16>(conv, group, pixel_begin, pixel_end, row, copy);
  } else {
    copy_rows<f16>(conv, group, pixel_begin, pixel_end, row, copy);
  }
  multiply(conv, group, pixel_begin, pixels, filter_begin, filter_end, row, partial);
}

#if defined(__AVX512BF16__)
extern const int64_t multiplies_bf16 = 1;
#else
extern const int64_t multiplies_bf16 = 0;
#endif
extern const int64_t vector_width = width;
extern const int64_t gemm_panel = panel_width;

}  // namespace resnet_fast::RESNET_FAST_LEVEL
