// The gradient of a convolution's weight: sums over pixels of gradient times input. Compiled once per level (levels.h).
//
// For each position of the kernel it is a product of two matrices, [filters, pixels] and [pixels, channels]. For 3x3
// kernels with stride 1 it is also a convolution, of the input by tiles of 4 x 4 values of the gradient with 3 x 3
// results, and Winograd's F(3 x 3, 4 x 4) needs 36 products for a tile instead of 144: the positions are then those of
// the transformed tiles, and the sums go over tiles.
//
// Both matrices are first copied, transformed or not, panel by panel, [panel][position][pixel][gemm_panel], so that the
// products read cache lines one after the other.
#include "../levels.h"
#include "gemm_tile.h"
#include "winograd.h"

namespace resnet_fast::RESNET_FAST_LEVEL {
namespace {

constexpr int tile = weight_grad_tile, taps = weight_grad_taps, size = weight_grad_size;

// Units whose products are summed before they are added to the sums in memory: a sum of sums loses less than one long
// sum, and the panels of so many units stay in the L1 and L2 caches (32 KiB each with AVX-512).
constexpr int64_t sum_units = 128;

template <typename T>
inline vec load_some(const T* p, int64_t n) {
  return n < width ? load_part(p, n) : load(p);
}

// Values of a map, normalised and behind a ReLU if there is a norm.
template <typename T>
struct Reader {
  const NormVectors& norm;
  vec mean{}, scale{}, shift{};

  Reader(const NormVectors& norm, int64_t channel) : norm(norm) {
    if (!norm.mean) return;
    mean = load(norm.mean + channel), scale = load(norm.scale + channel), shift = load(norm.shift + channel);
  }
  vec operator()(const T* p, int64_t n) const {
    const vec v = load_some(p, n);
    return norm.mean ? relu((v - mean) * scale + shift) : v;
  }
};

// Where panel `channel / panel_width` of position 0 begins.
inline float* panel_of(const WeightGrad& g, float* to, int64_t positions, int64_t channel) {
  return to + channel / panel_width * positions * g.block * panel_width + channel % panel_width;
}

struct Place {
  int64_t n, y, x;
};

// Of `unit` among units of `step` x `step` outputs.
inline Place place_of(const ConvShape& s, int64_t unit, int64_t step) {
  const int64_t across = (s.q + step - 1) / step, down = (s.p + step - 1) / step;
  return {unit / (across * down), unit / across % down * step, unit % across * step};
}

// Without the divisions of place_of.
inline Place next(const ConvShape& s, Place at, int64_t step) {
  at.x += step;
  if (at.x >= s.q) at.x = 0, at.y += step;
  if (at.y >= s.p) at.y = 0, ++at.n;
  return at;
}

template <typename T>
void input_tile(const WeightGrad& g, const Place& at, float* to) {
  const ConvShape& s = g.shape;
  const T* pixel[size * size];
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const int64_t y = at.y + i - s.padding[0], x = at.x + j - s.padding[1];
      const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
      pixel[i * size + j] = inside ? static_cast<const T*>(g.input) + ((at.n * s.h + y) * s.w + x) * s.c : nullptr;
    }
  }
  const int64_t stride = g.block * panel_width;
  for (int64_t c = 0; c < s.c; c += width) {
    const Reader<T> read(g.norm, c);
    float* out = panel_of(g, to, size * size, c);
    transform_input<taps, tile>(
        [&](int i, int j) {
          const T* p = pixel[i * size + j];
          return p ? read(p + c, s.c - c) : vec{};
        },
        [&](int i, int j, vec v) { store(out + (i * size + j) * stride, v); });
  }
}

