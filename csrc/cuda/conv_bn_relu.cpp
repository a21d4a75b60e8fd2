// The host side of conv_bn_relu on CUDA: BatchNorm folded into weight and bias by a kernel of ours, in every call, then
// cuDNN's convolution with bias, residual and ReLU in its store, as torch exposes it.
//
// At batch 1 the CPU's time is what counts, so everything that torch's dispatcher need not do is done here.
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "fold_batch_norm.h"
#include "ops.h"

namespace resnet_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

struct Shape {
  int64_t n, c, h, w, k, r, s, p, q;
};

// Everything that the kernel and cuDNN rely on. What breaks a rule gets the Python checks' words (ops/conv_bn_relu.py).
Shape checked_shape(const Tensor& input, const Tensor& weight, const std::array<std::optional<Tensor>, 5>& vectors,
                    const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  bool ok = input.dim() == 4 && weight.dim() == 4 && stride.size() == 2 && padding.size() == 2 &&
            dilation.size() == 2 && groups >= 1;
  for (int d = 0; ok && d < 2; ++d) ok = stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1;
  STD_TORCH_CHECK(ok, "conv_bn_relu: bad arguments");
  Shape f{
      input.size(0), input.size(1), input.size(2), input.size(3), weight.size(0), weight.size(2), weight.size(3), 0, 0};
  const auto outputs = [&](int d, int64_t size, int64_t window) {
    const int64_t room = size + 2 * padding[d] - dilation[d] * (window - 1) - 1;
    return room < 0 ? 0 : room / stride[d] + 1;
  };
  f.p = outputs(0, f.h, f.r), f.q = outputs(1, f.w, f.s);
  const auto alike = [&](const Tensor& t) {
    return t.scalar_type() == input.scalar_type() && t.get_device_index() == input.get_device_index() && t.is_cuda();
  };
  ok = f.n > 0 && f.p > 0 && f.q > 0 && weight.numel() > 0 && f.k % groups == 0 && f.c == weight.size(1) * groups &&
       alike(weight) && (!vectors[0].has_value() || alike(*vectors[0]));
  for (const auto& v : vectors)
    ok = ok && (!v.has_value() || (v->dim() == 1 && v->size(0) == f.k && v->is_cuda() &&
                                   v->get_device_index() == input.get_device_index()));
  if (residual.has_value())
    ok = ok && alike(*residual) && residual->dim() == 4 && residual->size(0) == f.n && residual->size(1) == f.k &&
         residual->size(2) == f.p && residual->size(3) == f.q;
  STD_TORCH_CHECK(ok, "conv_bn_relu: bad arguments");
  STD_TORCH_CHECK(std::max(input.numel(), f.n * f.k * f.p * f.q) < int64_t(1) << 31,
                  "conv_bn_relu: cuDNN's fused convolution takes fewer than 2^31 elements, got ", input.numel(),
                  " in the input and ", f.n * f.k * f.p * f.q, " in the output");
  return f;
}

FilterVector filter_vector(const std::optional<Tensor>& t) {
  if (!t.has_value()) return {};
  return {t->const_data_ptr(), type_of(t->scalar_type()), t->stride(0)};
}

Tensor channels_last(const Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (t.stride(1) == 1 && t.stride(3) == c && t.stride(2) == w * c && t.stride(0) == h * w * c) return t;
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

// An uninitialised tensor of like's dtype on like's device.
template <size_t n>
Tensor empty_strided(const std::array<int64_t, n>& sizes, const std::array<int64_t, n>& strides, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  int32_t dtype = 0, device = 0;
  STD_TORCH_CHECK(
      aoti_torch_get_dtype(like.get(), &dtype) == 0 && aoti_torch_get_device_type(like.get(), &device) == 0 &&
          aoti_torch_empty_strided(n, sizes.data(), strides.data(), dtype, device, like.get_device_index(), &handle) ==
              0,
      "conv_bn_relu: no memory");
  return Tensor(handle);
}

}  // namespace

// It always has the ReLU; without one, bias and residual are passes of their own.
Tensor conv_bn_relu_cuda(const Tensor& input,                     // [N, C, H, W], any strides
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
  const Shape f = checked_shape(input, weight, vectors, residual, stride, padding, dilation, groups);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
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
