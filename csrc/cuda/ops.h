// What the host sides of the CUDA operators share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "type.h"

namespace resnet_fast {

inline void* current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no current CUDA stream");
  return stream;
}

inline Type type_of(torch::headeronly::ScalarType type) {
  switch (type) {
    case torch::headeronly::ScalarType::Float:
      return Type::float32;
    case torch::headeronly::ScalarType::BFloat16:
      return Type::bfloat16;
    case torch::headeronly::ScalarType::Half:
      return Type::float16;
    case torch::headeronly::ScalarType::Double:
      return Type::float64;
    default:
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16");
  }
  return Type::float32;
}

inline void check_launch(int error, const char* kernel) {
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(cudaError_t(error)));
}

torch::stable::Tensor conv_bn_relu_cuda(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                        const std::optional<torch::stable::Tensor>& bias,
                                        const std::optional<torch::stable::Tensor>& bn_weight,
                                        const std::optional<torch::stable::Tensor>& bn_bias,
                                        const torch::stable::Tensor& running_mean,
                                        const torch::stable::Tensor& running_var,
                                        const std::optional<torch::stable::Tensor>& residual,
                                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                                        std::vector<int64_t> dilation, int64_t groups, double eps, bool relu);

}  // namespace resnet_fast