// G g G^T of a tile of the gradient, as of a 4 x 4 kernel.
template <typename T>
void grad_tile(const WeightGrad& g, const Place& at, float* to) {
  const ConvShape& s = g.shape;
  const T* first = static_cast<const T*>(g.grad) + ((at.n * s.p + at.y) * s.q + at.x) * s.k;
  const int64_t stride = g.block * panel_width;
  for (int64_t k = 0; k < s.k; k += width) {
    float* out = panel_of(g, to, size * size, k);
    vec rows[size][tile];
    for (int j = 0; j < tile; ++j) {
      vec column[tile];
      for (int i = 0; i < tile; ++i) {
        const bool inside = at.y + i < s.p && at.x + j < s.q;
        column[i] = inside ? load_some(first + (i * s.q + j) * s.k + k, s.k - k) : vec{};
      }
      for (int i = 0; i < size; ++i) {
        const float* h = g.transform + i * tile;
        rows[i][j] = h[0] * column[0] + h[1] * column[1] + h[2] * column[2] + h[3] * column[3];
      }
    }
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        const float* h = g.transform + j * tile;
        const vec* r = rows[i];
        store(out + (i * size + j) * stride, h[0] * r[0] + h[1] * r[1] + h[2] * r[2] + h[3] * r[3]);
      }
    }
  }
}

template <typename T>
void input_pixel(const WeightGrad& g, const Place& at, float* to) {
  const ConvShape& s = g.shape;
  const int64_t positions = s.r * s.s, stride = g.block * panel_width;
  for (int64_t r = 0; r < s.r; ++r) {
    for (int64_t t = 0; t < s.s; ++t) {
      const int64_t y = at.y * s.stride[0] - s.padding[0] + r * s.dilation[0];
      const int64_t x = at.x * s.stride[1] - s.padding[1] + t * s.dilation[1];
      const bool inside = y >= 0 && y < s.h && x >= 0 && x < s.w;
      const T* p = static_cast<const T*>(g.input) + ((at.n * s.h + y) * s.w + x) * s.c;
      for (int64_t c = 0; c < s.c; c += width) {
        const Reader<T> read(g.norm, c);
        store(panel_of(g, to, positions, c) + (r * s.s + t) * stride, inside ? read(p + c, s.c - c) : vec{});
      }
    }
  }
}

template <typename T>
void grad_pixel(const WeightGrad& g, const Place& at, float* to) {
  const int64_t filters = g.shape.k;
  const T* p = static_cast<const T*>(g.grad) + ((at.n * g.shape.p + at.y) * g.shape.q + at.x) * filters;
  for (int64_t k = 0; k < filters; k += width) store(panel_of(g, to, 1, k), load_some(p + k, filters - k));
}

template <typename Unit>
void each_unit(const WeightGrad& g, int64_t begin, int64_t end, float* to, const Unit& unit) {
  const int64_t step = g.winograd ? tile : 1;
  Place at = place_of(g.shape, begin, step);
  for (int64_t i = begin; i < end; ++i, at = next(g.shape, at, step), to += panel_width) unit(g, at, to);
}

// sums[i][j] += the sum over units of a[unit][i] * b[unit][j], where the units are panel_width apart.
template <int rows, int vectors>
void product(const float* a, const float* b, int64_t units, float* sums, bool adds) {
  vec sum[rows][vectors];
  each<rows, vectors>([&](int i, int j) { sum[i][j] = vec{}; });
  for (int64_t u = 0; u < units; ++u, a += panel_width, b += panel_width) {
    vec column[vectors], row;
    each<vectors, 1>([&](int j, int) { column[j] = load(b + j * width); });
    each<rows, vectors>([&](int i, int j) {
      if (j == 0) row = broadcast(a[i]);
      sum[i][j] += row * column[j];
    });
  }
  each<rows, vectors>([&](int i, int j) {
    float* to = sums + i * panel_width + j * width;
    store(to, adds ? load(to) + sum[i][j] : sum[i][j]);
  });
}

using Product = void (*)(const float*, const float*, int64_t, float*, bool);

