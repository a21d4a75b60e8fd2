// Batch normalisation with the statistics of the batch, with a ReLU and a residual, and its gradient; maps in
// channels_last. Compiled once per instruction-set level (levels.h).
//
// All of it is bound by memory. What sums over pixels takes a few vectors of channels at a time, pixel by pixel, with
// the sums in registers; what works value by value goes through the pixels as they lie in memory.
#include "../levels.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {
namespace {

// Pixels that are summed before they are added to a total: a sum of sums loses less than one long sum, and the vectors
// of so many pixels stay in the L1 cache, where the second pass of a variance finds them.
constexpr int64_t run = 32;

// job.panel<vectors>(channel, n) for all channels of [begin, end), four vectors at a time, then one; n: values that
// exist in each.
template <typename Job>
inline void each_panel(int64_t begin, int64_t end, const Job& job) {
  int64_t c = begin;
  for (; c + 4 * width <= end; c += 4 * width) job.template panel<4>(c, width);
  for (; c + width <= end; c += width) job.template panel<1>(c, width);
  if (c < end) job.template panel<1>(c, end - c);
}

template <typename T>
inline vec load_some(const T* p, int64_t n) {
  return n < width ? load_part(p, n) : load(p);
}

template <typename T>
inline void store_some(T* p, vec v, int64_t n) {
  n < width ? store_part(p, v, n) : store(p, v);
}

// Mean and sum of squared deviations of run after run, combined as they come (Chan, Golub and LeVeque, 1979). All are
// of the distance to the first pixel, since float32 would lose digits in a mean that is much larger than the deviation.
template <typename T>
struct Moments {
  const T* map;
  int64_t pixels, channels;
  float* moments;  // [first pixel, mean, sum of squares][channels]

  template <int vectors>
  void panel(int64_t c, int64_t n) const {
    vec first[vectors], mean[vectors], m2[vectors];
    each<vectors, 1>([&](int i, int) {
      first[i] = load_some(map + c + i * width, n);
      mean[i] = m2[i] = vec{};
    });
    for (int64_t start = 0; start < pixels; start += run) {
      const int64_t count = pixels - start < run ? pixels - start : run;
      const T* x = map + start * channels + c;
      const auto at = [&](int64_t p, int i) { return load_some(x + p * channels + i * width, n) - first[i]; };
      vec sum[vectors], squares[vectors], rest[vectors];
      each<vectors, 1>([&](int i, int) { sum[i] = squares[i] = rest[i] = vec{}; });
      for (int64_t p = 0; p < count; ++p) each<vectors, 1>([&](int i, int) { sum[i] += at(p, i); });
      each<vectors, 1>([&](int i, int) { sum[i] /= float(count); });
      for (int64_t p = 0; p < count; ++p) {
        if (start + run < pixels) prefetch(x + (p + run) * channels, vectors * n);
        each<vectors, 1>([&](int i, int) {
          const vec deviation = at(p, i) - sum[i];
          rest[i] += deviation;  // what rounding has left of the mean
          squares[i] += deviation * deviation;
        });
      }
      each<vectors, 1>([&](int i, int) { sum[i] += rest[i] / float(count); });
      const float share = float(count) / float(start + count);
      each<vectors, 1>([&](int i, int) {
        const vec delta = sum[i] - mean[i];
        mean[i] += delta * share;
        m2[i] += squares[i] + delta * delta * (float(start) * share);
      });
    }
    each<vectors, 1>([&](int i, int) {
      float* to = moments + c + i * width;
      store_some(to, first[i], n);
      store_some(to + channels, mean[i], n);
      store_some(to + 2 * channels, m2[i], n);
    });
  }
};

template <typename T>
void moments_of_type(const void* map, int64_t pixels, int64_t channels, int64_t begin, int64_t end, float* moments) {
  each_panel(begin, end, Moments<T>{static_cast<const T*>(map), pixels, channels, moments});
}

inline vec normalise(const NormVectors& norm, int64_t c, vec x) {
  return (x - load(norm.mean + c)) * load(norm.scale + c) + load(norm.shift + c);
}

// The largest value that a store to the type rounds to zero.
template <typename T>
constexpr float rounds_to_zero = 0.0f;
template <>
constexpr float rounds_to_zero<f16> = 0x1p-25f;

// Bit i is set where value i, as it is stored, is not <= 0: NaN passes, as in torch.
template <typename T>
inline uint32_t passes(vec v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(rounds_to_zero<T>), _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(rounds_to_zero<T>), _CMP_NLE_UQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < width; ++i) bits |= uint32_t(!(v[i] <= rounds_to_zero<T>)) << i;
  return bits;
#endif
}

