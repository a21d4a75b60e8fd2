#include "conv_bn_relu_sm80_launch.cuh"

namespace resnet_fast {

bool takes(ConvTile tile, const ConvBnRelu& conv) {
  if (tile < ConvTile::halo_m128n128) return true;
  const ConvShape& f = conv.shape;
  const int64_t bytes = f.c / f.groups * (conv.type == Type::float32 ? 4 : 2);
  const int64_t grid = f.n * (f.p + f.dilation[0] * (f.r - 1)) * (f.q + f.dilation[1] * (f.s - 1));
  return f.stride[0] == 1 && f.stride[1] == 1 && f.r * f.s >= fewest_halo_taps && bytes % 16 == 0 &&
         is_aligned(conv.x) && is_aligned(conv.weight) && grid < (int64_t(1) << 31) - 1024 &&
         halo_rows(f, 128) <= most_halo_rows;
}

// The widest tile that the filters fill, if that makes at least two blocks for each of 108 multiprocessors (A100).
ConvTile tile_for(const ConvBnRelu& conv) {
  const ConvShape& f = conv.shape;
  const int64_t filters = f.k / f.groups, pixels = f.n * f.p * f.q;
  const auto blocks = [&](int64_t m, int64_t n) { return (pixels + m - 1) / m * ((filters + n - 1) / n) * f.groups; };
  if (filters > 32 && takes(ConvTile::halo_m128n64, conv))
    return filters > 64 && blocks(128, 128) >= 216 ? ConvTile::halo_m128n128 : ConvTile::halo_m128n64;
  if (filters <= 32) return ConvTile::m128n32;
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
