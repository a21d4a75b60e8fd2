// What the kernels of batch normalisation share: how a block goes through its part of a map, and what a normalisation
// does to a value.
#pragma once

#include "batch_norm.h"
#include "convert.cuh"
#include "filter_vector.cuh"
#include "runtime.cuh"
#include "words.cuh"

namespace resnet_fast {

// Threads of a block; 32 words of 16 bytes side by side are a warp's widest access. A kernel's `unroll` says how many
// words of each map a thread has in flight: 4 words x 256 threads are 16 KiB a block, and two blocks on a
// multiprocessor cover the latency of memory (on an H100 3.35 TB/s x 600 ns / 132 = 15 KiB).
constexpr int block_size = 256, most_lanes = 32;

// Where a block is: `lanes` words of channels, side by side, of a chunk of pixels. Its threads are rows of as many
// lanes; row r has the pixels r, r + rows, ... of the chunk.
template <typename T, typename W, int unroll>
struct Part {
  static constexpr int per_word = sizeof(W) / sizeof(T);
  int lanes, rows, lane, row;
  int words, word;          // of a pixel; this thread's, which may lie behind them
  int pixels, chunk;        // pixels: of this chunk
  int64_t channels, first;  // first: the chunk's first pixel

  // reversed: the last block is the first. A kernel that reads what the one before has read begins with its end, which
  // the L2 cache still has of a map that is larger.
  __device__ explicit Part(const NormMap& map, bool reversed = false)
      : lanes(map.lanes), rows(block_size / lanes), lane(threadIdx.x % lanes), row(threadIdx.x / lanes) {
    channels = map.channels, words = int(channels / per_word);
    const int tiles = (words + lanes - 1) / lanes, block = int(reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    word = block % tiles * lanes + lane, chunk = block / tiles;
    first = chunk * map.chunk;
    pixels = int(min(map.chunk, map.pixels - first));
  }

  __device__ bool has(int pixel) const { return word < words && pixel < pixels; }
  __device__ int64_t at(int pixel) const { return (first + pixel) * words + word; }
  __device__ int channel(int e) const { return word * per_word + e; }

  // f(pixel) for every `unroll`-th pixel of this row: the others are f's. As often in all threads of the block.
  template <typename F>
  __device__ void each(const F& f) const {
    for (int pixel = row; pixel - row < pixels; pixel += rows * unroll) f(pixel);
  }

  // Words of `unroll` pixels of this row; zeros where there is none.
  __device__ void load(Elements<T, W> (&to)[unroll], const void* map, int pixel) const {
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      to[u].word = has(pixel + u * rows) ? __ldg(static_cast<const W*>(map) + at(pixel + u * rows)) : W{};
  }

  __device__ void store(void* map, const Elements<T, W> (&from)[unroll], int pixel) const {
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (has(pixel + u * rows)) static_cast<W*>(map)[at(pixel + u * rows)] = from[u].word;
  }

  // A byte of the mask, [pixels, ceil(C / 8)]: that of this thread's first channel.
  __device__ int64_t mask_at(int pixel) const { return (first + pixel) * ((channels + 7) / 8) + channel(0) / 8; }

  // f(place, channel) in one thread for each channel of the block; place(e) is the one of this thread's e-th channel.
  template <typename F>
  __device__ void each_channel(const F& f) const {
    if (row < per_word && word < words) f(int(threadIdx.x), channel(row));
  }
  __device__ int place(int e) const { return e * lanes + lane; }
};

// Numbers of the block's channels, several kinds of them, in shared memory: [kinds, block_size].
__device__ inline float* of_kind(int kind) { return reinterpret_cast<float*>(dynamic_shared()) + kind * block_size; }
__device__ inline void put(int kind, int place, float value) { store_shared(of_kind(kind) + place, value); }
__device__ inline float get(int kind, int place) { return load_shared<float>(of_kind(kind) + place); }

// (x - mean) * scale + shift. Spelt out, since the gradient's kernels must find the very sign that was here.
struct Affine {
  float mean, scale, shift;
  __device__ float operator()(float x) const { return fmaf(x - mean, scale, shift); }
};

__device__ inline float deviation(const BatchNorm& norm, float var) { return __fsqrt_rn(var + norm.eps); }

// All are loaded before one is waited for. Adding -0 changes nothing, not even a zero's sign.
__device__ inline Affine affine_of(const BatchNorm& norm, int c) {
  const float mean = filter_value(norm.mean, c, 0.0f), var = filter_value(norm.var, c, 1.0f);
  const float weight = filter_value(norm.weight, c, 1.0f), bias = filter_value(norm.bias, c, -0.0f);
  return {mean, __fdiv_rn(weight, deviation(norm, var)), bias};
}

// An Affine takes three kinds.
__device__ inline void put_affine(int kind, int place, const Affine& affine) {
  put(kind, place, affine.mean), put(kind + 1, place, affine.scale), put(kind + 2, place, affine.shift);
}
__device__ inline Affine get_affine(int kind, int place) {
  return {get(kind, place), get(kind + 1, place), get(kind + 2, place)};
}

// Whether a ReLU lets gradients through: as torch's it asks the value as it was stored, and NaN passes.
template <typename T>
__device__ bool passes(T y) {
  return !(to_float(y) <= 0.0f);
}

// Brings the values of a block's rows together in its first row, in an order that depends on nothing but the number of
// rows: combine(values, others, half) adds those of row + half, whose pixels and its own are then every half-th one.
template <int count, typename P, typename Combine>
__device__ void combine_rows(float (&values)[count], const P& part, float* shared, const Combine& combine) {
  for (int half = part.rows / 2; half > 0; half /= 2) {
    float* place = shared + part.row % half * part.lanes + part.lane;  // [count, block_size / 2]
    if (part.row / half == 1)
#pragma unroll
      for (int i = 0; i < count; ++i) store_shared(place + i * block_size / 2, values[i]);
    __syncthreads();
    if (part.row < half) {
      float others[count];
#pragma unroll
      for (int i = 0; i < count; ++i) others[i] = load_shared<float>(place + i * block_size / 2);
      combine(values, others, half);
    }
    __syncthreads();  // before the next half overwrites them
  }
}

// A block of the kernels that add up the chunks' partial results has 8 channels (32 bytes of a chunk) and 128 rows,
// each of which takes every 128th chunk, all of them at once: loads of one address after the other would take as long
// as a small map itself.
constexpr int sum_block = 1024, sum_channels = 8, sum_rows = sum_block / sum_channels, sum_parts = 4;

// The sum of what the rows have, in an order of their own, in the first row. In float64, as all sums of chunks.
__device__ inline double add_rows(double value) {
  double* shared = reinterpret_cast<double*>(dynamic_shared());  // [sum_rows, sum_channels]
  constexpr int part = sum_block / sum_parts;
  store_shared(shared + threadIdx.x, value);
  __syncthreads();
  if (threadIdx.x < part) {
    for (int i = 1; i < sum_parts; ++i) value += load_shared<double>(shared + threadIdx.x + i * part);
    store_shared(shared + threadIdx.x, value);
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < sum_channels)
#pragma unroll 8
    for (int row = 0; row < sum_rows / sum_parts; ++row)
      sum += load_shared<double>(shared + row * sum_channels + threadIdx.x);
  __syncthreads();  // before the next value overwrites this one
  return sum;
}

template <auto kernel, typename Arguments>
int launch_sum(int64_t channels, const Arguments& arguments, cudaStream_t stream) {
  return launch<kernel>(unsigned((channels + sum_channels - 1) / sum_channels), sum_block, sum_block * sizeof(double),
                        stream, arguments);
}

// function(NormMap, blocks, T(), W()) for the map's type and the word that divides `bits`, all addresses or'ed.
template <typename Function>
int with_type_and_word(NormMap map, uintptr_t bits, const Function& function) {
  return with_type(map.type, [&](auto value) {
    using T = decltype(value);
    return with_widest_word_or_one<T>(bits | uintptr_t(map.channels) * sizeof(T), [&](auto word) {
      const int64_t words = map.channels / int64_t(sizeof(word) / sizeof(T));
      for (map.lanes = 1; map.lanes < words && map.lanes < most_lanes;) map.lanes *= 2;
      const int64_t blocks = (words + map.lanes - 1) / map.lanes * chunks_of(map);
      return function(map, unsigned(blocks), value, word);
    });
  });
}

}  // namespace resnet_fast
