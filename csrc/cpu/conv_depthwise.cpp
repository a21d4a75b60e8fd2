// The host side of depthwise convolution: splits the output over torch's thread pool. The loops are in
// kernels/conv_depthwise.cpp.
#include "conv.h"
#include "levels.h"
#include "parallel.h"

namespace resnet_fast {

using torch::stable::Tensor;

namespace {

struct PixelPointers {};

// Values of the output that a thread computes at a time, in whole rows.
constexpr int64_t block_values = 1 << 14;

}  // namespace

Tensor conv_depthwise(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                      const std::optional<Tensor>& residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, bool relu) {
  STD_TORCH_CHECK(packed_weight.dim() == 3 && packed_weight.is_contiguous() && packed_weight.size(2) == input.size(1) &&
                      packed_weight.size(2) == bias.size(0) && storage_of(packed_weight.scalar_type()) == Storage::f32,
                  "packed_weight must be [R, S, C], contiguous and float32, with the channels of input and bias");
  const ConvShape s =
      conv_shape(input, bias, packed_weight.size(0), packed_weight.size(1), stride, padding, dilation, input.size(1));
  const ConvCall conv(s, input, packed_weight, bias, residual, relu);
  run_conv_depthwise(conv);
  return conv.result();
}

void run_conv_depthwise(const Conv& conv) {
  const ConvShape& s = conv.shape;
  const int64_t rows = s.n * s.p, block = std::max<int64_t>(1, block_values / std::max<int64_t>(1, s.q * s.c));
  for_each_item((rows + block - 1) / block, rows * s.q * s.c * s.r * s.s, [&](int64_t item) {
    const Scratch<PixelPointers> scratch(kernels().conv_depthwise_scratch(s));
    kernels().conv_depthwise(conv, item * block, std::min(rows, (item + 1) * block), scratch.bytes());
  });
}

}  // namespace resnet_fast
