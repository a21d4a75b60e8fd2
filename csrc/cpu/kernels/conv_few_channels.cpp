// Direct convolution for a network's first layer: one to four input channels, computed in float32. Compiled once per
// level (levels.h).
//
// A tile of `pixels_per_tile` output pixels and two vectors of filters stays in registers while all taps (kernel
// positions times channels) pass by: per tap two weight loads and one broadcast per pixel feed twice as many FMAs.
// oneDNN vectorises over input channels as well, of which there are 3 here. Input and output layouts differ anyway (the
// image may be NCHW, the map is NHWC), so the caller copies each input row once and this kernel only sees that copy.
#include "../levels.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

#if defined(__AVX512F__)
constexpr int pixels_per_tile = 12;  // 24 sums + 2 weights + 1 input of 32 registers
#else
constexpr int pixels_per_tile = 6;  // 12 + 2 + 1 of 16
#endif

// `pixels` output pixels from `pixel` on, filters [filter, filter + 2 * width).
template <int pixels, typename T>
static __attribute__((flatten)) void tile(const ConvRow& row, int64_t pixel, int64_t filter) {
  const float* x = row.input + pixel * row.pixel_step;
  const float* w = row.weight + filter / (2 * width) * row.block_stride;
  vec sum[pixels][2];
  each<pixels, 2>([&](int i, int j) { sum[i][j] = load(row.bias + filter + j * width); });
  for (int64_t t = 0; t < row.taps; ++t, w += 2 * width) {
    const float* xt = x + row.offsets[t];
    const vec w0 = load(w), w1 = load(w + width);
    each<pixels, 1>([&](int i, int) {
      const vec xi = broadcast(xt[i * row.pixel_step]);
      sum[i][0] += xi * w0;
      sum[i][1] += xi * w1;
    });
  }
  if (row.relu) each<pixels, 2>([&](int i, int j) { sum[i][j] = relu(sum[i][j]); });
  const int64_t left = row.filters - filter;
  T* out = static_cast<T*>(row.output) + pixel * row.filters + filter;
  each<pixels, 2>([&](int i, int j) {
    T* to = out + i * row.filters + j * width;
    if (left >= (j + 1) * width) {
      store_rounded(to, sum[i][j]);
    } else if (left > j * width) {
      store_part(to, sum[i][j], left - j * width);
    }
  });
}

// Pixels whose input (8 KiB for the 7x7 stem) and one block of filters (9 KiB) fit into the L1 cache, also where two
// hyperthreads share it.
constexpr int64_t chunk = 48;

template <typename T>
static void conv_row_into(const ConvRow& row) {
  for (int64_t start = 0; start < row.pixels; start += chunk) {
    const int64_t end = start + chunk < row.pixels ? start + chunk : row.pixels;
    for (int64_t filter = 0; filter < row.filters; filter += 2 * width) {
      int64_t pixel = start;
      for (; pixel + pixels_per_tile <= end; pixel += pixels_per_tile) tile<pixels_per_tile, T>(row, pixel, filter);
      if (pixel == end) continue;
      if (end >= pixels_per_tile) {  // the last tile overlaps the one before and computes the same values again
        tile<pixels_per_tile, T>(row, end - pixels_per_tile, filter);
      } else {
        for (; pixel < end; ++pixel) tile<1, T>(row, pixel, filter);
      }
    }
  }
}

void conv_row(const ConvRow& row) {
  if (row.output_type == Storage::f32) return conv_row_into<float>(row);
  if (row.output_type == Storage::bf16) return conv_row_into<bf16>(row);
  conv_row_into<f16>(row);
}

static inline float widened(float x) { return x; }
static inline float widened(bf16 x) { return bf16_to_float(x.bits); }
static inline float widened(f16 x) { return load_part(&x, 1)[0]; }

template <typename T>
static void widen_values(const T* from, int64_t step, int64_t n, float* to) {
  int64_t i = 0;
  if (step == 1)
    for (; i + width <= n; i += width) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widened(from[i * step]);
}

// n values of any type, `step` apart, as float32.
void widen(const void* from, Storage type, int64_t step, int64_t n, float* to) {
  if (type == Storage::f32) return widen_values(static_cast<const float*>(from), step, n, to);
  if (type == Storage::bf16) return widen_values(static_cast<const bf16*>(from), step, n, to);
  widen_values(static_cast<const f16*>(from), step, n, to);
}

extern const int64_t conv_block = 2 * width;

}  // namespace resnet_fast::RESNET_FAST_LEVEL
