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
// bfloat16, two; the last value of an odd depth is a step of its own.
template <typename T, int64_t step>
Tensor pack(const Tensor& weight, int64_t groups, ScalarType dtype) {
  const int64_t filters = weight.size(0) / groups, depth = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t width = kernels().vector_width, panel = kernels().gemm_panel;
  const int64_t padded = (filters + width - 1) / width * width, panels = (padded + panel - 1) / panel;
  Tensor packed = torch::stable::empty({groups, padded, weight.size(2), weight.size(3), depth}, dtype);
  const float* from = static_cast<const float*>(weight.const_data_ptr());
  T* to = static_cast<T*>(packed.mutable_data_ptr());
  for_each_item(groups * panels, weight.numel(), [&](int64_t item) {
    const int64_t group = item / panels, first = item % panels * panel;
    const int64_t columns = std::min(panel, padded - first);
    T* out = to + (group * padded + first) * taps * depth;
    for (int64_t j = 0; j < columns; ++j) {
      const float* filter = from + (group * filters + first + j) * depth * taps;
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t together = k / step * step + step <= depth ? step : 1;
        for (int64_t t = 0; t < taps; ++t)
          out[(t * depth + k / together * together) * columns + j * together + k % together] =
              first + j < filters ? static_cast<T>(filter[k * taps + t]) : T(0.0f);
      }
    }
  });
  return packed;
}

}  // namespace

Tensor pack_gemm(const Tensor& weight, int64_t groups, bool bfloat16) {  // [K, C / groups, R, S]
  const Tensor w = torch::stable::contiguous(weight);
  STD_TORCH_CHECK(w.dim() == 4 && w.scalar_type() == ScalarType::Float,
                  "weight must be [K, C / groups, R, S], float32");
  if (!bfloat16) return pack<float, 1>(w, groups, ScalarType::Float);
  return pack<torch::headeronly::BFloat16, 2>(w, groups, ScalarType::BFloat16);
}

Tensor conv_gemm(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                 const std::optional<Tensor>& residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                 std::vector<int64_t> dilation, int64_t groups, bool relu) {
  const ConvShape s =
      conv_shape(input, bias, packed_weight.size(2), packed_weight.size(3), stride, padding, dilation, groups);
  const int64_t width = kernels().vector_width;
  const int64_t filters = s.k / groups, depth = s.c / groups;
  STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == groups && packed_weight.size(4) == depth &&
                      packed_weight.size(1) == (filters + width - 1) / width * width,
                  "packed_weight must come from _pack_gemm for this input, bias and groups");
  ConvCall conv(s, input, packed_weight, bias, residual, relu);
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
