#include "conv_bn_relu_sm80_launch.cuh"

namespace resnet_fast {

// The widest tile that the filters fill, if that makes at least two blocks for each of 108 multiprocessors (A100).
ConvTile tile_for(const ConvShape& f) {
  const int64_t filters = f.k / f.groups, pixels = f.n * f.p * f.q;
  if (filters <= 32) return ConvTile::m128n32;
  const auto blocks = [&](int64_t m, int64_t n) { return (pixels + m - 1) / m * ((filters + n - 1) / n) * f.groups; };
  if (filters > 64 && blocks(128, 128) >= 216) return ConvTile::m128n128;
  return blocks(128, 64) >= 216 ? ConvTile::m128n64 : ConvTile::m64n64;
}

int launch_conv_bn_relu_sm80(const ConvBnRelu& conv, ConvTile tile, void* stream) {
  switch (conv.type) {
    case Type::float32:
      return launch_conv_bn_relu_sm80<float>(conv, tile, stream);
    case Type::bfloat16:
      return launch_conv_bn_relu_sm80<__nv_bfloat16>(conv, tile, stream);
    case Type::float16:
      return launch_conv_bn_relu_sm80<__half>(conv, tile, stream);
    default:
      return int(cudaErrorInvalidValue);
  }
}

}  // namespace resnet_fast
