// conv_bn_relu for sm_80 and later: an implicit GEMM on tensor cores (mma.sync), operands through shared memory.
//
//   out[m, k] = sum over (tap, c) of x[pixel(m) + tap, c] * weight[k, tap, c]      m: output pixels of all images
//
// A block computes a tile of block_m pixels by block_n filters. A step of its loop takes row_bytes of the reduction for
// each pixel and each filter; `stages` such steps lie in shared memory, all but one of them on their way (cp.async).
// In shared memory a pixel's or filter's row_bytes are cut into chunks of 16 bytes, whose order is changed by `swizzle`
// so that neither ldmatrix nor cp.async meets a bank twice. The reduction is cut into the same chunks, a tap's channels
// padded with zeros to whole ones (or to 4 channels where there are fewer, so that a first layer's taps lie close).
//
// All three types take the same path byte for byte; only the instruction that multiplies differs. The accumulators
// pass through shared memory once more, so that each thread stores 16 bytes of neighbouring filters, and BatchNorm,
// residual and ReLU are computed there in float32.
//
// Launched by the .cu file of each type.
#pragma once

#include <type_traits>

#include "conv_bn_relu_sm80.h"
#include "convert.cuh"
#include "filter_vector.cuh"
#include "ptx.cuh"
#include "runtime.cuh"

namespace resnet_fast {

// A convolution as the kernel reads it: 32-bit sizes, of one group where nothing else is said.
struct ConvSm80 {
  const void *x, *weight, *residual;
  void* out;
  FilterVector bias, bn_weight, bn_bias, running_mean, running_var;
  float eps;
  bool relu;
  bool vectors;  // whether the output and the residual can be accessed 16 bytes at a time
  int h, w, r, s, p, q;
  int channels, padded_channels, filters;  // padded: as the reduction counts them
  int all_channels, all_filters;           // of all groups
  int pixels;                              // of the output, N * P * Q
  int steps;                               // of the loop over the reduction
  int halo_rows, grid_h, grid_w;           // of conv_bn_relu_sm80_halo_kernel; rows that there is memory for
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

template <int block_m_, int block_n_, int warps_m_, int warps_n_, int row_bytes_, int stages_, int blocks_>
struct Tile {
  static constexpr int block_m = block_m_, block_n = block_n_;
  static constexpr int warps_m = warps_m_, warps_n = warps_n_, threads = warps_m * warps_n * 32;
  static constexpr int warp_m = block_m / warps_m, warp_n = block_n / warps_n;
  static constexpr int mma_m = warp_m / 16, mma_n = warp_n / 8;
  static constexpr int row_bytes = row_bytes_, chunks = row_bytes / 16, stages = stages_;
  static constexpr int blocks = blocks_;                 // that shall fit on a multiprocessor: limits the registers
  static constexpr int rows_at_once = threads / chunks;  // one chunk per thread
  static constexpr int loads_a = block_m / rows_at_once, loads_b = block_n / rows_at_once;
  static constexpr int filter_bytes = block_n * row_bytes, stage_bytes = block_m * row_bytes + filter_bytes;
  // The accumulators pass warp_m rows at a time. 8 more columns: rows 2 apart lie 16 banks apart, so that the stores of
  // 8 bytes of half a warp (4 rows) meet no bank twice.
  static constexpr int staging_columns = block_n + 8, staging_bytes = warp_m * staging_columns * 4;
  static constexpr int operand_bytes = stages * stage_bytes > staging_bytes ? stages * stage_bytes : staging_bytes;
  static constexpr int batch_norm_bytes = 3 * block_n * 4;  // centre, scale, shift of every filter
  static constexpr int shared_bytes = batch_norm_bytes + operand_bytes;
  static_assert(block_m % rows_at_once == 0 && block_n % rows_at_once == 0 && mma_n % 2 == 0);
  static_assert(shared_bytes <= 99 * 1024, "what sm_86 and sm_89 give a block");
};

using TileM128N128 = Tile<128, 128, 2, 4, 64, 4, 2>;
using TileM128N64 = Tile<128, 64, 2, 2, 64, 4, 3>;
using TileM64N64 = Tile<64, 64, 2, 2, 64, 4, 4>;
using TileM128N32 = Tile<128, 32, 4, 1, 64, 4, 4>;

template <typename T>
constexpr int per_chunk = 16 / sizeof(T);

// Place of a row's chunk: of 8 neighbouring rows' same chunk no two lie in the same banks.
template <typename Tile>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  static_assert(Tile::chunks == 4 || Tile::chunks == 8);
  return chunk ^ (Tile::chunks == 4 ? row >> 1 & 3 : row & 7);
}

// A chunk's place in shared memory, in bytes from the start of the rows.
template <typename Tile>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * Tile::row_bytes + swizzle<Tile>(row, chunk) * 16;
}

