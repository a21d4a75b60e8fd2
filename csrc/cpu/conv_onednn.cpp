// oneDNN's fused convolution as torch exposes it, with bias, residual and ReLU. BatchNorm is folded in and the weight
// packed before, once: resnet_fast/kernels/packing.py.
// In C++ because in Python everything around the oneDNN calls took a fifth of ResNet-50's time at batch 1.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "../dispatch.h"
#include "ops.h"

namespace resnet_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr MemoryFormat channels_last = MemoryFormat::ChannelsLast;

}  // namespace

Tensor conv_onednn(const Tensor& input,                    // [N, C, H, W], any strides
                   const Tensor& packed_weight,            // [K, C / groups, R, S] in oneDNN's layout for input's shape
                   const Tensor& folded_bias,              // [K]; its dtype is the one oneDNN computes in
                   const std::optional<Tensor>& residual,  // [N, K, P, Q], any strides, input's dtype
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups, bool relu) {
  const ScalarType dtype = folded_bias.scalar_type();
  const Tensor x = torch::stable::contiguous(input, channels_last);
  std::optional<Tensor> r;
  if (residual.has_value()) r = torch::stable::contiguous(*residual, channels_last);
  // torch 2.11 cannot describe a residual map of one pixel to oneDNN ("could not create a memory").
  const bool fused_residual = r.has_value() && r->size(2) * r->size(3) > 1;
  // oneDNN's fused ReLU turns NaN into 0. A NaN in the result comes from a NaN or an infinity in what is read (weights
  // were checked when folded), so those are looked for first.
  // With groups torch 2.14 fuses no residual and runs add_relu on the map, which has no 16-bit types and asserts.
  const bool takes_relu =
      fused_residual == r.has_value() && !(fused_residual && groups > 1 && dtype != ScalarType::Float);
  const bool fused_relu = relu && takes_relu && all_finite(x) && (!r.has_value() || all_finite(*r));

  const std::optional<Tensor> bias = folded_bias;
  const std::optional<std::string> no_algorithm;
  const std::vector<int64_t> no_scalars;
  Tensor out;
  if (fused_residual) {
    std::optional<std::string> activation;
    if (fused_relu) activation = "relu";
    out = call("mkldnn::_convolution_pointwise", "binary", to_dtype(x, dtype), to_dtype(*r, dtype), packed_weight, bias,
               padding, stride, dilation, groups, std::string("add"), std::optional<double>(), activation, no_scalars,
               no_algorithm);
  } else {
    const std::string activation = fused_relu ? "relu" : "none";
    out = call("mkldnn::_convolution_pointwise", "", to_dtype(x, dtype), packed_weight, bias, padding, stride, dilation,
               groups, activation, no_scalars, no_algorithm);
    if (r.has_value()) out = add(out, to_dtype(*r, dtype));
  }
  if (relu && !fused_relu) out = call("aten::relu_", "", out);
  return with_exact_strides(to_dtype(out, input.scalar_type()));
}

}  // namespace resnet_fast
