// Convolution as a matrix product (implicit GEMM), float32: output pixels are the rows, filters the columns, kernel
// positions times channels the depth. Compiled once per level (levels.h).
//
// Nothing is gathered: each tile reads its input pixels through pointers, one per row and kernel position, which point
// at zeros where the kernel meets padding (the indirection of Dukhan, "The Indirect Convolution Algorithm", 2019). So
// stride, padding and dilation cost nothing in the inner loop.
#include "../levels.h"
#include "gemm_tile.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Pointers of output pixels [begin, end) to their input pixels: [tiles][taps][tile_rows].
static void find_rows(const ConvGemm& conv, int64_t group, int64_t begin, int64_t end, const float** row) {
  const ConvShape& s = conv.shape;
  const int64_t taps = s.r * s.s;
  const float* input = conv.input + group * (s.c / s.groups);
  const int64_t tiles = tiles_of(end - begin);
  int64_t tile = 0, tile_begin = begin;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    while (pixel >= begin + (end - begin) * (tile + 1) / tiles) tile_begin = begin + (end - begin) * ++tile / tiles;
    const int64_t i = pixel - tile_begin;
    const int64_t n = pixel / (s.p * s.q), p = pixel / s.q % s.p, q = pixel % s.q;
    const float** at = row + tile * taps * tile_rows + i;
    for (int64_t r = 0; r < s.r; ++r) {
      const int64_t y = p * s.stride[0] - s.padding[0] + r * s.dilation[0];
      for (int64_t t = 0; t < s.s; ++t, at += tile_rows) {
        const int64_t x = q * s.stride[1] - s.padding[1] + t * s.dilation[1];
        const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
        *at = inside ? input + ((n * s.h + y) * s.w + x) * s.c : conv.zeros;
      }
    }
  }
}

int64_t conv_gemm_scratch(const ConvShape& s, int64_t pixels) {
  return tiles_of(pixels) * tile_rows * (s.r * s.s * int64_t(sizeof(float*)) + panel_width * int64_t(sizeof(float)));
}

void conv_gemm_f32(const ConvGemm& conv, int64_t group, int64_t pixel_begin, int64_t pixel_end, int64_t filter_begin,
                   int64_t filter_end, void* scratch) {
  const ConvShape& s = conv.shape;
  const int64_t taps = s.r * s.s, depth = s.c / s.groups, filters = s.k / s.groups;
  const int64_t pixels = pixel_end - pixel_begin, tiles = tiles_of(pixels);
  const float** row = static_cast<const float**>(scratch);
  float* partial = reinterpret_cast<float*>(row + tiles * taps * tile_rows);
  find_rows(conv, group, pixel_begin, pixel_end, row);

  const int64_t filters_padded = (filters + width - 1) / width * width;
  const float* weight = conv.weight + group * filters_padded * taps * depth;
  const int64_t chunk_depth = depth < depth_chunk ? depth : depth_chunk;
  const int64_t chunk_taps = depth < depth_chunk ? (depth_chunk / depth) : 1;
  for (int64_t filter = filter_begin; filter < filter_end; filter += panel_width) {
    const int64_t vectors = vectors_of_panel(filters, filter), columns = vectors * width;
    const float* panel = weight + filter * taps * depth;
    const int64_t first = group * filters + filter;
    for (int64_t tap = 0; tap < taps; tap += chunk_taps) {
      const int64_t n_taps = tap + chunk_taps < taps ? chunk_taps : taps - tap;
      for (int64_t k = 0; k < depth; k += chunk_depth) {
        const int64_t n_depth = k + chunk_depth < depth ? chunk_depth : depth - k;
        const bool is_first = tap == 0 && k == 0, is_last = tap + n_taps == taps && k + n_depth == depth;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t done = pixels * tile / tiles, rows = pixels * (tile + 1) / tiles - done;
          const int64_t at = (pixel_begin + done) * s.k + first;
          float* sums = partial + done * columns;
          TileOutput o{sums, columns, sums, nullptr, columns, columns, false};
          if (is_first) o.start = conv.bias + first, o.start_stride = 0;
          if (is_last) {
            o.out = conv.output + at;
            o.residual = conv.residual ? conv.residual + at : nullptr;
            o.out_stride = s.k;
            o.columns = filters - filter < columns ? filters - filter : columns;
            o.relu = conv.relu;
          }
          const float** here = row + (tile * taps + tap) * tile_rows;
          gemm_tiles[vectors - 1][rows - 1](here, n_taps, k, n_depth, panel + (tap * depth + k) * columns, o);
        }
      }
    }
  }
}

extern const int64_t vector_width = width;
extern const int64_t gemm_panel = panel_width;

}  // namespace resnet_fast::RESNET_FAST_LEVEL
