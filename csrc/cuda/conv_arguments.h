// The arguments of a convolution, checked, as the host sides of its CUDA operators need them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "../conv_shape.h"
#include "ops.h"

namespace resnet_fast {

// Everything that the kernels rely on. What breaks a rule gets the Python checks' words (ops/conv_bn_relu.py).
inline ConvShape checked_shape(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                               const std::array<std::optional<torch::stable::Tensor>, 5>& vectors,
                               const std::optional<torch::stable::Tensor>& residual, const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                               int64_t groups) {
  bool ok = input.dim() == 4 && weight.dim() == 4 && stride.size() == 2 && padding.size() == 2 &&
            dilation.size() == 2 && groups >= 1;
  for (int d = 0; ok && d < 2; ++d) ok = stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1;
  STD_TORCH_CHECK(ok, "conv_bn_relu: bad arguments");
  ConvShape f{};
  f.n = input.size(0), f.c = input.size(1), f.h = input.size(2), f.w = input.size(3);
  f.k = weight.size(0), f.r = weight.size(2), f.s = weight.size(3), f.groups = groups;
  for (int d = 0; d < 2; ++d) f.stride[d] = stride[d], f.padding[d] = padding[d], f.dilation[d] = dilation[d];
  const auto outputs = [&](int d, int64_t size, int64_t window) {
    const int64_t room = size + 2 * padding[d] - dilation[d] * (window - 1) - 1;
    return room < 0 ? 0 : room / stride[d] + 1;
  };
  f.p = outputs(0, f.h, f.r), f.q = outputs(1, f.w, f.s);
  const auto alike = [&](const torch::stable::Tensor& t) {
    return t.scalar_type() == input.scalar_type() && t.get_device_index() == input.get_device_index() && on_device(t);
  };
  ok = f.n > 0 && f.p > 0 && f.q > 0 && weight.numel() > 0 && f.k % groups == 0 && f.c == weight.size(1) * groups &&
       alike(weight) && (!vectors[0].has_value() || alike(*vectors[0]));
  for (const auto& v : vectors)
    ok = ok && (!v.has_value() || (v->dim() == 1 && v->size(0) == f.k && on_device(*v) &&
                                   v->get_device_index() == input.get_device_index()));
  if (residual.has_value())
    ok = ok && alike(*residual) && residual->dim() == 4 && residual->size(0) == f.n && residual->size(1) == f.k &&
         residual->size(2) == f.p && residual->size(3) == f.q;
  STD_TORCH_CHECK(ok, "conv_bn_relu: bad arguments");
  return f;
}

}  // namespace resnet_fast