template <int vectors>
Product product_of(int64_t rows) {
  static_assert(tile_rows == 6);
  static constexpr Product of[tile_rows] = {product<1, vectors>, product<2, vectors>, product<3, vectors>,
                                            product<4, vectors>, product<5, vectors>, product<6, vectors>};
  return of[rows - 1];
}

Product product_of(int64_t rows, int64_t vectors) {
  if (vectors == 1) return product_of<1>(rows);
  if constexpr (panel_vectors == 4) {
    if (vectors == 3) return product_of<3>(rows);
    if (vectors == 4) return product_of<4>(rows);
  }
  return product_of<2>(rows);
}

// The nine taps of filter k and the channels of a vector, from their sums at 36 positions.
inline void output_taps(const float* sums, vec* taps_of, vec* check) {
  transform_output<taps, tile>(sums, panel_width * panel_width, check, [&](int i, const vec* row) {
    for (int j = 0; j < taps; ++j) taps_of[i * taps + j] = row[j];
  });
}

}  // namespace

void weight_grad_input(const WeightGrad& g, int64_t begin, int64_t end, float* to) {
  const auto of = [&](auto tile_of_type, auto pixel_of_type) {
    each_unit(g, begin, end, to, g.winograd ? tile_of_type : pixel_of_type);
  };
  if (g.input_type == Storage::f32) return of(input_tile<float>, input_pixel<float>);
  if (g.input_type == Storage::bf16) return of(input_tile<bf16>, input_pixel<bf16>);
  of(input_tile<f16>, input_pixel<f16>);
}

void weight_grad_grad(const WeightGrad& g, int64_t begin, int64_t end, float* to) {
  const auto of = [&](auto tile_of_type, auto pixel_of_type) {
    each_unit(g, begin, end, to, g.winograd ? tile_of_type : pixel_of_type);
  };
  if (g.grad_type == Storage::f32) return of(grad_tile<float>, grad_pixel<float>);
  if (g.grad_type == Storage::bf16) return of(grad_tile<bf16>, grad_pixel<bf16>);
  of(grad_tile<f16>, grad_pixel<f16>);
}

void weight_grad_products(const float* grad, const float* input, int64_t units, int64_t filters, int64_t channels,
                          float* sums, bool adds) {
  const Tiles tiles(filters);
  const int64_t vectors = vectors_of_panel(channels, 0);
  for (int64_t begin = 0; begin < units; begin += sum_units) {
    const int64_t count = begin + sum_units < units ? sum_units : units - begin;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t first = tiles.first_row(t);
      product_of(tiles.rows_of(t), vectors)(grad + begin * panel_width + first, input + begin * panel_width, count,
                                            sums + first * panel_width, adds || begin > 0);
    }
  }
}

bool weight_grad_output(const WeightGrad& g, int64_t filter, int64_t channel, const float* sums) {
  const ConvShape& s = g.shape;
  const int64_t filters = s.k - filter < panel_width ? s.k - filter : panel_width;
  const int64_t channels = s.c - channel < panel_width ? s.c - channel : panel_width, positions = s.r * s.s;
  vec check{};
  for (int64_t k = 0; k < filters; ++k) {
    float* to = g.output + (filter + k) * g.output_stride[0] + channel * g.output_stride[1];
    for (int64_t c = 0; c < channels; c += width) {
      const float* from = sums + k * panel_width + c;
      const int64_t n = channels - c < width ? channels - c : width;
      vec found[taps * taps];
      if (g.winograd) output_taps(from, found, &check);
      for (int64_t i = 0; i < positions; ++i) {
        const vec v = g.winograd ? found[i] : load(from + i * panel_width * panel_width);
        float* at = to + c * g.output_stride[1] + i / s.s * g.output_stride[2] + i % s.s * g.output_stride[3];
        if (g.output_stride[1] == 1 && n == width) {
          store(at, v);
        } else {
          for (int64_t l = 0; l < n; ++l) at[l * g.output_stride[1]] = v[l];
        }
      }
    }
  }
  return is_finite(check);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
