// What the host sides of our own kernels share. Each has two halves: one that takes tensors, checks and allocates, and
// one, below, that takes pointers and splits the work over torch's thread pool; run_plan.cpp calls the latter alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>
#include <vector>

#include "../conv_shape.h"
#include "../dispatch.h"
#include "levels.h"
#include "map_pool.h"
#include "ops.h"

namespace resnet_fast {

// Outputs of a kernel that moves over `size` values, along one dimension.
inline int64_t output_extent(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

inline ConvShape conv_shape(const torch::stable::Tensor& input, const torch::stable::Tensor& bias, int64_t r, int64_t s,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  return {input.size(0),
          input.size(2),
          input.size(3),
          input.size(1),
          bias.size(0),
          r,
          s,
          output_extent(input.size(2), r, stride[0], padding[0], dilation[0]),
          output_extent(input.size(3), s, stride[1], padding[1], dilation[1]),
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]},
          groups};
}

inline Storage storage_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "the CPU's kernels take float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? Storage::f32 : dtype == ScalarType::BFloat16 ? Storage::bf16 : Storage::f16;
}

inline int64_t bytes_of(Storage type) { return type == Storage::f32 ? 4 : 2; }

inline void check_weight_type(Storage weight_type, Storage input_type) {
  const bool of_pairs = weight_type == Storage::bf16 && input_type == Storage::bf16 && kernels().multiplies_bf16;
  STD_TORCH_CHECK(weight_type == Storage::f32 || of_pairs,
                  "packed_weight must be float32 or, for a bfloat16 input and at level avx512_bf16, bfloat16");
}

struct Strides {
  int64_t n, c, h, w;  // in elements
};

struct Pool {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// A max-pooling; maps in channels_last. What of a kernel lies outside the map counts for nothing.
struct MaxPool {
  int64_t n, h, w, c, p, q;  // input [N, C, H, W], output [N, C, P, Q]
  Pool pool;
  const void* input;
  void* output;
  Storage type;
};

void run_conv_gemm(const Conv& conv);  // for 16-bit maps and a float32 weight only 1x1: the others are widened before
void run_conv_grouped(const Conv& conv);
void run_conv_depthwise(const Conv& conv);
// F(tile, 3); false if some result is not finite.
bool run_conv_winograd(const Conv& conv, int64_t tile);
// The input has any strides.
void run_conv_few_channels(const Conv& conv, const Strides& input);
// [P, Q] of conv.shape are the convolution's; conv.output is [N, pooled height, pooled width, K].
void run_conv_few_channels_max_pool(const Conv& conv, const Strides& input, const Pool& pool);
// The same for 7x7 with stride 2; false if some result is not finite.
bool run_conv_winograd_stem(const Conv& conv, const Strides& input);
bool run_conv_winograd_stem_max_pool(const Conv& conv, const Strides& input, const Pool& pool);
void run_max_pool(const MaxPool& pool);
// Means over `pixels`; input [N, pixels, C] or, not in channels_last, [N, C, pixels]; output [N, C].
void run_avg_pool(const void* input, Storage type, bool channels_last, int64_t n, int64_t pixels, int64_t c,
                  void* output);
// `size` 16-bit values to float32.
void run_widen(const void* input, Storage type, float* output, int64_t size);
void run_add_relu(const void* a, const void* b, void* output, int64_t size, Storage type);

// A normalisation in front of a convolution, [3, C] (mean, scale, shift), with the room behind that kernels ask for.
class NormOfChannels {
 public:
  NormOfChannels(const std::optional<torch::stable::Tensor>& norm, int64_t channels) {
    if (!norm.has_value()) return;
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(norm->dim() == 2 && norm->size(0) == 3 && norm->size(1) == channels &&
                        norm->scalar_type() == ScalarType::Float && norm->is_contiguous(),
                    "norm must be [3, C], float32, contiguous");
    stride_ = channels + kernels().vector_width;
    values_.resize(3 * stride_);
    const float* from = static_cast<const float*>(norm->const_data_ptr());
    for (int64_t i = 0; i < 3; ++i) std::memcpy(&values_[i * stride_], from + i * channels, channels * sizeof(float));
  }
  NormVectors pointers() const {
    if (values_.empty()) return {};
    return {values_.data(), values_.data() + stride_, values_.data() + 2 * stride_};
  }

 private:
  int64_t stride_ = 0;
  std::vector<float> values_;
};

// A convolution as the kernels take it, with what its pointers point at: maps in channels_last, a bias and zeros with
// room behind.
struct ConvCall : Conv {
  ConvCall(const ConvShape& s, const torch::stable::Tensor& x, const torch::stable::Tensor& packed_weight,
           const torch::stable::Tensor& b, const std::optional<torch::stable::Tensor>& r, bool with_relu,
           const std::optional<torch::stable::Tensor>& in_front = std::nullopt)
      : norm_(in_front, s.c) {
    using torch::headeronly::MemoryFormat;
    norm = norm_.pointers();
    shape = s;
    relu = with_relu;
    weight = packed_weight.const_data_ptr();
    weight_type = storage_of(packed_weight.scalar_type());
    check_weight_type(weight_type, storage_of(x.scalar_type()));
    output_type = storage_of(x.scalar_type());
    set_input(x);
    residual = nullptr;
    if (r.has_value()) {
      kept_residual_ = torch::stable::contiguous(to_dtype(*r, x.scalar_type()), MemoryFormat::ChannelsLast);
      residual = kept_residual_.const_data_ptr();
    }
    out_ = empty_map({s.n, s.k, s.p, s.q}, x.scalar_type());
    output = out_.mutable_data_ptr();
    vectors_.resize(s.k + kernels().gemm_panel + s.c + kernels().vector_width);
    std::memcpy(vectors_.data(), b.const_data_ptr(), s.k * sizeof(float));
    bias = vectors_.data();
    zeros = bias + s.k + kernels().gemm_panel;
  }

  // The kernel reads this instead of what the constructor was given: same shape, maybe another type.
  void set_input(const torch::stable::Tensor& x) {
    kept_input_ = torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
    input = kept_input_.const_data_ptr();
    input_type = storage_of(x.scalar_type());
  }

  torch::stable::Tensor result() const { return with_exact_strides(out_); }

 private:
  torch::stable::Tensor out_, kept_input_, kept_residual_;
  std::vector<float> vectors_;
  NormOfChannels norm_;
};

}  // namespace resnet_fast
