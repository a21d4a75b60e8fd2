// Winograd convolution F(m x m, 3 x 3), stride 1, for m = 2, 4, 5. Compiled once per level (levels.h).
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): m x m outputs come from (m + 2)^2
// products instead of 9 m^2, after a transform of the input tile (B^T d B) and before one of the products (A^T M A).
// Between them lie (m + 2)^2 matrix products, tiles x channels x filters.
//
// The points: 0, +-2/3, +-3/2 for m = 4 and +-1/3, +-3/4, +-2 for m = 5 lose 2 to 4 times less accuracy than 0, +-1,
// +-2
// (, 1/2), and keep the pairs +-x that halve the work.
#include "../levels.h"
#include "gemm_tile.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

template <int m>
struct Transform;

// Each function transforms one column: `input` B^T x of m + 2 values, `output` A^T x of m + 2 values into m.
template <>
struct Transform<2> {  // points 0, 1, -1, infinity
  static inline void input(const vec* x, vec* y) {
    y[0] = x[2] - x[0];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[3] - x[1];
  }
  static inline void output(const vec* x, vec* y) {
    y[0] = x[0] + x[1] + x[2];
    y[1] = x[1] - x[2] + x[3];
  }
};

template <>
struct Transform<4> {  // points 0, a, -a, b, -b, infinity; a b = 1
  static constexpr float a = 2.0f / 3, b = 1.5f;
  static inline void input(const vec* x, vec* y) {
    constexpr float sum = float(4.0 / 9 + 9.0 / 4);
    y[0] = x[0] + x[4] - sum * x[2];
    y[5] = x[1] + x[5] - sum * x[3];
    vec even = x[4] - b * b * x[2], odd = x[3] - b * b * x[1];
    y[1] = even + a * odd;
    y[2] = even - a * odd;
    even = x[4] - a * a * x[2], odd = x[3] - a * a * x[1];
    y[3] = even + b * odd;
    y[4] = even - b * odd;
  }
  static inline void output(const vec* x, vec* y) {
    const vec sum_a = x[1] + x[2], diff_a = x[1] - x[2], sum_b = x[3] + x[4], diff_b = x[3] - x[4];
    y[0] = x[0] + sum_a + sum_b;
    y[1] = a * diff_a + b * diff_b;
    y[2] = a * a * sum_a + b * b * sum_b;
    y[3] = a * a * a * diff_a + b * b * b * diff_b + x[5];
  }
};

template <>
struct Transform<5> {  // points a, -a, b, -b, c, -c, infinity
  static constexpr float a = 1.0f / 3, b = 0.75f, c = 2.0f;
  static constexpr float a2 = a * a, b2 = b * b, c2 = c * c;
  static inline void pair(const vec* x, vec* y, float sum, float product, float point) {
    const vec odd = x[5] - sum * x[3] + product * x[1], even = x[4] - sum * x[2] + product * x[0];
    y[0] = odd + point * even;
    y[1] = odd - point * even;
  }
  static inline void input(const vec* x, vec* y) {
    pair(x, y, b2 + c2, b2 * c2, a);
    pair(x, y + 2, a2 + c2, a2 * c2, b);
    pair(x, y + 4, a2 + b2, a2 * b2, c);
    y[6] = x[6] - (a2 + b2 + c2) * x[4] + (a2 * b2 + a2 * c2 + b2 * c2) * x[2] - a2 * b2 * c2 * x[0];
  }
  static inline void output(const vec* x, vec* y) {
    const vec sum_a = x[0] + x[1], diff_a = x[0] - x[1], sum_b = x[2] + x[3], diff_b = x[2] - x[3], sum_c = x[4] + x[5],
              diff_c = x[4] - x[5];
    y[0] = sum_a + sum_b + sum_c;
    y[1] = a * diff_a + b * diff_b + c * diff_c;
    y[2] = a2 * sum_a + b2 * sum_b + c2 * sum_c;
    y[3] = a2 * a * diff_a + b2 * b * diff_b + c2 * c * diff_c;
    y[4] = a2 * a2 * sum_a + b2 * b2 * sum_b + c2 * c2 * sum_c + x[6];
  }
};

