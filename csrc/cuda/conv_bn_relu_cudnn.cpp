// conv_bn_relu on CUDA by cuDNN: BatchNorm folded into weight and bias by a kernel of ours, in every call, then
// cuDNN's convolution with bias, residual and ReLU in its store, as torch exposes it.
//
// At batch 1 the CPU's time is what counts, so everything that torch's dispatcher need not do is done here.
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "conv_arguments.h"
#include "fold_batch_norm.h"
#include "ops.h"

namespace resnet_fast {

using torch::stable::Tensor;

// It always has the ReLU; without one, bias and residual are passes of their own.
Tensor conv_bn_relu_cudnn(const Tensor& input,                     // [N, C, H, W], any strides
                          const Tensor& weight,                    // [K, C / groups, R, S], any strides
                          const std::optional<Tensor>& bias,       // [K], as the four below
                          const std::optional<Tensor>& bn_weight,  //
                          const std::optional<Tensor>& bn_bias,    //
                          const Tensor& running_mean,              //
                          const Tensor& running_var,               //
                          const std::optional<Tensor>& residual,   // [N, K, P, Q], any strides
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups, double eps, bool relu) {
  const std::array<std::optional<Tensor>, 5> vectors{bias, bn_weight, bn_bias, running_mean, running_var};
  const ConvShape f = checked_shape(input, weight, vectors, residual, stride, padding, dilation, groups);
  STD_TORCH_CHECK(std::max(input.numel(), f.n * f.k * f.p * f.q) < int64_t(1) << 31,
                  "conv_bn_relu: cuDNN's fused convolution takes fewer than 2^31 elements, got ", input.numel(),
                  " in the input and ", f.n * f.k * f.p * f.q, " in the output");
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  std::optional<Tensor> z;
  if (residual.has_value()) z = channels_last(*residual);

  const int64_t c = weight.size(1);
  Tensor w = empty_strided<4>({f.k, c, f.r, f.s}, {f.r * f.s * c, 1, f.s * c, c}, weight);
  // The weight's dtype, though float32 would be exact: torch looks up cuDNN's plan by all but the bias's dtype, and
  // then reads it as what it was when the plan was made.
  Tensor b = empty_strided<1>({f.k}, {1}, weight);
  FoldBatchNorm fold{};
  fold.weight = weight.const_data_ptr();
  fold.folded_weight = w.mutable_data_ptr();
  fold.folded_bias = b.mutable_data_ptr();
  fold.type = type_of(weight.scalar_type());
  fold.k = int(f.k), fold.c = int(c), fold.r = int(f.r), fold.s = int(f.s);
  fold.stride_k = weight.stride(0), fold.stride_c = weight.stride(1);
  fold.stride_r = weight.stride(2), fold.stride_s = weight.stride(3);
  fold.bias = filter_vector(bias), fold.bn_weight = filter_vector(bn_weight), fold.bn_bias = filter_vector(bn_bias);
  fold.running_mean = filter_vector(running_mean), fold.running_var = filter_vector(running_var);
  fold.eps = float(eps);
  check_launch(launch_fold_batch_norm(fold, current_stream(input)), "conv_bn_relu");

  const std::optional<Tensor> bias_of_all = b;
  if (relu && z.has_value())
    return with_exact_strides(call("aten::cudnn_convolution_add_relu", "", x, w, *z, std::optional<double>(),
                                   bias_of_all, stride, padding, dilation, groups));
  if (relu)
    return with_exact_strides(
        call("aten::cudnn_convolution_relu", "", x, w, bias_of_all, stride, padding, dilation, groups));
  const Tensor out = call("aten::conv2d", "", x, w, bias_of_all, stride, padding, dilation, groups);
  return with_exact_strides(z.has_value() ? add(out, *z) : out);
}

}  // namespace resnet_fast