// The tile that this block computes, and the part of it that is this warp's.
template <typename Tile>
struct Part {
  int group, m0, n0, warp_row, warp_column;

  __device__ __forceinline__ explicit Part(const ConvSm80& conv) {
    const int tiles_n = (conv.filters + Tile::block_n - 1) / Tile::block_n, warp = threadIdx.x / 32;
    group = blockIdx.y, m0 = blockIdx.x / tiles_n * Tile::block_m, n0 = blockIdx.x % tiles_n * Tile::block_n;
    warp_row = warp / Tile::warps_n, warp_column = warp % Tile::warps_n;
  }
};

template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>)
    ptx::mma_tf32(c, a, b);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    ptx::mma_bf16(c, a, b);
  else
    ptx::mma_fp16(c, a, b);
}

template <typename T>
__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], uint32_t row) {
  ptx::ldmatrix_x4(fragment, row);
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = ptx::round_to_tf32(fragment[i]);
  }
}

// A place in the reduction: tap (r, s) of the window, channel c.
struct Place {
  int r, s, c;

  __device__ __forceinline__ void next_tap(const ConvSm80& conv) {
    if (++s == conv.s) s = 0, ++r;
  }
  __device__ __forceinline__ void advance(const ConvSm80& conv, int channels) {
    for (c += channels; c >= conv.padded_channels; c -= conv.padded_channels) next_tap(conv);
  }
};

// The top left corner of an output pixel's window.
struct Corner {
  int64_t offset;  // of its first channel in x; it may lie outside the image
  int h, w;

  __device__ __forceinline__ static Corner of(const ConvSm80& conv, int pixel) {
    if (pixel >= conv.pixels) return {0, -(1 << 30), 0};  // nothing is inside the image
    const int q = pixel % conv.q, rows = pixel / conv.q, p = rows % conv.p, n = rows / conv.p;
    const int h = p * conv.stride_h - conv.padding_h, w = q * conv.stride_w - conv.padding_w;
    return {((int64_t(n) * conv.h + h) * conv.w + w) * conv.all_channels, h, w};
  }
};

// Copies a block's operands into shared memory, step by step. Every thread has one chunk of each of its rows.
template <typename T, typename Tile, bool aligned>
struct Loader {
  const ConvSm80& conv;
  const T *x, *weight;  // of the group
  const int chunk, first_row, n0;
  Corner corners[Tile::loads_a];
  Place place{0, 0, 0};
  uint4 fetched[aligned ? 1 : Tile::loads_a + Tile::loads_b];

  __device__ __forceinline__ Loader(const ConvSm80& conv, int group, int m0, int n0)
      : conv(conv),
        x(static_cast<const T*>(conv.x) + group * conv.channels),
        weight(static_cast<const T*>(conv.weight) + int64_t(group) * conv.filters * filter_size()),
        chunk(threadIdx.x % Tile::chunks),
        first_row(threadIdx.x / Tile::chunks),
        n0(n0) {
#pragma unroll
    for (int i = 0; i < Tile::loads_a; ++i) corners[i] = Corner::of(conv, m0 + first_row + i * Tile::rows_at_once);
    place.advance(conv, chunk * per_chunk<T>);
  }

  __device__ __forceinline__ int filter_size() const { return conv.r * conv.s * conv.channels; }
  __device__ __forceinline__ void advance() { place.advance(conv, Tile::chunks * per_chunk<T>); }
  __device__ __forceinline__ static int row_of(int first_row, int i) { return first_row + i * Tile::rows_at_once; }

  __device__ __forceinline__ int to(int row) const { return chunk_at<Tile>(row, chunk); }

