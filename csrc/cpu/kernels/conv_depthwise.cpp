// Depthwise convolution: every channel has one filter of its own. Compiled once per level (levels.h).
//
// Channels are the lanes. A tile of output pixels side by side takes a vector of channels through all kernel rows; an
// input vector is loaded once for all the kernel's columns. Tiles find their input through pointers, which point at
// zeros where the kernel meets padding, and which all vectors of channels share.
#include "rows.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Output pixels of a tile; those behind the row's end are computed but not stored.
static int64_t tile_pixels_of(const ConvShape& s) {
  const auto computed = [&](int64_t pixels) { return (s.q + pixels - 1) / pixels * pixels; };
  return computed(7) < computed(8) ? 7 : 8;
}

static constexpr int positions_of(int columns, int stride, int pixels) { return (pixels - 1) * stride + columns; }

// [rows][positions], where a row of a kernel that is not taken at once counts once a column.
template <typename T>
struct Tile {
  const Conv& conv;
  const T* const* at;
  int64_t rows;
  int64_t pixel, live;  // the first output pixel, how many of them exist
};

// A vector of channels.
template <int columns, int stride, int pixels, typename T>
static inline __attribute__((always_inline)) void sum_tile(const Tile<T>& tile, int64_t channel) {
  constexpr int positions = positions_of(columns, stride, pixels);
  const Conv& conv = tile.conv;
  const int64_t step = conv.shape.c;
  const float* weight = static_cast<const float*>(conv.weight) + channel;
  const T* const* at = tile.at;
  vec sum[pixels];
  each<pixels, 1>([&](int i, int) { sum[i] = load(conv.bias + channel); });
  for (int64_t r = 0; r < tile.rows; ++r, at += positions, weight += columns * step) {
    vec w[columns];
    each<columns, 1>([&](int s, int) { w[s] = load(weight + s * step); });
    vec v;
    each<positions, columns>([&](int x, int s) {
      if (s == 0) v = load(at[x] + channel);
      if (x >= s && (x - s) % stride == 0 && (x - s) / stride < pixels) sum[(x - s) / stride] += v * w[s];
    });
  }
  const int64_t to = tile.pixel * step + channel;
  const T* residual = static_cast<const T*>(conv.residual);
  T* output = static_cast<T*>(conv.output);
  each<pixels, 1>([&](int i, int) {
    if (i >= tile.live) return;
    vec v = sum[i];
    if (residual) v += load(residual + to + i * step);
    store_rounded(output + to + i * step, conv.relu ? relu(v) : v);
  });
}

// Where there are fewer channels than a vector has: one value after the other.
template <int columns, int stride, int pixels, typename T>
static void sum_values(const Tile<T>& tile) {
  constexpr int positions = positions_of(columns, stride, pixels);
  const Conv& conv = tile.conv;
  const int64_t step = conv.shape.c;
  for (int64_t i = 0; i < pixels && i < tile.live; ++i) {
    for (int64_t channel = 0; channel < step; ++channel) {
      vec v = load_part(conv.bias + channel, 1);
      for (int64_t tap = 0; tap < tile.rows * columns; ++tap) {
        const T* at = tile.at[tap / columns * positions + i * stride + tap % columns];
        v += load_part(at + channel, 1) * load_part(static_cast<const float*>(conv.weight) + tap * step + channel, 1);
      }
      const int64_t to = (tile.pixel + i) * step + channel;
      if (conv.residual) v += load_part(static_cast<const T*>(conv.residual) + to, 1);
      store_part(static_cast<T*>(conv.output) + to, conv.relu ? relu(v) : v, 1);
    }
  }
}

// The last vector of channels overlaps the one before, if need be, and computes the same values again.
template <int columns, int stride, int pixels, typename T>
static __attribute__((flatten)) void sum_channels(const Tile<T>& tile) {
  const int64_t channels = tile.conv.shape.c;
  for (int64_t channel = 0; channel < channels; channel += width)
    sum_tile<columns, stride, pixels>(tile, channel + width <= channels ? channel : channels - width);
}

template <int columns, int stride, typename T>
static void sum_channels(const Tile<T>& tile, int64_t pixels) {
  if (tile.conv.shape.c < width)
    return pixels == 8 ? sum_values<columns, stride, 8>(tile) : sum_values<columns, stride, 7>(tile);
  return pixels == 8 ? sum_channels<columns, stride, 8>(tile) : sum_channels<columns, stride, 7>(tile);
}

// Pointers to `positions` input pixels of row y of image n, `step` apart from x on.
template <typename T>
static void find(const Conv& conv, int64_t n, int64_t y, int64_t x, int64_t step, int64_t positions, const T** at) {
  const ConvShape& s = conv.shape;
  const T* zeros = static_cast<const T*>(conv.zeros);
  const T* row = static_cast<const T*>(conv.input) + (n * s.h + y) * s.w * s.c;
  for (int64_t i = 0; i < positions; ++i, x += step)
    at[i] = y >= 0 && y < s.h && x >= 0 && x < s.w ? row + x * s.c : zeros;
}

template <typename T>
static void rows_of_type(const Conv& conv, int64_t begin, int64_t end, const T** at) {
  const ConvShape& s = conv.shape;
  const bool rows_at_once = takes_rows(s);
  const int64_t pixels = tile_pixels_of(s), columns = rows_at_once ? s.s : 1, stride = s.stride[1];
  const int64_t step = rows_at_once ? 1 : stride, rows = s.r * s.s / columns;
  const int64_t positions = rows_at_once ? positions_of(3, int(stride), int(pixels)) : pixels;
  const int64_t last = (positions - 1) * step + (s.s - columns) * s.dilation[1];  // position of a tile
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / s.p, top = row % s.p * s.stride[0] - s.padding[0];
    const bool inside = top >= 0 && top + (s.r - 1) * s.dilation[0] < s.h;
    for (int64_t q = 0, left = -s.padding[1]; q < s.q; q += pixels, left += pixels * stride) {
      if (inside && left - pixels * stride >= 0 && left + last < s.w) {  // as the tile before
        for (int64_t i = 0; i < rows * positions; ++i) at[i] += pixels * stride * s.c;
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t r = i * columns / s.s, t = i * columns % s.s;
          find(conv, n, top + r * s.dilation[0], left + t * s.dilation[1], step, positions, at + i * positions);
        }
      }
      const Tile<T> tile{conv, at, rows, row * s.q + q, s.q - q};
      if (!rows_at_once) {
        sum_channels<1, 1>(tile, pixels);
      } else if (stride == 1) {
        sum_channels<3, 1>(tile, pixels);
      } else {
        sum_channels<3, 2>(tile, pixels);
      }
    }
  }
}

int64_t conv_depthwise_scratch(const ConvShape& s) {
  return s.r * s.s * positions_of(3, 2, 8) * int64_t(sizeof(void*));
}

// Output rows [begin, end) of all images.
void conv_depthwise(const Conv& conv, int64_t begin, int64_t end, void* scratch) {
  if (conv.input_type == Storage::f32) return rows_of_type(conv, begin, end, static_cast<const float**>(scratch));
  if (conv.input_type == Storage::bf16) return rows_of_type(conv, begin, end, static_cast<const bf16**>(scratch));
  rows_of_type(conv, begin, end, static_cast<const f16**>(scratch));
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
