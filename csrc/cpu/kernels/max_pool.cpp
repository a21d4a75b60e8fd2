// Max-pooling of one row of output pixels, map in channels_last. Compiled once per level (levels.h).
#include "../levels.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// The larger one; NaN if either is, as in torch.
static inline vec maximum(vec a, vec b) {
  // a if either is NaN. The compiler, left alone, puts two comparisons of 4 cycles in the way of the next value.
#if defined(__AVX512F__)
  const vec larger = (vec)_mm512_max_ps((__m512)b, (__m512)a);
#elif defined(__AVX2__)
  const vec larger = (vec)_mm256_max_ps((__m256)b, (__m256)a);
#else
  const vec larger = b > a ? b : a;
#endif
  return b != b ? b : larger;
}

// Taps [first, last) of the row's kernel that meet the map at one output pixel.
struct Taps {
  int64_t left, first, last;  // left: where tap 0 lies, maybe outside
};

static inline Taps taps_of(const PoolRow& row, int64_t pixel) {
  const int64_t left = pixel * row.stride - row.padding;
  Taps t{left, 0, row.kernel};
  while (t.first < t.last && left + t.first * row.dilation < 0) ++t.first;
  while (t.last > t.first && left + (t.last - 1) * row.dilation >= row.width) --t.last;
  return t;
}

// The largest of `vectors` vectors of channels from `channel` on, of which `n` values exist if that is less.
template <int vectors, typename In, typename Out>
static inline void pool(const PoolRow& row, const Taps& t, int64_t channel, int64_t n, Out* out) {
  vec largest[vectors];
  each<vectors, 1>([&](int i, int) { largest[i] = broadcast(-__builtin_inff()); });
  for (int64_t r = 0; r < row.num_rows; ++r) {
    for (int64_t tap = t.first; tap < t.last; ++tap) {
      const In* x = static_cast<const In*>(row.rows[r]) + (t.left + tap * row.dilation) * row.channels + channel;
      each<vectors, 1>(
          [&](int i, int) { largest[i] = maximum(largest[i], n < width ? load_part(x, n) : load(x + i * width)); });
    }
  }
  each<vectors, 1>([&](int i, int) {
    if (n < width) {
      store_part(out + channel, largest[i], n);
    } else if constexpr (sizeof(In) == sizeof(Out)) {
      store(out + channel + i * width, largest[i]);
    } else {  // sums of a convolution, rounded as its own store does it
      store_rounded(out + channel + i * width, largest[i]);
    }
  });
}

template <typename In, typename Out>
static void pool_row(const PoolRow& row) {
  Out* out = static_cast<Out*>(row.output);
  for (int64_t pixel = 0; pixel < row.pixels; ++pixel, out += row.channels) {
    const Taps t = taps_of(row, pixel);
    int64_t channel = 0;
    for (; channel + 4 * width <= row.channels; channel += 4 * width) pool<4, In>(row, t, channel, width, out);
    for (; channel + width <= row.channels; channel += width) pool<1, In>(row, t, channel, width, out);
    if (channel < row.channels) pool<1, In>(row, t, channel, row.channels - channel, out);
  }
}

void max_pool_row(const PoolRow& row) {
  const bool from_f32 = row.input_type == Storage::f32;
  if (row.output_type == Storage::f32) return pool_row<float, float>(row);
  if (row.output_type == Storage::bf16) return from_f32 ? pool_row<float, bf16>(row) : pool_row<bf16, bf16>(row);
  from_f32 ? pool_row<float, f16>(row) : pool_row<f16, f16>(row);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
