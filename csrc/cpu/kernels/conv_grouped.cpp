// Convolution in many groups (ResNeXt). Compiled once per level (levels.h).
//
// A group has too few filters for a panel of conv_gemm.cpp, so a vector holds the filters of several groups: for each
// kernel position and each channel k of a group it needs the input's channel k of each lane's own group, which is a
// permutation of the same channels of the input pixel. Groups with more filters than half a vector have vectors of
// their own and broadcast channel k. The set of groups that share input vectors is called a unit.
//
// With weights in bf16, of groups with an even number of channels, a lane holds a pair of channels and all the same
// holds for pairs.
//
// A thread copies the input rows that it needs, as float32 or such pairs and with the padding around, into a ring that
// stays in its L1 or L2 cache: pixels of one input vector lie side by side there (in the map they are C values apart,
// which falls into few sets of the L1 cache), and the inner loop knows neither borders nor types. An input vector is
// loaded and permuted once for all the kernel's columns.
#include "multiply.h"
#include "rows.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

#if defined(__AVX512F__)
constexpr int tile_vectors = 2;  // 8 pixels x 2 sums + 2 x 3 weights + 1 input of 32 registers
#else
constexpr int tile_vectors = 1;  // 8 + 3 + 1 of 16
#endif

typedef int32_t lanes32 __attribute__((vector_size(width * sizeof(int32_t))));

