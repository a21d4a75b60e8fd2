// Means over the pixels of a map in channels_last. A block has 32 words of neighbouring channels (512 bytes of a pixel)
// for its warps' lanes; each of its warps sums every eighth pixel, `unroll` loads in flight, and the first warp adds
// the eight sums in their order, so that the result does not depend on how blocks are scheduled.
#include "convert.cuh"
#include "pooling.h"
#include "runtime.cuh"
#include "words.cuh"

namespace resnet_fast {
namespace {

constexpr int lanes = 32, warps = 8, unroll = 4;

template <typename T, typename W>
__global__ void __launch_bounds__(lanes* warps) avg_pool_flatten_kernel(const __grid_constant__ AvgPool m) {
  constexpr int per_word = sizeof(W) / sizeof(T);
  const int64_t words = m.c / per_word, tiles = (words + lanes - 1) / lanes;
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes;
  float* sums = reinterpret_cast<float*>(dynamic_shared());  // [warps, per_word, lanes]

  for (int64_t tile = blockIdx.x; tile < m.n * tiles; tile += gridDim.x) {
    const int64_t image = tile / tiles, word = tile % tiles * lanes + lane;
    const W* x = static_cast<const W*>(m.x) + image * m.pixels * words + word;
    float sum[per_word] = {};
    for (int64_t first = warp; first < m.pixels && word < words; first += warps * unroll) {
      Elements<T, W> loaded[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (first + u * warps < m.pixels) loaded[u].word = __ldg(x + (first + u * warps) * words);
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (first + u * warps < m.pixels)
#pragma unroll
          for (int e = 0; e < per_word; ++e) sum[e] += to_float(loaded[u].values[e]);
    }
#pragma unroll
    for (int e = 0; e < per_word; ++e) store_shared(sums + (warp * per_word + e) * lanes + lane, sum[e]);
    __syncthreads();
    if (warp == 0 && word < words) {
      Elements<T, W> out;
#pragma unroll
      for (int e = 0; e < per_word; ++e) {
        float total = sum[e];
        for (int other = 1; other < warps; ++other)
          total += load_shared<float>(sums + (other * per_word + e) * lanes + lane);
        out.values[e] = from_float<T>(__fdiv_rn(total, float(m.pixels)));
      }
      static_cast<W*>(m.out)[image * words + word] = out.word;
    }
    __syncthreads();  // before the next tile's sums overwrite these
  }
}

template <typename T>
int launch_avg_pool_flatten(const AvgPool& m, void* stream) {
  return with_widest_word<T>(uintptr_t(m.x) | uintptr_t(m.out) | uintptr_t(m.c) * sizeof(T), [&](auto word) {
    using W = decltype(word);
    constexpr int per_word = sizeof(W) / sizeof(T);
    const int64_t tiles = m.n * ((m.c / per_word + lanes - 1) / lanes);
    const unsigned grid = unsigned(tiles > 65536 ? 65536 : tiles);
    return launch<avg_pool_flatten_kernel<T, W>>(grid, lanes * warps, warps * per_word * lanes * sizeof(float),
                                                 static_cast<cudaStream_t>(stream), m);
  });
}

}  // namespace

int launch_avg_pool_flatten(const AvgPool& pool, void* stream) {
  if (pool.n * pool.c == 0) return int(cudaSuccess);
  return with_type(pool.type, [&](auto value) { return launch_avg_pool_flatten<decltype(value)>(pool, stream); });
}

}  // namespace resnet_fast
