// The host side of the convolution in many groups: packs the weight and splits the output over torch's thread pool. The
// loops are in kernels/conv_grouped.cpp.
#include <torch/headeronly/util/BFloat16.h>

#include "conv.h"
#include "levels.h"
#include "parallel.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct InputRing {};

// Input rows and weights that a thread works on at a time: a part of its L2 cache. 3x3 layers of ResNeXt at batch 8 on
// 2 Zen 5 cores, GFLOP/s with 32, 128 and 256 KiB: 164, 216 and 211 for 32 groups of 4 at 56x56; 340, 380 and 374 for
// 16 with stride 2; 420, 458 and 449 for 16 at 28x28.
constexpr int64_t block_bytes = 128 << 10;

// [units * vectors][R][depth / step][S][width][step], where a step is one value or, in bfloat16, two.
template <typename T, int64_t step>
Tensor pack(const Tensor& weight, int64_t groups, ScalarType dtype) {
  const int64_t width = kernels().vector_width, depth = weight.size(1), filters = weight.size(0) / groups;
  const int64_t r = weight.size(2), s = weight.size(3);
  const GroupedUnit unit = kernels().grouped_unit(groups * depth, weight.size(0), groups);
  Tensor packed = torch::stable::empty({unit.units * unit.vectors, r, depth, s, width}, dtype);
  const float* from = static_cast<const float*>(weight.const_data_ptr());
  T* to = static_cast<T*>(packed.mutable_data_ptr());
  for_each_item(unit.units * unit.vectors, weight.numel(), [&](int64_t v) {
    T* out = to + v * r * depth * s * width;
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t in_unit = v % unit.vectors * width + lane, filter = v / unit.vectors * unit.filters + in_unit;
      const bool exists = in_unit < unit.filters && filter < groups * filters;
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t y = 0; y < r; ++y)
          for (int64_t x = 0; x < s; ++x)
            out[(((y * depth + k) / step * s + x) * width + lane) * step + k % step] =
                static_cast<T>(exists ? from[((filter * depth + k) * r + y) * s + x] : 0.0f);
    }
  });
  return packed;
}

}  // namespace

Tensor pack_grouped(const Tensor& weight, int64_t groups, bool bfloat16) {  // [K, C / groups, R, S]
  const Tensor w = torch::stable::contiguous(weight);
  if (!bfloat16) return pack<float, 1>(w, groups, ScalarType::Float);
  STD_TORCH_CHECK(w.size(1) % 2 == 0, "in bfloat16 groups must have an even number of channels, got ", w.size(1));
  return pack<torch::headeronly::BFloat16, 2>(w, groups, ScalarType::BFloat16);
}

Tensor conv_grouped(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                    const std::optional<Tensor>& residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, bool relu) {
  STD_TORCH_CHECK(packed_weight.dim() == 5, "packed_weight must come from _pack_grouped");
  const ConvShape s =
      conv_shape(input, bias, packed_weight.size(1), packed_weight.size(3), stride, padding, dilation, groups);
  const GroupedUnit unit = kernels().grouped_unit(s.c, s.k, groups);
  const bool pairs = storage_of(packed_weight.scalar_type()) == Storage::bf16;
  STD_TORCH_CHECK((!pairs || s.c / groups % 2 == 0) && packed_weight.size(0) == unit.units * unit.vectors &&
                      packed_weight.size(2) == s.c / groups && packed_weight.size(4) == kernels().vector_width,
                  "packed_weight must come from _pack_grouped for this input, bias and groups");
  const ConvCall conv(s, input, packed_weight, bias, residual, relu);
  if (s.n > 0) run_conv_grouped(conv);
  return conv.result();
}

void run_conv_grouped(const Conv& conv) {
  const ConvShape& s = conv.shape;
  const GroupedUnit unit = kernels().grouped_unit(s.c, s.k, s.groups);
  const int64_t weight_bytes =
      unit.vectors * s.r * (s.c / s.groups) * s.s * kernels().vector_width * bytes_of(conv.weight_type);
  const int64_t unit_bytes = kernels().conv_grouped_scratch(s, 1) + weight_bytes;
  const int64_t even = unit.vectors == 1 ? 2 : 1;  // units whose vectors go in pairs
  const int64_t in_block = std::clamp<int64_t>(block_bytes / (unit_bytes * even), 1, unit.units) * even;
  const int64_t blocks = (unit.units + in_block - 1) / in_block;
  const int64_t wanted = 4 * torch::stable::get_num_threads();
  const int64_t bands = std::clamp<int64_t>((wanted + s.n * blocks - 1) / (s.n * blocks), 1, (s.p + 3) / 4);
  for_each_item(s.n * blocks * bands, s.n * s.p * s.q * s.k * (s.c / s.groups) * s.r * s.s, [&](int64_t item) {
    const int64_t band = item % bands, block = item / bands % blocks, n = item / bands / blocks;
    const int64_t begin = block * in_block, end = std::min(unit.units, begin + in_block);
    const Scratch<InputRing> scratch(kernels().conv_grouped_scratch(s, end - begin));
    kernels().conv_grouped(conv, n, s.p * band / bands, s.p * (band + 1) / bands, begin, end, scratch.bytes());
  });
}

}  // namespace resnet_fast
