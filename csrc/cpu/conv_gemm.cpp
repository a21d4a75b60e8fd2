// The host side of the convolution as a matrix product: packs the weight and splits the output over torch's thread
// pool. The loops are in kernels/conv_gemm.cpp.
#include <torch/headeronly/util/BFloat16.h>

#include "conv.h"
#include "levels.h"
#include "parallel.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct RowPointers {};

// More output pixels in a block gain nothing (one Zen 3 core: 91 GFLOP/s with 96, 92 with 192 for 512 channels at
// 28x28).
constexpr int64_t most_pixels = 120;

// Bytes of input that a block reads again for every panel of filters: half of the L2 cache (of 192 KiB and 480 KiB with
// a cache of 1 MiB, the latter was 1.03 times as fast for 1024 channels).
int64_t input_bytes() { return l2_bytes() * 15 / 32; }

// Panels of filters: [groups][padded / panel][R][S][depth / step][panel][step], where a step is one value or, in
// bfloat16, two; the last value of an odd depth is a step of its own. `from` [filters of all groups, depth, R, S] with
// any strides.
struct Weight {
  const float* from;
  int64_t filter_stride, depth_stride, row_stride, tap_stride;
  int64_t groups, filters, depth, rows, taps;  // filters of a group
};

// [rows, columns], whose columns are neighbours, to [columns, rows]. In blocks of 4 x 4, that compilers turn around in
// registers: 3 to 5 times as fast as one value after the other.
void transpose(const float* from, int64_t rows, int64_t columns, int64_t row_stride, float* to) {
  constexpr int64_t side = 4;
  for (int64_t k = 0; k < columns; k += side) {
    const int64_t width = std::min(side, columns - k);
    for (int64_t j = 0; j < rows; j += side) {
      const float* block = from + j * row_stride + k;
      float* out = to + k * rows + j;
      if (width == side && j + side <= rows) {
        float turned[side][side];
        for (int64_t i = 0; i < side; ++i)
          for (int64_t l = 0; l < side; ++l) turned[l][i] = block[i * row_stride + l];
        for (int64_t l = 0; l < side; ++l) std::copy_n(turned[l], side, out + l * rows);
      } else {
        for (int64_t l = 0; l < width; ++l)
          for (int64_t i = 0; i < std::min(side, rows - j); ++i) out[l * rows + i] = block[i * row_stride + l];
      }
    }
  }
}

template <typename T, int64_t step>
void pack(const Weight& w, T* to) {
  constexpr int64_t together_in_cache = 16;  // steps of the depth: 4 KiB of a panel of 64 filters
  const int64_t width = kernels().vector_width, panel = kernels().gemm_panel;
  const int64_t padded = (w.filters + width - 1) / width * width, panels = (padded + panel - 1) / panel;
  const int64_t positions = w.rows * w.taps;
  for_each_item(w.groups * panels, w.groups * padded * w.depth * positions, [&](int64_t item) {
    const int64_t group = item / panels, first = item % panels * panel, columns = std::min(panel, padded - first);
    const float* filters = w.from + (group * w.filters + first) * w.filter_stride;
    for (int64_t position = 0; position < positions; ++position) {
      const float* tap = filters + position / w.taps * w.row_stride + position % w.taps * w.tap_stride;
      T* out = to + ((group * padded + first) * positions + position * columns) * w.depth;
      if constexpr (step == 1)
        if (first + columns <= w.filters && (w.filter_stride == 1 || w.depth_stride == 1)) {
          if (w.filter_stride == 1) {
            for (int64_t k = 0; k < w.depth; ++k) std::copy_n(tap + k * w.depth_stride, columns, out + k * columns);
          } else {
            transpose(tap, columns, w.depth, w.filter_stride, out);
          }
          continue;
        }
      for (int64_t begin = 0; begin < w.depth; begin += step * together_in_cache) {
        const int64_t end = std::min(w.depth, begin + step * together_in_cache);
        for (int64_t j = 0; j < columns; ++j) {
          const bool exists = first + j < w.filters;
          for (int64_t k = begin; k < end; ++k) {
            const int64_t together = k / step * step + step <= w.depth ? step : 1;
            const float value = exists ? tap[j * w.filter_stride + k * w.depth_stride] : 0.0f;
            out[k / together * together * columns + j * together + k % together] = static_cast<T>(value);
          }
        }
      }
    }
  });
}

}  // namespace