  __device__ __forceinline__ bool inside(const Corner& corner, const Place& at) const {
    const int h = corner.h + at.r * conv.dilation_h, w = corner.w + at.s * conv.dilation_w;
    return at.r < conv.r && unsigned(h) < unsigned(conv.h) && unsigned(w) < unsigned(conv.w);
  }
  __device__ __forceinline__ int64_t input_offset(const Place& at) const {
    return (int64_t(at.r * conv.dilation_h) * conv.w + at.s * conv.dilation_w) * conv.all_channels + at.c;
  }
  __device__ __forceinline__ int weight_offset(const Place& at) const {
    return (at.r * conv.s + at.s) * conv.channels + at.c;
  }

  // Channels in whole, aligned chunks: starts the copies of a step.
  __device__ __forceinline__ void copy(uint32_t a, uint32_t b) {
    const int64_t offset = input_offset(place);
#pragma unroll
    for (int i = 0; i < Tile::loads_a; ++i) {
      const bool ok = inside(corners[i], place);
      ptx::cp_async_16(a + to(row_of(first_row, i)), ok ? x + corners[i].offset + offset : x, ok);
    }
#pragma unroll
    for (int i = 0; i < Tile::loads_b; ++i) {
      const int k = n0 + row_of(first_row, i);
      const bool ok = k < conv.filters && place.r < conv.r;
      ptx::cp_async_16(b + to(row_of(first_row, i)),
                       ok ? weight + int64_t(k) * filter_size() + weight_offset(place) : weight, ok);
    }
    advance();
  }

  // Any channels: a step element by element, first into registers, so that other work lies between load and use.
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int i = 0; i < Tile::loads_a; ++i)
      fetched[i] = gather([&](const Place& at) -> const T* {
        return inside(corners[i], at) ? x + corners[i].offset + input_offset(at) : nullptr;
      });
#pragma unroll
    for (int i = 0; i < Tile::loads_b; ++i) {
      const int k = n0 + row_of(first_row, i);
      fetched[Tile::loads_a + i] = gather([&](const Place& at) -> const T* {
        return k < conv.filters && at.r < conv.r ? weight + int64_t(k) * filter_size() + weight_offset(at) : nullptr;
      });
    }
    advance();
  }

  template <typename Address>
  __device__ __forceinline__ uint4 gather(Address address) const {
    union {
      uint4 vector;
      T values[per_chunk<T>];
    };
    vector = uint4{0, 0, 0, 0};
    Place at = place;
#pragma unroll
    for (int e = 0; e < per_chunk<T>; ++e) {
      const T* from = at.c < conv.channels ? address(at) : nullptr;
      if (from != nullptr) values[e] = __ldg(from);
      if (++at.c == conv.padded_channels) at.c = 0, at.next_tap(conv);
    }
    return vector;
  }

  __device__ __forceinline__ void store(unsigned char* a, unsigned char* b) const {
#pragma unroll
    for (int i = 0; i < Tile::loads_a; ++i) store_shared(a + to(row_of(first_row, i)), fetched[i]);
#pragma unroll
    for (int i = 0; i < Tile::loads_b; ++i) store_shared(b + to(row_of(first_row, i)), fetched[Tile::loads_a + i]);
  }
};

template <typename Tile>
using Accumulators = float[Tile::mma_m][Tile::mma_n][4];

// One step: accumulators += A B, of this warp. row_a(i, chunk): the address of a chunk of this lane's row of the i-th
// 16 rows of A; b: where the warp's first row of B begins.
template <typename T, typename Tile, typename RowA>
__device__ __forceinline__ void multiply_step(Accumulators<Tile>& accumulators, RowA row_a, uint32_t b) {
  const int lane = threadIdx.x % 32, row_b = lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < Tile::row_bytes / 32; ++k) {
    uint32_t fragment_a[Tile::mma_m][4], fragment_b[Tile::mma_n / 2][4];
    // Rows of B 16 apart are swizzled alike.
    const uint32_t from_b = b + chunk_at<Tile>(row_b, 2 * k + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < Tile::mma_m; ++i) load_fragment<T>(fragment_a[i], row_a(i, 2 * k + lane / 16));
#pragma unroll
    for (int j = 0; j < Tile::mma_n / 2; ++j) load_fragment<T>(fragment_b[j], from_b + j * 16 * Tile::row_bytes);
#pragma unroll
    for (int i = 0; i < Tile::mma_m; ++i)
#pragma unroll
      for (int j = 0; j < Tile::mma_n; ++j) {
        const uint32_t (&pair)[4] = fragment_b[j / 2];
        const uint32_t of_column[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
        multiply_add<T>(accumulators[i][j], fragment_a[i], of_column);
      }
  }
}

