// Winograd convolution F(m x m, 3 x 3), stride 1, for m = 2, 4, 5. Compiled once per level (levels.h).
//
// Between the transforms (winograd.h) lie (m + 2)^2 matrix products, tiles x channels x filters.
#include "../levels.h"
#include "gemm_tile.h"
#include "winograd.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Where tile `tile` of the whole batch lies.
struct Place {
  int64_t n, y, x;  // image, first output row and column
};

template <int m>
static inline Place place_of(const ConvShape& s, int64_t tile) {
  const int64_t across = (s.q + m - 1) / m, down = (s.p + m - 1) / m;
  return {tile / (across * down), tile / across % down * m, tile % across * m};
}

// Without the divisions of place_of.
template <int m>
static inline Place next(const ConvShape& s, Place at) {
  at.x += m;
  if (at.x >= s.q) at.x = 0, at.y += m;
  if (at.y >= s.p) at.y = 0, ++at.n;
  return at;
}

// Row length of the transformed input: channels in whole vectors.
static inline int64_t row_length(const ConvShape& s) { return (s.c + width - 1) / width * width; }

// From one product to the next in the transformed input and output of `tiles` tiles. 16 more values than it takes: with
// strides of a power of two the stores of one tile fall into the same few sets of the L1 cache.
static inline int64_t input_stride(const ConvShape& s, int64_t tiles) { return tiles * row_length(s) + 16; }
static inline int64_t output_stride(int64_t tiles) { return tiles * panel_width + 16; }

// Half a vector, and the same in float64, in which weights are transformed: their errors would be in every product. (Of
// a whole one, which no register holds, GCC 12 converts value by value: 512 channels took 8 times as long to pack.)
constexpr int half = width / 2;
typedef float half_vec __attribute__((vector_size(half * sizeof(float))));
typedef double wide_vec __attribute__((vector_size(half * sizeof(double))));

static inline wide_vec load_wide(const float* p) {
  half_vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, wide_vec);
}

// The nine taps of filters [filter, filter + width) at one channel after the other.
class FilterTaps {
 public:
  FilterTaps(const WinogradWeight& w, int64_t filter)
      : w_(w), from_(w.from + filter * w.filter_stride), filters_(w.filters - filter) {
    if (filters_ > width) filters_ = width;
    if (filters_ < 0) filters_ = 0;
  }

  void at(int64_t channel, float (*taps)[width]) {
    if (filters_ == width && w_.filter_stride == 1) {
      for (int t = 0; t < 9; ++t) store(taps[t], load(tap(t) + channel * w_.channel_stride));
      return;
    }
    if (channel % width == 0) fetch(channel);
    for (int t = 0; t < 9; ++t)
      for (int64_t i = 0; i < filters_; ++i) taps[t][i] = values_[i][t][channel % width];
  }

 private:
  const float* tap(int t) const { return from_ + t / 3 * w_.row_stride + t % 3 * w_.tap_stride; }

  // A vector of channels of each filter: taken one by one, their lines push one another out of the L1 cache (filters
  // of 512 channels lie 18 KiB apart, and their taps may lie 2 KiB apart).
  void fetch(int64_t channel) {
    const int64_t left = w_.channels - channel, n = left < width ? left : width;
    for (int64_t i = 0; i < filters_; ++i) {
      for (int t = 0; t < 9; ++t) {
        const float* p = tap(t) + i * w_.filter_stride + channel * w_.channel_stride;
        if (w_.channel_stride == 1 && n == width) {
          store(values_[i][t], load(p));
        } else {
          for (int64_t c = 0; c < n; ++c) values_[i][t][c] = p[c * w_.channel_stride];
        }
      }
    }
  }

  const WinogradWeight& w_;
  const float* from_;
  int64_t filters_;
  float values_[width][9][width];
};

