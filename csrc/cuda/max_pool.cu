// Max-pooling of a map in channels_last: a thread computes one word (16 bytes where channels and addresses allow) of
// one output pixel. Bound by memory: of the 3x3 windows of stride 2 that ResNets have, four ninths of the reads come
// from the caches, and a thread has all of a row's loads in flight before the first value is compared.
#include "convert.cuh"
#include "pooling.h"
#include "runtime.cuh"
#include "words.cuh"

namespace resnet_fast {
namespace {

constexpr int block_size = 256;

template <typename T, typename W>
struct Largest {
  Elements<T, W> best;

  __device__ Largest() {
#pragma unroll
    for (int e = 0; e < int(sizeof(W) / sizeof(T)); ++e) best.values[e] = from_float<T>(-INFINITY);
  }
  __device__ void take(W word) {
    const Elements<T, W> x{word};
#pragma unroll
    for (int e = 0; e < int(sizeof(W) / sizeof(T)); ++e) {
      const float value = to_float(x.values[e]);
      if (value > to_float(best.values[e]) || value != value) best.values[e] = x.values[e];
    }
  }
};

// columns: of the window, known when compiled, or 0. Index: 32 bits where they count all words, for they divide faster.
template <typename T, typename W, int columns, typename Index>
__global__ void __launch_bounds__(block_size) max_pool_kernel(const __grid_constant__ MaxPool m) {
  const Index words = Index(m.c / int64_t(sizeof(W) / sizeof(T))), total = Index(m.n * m.p * m.q) * words;
  const W* x = static_cast<const W*>(m.x);
  W* out = static_cast<W*>(m.out);
  for (Index i = Index(blockIdx.x) * block_size + threadIdx.x; i < total; i += Index(gridDim.x) * block_size) {
    const Index word = i % words, pixel = i / words, row = pixel / Index(m.q);
    const int q = int(pixel % Index(m.q)), p = int(row % Index(m.p));
    const int64_t image = row / Index(m.p);
    const int h0 = p * m.stride[0] - m.padding[0], w0 = q * m.stride[1] - m.padding[1];
    Largest<T, W> largest;
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
          if (w >= 0 && w < m.w) largest.take(loaded[s]);
        }
      } else {
        for (int s = 0; s < m.kernel[1]; ++s) {
          const int w = w0 + s * m.dilation[1];
          if (w >= 0 && w < m.w) largest.take(__ldg(of_row + w * int64_t(words)));
        }
      }
    }
    out[i] = largest.best.word;
  }
}

template <typename T, typename W, int columns>
int launch_columns(const MaxPool& m, cudaStream_t stream) {
  const int64_t total = m.n * m.p * m.q * (m.c / int64_t(sizeof(W) / sizeof(T)));
  const int64_t blocks = (total + block_size - 1) / block_size;
  const unsigned grid = unsigned(blocks > (1 << 20) ? 1 << 20 : blocks);
  // The loop's index goes one step of the grid past the end.
  if (total < (int64_t(1) << 32) - (int64_t(block_size) << 20))
    return launch<max_pool_kernel<T, W, columns, uint32_t>>(grid, block_size, 0, stream, m);
  return launch<max_pool_kernel<T, W, columns, uint64_t>>(grid, block_size, 0, stream, m);
}

template <typename T>
int launch_max_pool(const MaxPool& m, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  return with_widest_word<T>(uintptr_t(m.x) | uintptr_t(m.out) | uintptr_t(m.c) * sizeof(T), [&](auto word) {
    using W = decltype(word);
    return m.kernel[1] == 3 ? launch_columns<T, W, 3>(m, s) : launch_columns<T, W, 0>(m, s);
  });
}

}  // namespace

int launch_max_pool(const MaxPool& pool, void* stream) {
  if (pool.n * pool.p * pool.q * pool.c == 0) return int(cudaSuccess);
  switch (pool.type) {
    case Type::float32:
      return launch_max_pool<float>(pool, stream);
    case Type::bfloat16:
      return launch_max_pool<__nv_bfloat16>(pool, stream);
    case Type::float16:
      return launch_max_pool<__half>(pool, stream);
    default:
      return int(cudaErrorInvalidValue);
  }
}

}  // namespace resnet_fast
