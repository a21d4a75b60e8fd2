// conv_bn_relu for sm_80 and later, windows of several taps and stride 1: as conv_bn_relu_sm80.cuh, but a block's input
// lies in shared memory once for all taps instead of once for each, which of a 3x3 window saves more than four fifths
// of the reads of the input.
//
// Take the input with its padding, all images below each other, as a grid grid_w = Q + dilation (S - 1) pixels wide and
// P + dilation (R - 1) an image high. The window of the output pixel (n, p, q) begins at position
// (n grid_h + p) grid_w + q of it, and a tap (r, s) lies dilation (r grid_w + s) further on, for every pixel alike. So
// the windows of a block's successive pixels lie in one range of positions: its halo. Of that, a slice of row_bytes of
// channels lies in shared memory, a row for each position; ldmatrix takes any row for any lane, so a tap costs nothing
// but an addition. While a slice is multiplied, the next one is on its way into a second buffer.
#pragma once

#include "conv_bn_relu_sm80.cuh"

namespace resnet_fast {

// Position of an output pixel's window.
__device__ __forceinline__ int halo_position(const ConvSm80& conv, int pixel) {
  const int q = pixel % conv.q, rows = pixel / conv.q;
  return (rows / conv.p * conv.grid_h + rows % conv.p) * conv.grid_w + q;
}

template <typename T, typename Tile>
struct HaloLoader {
  const ConvSm80& conv;
  const T *x, *weight;  // of the group
  const int chunk, first_row, n0, first_position;
  int halo_rows;           // from there to the end of the last pixel's window
  int slice = 0, tap = 0;  // of the filters' next copy

  __device__ __forceinline__ HaloLoader(const ConvSm80& conv, int group, int m0, int n0)
      : conv(conv),
        x(static_cast<const T*>(conv.x) + group * conv.channels),
        weight(static_cast<const T*>(conv.weight) + int64_t(group) * conv.filters * conv.r * conv.s * conv.channels),
        chunk(threadIdx.x % Tile::chunks),
        first_row(threadIdx.x / Tile::chunks),
        n0(n0),
        first_position(halo_position(conv, m0)) {
    const int last_pixel = min(m0 + Tile::block_m, conv.pixels) - 1;
    const int last_tap = (conv.r - 1) * conv.dilation_h * conv.grid_w + (conv.s - 1) * conv.dilation_w;
    halo_rows = halo_position(conv, last_pixel) + last_tap - first_position + 1;
  }

  __device__ __forceinline__ int channel(int slice) const { return (slice * Tile::chunks + chunk) * per_chunk<T>; }
  __device__ __forceinline__ bool exists(int slice) const {
    return slice * Tile::chunks * per_chunk<T> < conv.channels;
  }
  __device__ __forceinline__ int to(int row) const { return chunk_at<Tile>(row, chunk); }

  // Starts the copy of a slice of the halo.
  __device__ __forceinline__ void copy_halo(uint32_t a, int slice) const {
    const int c = channel(slice);
    for (int row = first_row; row < halo_rows; row += Tile::rows_at_once) {
      const int position = first_position + row, column = position % conv.grid_w, rows = position / conv.grid_w;
      const int h = rows % conv.grid_h - conv.padding_h, w = column - conv.padding_w;
      const int64_t n = rows / conv.grid_h;
      const bool ok = c < conv.channels && unsigned(h) < unsigned(conv.h) && unsigned(w) < unsigned(conv.w);
      ptx::cp_async_16(a + to(row), ok ? x + ((n * conv.h + h) * conv.w + w) * conv.all_channels + c : x, ok);
    }
  }

  // Starts the copy of the next step's filters: a tap of a slice.
  __device__ __forceinline__ void copy_filters(uint32_t b) {
    const int c = channel(slice), taps = conv.r * conv.s;
#pragma unroll
    for (int i = 0; i < Tile::loads_b; ++i) {
      const int row = first_row + i * Tile::rows_at_once, k = n0 + row;
      const bool ok = k < conv.filters && c < conv.channels;
      ptx::cp_async_16(b + to(row), ok ? weight + (int64_t(k) * taps + tap) * conv.channels + c : weight, ok);
    }
    if (++tap == taps) tap = 0, ++slice;
  }
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    conv_bn_relu_sm80_halo_kernel(const __grid_constant__ ConvSm80 conv) {
  unsigned char* shared = dynamic_shared();
  const Part<Tile> part(conv);
  auto& batch_norm = *reinterpret_cast<BatchNorm<Tile>*>(shared);
  batch_norm.load(conv, part.group, part.n0);
  unsigned char* operands = shared + Tile::batch_norm_bytes;
  const uint32_t filters = ptx::shared_address(operands), halo = filters + Tile::stages * Tile::filter_bytes;
  const auto filters_of = [&](int step) { return filters + step % Tile::stages * Tile::filter_bytes; };
  const auto halo_of = [&](int slice) { return halo + slice % 2 * conv.halo_rows * Tile::row_bytes; };

  HaloLoader<T, Tile> loader(conv, part.group, part.m0, part.n0);
  int rows[Tile::mma_m];  // of the halo, for this lane's pixels at the window's first tap
#pragma unroll
  for (int i = 0; i < Tile::mma_m; ++i) {
    const int pixel = part.m0 + part.warp_row * Tile::warp_m + i * 16 + int(threadIdx.x) % 16;
    rows[i] = pixel < conv.pixels ? halo_position(conv, pixel) - loader.first_position : 0;
  }

  loader.copy_halo(halo_of(0), 0);
#pragma unroll
  for (int step = 0; step < Tile::stages - 1; ++step) {
    if (step < conv.steps) loader.copy_filters(filters_of(step));
    ptx::cp_async_commit();  // a group for every step, so that waiting can count them
  }
  Accumulators<Tile> accumulators = {};
  int slice = 0, r = 0, s = 0;
  for (int step = 0; step < conv.steps; ++step) {
    // Also the halo of this step's slice: it was copied with the first tap of the slice before, which is more groups
    // ago than may be on their way, since a window has at least stages - 1 taps.
    ptx::cp_async_wait<Tile::stages - 2>();
    __syncthreads();  // this step is there for all, and all are done with what the next copies overwrite
    if (step + Tile::stages - 1 < conv.steps) loader.copy_filters(filters_of(step + Tile::stages - 1));
    if (r == 0 && s == 0 && loader.exists(slice + 1)) loader.copy_halo(halo_of(slice + 1), slice + 1);
    ptx::cp_async_commit();
    const uint32_t a = halo_of(slice);
    const int tap = r * conv.dilation_h * conv.grid_w + s * conv.dilation_w;
    multiply_step<T, Tile>(
        accumulators, [&](int i, int chunk) { return a + chunk_at<Tile>(rows[i] + tap, chunk); },
        filters_of(step) + part.warp_column * Tile::warp_n * Tile::row_bytes);
    if (++s == conv.s) s = 0, ++r;
    if (r == conv.r) r = 0, ++slice;
  }
  ptx::cp_async_wait<0>();

  Epilogue<T, Tile>{conv, part, batch_norm, reinterpret_cast<float*>(operands)}.run(accumulators);
}

}  // namespace resnet_fast
