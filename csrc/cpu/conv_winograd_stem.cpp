// The host side of Winograd's algorithm for the 7x7 convolution with stride 2 that networks begin with, alone or with
// the max-pooling behind it: transforms and packs the weight, splits the images into phases. The loops are in
// kernels/conv_winograd_stem.cpp and kernels/max_pool.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "conv_rows.h"
#include "winograd.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t tile = stem_tile, taps = stem_taps, size = stem_size;

struct StemScratch {};

class WinogradStem {
 public:
  static constexpr int64_t rows_at_once = tile;

  WinogradStem(const Conv& conv, const Strides& input) : shape(conv.shape), conv_(conv), input_(input) {
    const int64_t width = kernels().vector_width;
    pixels_ = {nullptr, conv.input_type, input.w, input.c, shape.w, shape.c};
    tiles_ = (shape.q + tile - 1) / tile;
    positions_ = tiles_ * tile + taps - 1;
    lanes_ = (4 * shape.c + width - 1) / width * width;
  }

  // The last rows of the phases that a thread has made.
  struct State {
    std::vector<float> row;     // of the padded image, [2 * positions][C] or more
    std::vector<float> zeros;   // a row of padding
    std::vector<float> phases;  // [size][positions][lanes]
    int64_t n = -1, top = 0;    // image, first row of now
    int64_t made = 0;           // rows before this one have been
  };
  State state() const {
    const int64_t row = std::max(2 * positions_, shape.w + shape.padding[1]) * shape.c;
    return {std::vector<float>(row), std::vector<float>(2 * positions_ * shape.c),
            std::vector<float>(size * positions_ * lanes_)};
  }

  bool block(int64_t n, int64_t i, State& state, Storage type, void* output) const {
    const int64_t top = i * tile;
    make(n, top, state);
    const float* at[size];
    for (int64_t y = 0; y < size; ++y) at[y] = slot(state, top + y);
    const StemRows rows{at,     static_cast<const float*>(conv_.weight), conv_.bias, output,  type,      shape.c,
                        tiles_, std::min(tile, shape.p - top),           shape.q,    shape.k, conv_.relu};
    const Scratch<StemScratch> scratch(kernels().winograd_stem_scratch(shape.c));
    return kernels().winograd_stem(rows, scratch.floats());
  }

  const ConvShape shape;

 private:
  float* slot(State& state, int64_t y) const { return state.phases.data() + y % size * positions_ * lanes_; }

  // Rows [top, top + size) of the phases of image n.
  void make(int64_t n, int64_t top, State& state) const {
    if (state.n != n || top < state.top) state.made = 0;
    state.n = n, state.top = top;
    for (int64_t y = std::max(top, state.made); y < top + size; ++y) {
      for (int64_t odd = 0; odd < 2; ++odd) {
        const float* row = read(n, 2 * y + odd - shape.padding[0], state);
        kernels().stem_phases(row, shape.c, positions_, slot(state, y) + odd * 2 * shape.c);
      }
    }
    state.made = top + size;
  }

  const float* read(int64_t n, int64_t y, State& state) const {
    if (y < 0 || y >= shape.h) return state.zeros.data();
    PixelRow row = pixels_;
    row.pixels = static_cast<const char*>(conv_.input) + (n * input_.n + y * input_.h) * bytes_of(row.type);
    kernels().read_pixels(row, Storage::f32, state.row.data() + shape.padding[1] * shape.c);
    return state.row.data();
  }

  const Conv conv_;
  const Strides input_;
  PixelRow pixels_{};
  int64_t tiles_, positions_, lanes_;
};