// v where its bit is set, else 0.
inline vec select(uint32_t bits, vec v) {
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)v);
#else
  bits32 lane;
  for (int i = 0; i < width; ++i) lane[i] = 1u << i;
  return ((bits32{} + bits) & lane) != 0 ? v : vec{};
#endif
}

// The mask's bits of a vector at channel c: its first bit is bit c % 8 of byte c / 8.
inline uint32_t bits_at(const uint8_t* mask, int64_t c, int64_t n) {
  if constexpr (width == 16) {
    if (n <= 8) return mask[c / 8];
    uint16_t bits;
    __builtin_memcpy(&bits, mask + c / 8, 2);
    return bits;
  }
  return uint32_t(mask[c / 8]) >> (c % 8);
}

inline void put_bits(uint8_t* mask, int64_t c, int64_t n, uint32_t bits) {
  if (n < width) bits &= (1u << n) - 1;
  if constexpr (width == 16) {
    const uint16_t both = uint16_t(bits);
    __builtin_memcpy(mask + c / 8, &both, n <= 8 ? 1 : 2);
  } else if (c % 8 == 0) {
    mask[c / 8] = uint8_t(bits);
  } else {
    mask[c / 8] |= uint8_t(bits << (c % 8));
  }
}

template <typename T, bool has_residual, bool residual_is_normalised>
void apply_to(const NormApply& a, int64_t begin, int64_t end) {
  const int64_t mask_bytes = (a.channels + 7) / 8;
  const T* x = static_cast<const T*>(a.input) + begin * a.channels;
  const T* residual = static_cast<const T*>(a.residual);
  if (has_residual) residual += begin * a.channels;
  T* out = static_cast<T*>(a.output) + begin * a.channels;
  uint8_t* mask = a.mask ? a.mask + begin * mask_bytes : nullptr;
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t c = 0; c < a.channels; c += width) {
      const int64_t n = a.channels - c;
      vec y = normalise(a.norm, c, load_some(x + c, n));
      if constexpr (has_residual) {
        const vec r = load_some(residual + c, n);
        y += residual_is_normalised ? normalise(a.residual_norm, c, r) : r;
      }
      if (mask) put_bits(mask, c, n, passes<T>(y));
      store_some(out + c, a.relu ? relu(y) : y, n);
    }
    x += a.channels, out += a.channels;
    if (has_residual) residual += a.channels;
    if (mask) mask += mask_bytes;
  }
}

template <typename T>
void apply_to_type(const NormApply& a, int64_t begin, int64_t end) {
  if (!a.residual) return apply_to<T, false, false>(a, begin, end);
  a.residual_norm.mean ? apply_to<T, true, true>(a, begin, end) : apply_to<T, true, false>(a, begin, end);
}

// The gradient behind the ReLU: `grad` where the mask or, without one, the normalised value lets it through.
template <typename T>
inline vec behind_relu(const NormGrad& g, const uint8_t* mask, int64_t c, int64_t n, vec grad, vec x) {
  if (mask) return select(bits_at(mask, c, n), grad);
  return g.relu ? select(passes<T>(normalise(g.norm, c, x)), grad) : grad;
}

// Sums over pixels of the gradient, of its product with the map's deviation from the mean and with the shortcut's.
template <typename T, bool has_shortcut>
struct GradSums {
  const NormGrad& g;
  int64_t begin, end;  // pixels
  float* sums;         // [3][channels]

  template <int vectors>
  void panel(int64_t c, int64_t n) const {
    constexpr int kinds = has_shortcut ? 3 : 2;
    const int64_t channels = g.channels, mask_bytes = (channels + 7) / 8;
    vec total[kinds * vectors];
    each<kinds, vectors>([&](int k, int i) { total[k * vectors + i] = vec{}; });
    for (int64_t start = begin; start < end; start += run) {
      const int64_t stop = start + run < end ? start + run : end;
      vec sum[kinds * vectors];
      each<kinds, vectors>([&](int k, int i) { sum[k * vectors + i] = vec{}; });
      for (int64_t p = start; p < stop; ++p) {
        const T* grad = static_cast<const T*>(g.grad) + p * channels + c;
        const T* x = static_cast<const T*>(g.input) + p * channels + c;
        const T* shortcut = has_shortcut ? static_cast<const T*>(g.shortcut) + p * channels + c : nullptr;
        const uint8_t* mask = g.mask ? g.mask + p * mask_bytes : nullptr;
        each<vectors, 1>([&](int i, int) {
          const int64_t at = c + i * width;
          const vec value = load_some(x + i * width, n);
          const vec d = behind_relu<T>(g, mask, at, n, load_some(grad + i * width, n), value);
          sum[i] += d;
          sum[vectors + i] += d * (value - load(g.norm.mean + at));
          if constexpr (has_shortcut)
            sum[2 * vectors + i] += d * (load_some(shortcut + i * width, n) - load(g.shortcut_norm.mean + at));
        });
      }
      each<kinds, vectors>([&](int k, int i) { total[k * vectors + i] += sum[k * vectors + i]; });
    }
    each<kinds, vectors>(
        [&](int k, int i) { store_some(sums + k * channels + c + i * width, total[k * vectors + i], n); });
  }
};