Tensor pack_gemm(const Tensor& weight, int64_t groups, bool bfloat16, bool turned, bool reused) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && (groups == 1 || !turned),
                  "weight must be [K, C / groups, R, S], float32; turned without groups");
  Weight w{static_cast<const float*>(weight.const_data_ptr()),
           weight.stride(turned),
           weight.stride(1 - turned),
           weight.stride(2),
           weight.stride(3),
           groups,
           weight.size(turned) / groups,
           weight.size(1 - turned),
           weight.size(2),
           weight.size(3)};
  if (turned) {  // each filter's last tap first
    w.from += (w.rows - 1) * w.row_stride + (w.taps - 1) * w.tap_stride;
    w.row_stride = -w.row_stride, w.tap_stride = -w.tap_stride;
  }
  const int64_t width = kernels().vector_width;
  const std::vector<int64_t> size{groups, (w.filters + width - 1) / width * width, w.rows, w.taps, w.depth};
  const ScalarType dtype = bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor packed = reused ? empty_reused(size, dtype) : torch::stable::empty(size, dtype);
  if (bfloat16) {
    pack<torch::headeronly::BFloat16, 2>(w, static_cast<torch::headeronly::BFloat16*>(packed.mutable_data_ptr()));
  } else {
    pack<float, 1>(w, static_cast<float*>(packed.mutable_data_ptr()));
  }
  return packed;
}

Tensor conv_gemm(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                 const std::optional<Tensor>& residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                 std::vector<int64_t> dilation, int64_t groups, bool relu, const std::optional<Tensor>& norm) {
  const ConvShape s =
      conv_shape(input, bias, packed_weight.size(2), packed_weight.size(3), stride, padding, dilation, groups);
  const int64_t width = kernels().vector_width;
  const int64_t filters = s.k / groups, depth = s.c / groups;
  STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == groups && packed_weight.size(4) == depth &&
                      packed_weight.size(1) == (filters + width - 1) / width * width,
                  "packed_weight must come from _pack_gemm for this input, bias and groups");
  STD_TORCH_CHECK(!norm.has_value() || (s.r * s.s == 1 && padding[0] == 0 && padding[1] == 0 && groups == 1),
                  "norm is for 1x1 without padding and groups");
  ConvCall conv(s, input, packed_weight, bias, residual, relu, norm);
  if (s.r * s.s > 1 && conv.weight_type == Storage::f32)  // the kernel itself widens pixels for 1x1 only
    conv.set_input(to_dtype(input, ScalarType::Float));
  if (s.n > 0) run_conv_gemm(conv);
  return conv.result();
}

void run_conv_gemm(const Conv& conv) {
  const ConvShape& s = conv.shape;
  const int64_t panel = kernels().gemm_panel, groups = s.groups;
  const int64_t filters = s.k / groups, depth = s.c / groups, taps = s.r * s.s;
  const int64_t pixels = s.n * s.p * s.q, panels = (filters + panel - 1) / panel;
  const int64_t threads = torch::stable::get_num_threads();
  // A block's input counts once a pixel for kernels that overlap, as often as taps for those that do not.
  const int64_t reads = std::max<int64_t>(1, std::min(s.stride[0] * s.stride[1], taps));
  int64_t block = std::clamp<int64_t>(input_bytes() / int64_t(sizeof(float)) / (depth * reads), 12, most_pixels);
  const bool split_pixels = pixels >= filters;
  int64_t blocks = (pixels + block - 1) / block;
  if (split_pixels) blocks = (blocks + threads - 1) / threads * threads;
  block = (pixels + blocks - 1) / blocks;
  const int64_t splits = split_pixels ? 1 : std::min(panels, 4 * threads);
  for_each_item(groups * blocks * splits, pixels * s.k * depth * taps, [&](int64_t item) {
    const int64_t split = item % splits, begin = item / splits % blocks * block, group = item / splits / blocks;
    const int64_t end = std::min(pixels, begin + block);
    if (begin >= end) return;
    const int64_t first = panels * split / splits * panel,
                  last = std::min(filters, panels * (split + 1) / splits * panel);
    const Scratch<RowPointers> scratch(kernels().conv_gemm_scratch(conv, end - begin));
    kernels().conv_gemm(conv, group, begin, end, first, last, scratch.bytes());
  });
}

}  // namespace resnet_fast
