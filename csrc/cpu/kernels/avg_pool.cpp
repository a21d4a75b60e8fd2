// Mean of every channel over all pixels of an image, summed in float32. Compiled once per level (levels.h).
#include "../levels.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Pixels that are summed before they are added to the total: a sum of sums loses less than one long sum.
constexpr int64_t run = 64;

// Channels [begin, begin + vectors * width) of a map in channels_last, or [begin, end) if these are fewer.
template <int vectors, typename T>
static inline void mean_of_columns(const T* map, int64_t pixels, int64_t channels, int64_t begin, int64_t end, T* out) {
  const int64_t n = end - begin;
  vec total[vectors];
  each<vectors, 1>([&](int i, int) { total[i] = vec{}; });
  for (int64_t start = 0; start < pixels; start += run) {
    vec sum[vectors];
    each<vectors, 1>([&](int i, int) { sum[i] = vec{}; });
    for (int64_t p = start; p < pixels && p < start + run; ++p) {
      const T* x = map + p * channels + begin;
      each<vectors, 1>([&](int i, int) { sum[i] += n < width ? load_part(x, n) : load(x + i * width); });
    }
    each<vectors, 1>([&](int i, int) { total[i] += sum[i]; });
  }
  each<vectors, 1>([&](int i, int) {
    const vec mean = total[i] / float(pixels);
    if (n < width) {
      store_part(out + begin, mean, n);
    } else {
      store(out + begin + i * width, mean);
    }
  });
}

// Lanes [0, width - n) are zero.
static inline vec last_lanes(vec v, int64_t n) {
  bits32 lane{};
  for (int i = 0; i < width; ++i) lane[i] = i;
  return lane >= uint32_t(width - n) ? v : vec{};
}

static inline float sum_of_lanes(vec v) {
  typedef float four __attribute__((vector_size(16)));
  four sums[width / 4];
  __builtin_memcpy(sums, &v, sizeof(v));
#pragma GCC unroll 2
  for (int half = width / 8; half > 0; half /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
}

// Over one channel of a contiguous map.
template <typename T>
static inline float sum_of_plane(const T* plane, int64_t pixels) {
  vec total{};
  for (int64_t start = 0; start < pixels; start += run * width) {
    const int64_t left = pixels - start, n = left < run * width ? left : run * width;
    const T* x = plane + start;
    vec sum{};
    int64_t p = 0;
    for (; p + width <= n; p += width) sum += load(x + p);
    // Of the last vector's lanes, those that were not summed yet.
    if (p < n) sum += pixels < width ? load_part(x, n) : last_lanes(load(x + n - width), n - p);
    total += sum;
  }
  return sum_of_lanes(total);
}

template <typename T>
static void average(const T* map, bool channels_last, int64_t pixels, int64_t channels, int64_t begin, int64_t end,
                    T* out) {
  int64_t c = begin;
  if (channels_last) {
    for (; c + 4 * width <= end; c += 4 * width) mean_of_columns<4>(map, pixels, channels, c, c + 4 * width, out);
    for (; c < end; c += width) mean_of_columns<1>(map, pixels, channels, c, end, out);
    return;
  }
  for (; c < end; c += width) {
    float sums[width] = {};
    const int64_t n = end - c < width ? end - c : width;
    for (int64_t i = 0; i < n; ++i) sums[i] = sum_of_plane(map + (c + i) * pixels, pixels);
    store_part(out + c, load(sums) / float(pixels), n);
  }
}

void avg_pool(const void* map, Storage type, bool channels_last, int64_t pixels, int64_t channels,
              int64_t channel_begin, int64_t channel_end, void* output) {
  const auto with = [&](auto* out) {
    average(static_cast<decltype(out)>(const_cast<void*>(map)), channels_last, pixels, channels, channel_begin,
            channel_end, out);
  };
  if (type == Storage::f32) return with(static_cast<float*>(output));
  if (type == Storage::bf16) return with(static_cast<bf16*>(output));
  with(static_cast<f16*>(output));
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