ImageCall checked(const Tensor& input,          // [N, C, H, W], any strides
                  const Tensor& packed_weight,  // [K', size^2, 4 * C]
                  const Tensor& bias,           // [K], float32
                  const std::vector<int64_t>& padding, bool relu) {
  const int64_t width = kernels().vector_width;
  const ConvShape s = conv_shape(input, bias, 7, 7, {2, 2}, padding, {1, 1}, 1);
  STD_TORCH_CHECK(s.c <= 4, "input must have at most 4 channels, got ", s.c);
  STD_TORCH_CHECK(packed_weight.dim() == 3 && packed_weight.size(0) == (s.k + width - 1) / width * width &&
                      packed_weight.size(1) == size * size && packed_weight.size(2) == 4 * s.c &&
                      packed_weight.scalar_type() == ScalarType::Float,
                  "packed_weight must come from _pack_winograd_stem for this input and bias");
  return {s, input, packed_weight, bias, relu};
}

}  // namespace

// Panels of filters: [padded / panel][size^2][4 * C][panel]; the phases of even rows come first.
Tensor pack_winograd_stem(const Tensor& weight) {
  const Tensor w = torch::stable::contiguous(weight);  // [K, C, 7, 7]
  STD_TORCH_CHECK(
      w.dim() == 4 && w.size(1) <= 4 && w.size(2) == 7 && w.size(3) == 7 && w.scalar_type() == ScalarType::Float,
      "weight must be [K, C, 7, 7] with at most 4 channels, float32");
  const auto g = winograd_weight_transform(tile, taps);
  const int64_t filters = w.size(0), channels = w.size(1), depth = 4 * channels;
  const int64_t width = kernels().vector_width, panel = kernels().gemm_panel;
  const int64_t padded = (filters + width - 1) / width * width;
  Tensor packed = torch::stable::empty({padded, size * size, depth}, ScalarType::Float);
  const float* from = static_cast<const float*>(w.const_data_ptr());
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  for (int64_t filter = 0; filter < padded; ++filter) {
    const int64_t first = filter / panel * panel, columns = std::min(panel, padded - first);
    float* out = to + first * size * size * depth + filter % panel;
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t odd_row = d / (2 * channels), odd_column = d / channels % 2, c = d % channels;
      double half[size][taps] = {};  // transformed along the columns
      for (int64_t i = 0; i < taps; ++i) {
        for (int64_t j = 0; j < taps; ++j) {
          const int64_t r = 2 * i + odd_row, s = 2 * j + odd_column;
          if (filter >= filters || r >= 7 || s >= 7) continue;
          const double value = from[((filter * channels + c) * 7 + r) * 7 + s];
          for (int64_t u = 0; u < size; ++u) half[u][j] += g[u][i] * value;
        }
      }
      for (int64_t u = 0; u < size; ++u) {
        for (int64_t v = 0; v < size; ++v) {
          double sum = 0.0;
          for (int64_t j = 0; j < taps; ++j) sum += half[u][j] * g[v][j];
          out[((u * size + v) * depth + d) * columns] = float(sum);
        }
      }
    }
  }
  return packed;
}

std::tuple<Tensor, bool> conv_winograd_stem(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                                            std::vector<int64_t> padding, bool relu) {
  ImageCall call = checked(input, packed_weight, bias, padding, relu);
  const Tensor out = call.allocate();
  const bool finite = run_conv_winograd_stem(call.conv, call.strides);
  return {with_exact_strides(out), finite};
}

bool run_conv_winograd_stem(const Conv& c, const Strides& input) { return write_rows(WinogradStem(c, input), c); }

std::tuple<Tensor, bool> conv_winograd_stem_max_pool(const Tensor& input, const Tensor& packed_weight,
                                                     const Tensor& bias, std::vector<int64_t> padding,
                                                     std::vector<int64_t> kernel_size, std::vector<int64_t> pool_stride,
                                                     std::vector<int64_t> pool_padding) {
  ImageCall call = checked(input, packed_weight, bias, padding, true);
  const Pool pool = pool_of(kernel_size, pool_stride, pool_padding);
  const Tensor out = call.allocate(pool);
  const bool finite = run_conv_winograd_stem_max_pool(call.conv, call.strides, pool);
  return {with_exact_strides(out), finite};
}

bool run_conv_winograd_stem_max_pool(const Conv& c, const Strides& input, const Pool& pool) {
  return max_pool_rows(WinogradStem(c, input), c, pool);
}

}  // namespace resnet_fast
