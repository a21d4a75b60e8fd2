// Max-pooling of a map in channels_last: a thread computes one word (16 bytes where channels and addresses allow) of
// one output pixel. Bound by memory: of the 3x3 windows of stride 2 that ResNets have, four ninths of the reads come
// from the caches, and a thread has all of a row's loads in flight before the first value is compared.
#pragma once

#include "convert.cuh"
#include "pooling.h"
#include "runtime.cuh"
#include "words.cuh"

namespace resnet_fast {

constexpr int pool_block = 256;

template <typename T, typename W, bool with_indices>
struct Largest {
  static constexpr int per_word = sizeof(W) / sizeof(T);
  Elements<T, W> best;
  int index[per_word];

  // first: the kernel's first place inside the map, where -inf stands if nothing else does.
  __device__ explicit Largest(int first) {
#pragma unroll
    for (int e = 0; e < per_word; ++e) best.values[e] = from_float<T>(-INFINITY), index[e] = first;
  }
  __device__ void take(W word, int place) {
    const Elements<T, W> x{word};
#pragma unroll
    for (int e = 0; e < per_word; ++e) {
      const float value = to_float(x.values[e]);
      if (value > to_float(best.values[e]) || value != value) {
        best.values[e] = x.values[e];
        if (with_indices) index[e] = place;
      }
    }
  }
  __device__ void store_indices(uint8_t* indices, uint64_t i) const {
    using Places = typename WordOf<per_word>::type;
    Elements<uint8_t, Places> places;
#pragma unroll
    for (int e = 0; e < per_word; ++e) places.values[e] = uint8_t(index[e]);
    reinterpret_cast<Places*>(indices)[i] = places.word;
  }
};

// The first of a kernel's rows (or columns) that is inside the map; it starts at h.
__device__ inline int first_inside(int h, int dilation) { return h < 0 ? (dilation - 1 - h) / dilation : 0; }

// columns: of the window, known when compiled, or 0. Index: 32 bits where they count all words, for they divide faster.
template <typename T, typename W, int columns, typename Index, bool with_indices>
__global__ void __launch_bounds__(pool_block) max_pool_kernel(const __grid_constant__ MaxPool m) {
  const Index words = Index(m.c / int64_t(sizeof(W) / sizeof(T))), total = Index(m.n * m.p * m.q) * words;
  const W* x = static_cast<const W*>(m.x);
  W* out = static_cast<W*>(m.out);
  for (Index i = Index(blockIdx.x) * pool_block + threadIdx.x; i < total; i += Index(gridDim.x) * pool_block) {
    const Index word = i % words, pixel = i / words, row = pixel / Index(m.q);
    const int q = int(pixel % Index(m.q)), p = int(row % Index(m.p));
    const int64_t image = row / Index(m.p);
    const int h0 = p * m.stride[0] - m.padding[0], w0 = q * m.stride[1] - m.padding[1];
    const int first = first_inside(h0, m.dilation[0]) * m.kernel[1] + first_inside(w0, m.dilation[1]);
    Largest<T, W, with_indices> largest(first);
    for (int r = 0; r < m.kernel[0]; ++r) {
      const int h = h0 + r * m.dilation[0];
      if (h < 0 || h >= m.h) continue;
      const W* of_row = x + (image * m.h + h) * m.w * int64_t(words) + word;
      if constexpr (columns > 0) {
        W loaded[columns];
#pragma unroll
        for (int s = 0; s < columns; ++s) {
          const int w = w0 + s * m.dilation[1];
          if (w >= 0 && w < m.w) loaded[s] = __ldg(of_row + w * int64_t(words));
        }
#pragma unroll
        for (int s = 0; s < columns; ++s) {
          const int w = w0 + s * m.dilation[1];
          if (w >= 0 && w < m.w) largest.take(loaded[s], r * m.kernel[1] + s);
        }
      } else {
        for (int s = 0; s < m.kernel[1]; ++s) {
          const int w = w0 + s * m.dilation[1];
          if (w >= 0 && w < m.w) largest.take(__ldg(of_row + w * int64_t(words)), r * m.kernel[1] + s);
        }
      }
    }
    out[i] = largest.best.word;
    if constexpr (with_indices) largest.store_indices(m.indices, i);
  }
}

// A thread for every word of `pixels` pixels, with the type that counts them all; the loop's index goes one step of the
// grid past the end.
template <auto small, auto large, typename Arguments>
int launch_words(int64_t pixels, int64_t words, const Arguments& arguments, cudaStream_t stream) {
  const int64_t total = pixels * words, blocks = (total + pool_block - 1) / pool_block;
  const unsigned grid = unsigned(blocks > (1 << 20) ? 1 << 20 : blocks);
  if (total < (int64_t(1) << 32) - (int64_t(pool_block) << 20))
    return launch<small>(grid, pool_block, 0, stream, arguments);
  return launch<large>(grid, pool_block, 0, stream, arguments);
}

template <typename T, typename W, bool with_indices>
int launch_max_pool(const MaxPool& m, cudaStream_t stream) {
  const int64_t pixels = m.n * m.p * m.q, words = m.c / int64_t(sizeof(W) / sizeof(T));
  if (m.kernel[1] == 3)
    return launch_words<max_pool_kernel<T, W, 3, uint32_t, with_indices>,
                        max_pool_kernel<T, W, 3, uint64_t, with_indices>>(pixels, words, m, stream);
  return launch_words<max_pool_kernel<T, W, 0, uint32_t, with_indices>,
                      max_pool_kernel<T, W, 0, uint64_t, with_indices>>(pixels, words, m, stream);
}

}  // namespace resnet_fast
