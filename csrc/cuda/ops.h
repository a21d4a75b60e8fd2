// What the host sides of the CUDA operators share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "filter_vector.h"
#include "type.h"

namespace resnet_fast {

// Where the kernels run: on the current stream of a CUDA device or, under tests/cuda_emulator, on the CPU.
#ifdef RESNET_FAST_EMULATED
#define RESNET_FAST_DEVICE CPU
inline bool on_device(const torch::stable::Tensor& t) { return !t.is_cuda(); }
inline void* current_stream(const torch::stable::Tensor&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
#define RESNET_FAST_DEVICE CUDA
inline bool on_device(const torch::stable::Tensor& t) { return t.is_cuda(); }
inline void* current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no current CUDA stream");
  return stream;
}
using torch::stable::accelerator::DeviceGuard;
#endif

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

// An uninitialised tensor of those sizes and strides, of that dtype (aoti_torch_dtype_*) or like's, on like's device.
template <size_t n>
torch::stable::Tensor empty_strided(const std::array<int64_t, n>& sizes, const std::array<int64_t, n>& strides,
                                    const torch::stable::Tensor& like, std::optional<int32_t> dtype = {}) {
  AtenTensorHandle handle = nullptr;
  int32_t of_like = 0, device = 0;
  STD_TORCH_CHECK(aoti_torch_get_dtype(like.get(), &of_like) == 0 &&
                      aoti_torch_get_device_type(like.get(), &device) == 0 &&
                      aoti_torch_empty_strided(n, sizes.data(), strides.data(), dtype.value_or(of_like), device,
                                               like.get_device_index(), &handle) == 0,
                  "no memory for a tensor");
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty_vector(int64_t size, const torch::stable::Tensor& like,
                                          std::optional<int32_t> dtype = {}) {
  return empty_strided<1>({size}, {1}, like, dtype);
}

// A map [N, C, H, W] in channels_last, with the strides that the operators' fakes promise also where a size is 1.
inline torch::stable::Tensor empty_channels_last(const std::array<int64_t, 4>& sizes, const torch::stable::Tensor& like,
                                                 std::optional<int32_t> dtype = {}) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  return empty_strided<4>(sizes, {h * w * c, 1, w * c, c}, like, dtype);
}

// `t` with its channels innermost: itself where they are, a copy otherwise.
inline torch::stable::Tensor channels_last(const torch::stable::Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (t.stride(1) == 1 && t.stride(3) == c && t.stride(2) == w * c && t.stride(0) == h * w * c) return t;
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline FilterVector filter_vector(const std::optional<torch::stable::Tensor>& t) {
  if (!t.has_value()) return {};
  return {t->const_data_ptr(), type_of(t->scalar_type()), t->stride(0)};
}

torch::stable::Tensor conv_bn_relu_cuda(
    const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& bn_weight,
    const std::optional<torch::stable::Tensor>& bn_bias, const torch::stable::Tensor& running_mean,
    const torch::stable::Tensor& running_var, const std::optional<torch::stable::Tensor>& residual,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
    double eps, bool relu, int64_t tile);

torch::stable::Tensor conv_bn_relu_cudnn(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                         const std::optional<torch::stable::Tensor>& bias,
                                         const std::optional<torch::stable::Tensor>& bn_weight,
                                         const std::optional<torch::stable::Tensor>& bn_bias,
                                         const torch::stable::Tensor& running_mean,
                                         const torch::stable::Tensor& running_var,
                                         const std::optional<torch::stable::Tensor>& residual,
                                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                                         std::vector<int64_t> dilation, int64_t groups, double eps, bool relu);

torch::stable::Tensor max_pool_cuda(const torch::stable::Tensor& input, std::vector<int64_t> kernel_size,
                                    std::vector<int64_t> stride, std::vector<int64_t> padding,
                                    std::vector<int64_t> dilation, std::vector<int64_t> output_size);

torch::stable::Tensor avg_pool_flatten_cuda(const torch::stable::Tensor& input);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> max_pool_with_indices_cuda(
    const torch::stable::Tensor& input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> output_size);

torch::stable::Tensor max_pool_backward_cuda(const torch::stable::Tensor& grad, const torch::stable::Tensor& indices,
                                             std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                             std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                             std::vector<int64_t> input_size);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> batch_norm_statistics_cuda(const torch::stable::Tensor& input);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> batch_norm_relu_cuda(
    const torch::stable::Tensor& input, const torch::stable::Tensor& mean, const torch::stable::Tensor& var,
    const std::optional<torch::stable::Tensor>& weight, const std::optional<torch::stable::Tensor>& bias, double eps,
    const std::optional<torch::stable::Tensor>& residual, const std::optional<torch::stable::Tensor>& residual_mean,
    const std::optional<torch::stable::Tensor>& residual_var,
    const std::optional<torch::stable::Tensor>& residual_weight,
    const std::optional<torch::stable::Tensor>& residual_bias, double residual_eps, bool relu, bool with_mask);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
batch_norm_relu_backward_cuda(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& input, const torch::stable::Tensor& mean,
    const torch::stable::Tensor& var, const std::optional<torch::stable::Tensor>& weight,
    const std::optional<torch::stable::Tensor>& bias, double eps, const std::optional<torch::stable::Tensor>& mask,
    const std::optional<torch::stable::Tensor>& shortcut, const std::optional<torch::stable::Tensor>& shortcut_mean,
    const std::optional<torch::stable::Tensor>& shortcut_var,
    const std::optional<torch::stable::Tensor>& shortcut_weight, double shortcut_eps, bool relu, bool needs_residual);

torch::stable::Tensor update_running_stats_cuda(const torch::stable::Tensor& running_mean,
                                                const torch::stable::Tensor& running_var,
                                                const torch::stable::Tensor& mean, const torch::stable::Tensor& var,
                                                double momentum, int64_t count);

}  // namespace resnet_fast