// BatchNorm of a tile's filters: (x - centre) * scale + shift.
template <typename Tile>
struct BatchNorm {
  float centre[Tile::block_n], scale[Tile::block_n], shift[Tile::block_n];

  __device__ __forceinline__ void load(const ConvSm80& conv, int group, int n0) {
    for (int i = threadIdx.x; i < Tile::block_n; i += Tile::threads) {
      if (n0 + i >= conv.filters) continue;
      const int k = group * conv.filters + n0 + i;
      centre[i] = filter_value(conv.running_mean, k, 0.0f) - filter_value(conv.bias, k, 0.0f);
      scale[i] = filter_scale(conv.running_var, conv.bn_weight, conv.eps, k);
      shift[i] = filter_value(conv.bn_bias, k, 0.0f);
    }
  }
};

// What a thread stores at a time: neighbouring filters of one pixel.
template <typename T>
union Chunk {
  uint4 vector;
  T values[per_chunk<T>];
};

// Writes the tile. A warp's rows pass through `staging`, which nobody may be reading any more.
template <typename T, typename Tile>
struct Epilogue {
  const ConvSm80& conv;
  const Part<Tile>& part;
  const BatchNorm<Tile>& batch_norm;
  float* staging;
  static constexpr int columns = Tile::block_n / per_chunk<T>;  // chunks of a row
  static constexpr int per_thread = Tile::warp_m * columns / Tile::threads;
  static_assert(Tile::warp_m * columns % Tile::threads == 0 && Tile::threads % columns == 0);

  __device__ __forceinline__ int column() const { return threadIdx.x % columns * per_chunk<T>; }
  __device__ __forceinline__ int row(int i) const { return threadIdx.x / columns + i * (Tile::threads / columns); }
  __device__ __forceinline__ int64_t offset(int m, int column) const {
    return int64_t(m) * conv.all_filters + part.group * conv.filters + part.n0 + column;
  }
  __device__ __forceinline__ bool exists(int m, int column) const {
    return m < conv.pixels && part.n0 + column < conv.filters;
  }

  __device__ __forceinline__ void run(const Accumulators<Tile>& accumulators) {
#pragma unroll
    for (int pass = 0; pass < Tile::warps_m; ++pass) {
      Chunk<T> residual[per_thread];
      load_residual(residual, part.m0 + pass * Tile::warp_m);
      __syncthreads();  // the rows of the pass before have been read
      if (part.warp_row == pass) stage(accumulators);
      __syncthreads();
      store(residual, part.m0 + pass * Tile::warp_m);
    }
  }

