// Host functions of the CPU operators: they check, allocate and split work over torch's thread pool.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace resnet_fast {

torch::stable::Tensor add_relu_cpu(const torch::stable::Tensor& a, const torch::stable::Tensor& b);

// relu(conv2d(input, weight, bias) + residual), [N, K, P, Q] in channels_last and input's dtype, with the weight in the
// layout of the kernel. BatchNorm is folded into weight and bias before. `input` and `residual` may have any strides.
torch::stable::Tensor conv_onednn(const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight,
                                  const torch::stable::Tensor& bias,
                                  const std::optional<torch::stable::Tensor>& residual, std::vector<int64_t> stride,
                                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                  bool relu);

// One to four input channels, no groups. `packed_weight` is pack_gemm's, of a weight whose columns and channels are one
// dimension, [K, S * C, R, 1], unless a row of the kernel has dilation.
torch::stable::Tensor conv_few_channels(const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight,
                                        const torch::stable::Tensor& bias, std::vector<int64_t> stride,
                                        std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu);
// max_pool(conv_few_channels(...)), with a ReLU between.
torch::stable::Tensor conv_few_channels_max_pool(const torch::stable::Tensor& input,
                                                 const torch::stable::Tensor& packed_weight,
                                                 const torch::stable::Tensor& bias, std::vector<int64_t> stride,
                                                 std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                 std::vector<int64_t> pool_kernel_size,
                                                 std::vector<int64_t> pool_stride, std::vector<int64_t> pool_padding);

// `weight` is float32. A weight packed in bfloat16 makes the kernel compute products of bfloat16 values, summed in
// float32, of a bfloat16 input; only levels that multiplies_bf16() take it. `turned`: the weight is packed for the
// convolution that computes the input's gradient from the output's. `reused`: the packed weight lives no longer than a
// map does, and its memory is used again.
torch::stable::Tensor pack_gemm(const torch::stable::Tensor& weight, int64_t groups, bool bfloat16, bool turned,
                                bool reused);
bool multiplies_bf16();
// With a `norm`, [3, C] (mean, scale, shift), the convolution is of relu(norm(input)); 1x1 without padding and groups.
torch::stable::Tensor conv_gemm(const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight,
                                const torch::stable::Tensor& bias, const std::optional<torch::stable::Tensor>& residual,
                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                std::vector<int64_t> dilation, int64_t groups, bool relu,
                                const std::optional<torch::stable::Tensor>& norm);

// As many groups as channels and filters; `packed_weight` is [R, S, C], float32.
torch::stable::Tensor conv_depthwise(const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight,
                                     const torch::stable::Tensor& bias,
                                     const std::optional<torch::stable::Tensor>& residual, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> dilation, bool relu);

// In bfloat16 groups must have an even number of channels.
torch::stable::Tensor pack_grouped(const torch::stable::Tensor& weight, int64_t groups, bool bfloat16);
torch::stable::Tensor conv_grouped(const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight,
                                   const torch::stable::Tensor& bias,
                                   const std::optional<torch::stable::Tensor>& residual, std::vector<int64_t> stride,
                                   std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                                   bool relu);

// 3x3, stride 1, no groups; `tile` is the width of the output tiles (2, 4 or 5). The second result is false if some
// value of the first is not finite: then NaN and infinities may have spread over whole tiles, and another kernel must
// compute the convolution. In bfloat16, as above, only tiles of 2 are accurate enough.
torch::stable::Tensor pack_winograd(const torch::stable::Tensor& weight, int64_t tile, bool bfloat16);
std::tuple<torch::stable::Tensor, bool> conv_winograd(const torch::stable::Tensor& input,
                                                      const torch::stable::Tensor& packed_weight,
                                                      const torch::stable::Tensor& bias,
                                                      const std::optional<torch::stable::Tensor>& residual,
                                                      std::vector<int64_t> padding, bool relu,
                                                      const std::optional<torch::stable::Tensor>& norm);

// The same for a weight that changes with every call, [K, C, 3, 3] in float32 with any strides. `turned`: it is the
// weight of the convolution whose input's gradient is computed, from the output's.
std::tuple<torch::stable::Tensor, bool> conv_winograd_packing(const torch::stable::Tensor& input,
                                                              const torch::stable::Tensor& weight,
                                                              const torch::stable::Tensor& bias,
                                                              std::vector<int64_t> padding, int64_t tile, bool bfloat16,
                                                              bool turned,
                                                              const std::optional<torch::stable::Tensor>& norm);

