// What the host sides of our own convolutions share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>
#include <vector>

#include "../conv_shape.h"
#include "../dispatch.h"
#include "levels.h"
#include "ops.h"

namespace resnet_fast {

inline ConvShape conv_shape(const torch::stable::Tensor& input, const torch::stable::Tensor& bias, int64_t r, int64_t s,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  const auto extent = [&](int64_t size, int64_t kernel, int d) {
    return (size + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) / stride[d] + 1;
  };
  return {input.size(0),
          input.size(2),
          input.size(3),
          input.size(1),
          bias.size(0),
          r,
          s,
          extent(input.size(2), r, 0),
          extent(input.size(3), s, 1),
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]},
          groups};
}

// The tensors of a convolution as the kernels take them: channels_last float32, a bias and zeros with room behind.
struct ConvTensors {
  ConvTensors(const ConvShape& shape, const torch::stable::Tensor& x, const torch::stable::Tensor& b,
              const std::optional<torch::stable::Tensor>& r) {
    using torch::headeronly::MemoryFormat;
    using torch::headeronly::ScalarType;
    dtype_ = x.scalar_type();
    kept_input_ = torch::stable::contiguous(to_dtype(x, ScalarType::Float), MemoryFormat::ChannelsLast);
    input = static_cast<const float*>(kept_input_.const_data_ptr());
    if (r.has_value()) {
      kept_residual_ = torch::stable::contiguous(to_dtype(*r, ScalarType::Float), MemoryFormat::ChannelsLast);
      residual = static_cast<const float*>(kept_residual_.const_data_ptr());
    }
    out_ = torch::stable::empty({shape.n, shape.k, shape.p, shape.q}, ScalarType::Float, std::nullopt, std::nullopt,
                                std::nullopt, MemoryFormat::ChannelsLast);
    output = static_cast<float*>(out_.mutable_data_ptr());
    vectors_.resize(shape.k + kernels().gemm_panel + shape.c + kernels().vector_width);
    std::memcpy(vectors_.data(), b.const_data_ptr(), shape.k * sizeof(float));
    bias = vectors_.data();
    zeros = bias + shape.k + kernels().gemm_panel;
  }

  const float *input, *residual = nullptr, *bias, *zeros;
  float* output;

  torch::stable::Tensor result() const { return with_exact_strides(to_dtype(out_, dtype_)); }

 private:
  torch::headeronly::ScalarType dtype_;
  torch::stable::Tensor out_, kept_input_, kept_residual_;
  std::vector<float> vectors_;
};

}  // namespace resnet_fast