// G g G^T of half a vector of filters; `to` has the results `stride` apart.
template <int size>
static inline void transform_taps(const double* transform, const float (*taps)[width], float* to, int64_t stride) {
  wide_vec tap[9];
  for (int t = 0; t < 9; ++t) tap[t] = load_wide(taps[t]);
  for (int i = 0; i < size; ++i) {
    const double* g = transform + 3 * i;
    wide_vec row[3];
    for (int k = 0; k < 3; ++k) row[k] = g[0] * tap[k] + g[1] * tap[3 + k] + g[2] * tap[6 + k];
    for (int k = 0; k < size; ++k) {
      const double* h = transform + 3 * k;
      const half_vec out = __builtin_convertvector(row[0] * h[0] + row[1] * h[1] + row[2] * h[2], half_vec);
      __builtin_memcpy(to + (i * size + k) * stride, &out, sizeof(out));
    }
  }
}

template <int size, typename Out>
static void transform_weight(const WinogradWeight& w, int64_t filter, int64_t begin, int64_t end, Out* to_panel) {
  constexpr int64_t step = per_step<Out>;
  const int64_t depth = (end - begin + step - 1) / step * step, columns = vectors_of_panel(w.filters, filter) * width;
  for (int64_t j = 0; j < columns; j += width) {
    FilterTaps filters(w, filter + j);
    for (int64_t c = 0; c < depth; ++c) {
      float taps[9][width] = {};
      if (begin + c < end) filters.at(begin + c, taps);
      Out* to = to_panel + c / step * step * columns + j * step;
      const int64_t stride = depth * columns;
      for (int64_t first = 0; first < width; first += half) {
        const auto from = reinterpret_cast<const float (*)[width]>(&taps[0][first]);
        if constexpr (step == 1) {
          transform_taps<size>(w.transform, from, to + first, stride);
        } else {
          float found[size * size][half];
          transform_taps<size>(w.transform, from, found[0], half);
          for (int i = 0; i < size * size; ++i)
            for (int l = 0; l < half; ++l)
              to[i * stride + (first + l) * step + c % step] = bf16{float_to_bf16(found[i][l])};
        }
      }
    }
  }
}

void winograd_weight(const WinogradWeight& w, int64_t m, int64_t filter, int64_t begin, int64_t end, void* to) {
#if defined(__AVX512BF16__)
  if (w.type == Storage::bf16) return transform_weight<4>(w, filter, begin, end, static_cast<bf16*>(to));
#endif
  float* out = static_cast<float*>(to);
  if (m == 2) return transform_weight<4>(w, filter, begin, end, out);
  if (m == 4) return transform_weight<6>(w, filter, begin, end, out);
  transform_weight<7>(w, filter, begin, end, out);
}

template <int m, typename T, typename In>
static inline void input_tile(const Conv& conv,
                              const T* const* pixel,  // [(m + 2)^2]
                              int64_t channel, int64_t channels, In* out, int64_t stride) {
  constexpr int size = m + 2;
  const auto raw = [&](int i, int j) {
    const T* p = pixel[i * size + j] + channel;
    return channels >= width ? load(p) : load_part(p, channels);
  };
  if (!conv.norm.mean) {
    transform_input<m, 3>(raw, [&](int i, int j, vec v) { store_rounded(out + (i * size + j) * stride + channel, v); });
    return;
  }
  const vec mean = load(conv.norm.mean + channel), scale = load(conv.norm.scale + channel),
            shift = load(conv.norm.shift + channel);
  const auto read = [&](int i, int j) {  // padding is of zeros behind the ReLU
    return pixel[i * size + j] == conv.zeros ? vec{} : relu((raw(i, j) - mean) * scale + shift);
  };
  transform_input<m, 3>(read, [&](int i, int j, vec v) { store_rounded(out + (i * size + j) * stride + channel, v); });
}