  __device__ __forceinline__ void stage(const Accumulators<Tile>& accumulators) {
    const int lane = threadIdx.x % 32, first = part.warp_column * Tile::warp_n + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Tile::mma_m; ++i)
#pragma unroll
      for (int j = 0; j < Tile::mma_n; ++j) {
        const float (&c)[4] = accumulators[i][j];
        float* to = staging + (i * 16 + lane / 4) * Tile::staging_columns + first + j * 8;
        store_shared(to, make_float2(c[0], c[1]));
        store_shared(to + 8 * Tile::staging_columns, make_float2(c[2], c[3]));
      }
  }

  // All of a thread's loads before the first of them is used.
  __device__ __forceinline__ void load_residual(Chunk<T> (&residual)[per_thread], int first_m) const {
    const T* from = static_cast<const T*>(conv.residual);
    if (from == nullptr || !conv.vectors) return;
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
      const int m = first_m + row(i);
      if (exists(m, column())) residual[i].vector = __ldg(reinterpret_cast<const uint4*>(from + offset(m, column())));
    }
  }

  __device__ __forceinline__ T finished(float x, int column, bool has_residual, T residual) const {
    x = (x - batch_norm.centre[column]) * batch_norm.scale[column] + batch_norm.shift[column];
    if (has_residual) x += to_float(residual);
    return from_float<T>(conv.relu ? relu(x) : x);
  }

  __device__ __forceinline__ void store(const Chunk<T> (&residual)[per_thread], int first_m) const {
    T* out = static_cast<T*>(conv.out);
    const T* added = static_cast<const T*>(conv.residual);
#pragma unroll
    for (int i = 0; i < per_thread; ++i) {
      const int m = first_m + row(i);
      if (!exists(m, column())) continue;
      const float* from = staging + row(i) * Tile::staging_columns + column();
      union {
        float4 vectors[per_chunk<T> / 4];
        float x[per_chunk<T>];
      };
#pragma unroll
      for (int v = 0; v < per_chunk<T> / 4; ++v) vectors[v] = load_shared<float4>(from + 4 * v);
      if (conv.vectors) {
        Chunk<T> chunk;
#pragma unroll
        for (int e = 0; e < per_chunk<T>; ++e)
          chunk.values[e] = finished(x[e], column() + e, added != nullptr, residual[i].values[e]);
        *reinterpret_cast<uint4*>(out + offset(m, column())) = chunk.vector;
      } else {
#pragma unroll
        for (int e = 0; e < per_chunk<T>; ++e) {
          if (!exists(m, column() + e)) break;
          const int64_t at = offset(m, column() + e);
          out[at] = finished(x[e], column() + e, added != nullptr, added == nullptr ? T() : added[at]);
        }
      }
    }
  }
};

// aligned: whole chunks of channels, all 16-byte aligned.
template <typename T, typename Tile, bool aligned>
__global__ void __launch_bounds__(Tile::threads, aligned ? Tile::blocks : Tile::blocks - 1)
    conv_bn_relu_sm80_kernel(const __grid_constant__ ConvSm80 conv) {
  unsigned char* shared = dynamic_shared();
  const Part<Tile> part(conv);
  auto& batch_norm = *reinterpret_cast<BatchNorm<Tile>*>(shared);
  batch_norm.load(conv, part.group, part.n0);
  unsigned char* operands = shared + Tile::batch_norm_bytes;

  Loader<T, Tile, aligned> loader(conv, part.group, part.m0, part.n0);
  const auto stage_a = [&](int step) { return operands + step % Tile::stages * Tile::stage_bytes; };
  const auto stage_b = [&](int step) { return stage_a(step) + Tile::block_m * Tile::row_bytes; };
  const auto start_load = [&](int step) {
    if constexpr (aligned) {
      if (step < conv.steps) loader.copy(ptx::shared_address(stage_a(step)), ptx::shared_address(stage_b(step)));
      ptx::cp_async_commit();  // a group for every step, so that waiting can count them
    } else if (step < conv.steps) {
      loader.fetch();
    }
  };
  const auto finish_load = [&](int step) {
    if constexpr (!aligned) {
      if (step < conv.steps) loader.store(stage_a(step), stage_b(step));
    }
  };

  const int row =
      part.warp_row * Tile::warp_m + threadIdx.x % 16;  // of A, this lane's first; those 16 apart swizzle alike
  Accumulators<Tile> accumulators = {};
#pragma unroll
  for (int step = 0; step < Tile::stages - 1; ++step) start_load(step), finish_load(step);
  for (int step = 0; step < conv.steps; ++step) {
    if constexpr (aligned) ptx::cp_async_wait<Tile::stages - 2>();
    __syncthreads();  // this step is there for all, and all are done with the one whose place the next load takes
    start_load(step + Tile::stages - 1);
    const uint32_t a = ptx::shared_address(stage_a(step));
    multiply_step<T, Tile>(
        accumulators, [&](int i, int chunk) { return a + chunk_at<Tile>(row, chunk) + i * 16 * Tile::row_bytes; },
        ptx::shared_address(stage_b(step)) + part.warp_column * Tile::warp_n * Tile::row_bytes);
    finish_load(step + Tile::stages - 1);
  }
  if constexpr (aligned) ptx::cp_async_wait<0>();

  Epilogue<T, Tile>{conv, part, batch_norm, reinterpret_cast<float*>(operands)}.run(accumulators);
}

}  // namespace resnet_fast
