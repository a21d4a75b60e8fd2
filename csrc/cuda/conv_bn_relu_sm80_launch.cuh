// Launches conv_bn_relu_sm80 for one type of maps; included by the .cu file of each.
#pragma once

#include "conv_bn_relu_sm80.cuh"
#include "conv_bn_relu_sm80_halo.cuh"

namespace resnet_fast {

template <typename T>
int launch_conv_bn_relu_sm80(const ConvBnRelu& conv, ConvTile tile, void* stream);

// Of conv_bn_relu_sm80_halo.cuh: what its shared memory takes, and what its way of waiting for copies needs.
constexpr int most_halo_rows = 504, fewest_halo_taps = 3;

// The largest range of positions that the windows of `pixels` successive output pixels cover
// (conv_bn_relu_sm80_halo.cuh).
inline int64_t halo_rows(const ConvShape& f, int64_t pixels) {
  const int64_t more_w = f.dilation[1] * (f.s - 1), more_h = f.dilation[0] * (f.r - 1), grid_w = f.q + more_w;
  const auto crossed = [&](int64_t size) { return (pixels + size - 2) / size; };  // ends of rows, or images, that large
  const int64_t new_rows = crossed(f.q), new_images = f.n > 1 ? crossed(f.p * f.q) : 0;
  return pixels + new_rows * more_w + new_images * more_h * grid_w + more_h * grid_w + more_w;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

namespace {

template <typename T>
ConvSm80 problem_of(const ConvBnRelu& from) {
  const ConvShape& f = from.shape;
  ConvSm80 c{};
  c.x = from.x, c.weight = from.weight, c.residual = from.residual, c.out = from.out;
  c.bias = from.bias, c.bn_weight = from.bn_weight, c.bn_bias = from.bn_bias;
  c.running_mean = from.running_mean, c.running_var = from.running_var;
  c.eps = from.eps, c.relu = from.relu;
  c.h = int(f.h), c.w = int(f.w), c.r = int(f.r), c.s = int(f.s), c.p = int(f.p), c.q = int(f.q);
  c.all_channels = int(f.c), c.all_filters = int(f.k);
  c.channels = int(f.c / f.groups), c.filters = int(f.k / f.groups);
  constexpr int chunk = per_chunk<T>;
  c.padded_channels = c.channels <= 4 ? 4 : (c.channels + chunk - 1) / chunk * chunk;
  c.pixels = int(f.n * f.p * f.q);
  c.stride_h = int(f.stride[0]), c.stride_w = int(f.stride[1]);
  c.padding_h = int(f.padding[0]), c.padding_w = int(f.padding[1]);
  c.dilation_h = int(f.dilation[0]), c.dilation_w = int(f.dilation[1]);
  c.vectors = c.filters % chunk == 0 && is_aligned(c.out) && is_aligned(c.residual);
  return c;
}

// One block for each tile; filters change fastest, so that x stays in L2.
template <typename Tile>
dim3 grid_of(const ConvSm80& conv, int groups) {
  const int64_t tiles_m = (int64_t(conv.pixels) + Tile::block_m - 1) / Tile::block_m;
  const int64_t tiles_n = (conv.filters + Tile::block_n - 1) / Tile::block_n;
  return dim3(unsigned(tiles_m * tiles_n), unsigned(groups));
}

template <typename T, typename Tile, bool aligned>
int launch_tile(ConvSm80 conv, int groups, void* stream) {
  const int64_t per_step = Tile::chunks * per_chunk<T>, depth = int64_t(conv.r) * conv.s * conv.padded_channels;
  conv.steps = int((depth + per_step - 1) / per_step);
  return launch<conv_bn_relu_sm80_kernel<T, Tile, aligned>>(
      grid_of<Tile>(conv, groups), Tile::threads, Tile::shared_bytes, static_cast<cudaStream_t>(stream), conv);
}

// halo_rows of a block's pixels; its steps go through the taps of one slice of channels after the other.
template <typename T, typename Tile>
int launch_halo(ConvSm80 conv, int groups, int64_t halo_rows, void* stream) {
  const int per_step = Tile::chunks * per_chunk<T>;
  conv.steps = (conv.channels + per_step - 1) / per_step * conv.r * conv.s;
  conv.grid_h = conv.p + conv.dilation_h * (conv.r - 1), conv.grid_w = conv.q + conv.dilation_w * (conv.s - 1);
  conv.halo_rows = int((halo_rows + 7) / 8 * 8);  // so that the second buffer begins at the same bank
  constexpr int of_filters = Tile::stages * Tile::filter_bytes;
  static_assert(Tile::stages - 1 <= fewest_halo_taps);
  static_assert(Tile::batch_norm_bytes + of_filters + 2 * most_halo_rows * Tile::row_bytes <= 99 * 1024);
  const int operands = of_filters + 2 * conv.halo_rows * Tile::row_bytes;
  const int bytes = Tile::batch_norm_bytes + (operands > Tile::staging_bytes ? operands : Tile::staging_bytes);
  return launch<conv_bn_relu_sm80_halo_kernel<T, Tile>>(grid_of<Tile>(conv, groups), Tile::threads, bytes,
                                                        static_cast<cudaStream_t>(stream), conv);
}

}  // namespace

template <typename T>
int launch_conv_bn_relu_sm80(const ConvBnRelu& conv, ConvTile tile, void* stream) {
  const ConvSm80 problem = problem_of<T>(conv);
  const int groups = int(conv.shape.groups);
  // One tile for what is loaded element by element: there it is the loads that take the time.
  if (problem.channels % per_chunk<T> != 0 || !is_aligned(conv.x) || !is_aligned(conv.weight))
    return launch_tile<T, TileM128N64, false>(problem, groups, stream);
  switch (tile) {
    case ConvTile::m128n128:
      return launch_tile<T, TileM128N128, true>(problem, groups, stream);
    case ConvTile::m128n64:
      return launch_tile<T, TileM128N64, true>(problem, groups, stream);
    case ConvTile::m64n64:
      return launch_tile<T, TileM64N64, true>(problem, groups, stream);
    case ConvTile::m128n32:
      return launch_tile<T, TileM128N32, true>(problem, groups, stream);
    case ConvTile::halo_m128n128:
      return launch_halo<T, TileM128N128>(problem, groups, halo_rows(conv.shape, 128), stream);
    case ConvTile::halo_m128n64:
      return launch_halo<T, TileM128N64>(problem, groups, halo_rows(conv.shape, 128), stream);
    default:
      return int(cudaErrorInvalidValue);
  }
}

}  // namespace resnet_fast