template <typename T>
void grad_sums_of_type(const NormGrad& g, int64_t begin, int64_t end, int64_t channel_begin, int64_t channel_end,
                       float* sums) {
  if (g.shortcut) return each_panel(channel_begin, channel_end, GradSums<T, true>{g, begin, end, sums});
  each_panel(channel_begin, channel_end, GradSums<T, false>{g, begin, end, sums});
}

// scale * gradient + slope * (x - mean) + offset.
inline vec through_norm(const NormVectors& norm, const NormSlope& s, int64_t c, vec d, vec x) {
  return load(norm.scale + c) * d + (load(s.slope + c) * (x - load(norm.mean + c)) + load(s.offset + c));
}

template <typename T, bool has_shortcut>
void grad_to(const NormGrad& g, int64_t begin, int64_t end) {
  const int64_t channels = g.channels, mask_bytes = (channels + 7) / 8;
  for (int64_t p = begin; p < end; ++p) {
    const T* grad = static_cast<const T*>(g.grad) + p * channels;
    const T* x = static_cast<const T*>(g.input) + p * channels;
    const T* shortcut = has_shortcut ? static_cast<const T*>(g.shortcut) + p * channels : nullptr;
    const uint8_t* mask = g.mask ? g.mask + p * mask_bytes : nullptr;
    T* to = static_cast<T*>(g.to) + p * channels;
    T* to_shortcut = g.to_shortcut ? static_cast<T*>(g.to_shortcut) + p * channels : nullptr;
    for (int64_t c = 0; c < channels; c += width) {
      const int64_t n = channels - c;
      const vec value = load_some(x + c, n);
      const vec d = behind_relu<T>(g, mask, c, n, load_some(grad + c, n), value);
      if constexpr (has_shortcut) {
        const vec other = load_some(shortcut + c, n);
        store_some(to_shortcut + c, through_norm(g.shortcut_norm, g.shortcut_slope, c, d, other), n);
      } else if (to_shortcut) {
        store_some(to_shortcut + c, d, n);
      }
      store_some(to + c, through_norm(g.norm, g.slope, c, d, value), n);
    }
  }
}

template <typename T>
void grad_to_type(const NormGrad& g, int64_t begin, int64_t end) {
  g.shortcut ? grad_to<T, true>(g, begin, end) : grad_to<T, false>(g, begin, end);
}

}  // namespace

void batch_norm_moments(const void* map, Storage type, int64_t pixels, int64_t channels, int64_t begin, int64_t end,
                        float* moments) {
  const auto of = type == Storage::f32    ? moments_of_type<float>
                  : type == Storage::bf16 ? moments_of_type<bf16>
                                          : moments_of_type<f16>;
  of(map, pixels, channels, begin, end, moments);
}

void batch_norm_apply(const NormApply& a, int64_t begin, int64_t end) {
  if (a.type == Storage::f32) return apply_to_type<float>(a, begin, end);
  if (a.type == Storage::bf16) return apply_to_type<bf16>(a, begin, end);
  apply_to_type<f16>(a, begin, end);
}

void batch_norm_grad_sums(const NormGrad& g, int64_t begin, int64_t end, int64_t channel_begin, int64_t channel_end,
                          float* sums) {
  const auto sum = g.type == Storage::f32    ? grad_sums_of_type<float>
                   : g.type == Storage::bf16 ? grad_sums_of_type<bf16>
                                             : grad_sums_of_type<f16>;
  sum(g, begin, end, channel_begin, channel_end, sums);
}

void batch_norm_grad(const NormGrad& g, int64_t begin, int64_t end) {
  if (g.type == Storage::f32) return grad_to_type<float>(g, begin, end);
  if (g.type == Storage::bf16) return grad_to_type<bf16>(g, begin, end);
  grad_to_type<f16>(g, begin, end);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
