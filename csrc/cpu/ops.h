// Host functions of the CPU operators: they check, allocate and split work over torch's thread pool.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace resnet_fast {

torch::stable::Tensor add_relu_cpu(const torch::stable::Tensor& a, const torch::stable::Tensor& b);

// relu(conv2d(input, weight, bias) + residual) with BatchNorm folded in and the weight packed: see conv_bn_relu.cpp.
// The kind of packed weight decides the kernel: oneDNN's opaque layout, or what _pack_few_channels returns.
torch::stable::Tensor conv_bn_relu_onednn(const torch::stable::Tensor& input,
                                          const torch::stable::Tensor& packed_weight,
                                          const torch::stable::Tensor& folded_bias,
                                          const std::optional<torch::stable::Tensor>& residual,
                                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                                          std::vector<int64_t> dilation, int64_t groups, bool relu);
torch::stable::Tensor conv_bn_relu_few_channels(const torch::stable::Tensor& input,
                                                const torch::stable::Tensor& packed_weight,
                                                const torch::stable::Tensor& folded_bias,
                                                const std::optional<torch::stable::Tensor>& residual,
                                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                std::vector<int64_t> dilation, int64_t groups, bool relu);

// [K, C, R, S] float32 in the layout of conv_few_channels, which depends on the instruction-set level.
torch::stable::Tensor pack_few_channels(const torch::stable::Tensor& weight);
torch::stable::Tensor conv_few_channels(const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight,
                                        const torch::stable::Tensor& bias, const std::vector<int64_t>& stride,
                                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                        bool relu);

// True if no element is NaN or infinite. `input` must be dense (any order of dimensions).
bool all_finite(const torch::stable::Tensor& input);

// A byte string that changes when packed weights go stale: see fingerprint.cpp.
torch::stable::Tensor fingerprint(const torch::stable::Tensor& weight, int64_t groups,
                                  const std::vector<torch::stable::Tensor>& vectors);
bool fingerprint_matches(const torch::stable::Tensor& fingerprint, const torch::stable::Tensor& weight, int64_t groups,
                         const std::vector<torch::stable::Tensor>& vectors);

// Floating point operations a second of that many iterations of independent multiply-adds in registers, of float32 or
// of bfloat16 pairs into float32, summed over the threads of torch's pool, each by its own clock: one that waits for a
// core does not hide what the core can do. 0 if the CPU has no such instruction.
double fma_peak(int64_t iterations, bool bfloat16);

// Position of the instruction-set level in use in the table of levels.cpp.
int64_t cpu_level_index();

}  // namespace resnet_fast