template <int m, typename T, typename In>
static void input_tiles(const Conv& conv, int64_t begin, int64_t end, In* transformed, int64_t stride) {
  constexpr int size = m + 2;
  const ConvShape& s = conv.shape;
  const T *input = static_cast<const T*>(conv.input), *zeros = static_cast<const T*>(conv.zeros);
  Place at = place_of<m>(s, begin);
  for (int64_t tile = begin; tile < end; ++tile, at = next<m>(s, at)) {
    const T* pixel[size * size];
    for (int i = 0; i < size; ++i) {
      const int64_t y = at.y + i - s.padding[0];
      for (int j = 0; j < size; ++j) {
        const int64_t x = at.x + j - s.padding[1];
        const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
        pixel[i * size + j] = inside ? input + ((at.n * s.h + y) * s.w + x) * s.c : zeros;
      }
    }
    In* out = transformed + (tile - begin) * row_length(s);
    int64_t channel = 0;
    for (; channel + width <= s.c; channel += width) input_tile<m>(conv, pixel, channel, width, out, stride);
    if (channel < s.c) input_tile<m>(conv, pixel, channel, s.c - channel, out, stride);
  }
}

// Output tile at filters [filter, filter + width) from its products. `check` becomes NaN where a result is not finite.
template <int m, typename T>
static inline void output_tile(const Conv& conv, const float* products, int64_t stride, const Place& at, int64_t filter,
                               vec* check) {
  const ConvShape& s = conv.shape;
  const vec bias = load(conv.bias + filter);
  const int64_t filters = s.k - filter, rows = s.p - at.y, cols = s.q - at.x;
  const int64_t first = ((at.n * s.p + at.y) * s.q + at.x) * s.k + filter;
  const T* residual = static_cast<const T*>(conv.residual);
  T* output = static_cast<T*>(conv.output);
  transform_output<m, 3>(products, stride, check, [&](int i, const vec* row) {
    if (i >= rows) return;
    for (int j = 0; j < m; ++j) {
      if (j >= cols) break;
      const int64_t to = first + (i * s.q + j) * s.k;
      vec y = row[j] + bias;
      if (filters >= width) {
        if (residual) y += load(residual + to);
        store_rounded(output + to, conv.relu ? relu(y) : y);
      } else {
        if (residual) y += load_part(residual + to, filters);
        store_part(output + to, conv.relu ? relu(y) : y, filters);
      }
    }
  });
}

// Where the output of a tile will go, and the residual to be added, which makes 64 channels at 56x56 1.05 and, with a
// residual, 1.1 times as fast (2 Zen 5 cores, batch 8).
template <int m, typename T>
static inline void prefetch_output(const Conv& conv, const Place& at, int64_t filter, int64_t columns) {
  const ConvShape& s = conv.shape;
  for (int64_t y = at.y; y < at.y + m && y < s.p; ++y) {
    for (int64_t x = at.x; x < at.x + m && x < s.q; ++x) {
      const int64_t to = ((at.n * s.p + y) * s.q + x) * s.k + filter;
      prefetch(static_cast<const T*>(conv.output) + to, columns);
      if (conv.residual) prefetch(static_cast<const T*>(conv.residual) + to, columns);
    }
  }
}

// The products of a panel of filters with `count` tiles, over channels [begin, end): added to what is there unless they
// are the first. `weight` has those channels alone, [(m + 2)^2][channels / step][panel][step].
template <int m, typename In>
static void products_of(const Conv& conv, const In* transformed, int64_t stride, int64_t count, int64_t filter,
                        int64_t begin, int64_t end, const In* weight, float* products) {
  constexpr int size = m + 2;
  const ConvShape& s = conv.shape;
  const int64_t vectors = vectors_of_panel(s.k, filter), columns = vectors * width;
  const int64_t products_stride = output_stride(count);
  const Tiles tiles(count);
  const AheadOfChunks<In> ahead(columns, tiles.count);
  constexpr int64_t chunk = winograd_steps * per_step<In>;
  const int64_t last = begin + (end - begin + per_step<In> - 1) / per_step<In> * per_step<In>;
  for (int xi = 0; xi < size * size; ++xi) {
    for (int64_t k = begin; k < last; k += chunk) {
      const int64_t depth = k + chunk < last ? chunk : last - k;
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t first = tiles.first_row(t), rows = tiles.rows_of(t);
        const In* row[tile_rows];
        for (int64_t i = 0; i < rows; ++i) row[i] = transformed + xi * stride + (first + i) * row_length(s);
        float* out = products + xi * products_stride + first * columns;
        const float* start = k == 0 ? nullptr : out;
        gemm_tile<In, float>(rows, vectors)(row, 1, k, depth, weight,
                                            {start, columns, out, nullptr, columns, columns, false, true},
                                            ahead.of(weight, depth, t));
      }
      weight += depth * columns;
    }
  }
}