// Where tile `tile` of the whole batch lies.
struct Place {
  int64_t n, y, x;  // image, first output row and column
};

template <int m>
static inline Place place_of(const ConvShape& s, int64_t tile) {
  const int64_t across = (s.q + m - 1) / m, down = (s.p + m - 1) / m;
  return {tile / (across * down), tile / across % down * m, tile % across * m};
}

// Row length of the transformed input: channels in whole vectors.
static inline int64_t row_length(const ConvShape& s) { return (s.c + width - 1) / width * width; }

// From one product to the next in the transformed input and output of `tiles` tiles. 16 more values than it takes: with
// strides of a power of two the stores of one tile fall into the same few sets of the L1 cache.
static inline int64_t input_stride(const ConvShape& s, int64_t tiles) { return tiles * row_length(s) + 16; }
static inline int64_t output_stride(int64_t tiles) { return tiles * panel_width + 16; }

template <int m, typename T, typename In>
static inline void transform_input(const T* const* pixel,  // [(m + 2)^2]
                                   int64_t channel, int64_t channels, In* out, int64_t stride) {
  constexpr int size = m + 2;
  vec rows[size][size];
  for (int j = 0; j < size; ++j) {
    vec column[size], t[size];
    for (int i = 0; i < size; ++i) {
      const T* p = pixel[i * size + j] + channel;
      column[i] = channels >= width ? load(p) : load_part(p, channels);
    }
    Transform<m>::input(column, t);
    for (int i = 0; i < size; ++i) rows[i][j] = t[i];
  }
  for (int i = 0; i < size; ++i) {
    vec t[size];
    Transform<m>::input(rows[i], t);
    for (int j = 0; j < size; ++j) store_rounded(out + (i * size + j) * stride + channel, t[j]);
  }
}

template <int m, typename T, typename In>
static void input_tiles(const Conv& conv, int64_t begin, int64_t end, In* transformed, int64_t stride) {
  constexpr int size = m + 2;
  const ConvShape& s = conv.shape;
  const T *input = static_cast<const T*>(conv.input), *zeros = static_cast<const T*>(conv.zeros);
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place_of<m>(s, tile);
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
    for (; channel + width <= s.c; channel += width) transform_input<m>(pixel, channel, width, out, stride);
    if (channel < s.c) transform_input<m>(pixel, channel, s.c - channel, out, stride);
  }
}