// The gradient of the weight [K, C, R, S], which has the sizes and strides of `like`, float32, without groups. With a
// `norm`, [3, C] (mean, scale, shift), the convolution's input was relu(norm(input)). Winograd's algorithm takes 3x3
// kernels with stride 1; the second result is false as above.
std::tuple<torch::stable::Tensor, bool> conv_weight_grad(const torch::stable::Tensor& grad,
                                                         const torch::stable::Tensor& input,
                                                         const torch::stable::Tensor& like, std::vector<int64_t> stride,
                                                         std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                         bool winograd,
                                                         const std::optional<torch::stable::Tensor>& norm);

// Winograd's for one to four input channels, 7x7, stride 2, no dilation: `packed_weight` is float32 for every input.
torch::stable::Tensor pack_winograd_stem(const torch::stable::Tensor& weight);
std::tuple<torch::stable::Tensor, bool> conv_winograd_stem(const torch::stable::Tensor& input,
                                                           const torch::stable::Tensor& packed_weight,
                                                           const torch::stable::Tensor& bias,
                                                           std::vector<int64_t> padding, bool relu);
// With a ReLU and max-pooling behind it.
std::tuple<torch::stable::Tensor, bool> conv_winograd_stem_max_pool(
    const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight, const torch::stable::Tensor& bias,
    std::vector<int64_t> padding, std::vector<int64_t> pool_kernel_size, std::vector<int64_t> pool_stride,
    std::vector<int64_t> pool_padding);

// `output_size`: height and width. What of a kernel lies outside the map counts for nothing.
torch::stable::Tensor max_pool_cpu(const torch::stable::Tensor& input, std::vector<int64_t> kernel_size,
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation, std::vector<int64_t> output_size);

// Also the place of each largest value under the kernel, row by row, as uint8 [N, C, P, Q].
std::tuple<torch::stable::Tensor, torch::stable::Tensor> max_pool_with_indices_cpu(
    const torch::stable::Tensor& input, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> output_size);
torch::stable::Tensor max_pool_backward_cpu(const torch::stable::Tensor& grad, const torch::stable::Tensor& indices,
                                            std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                            std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                            std::vector<int64_t> input_size);

// Mean and biased variance of every channel, [C] in float32.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> batch_norm_statistics_cpu(const torch::stable::Tensor& input);
// relu(norm(input) + residual_norm(residual)) and, if asked for, the ReLU's mask, [N, H, W, ceil(C / 8)]. A norm is of
// mean, var, weight, bias, each [C], and eps; a residual without a mean is added as it is.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> batch_norm_relu_cpu(
    const torch::stable::Tensor& input, const torch::stable::Tensor& mean, const torch::stable::Tensor& var,
    const std::optional<torch::stable::Tensor>& weight, const std::optional<torch::stable::Tensor>& bias, double eps,
    const std::optional<torch::stable::Tensor>& residual, const std::optional<torch::stable::Tensor>& residual_mean,
    const std::optional<torch::stable::Tensor>& residual_var,
    const std::optional<torch::stable::Tensor>& residual_weight,
    const std::optional<torch::stable::Tensor>& residual_bias, double residual_eps, bool relu, bool with_mask);
// Gradients of input, weight, bias, shortcut (without one, if asked for, of the residual) and shortcut_weight. Without
// a mask the ReLU's sign is computed again. What is not asked for is empty.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
batch_norm_relu_backward_cpu(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& input, const torch::stable::Tensor& mean,
    const torch::stable::Tensor& var, const std::optional<torch::stable::Tensor>& weight,
    const std::optional<torch::stable::Tensor>& bias, double eps, const std::optional<torch::stable::Tensor>& mask,
    const std::optional<torch::stable::Tensor>& shortcut, const std::optional<torch::stable::Tensor>& shortcut_mean,
    const std::optional<torch::stable::Tensor>& shortcut_var,
    const std::optional<torch::stable::Tensor>& shortcut_weight, double shortcut_eps, bool relu, bool needs_residual);

// [N, C]: means over height and width.
torch::stable::Tensor avg_pool_flatten_cpu(const torch::stable::Tensor& input);

// Runs the steps of a plan, [steps][fields] of int64 as run_plan.cpp describes them, on `maps`. Adds the time that each
// took to `seconds` [steps]. The number of the first step whose result Winograd's algorithm could not compute, with all
// behind it left out, or -1.
int64_t run_plan(const torch::stable::Tensor& steps, std::vector<torch::stable::Tensor> constants,
                 std::vector<torch::stable::Tensor> maps, const std::optional<torch::stable::Tensor>& seconds);
// The names of a step's fields, "|", and those of its kinds.
std::string plan_format();

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
