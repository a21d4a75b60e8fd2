// The host side of the convolution in many groups: packs the weight and splits the output over torch's thread pool. The
// loops are in kernels/conv_grouped.cpp.
#include "conv.h"
#include "levels.h"
#include "parallel.h"

namespace resnet_fast {
namespace {

using torch::stable::Tensor;

struct InputRing {};

// Input rows and weights that a thread works on at a time: a part of its L2 cache. 3x3 layers of ResNeXt at batch 8 on
// 2 Zen 5 cores, GFLOP/s with 32, 128 and 256 KiB: 164, 216 and 211 for 32 groups of 4 at 56x56; 340, 380 and 374 for
// 16 with stride 2; 420, 458 and 449 for 16 at 28x28.
constexpr int64_t block_bytes = 128 << 10;

}  // namespace

Tensor pack_grouped(const Tensor& weight, int64_t groups) {  // [K, C / groups, R, S]
  const Tensor w = torch::stable::contiguous(weight);
  const int64_t width = kernels().vector_width, depth = w.size(1), filters = w.size(0) / groups;
  const int64_t r = w.size(2), s = w.size(3);
  const GroupedUnit unit = kernels().grouped_unit(groups * depth, w.size(0), groups);
  Tensor packed = torch::stable::empty({unit.units * unit.vectors, r, depth, s, width});
  const float* from = static_cast<const float*>(w.const_data_ptr());
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  for_each_item(unit.units * unit.vectors, w.numel(), [&](int64_t v) {
    float* out = to + v * r * depth * s * width;
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t in_unit = v % unit.vectors * width + lane, filter = v / unit.vectors * unit.filters + in_unit;
      const bool exists = in_unit < unit.filters && filter < groups * filters;
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t y = 0; y < r; ++y)
          for (int64_t x = 0; x < s; ++x)
            out[((y * depth + k) * s + x) * width + lane] =
                exists ? from[((filter * depth + k) * r + y) * s + x] : 0.0f;
    }
  });
  return packed;
}

Tensor conv_grouped(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                    const std::optional<Tensor>& residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, bool relu) {
  STD_TORCH_CHECK(packed_weight.dim() == 5, "packed_weight must come from _pack_grouped");
  const ConvShape s =
      conv_shape(input, bias, packed_weight.size(1), packed_weight.size(3), stride, padding, dilation, groups);
  const GroupedUnit unit = kernels().grouped_unit(s.c, s.k, groups);
  STD_TORCH_CHECK(storage_of(packed_weight.scalar_type()) == Storage::f32 &&
                      packed_weight.size(0) == unit.units * unit.vectors && packed_weight.size(2) == s.c / groups &&
                      packed_weight.size(4) == kernels().vector_width,
                  "packed_weight must come from _pack_grouped for this input, bias and groups");
  const ConvCall conv(s, input, packed_weight, bias, residual, relu);
  if (s.n > 0) run_conv_grouped(conv);
  return conv.result();
}

void run_conv_grouped(const Conv& conv) {
  const ConvShape& s = conv.shape;
  const GroupedUnit unit = kernels().grouped_unit(s.c, s.k, s.groups);
  const int64_t weight_bytes = unit.vectors * s.r * (s.c / s.groups) * s.s * kernels().vector_width * 4;
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