// The outputs of a panel of filters and tiles [begin, end) from their products.
template <int m, typename T>
static bool output_panel(const Conv& conv, int64_t begin, int64_t end, int64_t filter, const float* products) {
  const ConvShape& s = conv.shape;
  const int64_t vectors = vectors_of_panel(s.k, filter), columns = vectors * width;
  vec check{};
  Place at = place_of<m>(s, begin);
  for (int64_t tile = begin; tile < end; ++tile, at = next<m>(s, at)) {
    if (tile + 1 < end) prefetch_output<m, T>(conv, next<m>(s, at), filter, columns);
    for (int64_t j = 0; j < vectors; ++j)
      output_tile<m, T>(conv, products + (tile - begin) * columns + j * width, output_stride(end - begin), at,
                        filter + j * width, &check);
  }
  return is_finite(check);
}

template <typename T>
static void input_of_type(const Conv& conv, int64_t m, int64_t begin, int64_t end, float* transformed, int64_t stride) {
  if (m == 2) return input_tiles<2, T>(conv, begin, end, transformed, stride);
  if (m == 4) return input_tiles<4, T>(conv, begin, end, transformed, stride);
  input_tiles<5, T>(conv, begin, end, transformed, stride);
}

void winograd_input(const Conv& conv, int64_t m, int64_t begin, int64_t end, void* transformed, int64_t stride) {
#if defined(__AVX512BF16__)
  if (conv.weight_type == Storage::bf16)
    return input_tiles<2, bf16>(conv, begin, end, static_cast<bf16*>(transformed), stride);
#endif
  float* out = static_cast<float*>(transformed);
  if (conv.input_type == Storage::f32) return input_of_type<float>(conv, m, begin, end, out, stride);
  if (conv.input_type == Storage::bf16) return input_of_type<bf16>(conv, m, begin, end, out, stride);
  input_of_type<f16>(conv, m, begin, end, out, stride);
}

void winograd_products(const Conv& conv, int64_t m, const void* transformed, int64_t stride, int64_t count,
                       int64_t filter, int64_t begin, int64_t end, const void* weight, float* products) {
#if defined(__AVX512BF16__)
  if (conv.weight_type == Storage::bf16)
    return products_of<2>(conv, static_cast<const bf16*>(transformed), stride, count, filter, begin, end,
                          static_cast<const bf16*>(weight), products);
#endif
  const auto of = m == 2 ? products_of<2, float> : m == 4 ? products_of<4, float> : products_of<5, float>;
  of(conv, static_cast<const float*>(transformed), stride, count, filter, begin, end, static_cast<const float*>(weight),
     products);
}

template <typename T>
static bool output_of_type(const Conv& conv, int64_t m, int64_t begin, int64_t end, int64_t filter,
                           const float* products) {
  if (m == 2) return output_panel<2, T>(conv, begin, end, filter, products);
  if (m == 4) return output_panel<4, T>(conv, begin, end, filter, products);
  return output_panel<5, T>(conv, begin, end, filter, products);
}

bool winograd_output(const Conv& conv, int64_t m, int64_t begin, int64_t end, int64_t filter, const float* products) {
  const auto of = conv.output_type == Storage::f32    ? output_of_type<float>
                  : conv.output_type == Storage::bf16 ? output_of_type<bf16>
                                                      : output_of_type<f16>;
  return of(conv, m, begin, end, filter, products);
}

int64_t winograd_input_stride(const ConvShape& s, int64_t tiles) { return input_stride(s, tiles); }
int64_t winograd_output_stride(int64_t tiles) { return output_stride(tiles); }

}  // namespace resnet_fast::RESNET_FAST_LEVEL
