#pragma once

#include "../conv_shape.h"
#include "filter_vector.h"

namespace resnet_fast {

// relu(batch_norm(conv2d(x, weight, bias)) + residual), everything dense.
struct ConvBnRelu {
  ConvShape shape;
  Type type;             // of all four maps: float32 (multiplied as TF32), bfloat16 or float16
  const void* x;         // [N, H, W, C]
  const void* weight;    // [K, R, S, C / groups]
  const void* residual;  // [N, P, Q, K] or null
  void* out;             // [N, P, Q, K]
  FilterVector bias, bn_weight, bn_bias, running_mean, running_var;  // [K]
  float eps;
  bool relu;
};

// The kernel, and how many pixels and filters a block of threads computes. halo: each input pixel is read once for all
// taps of the window; stride 1, whole aligned chunks of 16 bytes of channels, at least 3 taps.
enum class ConvTile { m128n128, m128n64, m64n64, m128n32, halo_m128n128, halo_m128n64, count };

bool takes(ConvTile tile, const ConvBnRelu& conv);

// The tile in use unless one is asked for. By arithmetic; not yet measured.
ConvTile tile_for(const ConvBnRelu& conv);

// On `stream` (a cudaStream_t). Any alignment that the type itself has; fewer than 2^31 - 256 pixels in the output.
// Returns a cudaError_t.
int launch_conv_bn_relu_sm80(const ConvBnRelu& conv, ConvTile tile, void* stream);

}  // namespace resnet_fast