static inline vec permute(vec v, const int32_t* index) {
  lanes32 at;
  __builtin_memcpy(&at, index, sizeof(at));
#if defined(__AVX512F__)
  return (vec)_mm512_permutexvar_ps((__m512i)at, (__m512)v);
#elif defined(__AVX2__)
  return (vec)_mm256_permutevar8x32_ps((__m256)v, (__m256i)at);
#else
  vec out;
  for (int i = 0; i < width; ++i) out[i] = v[at[i]];
  return out;
#endif
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

GroupedUnit grouped_unit(int64_t channels, int64_t filters, int64_t groups) {
  const int64_t c = channels / groups, k = filters / groups, larger = c > k ? c : k;
  const int64_t together = 2 * larger <= width ? width / larger : 1;
  return {c * together, k * together, ceil_div(c * together, width), ceil_div(k * together, width),
          ceil_div(groups, together)};
}

// What the output pixels of a row have in common.
struct Tiling {
  int64_t pixels;      // of a tile; those behind the row's end are computed but not stored
  int64_t row_pixels;  // of the ring
  int64_t row_slots;   // rows of the ring: as many as the kernel is high
};

static Tiling tiling_of(const ConvShape& s) {
  const auto computed = [&](int64_t pixels) { return ceil_div(s.q, pixels) * pixels; };
  int64_t pixels = 8;
  if (computed(7) < computed(pixels)) pixels = 7;
  if (computed(4) < computed(pixels)) pixels = 4;
  return {pixels, (computed(pixels) - 1) * s.stride[1] + (s.s - 1) * s.dilation[1] + 1, (s.r - 1) * s.dilation[0] + 1};
}

// Where one row of the kernel, or one position of it, meets the input. Offsets and steps here and in Tile are in lanes
// of 32 bits: floats or pairs.
struct Taps {
  const float* input;
  int64_t weight;  // offset
};

struct Tile {
  const Taps* taps;
  int64_t num_taps;
  int64_t input;                    // offset into every row
  int64_t chunk_step;               // from one input vector of a group to the next
  int64_t unit_step;                // from one unit to the next
  int64_t pixel_step;               // to the next input pixel
  int64_t depth;                    // channels, or pairs, of a group
  const float* weight;              // [kernel rows][depth][kernel columns][width]
  int64_t weight_step, depth_step;  // to the next vector of filters, the next channel or pair
  const float* bias;
  int64_t bias_step;     // to the next vector of filters
  const int32_t* index;  // [depth][width]: lanes of the permutations
};

enum class Form {
  permuted,  // several groups in a vector
  own,       // a vector or less for each group
  shared     // several vectors of filters for a group
};

// sums[pixels][vectors] of output pixels side by side; the Taps are `columns` wide.
template <typename In, Form form, int columns, int stride, int pixels, int vectors>
static void sum_tile(const Tile& t, float* sums) {
  constexpr int positions = (pixels - 1) * stride + columns;
  constexpr int together = form == Form::shared ? vectors : 1;  // vectors with the same input
  const int64_t pixel_step = columns == 1 ? t.pixel_step : width;
  vec sum[pixels][vectors];
  each<pixels, vectors>([&](int i, int j) { sum[i][j] = vec{}; });
  for (const Taps* taps = t.taps; taps < t.taps + t.num_taps; ++taps) {
    const float* x = taps->input + t.input;
    const float* w = t.weight + taps->weight;
    for (int64_t k = 0; k < t.depth; ++k, w += t.depth_step) {
      if (form != Form::permuted && k > 0) x += k % width == 0 ? t.chunk_step - (width - 1) : 1;
      vec b[vectors][columns];
      each<vectors, columns>([&](int j, int s) { b[j][s] = load(w + j * t.weight_step + s * width); });
#pragma GCC unroll 2
      for (int first = 0; first < vectors; first += together) {
#pragma GCC unroll 20
        for (int at = 0; at < positions; ++at) {
          const float* from = x + at * pixel_step + first * t.unit_step;
          const In* in = reinterpret_cast<const In*>(from);
          const vec a = form == Form::permuted ? permute(panel_step(in), t.index + k * width) : row_step(in);
#pragma GCC unroll 3
          for (int s = 0; s < columns; ++s) {
            if (at < s || (at - s) % stride != 0 || (at - s) / stride >= pixels) continue;
#pragma GCC unroll 2
            for (int j = first; j < first + together; ++j) {
              vec& to = sum[(at - s) / stride][j];
              to = multiply_add(in, a, b[j][s], to);
            }
          }
        }
      }
    }
  }
  each<pixels, vectors>(
      [&](int i, int j) { store(sums + (i * vectors + j) * width, sum[i][j] + load(t.bias + j * t.bias_step)); });
}

typedef void (*SumTile)(const Tile&, float*);

template <typename In, Form form, int columns, int stride>
static SumTile sum_tile_of(int64_t pixels, int64_t vectors) {
  constexpr int several = tile_vectors;
  if (vectors == 1 && pixels == 8) return sum_tile<In, form, columns, stride, 8, 1>;
  if (vectors == 1 && pixels == 7) return sum_tile<In, form, columns, stride, 7, 1>;
  if (vectors == 1) return sum_tile<In, form, columns, stride, 4, 1>;
  if (pixels == 8) return sum_tile<In, form, columns, stride, 8, several>;
  if (pixels == 7) return sum_tile<In, form, columns, stride, 7, several>;
  return sum_tile<In, form, columns, stride, 4, several>;
}

template <typename In, Form form>
static SumTile sum_tile_of(int64_t columns, int64_t stride, int64_t pixels, int64_t vectors) {
  if (columns == 3 && stride == 1) return sum_tile_of<In, form, 3, 1>(pixels, vectors);
  if (columns == 3 && stride == 2) return sum_tile_of<In, form, 3, 2>(pixels, vectors);
  return sum_tile_of<In, form, 1, 1>(pixels, vectors);
}

template <typename In>
static SumTile sum_tile_of(Form form, int64_t columns, int64_t stride, int64_t pixels, int64_t vectors) {
  if (form == Form::permuted) return sum_tile_of<In, Form::permuted>(columns, stride, pixels, vectors);
  if (form == Form::own || vectors == 1) return sum_tile_of<In, Form::own>(columns, stride, pixels, vectors);
  return sum_tile_of<In, Form::shared>(columns, stride, pixels, vectors);
}

// The first n < width * per_step values of a pixel in lanes of In; the others are zero.
template <typename T>
static inline vec some_lanes(const T* from, int64_t n, const float*) {
  return load_part(from, n);
}
template <typename T>
static inline vec all_lanes(const T* from, const float*) {
  return load(from);
}

#if defined(__AVX512BF16__)
static inline vec some_lanes(const bf16* from, int64_t n, const bf16*) {
  return (vec)_mm512_maskz_loadu_epi16((1u << n) - 1, from);
}
static inline vec all_lanes(const bf16* from, const bf16*) { return panel_step(from); }
#endif

// One input row into the ring: [units][vectors of a unit's channels][row_pixels][width].
template <typename T, typename In>
static void copy_row(const Conv& conv, const GroupedUnit& unit, int64_t row_pixels, int64_t n, int64_t y,
                     int64_t unit_begin, int64_t unit_end, float* to) {
  constexpr int64_t in_vector = width * per_step<In>;
  constexpr const In* lanes = nullptr;
  const ConvShape& s = conv.shape;
  const int64_t left = s.padding[1] < row_pixels ? s.padding[1] : row_pixels;
  const int64_t end = left + s.w < row_pixels ? left + s.w : row_pixels;
  const T* row = static_cast<const T*>(conv.input) + (n * s.h + y) * s.w * s.c;
  for (int64_t u = unit_begin; u < unit_end; ++u) {
    for (int64_t i = 0; i < unit.channels; i += in_vector, to += row_pixels * width) {
      const int64_t channel = u * unit.channels + i, channels = s.c - channel;
      const T* from = row + channel;
      for (int64_t x = 0; x < left; ++x) store(to + x * width, vec{});
      if (channels >= in_vector) {
        for (int64_t x = left; x < end; ++x, from += s.c) store(to + x * width, all_lanes(from, lanes));
      } else {
        for (int64_t x = left; x < end; ++x, from += s.c) store(to + x * width, some_lanes(from, channels, lanes));
      }
      for (int64_t x = end; x < row_pixels; ++x) store(to + x * width, vec{});
    }
  }
}

template <typename In>
static void copy_row(const Conv& conv, const GroupedUnit& unit, int64_t row_pixels, int64_t n, int64_t y,
                     int64_t unit_begin, int64_t unit_end, float* to) {
  if constexpr (per_step<In> == 1) {
    if (conv.input_type == Storage::f32) copy_row<float, In>(conv, unit, row_pixels, n, y, unit_begin, unit_end, to);
    if (conv.input_type == Storage::f16) copy_row<f16, In>(conv, unit, row_pixels, n, y, unit_begin, unit_end, to);
  }
  if (conv.input_type == Storage::bf16) copy_row<bf16, In>(conv, unit, row_pixels, n, y, unit_begin, unit_end, to);
}

// Where a tile's outputs will go: 4 channels a group at 56x56 are 1.3 times as fast, 16 at 14x14 0.98 times (2 Zen 5
// cores, batch 8).
static void prefetch_output(const Conv& conv, int64_t pixel, int64_t pixels, int64_t filter, int64_t filters) {
  const int64_t size = conv.output_type == Storage::f32 ? 4 : 2;
  const char* out = static_cast<const char*>(conv.output) + (pixel * conv.shape.k + filter) * size;
  for (int64_t i = 0; i < pixels; ++i) prefetch(out + i * conv.shape.k * size, filters * size);
}

// Stores the first `lanes` sums of each pixel, `step` apart.
template <typename T>
static void finish(const Conv& conv, int64_t pixel, int64_t pixels, int64_t filter, int64_t lanes, const float* sums,
                   int64_t step) {
  const int64_t at = pixel * conv.shape.k + filter;
  const T* residual = conv.residual ? static_cast<const T*>(conv.residual) + at : nullptr;
  T* out = static_cast<T*>(conv.output) + at;
  for (int64_t i = 0; i < pixels; ++i, sums += step, out += conv.shape.k) {
    vec v = load(sums);
    if (residual) {
      v += lanes == width ? load(residual) : load_part(residual, lanes);
      residual += conv.shape.k;
    }
    if (conv.relu) v = relu(v);
    if (lanes == width) {
      store_rounded(out, v);
    } else {
      store_part(out, v, lanes);
    }
  }
}

static void finish(const Conv& conv, int64_t pixel, int64_t pixels, int64_t filter, int64_t lanes, const float* sums,
                   int64_t step) {
  if (conv.output_type == Storage::f32) finish<float>(conv, pixel, pixels, filter, lanes, sums, step);
  if (conv.output_type == Storage::bf16) finish<bf16>(conv, pixel, pixels, filter, lanes, sums, step);
  if (conv.output_type == Storage::f16) finish<f16>(conv, pixel, pixels, filter, lanes, sums, step);
}

int64_t conv_grouped_scratch(const ConvShape& s, int64_t units) {
  const Tiling t = tiling_of(s);
  const GroupedUnit unit = grouped_unit(s.c, s.k, s.groups);
  return units * unit.chunks * t.row_slots * t.row_pixels * width * int64_t(sizeof(float)) +
         s.r * s.s * int64_t(sizeof(Taps));
}

template <typename In>
static void conv_units(const Conv& conv, int64_t n, int64_t row_begin, int64_t row_end, int64_t unit_begin,
                       int64_t unit_end, void* scratch) {
  const ConvShape& s = conv.shape;
  const GroupedUnit unit = grouped_unit(s.c, s.k, s.groups);
  const Tiling tiling = tiling_of(s);
  const int64_t depth = s.c / s.groups / per_step<In>, filters = s.k / s.groups;
  const int64_t chunks = ceil_div(unit.channels, width * per_step<In>);
  const int64_t chunk = tiling.row_pixels * width, slot = (unit_end - unit_begin) * chunks * chunk;
  const bool rows_at_once = takes_rows(s), together = unit.filters > filters;
  const Form form = together ? Form::permuted : unit.vectors == 1 ? Form::own : Form::shared;
  float* ring = static_cast<float*>(scratch);
  Taps* taps = reinterpret_cast<Taps*>(ring + tiling.row_slots * slot);

  int32_t index[width * width] = {};
  if (together)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < unit.filters; ++i) index[k * width + i] = int32_t(i / filters * depth + k);

  Tile tile{};
  tile.taps = taps;
  tile.chunk_step = chunk;
  tile.unit_step = chunks * chunk;
  tile.pixel_step = s.stride[1] * width;
  tile.depth = depth;
  tile.depth_step = s.s * width;
  tile.weight_step = s.r * s.s * depth * width;
  tile.bias_step = unit.vectors == 1 ? unit.filters : width;
  tile.index = index;
  // Vectors of one unit at a time, or of one after the other if it has but one.
  const int64_t vectors = (unit_end - unit_begin) * unit.vectors, run = unit.vectors == 1 ? vectors : unit.vectors;

  int64_t copied = 0;  // input rows before this one are in the ring, or not needed any more
  for (int64_t p = row_begin; p < row_end; ++p) {
    const int64_t first = p * s.stride[0] - s.padding[0];
    for (int64_t y = first > copied ? first : copied; y < first + tiling.row_slots && y < s.h; ++y) {
      copy_row<In>(conv, unit, tiling.row_pixels, n, y, unit_begin, unit_end, ring + y % tiling.row_slots * slot);
      copied = y + 1;
    }
    tile.num_taps = 0;
    for (int64_t r = 0; r < s.r; ++r) {
      const int64_t y = first + r * s.dilation[0];
      if (y < 0 || y >= s.h) continue;
      const float* row = ring + y % tiling.row_slots * slot;
      for (int64_t t = 0; t < (rows_at_once ? 1 : s.s); ++t)
        taps[tile.num_taps++] = {row + t * s.dilation[1] * width, (r * depth * s.s + t) * width};
    }
    for (int64_t v = 0, count; v < vectors; v += count) {
      const int64_t left = run - v % run;
      count = left < tile_vectors ? left : tile_vectors;
      const SumTile sum = sum_tile_of<In>(form, rows_at_once ? s.s : 1, s.stride[1], tiling.pixels, count);
      const int64_t u = unit_begin + v / unit.vectors, filter = u * unit.filters + v % unit.vectors * width;
      tile.weight = static_cast<const float*>(conv.weight) + (unit_begin * unit.vectors + v) * tile.weight_step;
      tile.bias = conv.bias + filter;
      for (int64_t q = 0; q < s.q; q += tiling.pixels) {
        float sums[8 * tile_vectors * width];
        tile.input = v / unit.vectors * tile.unit_step + q * s.stride[1] * width;
        const int64_t pixels = s.q - q < tiling.pixels ? s.q - q : tiling.pixels;
        prefetch_output(conv, (n * s.p + p) * s.q + q, pixels, filter, count * tile.bias_step);
        sum(tile, sums);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t f = filter + j * tile.bias_step;
          int64_t lanes = unit.filters - (v + j) % unit.vectors * width;
          if (lanes > s.k - f) lanes = s.k - f;
          if (lanes > width) lanes = width;
          finish(conv, (n * s.p + p) * s.q + q, pixels, f, lanes, sums + j * width, count * width);
        }
      }
    }
  }
}

void conv_grouped(const Conv& conv, int64_t n, int64_t row_begin, int64_t row_end, int64_t unit_begin, int64_t unit_end,
                  void* scratch) {
#if defined(__AVX512BF16__)
  if (conv.weight_type == Storage::bf16)
    return conv_units<bf16>(conv, n, row_begin, row_end, unit_begin, unit_end, scratch);
#endif
  conv_units<float>(conv, n, row_begin, row_end, unit_begin, unit_end, scratch);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
