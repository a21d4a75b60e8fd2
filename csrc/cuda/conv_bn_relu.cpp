// conv_bn_relu on CUDA by the kernels of this package: one launch, nothing folded or packed before, so that nothing can
// go stale; the only memory allocated is the output's, but for a copy of each map or weight that is not channels_last.
#include "conv_arguments.h"
#include "conv_bn_relu_sm80.h"
#include "ops.h"

namespace resnet_fast {

using torch::stable::Tensor;

// float32 is multiplied as TF32. tile: of ConvTile, or -1 for the one that `tile_for` says.
Tensor conv_bn_relu_cuda(const Tensor& input,                     // [N, C, H, W], any strides
                         const Tensor& weight,                    // [K, C / groups, R, S], any strides
                         const std::optional<Tensor>& bias,       // [K], as the four below
                         const std::optional<Tensor>& bn_weight,  //
                         const std::optional<Tensor>& bn_bias,    //
                         const Tensor& running_mean,              //
                         const Tensor& running_var,               //
                         const std::optional<Tensor>& residual,   // [N, K, P, Q], any strides
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         int64_t groups, double eps, bool relu, int64_t tile) {
  const std::array<std::optional<Tensor>, 5> vectors{bias, bn_weight, bn_bias, running_mean, running_var};
  ConvBnRelu conv{};
  conv.shape = checked_shape(input, weight, vectors, residual, stride, padding, dilation, groups);
  const ConvShape& f = conv.shape;
  constexpr int64_t limit = (int64_t(1) << 31) - 256;
  bool counts = f.n * f.p * f.q < limit && f.k < limit && f.c < limit && f.r * f.s * f.c / groups < limit;
  for (const int64_t padded : {f.h + 2 * f.padding[0], f.w + 2 * f.padding[1]}) counts = counts && padded < 1 << 30;
  counts = counts && (f.n * f.p * f.q / 64 + 1) * (f.k / 32 + 1) < limit && groups < 65536;
  STD_TORCH_CHECK(counts,
                  "conv_bn_relu: the CUDA kernel takes fewer than 2^31 - 256 output pixels, filters, channels, and "
                  "weights a filter, 2^41 elements of output, padded images of fewer than 2^30 rows and columns, and "
                  "fewer than 65536 groups");
  STD_TORCH_CHECK(tile >= -1 && tile < int64_t(ConvTile::count), "conv_bn_relu: there is no tile ", tile);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input), w = channels_last(weight);
  std::optional<Tensor> z;
  if (residual.has_value()) z = channels_last(*residual);
  const Tensor out = empty_channels_last({f.n, f.k, f.p, f.q}, input);

  conv.type = type_of(input.scalar_type());
  conv.x = x.const_data_ptr(), conv.weight = w.const_data_ptr();
  conv.residual = z.has_value() ? z->const_data_ptr() : nullptr;
  conv.out = out.mutable_data_ptr();
  conv.bias = filter_vector(bias), conv.bn_weight = filter_vector(bn_weight), conv.bn_bias = filter_vector(bn_bias);
  conv.running_mean = filter_vector(running_mean), conv.running_var = filter_vector(running_var);
  conv.eps = float(eps), conv.relu = relu;
  const ConvTile chosen = tile < 0 ? tile_for(conv) : ConvTile(tile);
  STD_TORCH_CHECK(takes(chosen, conv), "conv_bn_relu: tile ", tile, " does not take this convolution");
  check_launch(launch_conv_bn_relu_sm80(conv, chosen, current_stream(input)), "conv_bn_relu");
  return out;
}

}  // namespace resnet_fast