// Output tile at filters [filter, filter + width) from its products. `check` becomes NaN where a result is not finite.
template <int m, typename T>
static inline void transform_output(const Conv& conv, const float* products, int64_t stride, const Place& at,
                                    int64_t filter, vec* check) {
  constexpr int size = m + 2;
  const ConvShape& s = conv.shape;
  vec columns[m][size];
  for (int j = 0; j < size; ++j) {
    vec column[size], t[m];
    for (int i = 0; i < size; ++i) column[i] = load(products + (i * size + j) * stride);
    Transform<m>::output(column, t);
    for (int i = 0; i < m; ++i) columns[i][j] = t[i];
  }
  const vec bias = load(conv.bias + filter);
  const int64_t filters = s.k - filter, rows = s.p - at.y, cols = s.q - at.x;
  const int64_t first = ((at.n * s.p + at.y) * s.q + at.x) * s.k + filter;
  const T* residual = static_cast<const T*>(conv.residual);
  T* output = static_cast<T*>(conv.output);
  vec sum{};
  for (int i = 0; i < m; ++i) {
    vec t[m];
    Transform<m>::output(columns[i], t);
    for (int j = 0; j < m; ++j) sum += t[j];
    if (i >= rows) continue;
    for (int j = 0; j < m; ++j) {
      if (j >= cols) break;
      const int64_t to = first + (i * s.q + j) * s.k;
      vec y = t[j] + bias;
      if (filters >= width) {
        if (residual) y += load(residual + to);
        store_rounded(output + to, conv.relu ? relu(y) : y);
      } else {
        if (residual) y += load_part(residual + to, filters);
        store_part(output + to, conv.relu ? relu(y) : y, filters);
      }
    }
  }
  *check += sum - sum;
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

template <int m, typename T, typename In>
static bool output_panel(const Conv& conv, const In* transformed, int64_t stride, int64_t begin, int64_t end,
                         int64_t filter, float* products) {
  constexpr int size = m + 2;
  const ConvShape& s = conv.shape;
  const int64_t count = end - begin, vectors = vectors_of_panel(s.k, filter), columns = vectors * width;
  const int64_t tiles = tiles_of(count), products_stride = output_stride(count);
  constexpr int64_t chunk = winograd_steps * per_step<In>;
  const int64_t channels = (s.c + per_step<In> - 1) / per_step<In> * per_step<In>;
  const In* panel = static_cast<const In*>(conv.weight) + filter * size * size * channels;
  for (int xi = 0; xi < size * size; ++xi) {
    for (int64_t k = 0; k < channels; k += chunk) {
      const int64_t depth = k + chunk < channels ? chunk : channels - k;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = count * t / tiles, rows = count * (t + 1) / tiles - first;
        const In* row[tile_rows];
        for (int64_t i = 0; i < rows; ++i) row[i] = transformed + xi * stride + (first + i) * row_length(s);
        float* out = products + xi * products_stride + first * columns;
        const float* start = k == 0 ? nullptr : out;
        gemm_tile<In, float>(rows, vectors)(row, 1, k, depth, panel,
                                            {start, columns, out, nullptr, columns, columns, false},
                                            ahead_of_chunk(panel, depth, columns, t, tiles));
      }
      panel += depth * columns;
    }
  }
  vec check{};
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place_of<m>(s, tile);
    if (tile + 1 < end) prefetch_output<m, T>(conv, place_of<m>(s, tile + 1), filter, columns);
    for (int64_t j = 0; j < vectors; ++j)
      transform_output<m, T>(conv, products + (tile - begin) * columns + j * width, products_stride, at,
                             filter + j * width, &check);
  }
  bool finite = true;
  for (int i = 0; i < width; ++i) finite = finite && check[i] == 0.0f;
  return finite;
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

template <typename T>
static bool output_of_type(const Conv& conv, int64_t m, const float* transformed, int64_t stride, int64_t begin,
                           int64_t end, int64_t filter, float* products) {
  if (m == 2) return output_panel<2, T>(conv, transformed, stride, begin, end, filter, products);
  if (m == 4) return output_panel<4, T>(conv, transformed, stride, begin, end, filter, products);
  return output_panel<5, T>(conv, transformed, stride, begin, end, filter, products);
}

bool winograd_output(const Conv& conv, int64_t m, const void* transformed, int64_t stride, int64_t begin, int64_t end,
                     int64_t filter, float* products) {
#if defined(__AVX512BF16__)
  if (conv.weight_type == Storage::bf16)
    return output_panel<2, bf16>(conv, static_cast<const bf16*>(transformed), stride, begin, end, filter, products);
#endif
  const auto run = conv.output_type == Storage::f32    ? output_of_type<float>
                   : conv.output_type == Storage::bf16 ? output_of_type<bf16>
                                                       : output_of_type<f16>;
  return run(conv, m, static_cast<const float*>(transformed), stride, begin, end, filter, products);
}

int64_t winograd_input_stride(const ConvShape& s, int64_t tiles) { return input_stride(s, tiles); }
int64_t winograd_output_stride(int64_t tiles) { return output_stride(tiles); }

}  // namespace resnet_fast::RESNET_FAST_LEVEL
