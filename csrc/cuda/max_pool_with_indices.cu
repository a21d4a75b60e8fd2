// Max-pooling that remembers in 8 bits where each largest value was, and its gradient. There a thread gathers for one
// word of one input pixel from the outputs whose kernels saw it, so that nothing is added in an order that is not
// known.
#include "max_pool.cuh"

namespace resnet_fast {
namespace {

// The outputs (rows or columns of them) whose kernels may cover a place of the map.
struct Outputs {
  int first, last, reach, stride, dilation;  // reach: from the first output's start to the place

  __device__ Outputs(int at, int dim, const Windows& m, int64_t outputs)
      : reach(at + m.padding[dim]), stride(m.stride[dim]), dilation(m.dilation[dim]) {
    const int before = reach - (m.kernel[dim] - 1) * dilation;
    first = before > 0 ? (before + stride - 1) / stride : 0;
    last = min(reach / stride, int(outputs) - 1);
  }
  // Which of its kernel's rows (or columns) covers the place: negative if none does.
  __device__ int tap(int output) const {
    const int distance = reach - output * stride;
    return dilation == 1 ? distance : distance % dilation == 0 ? distance / dilation : -1;
  }
};

template <typename T, typename W, typename Index>
__global__ void __launch_bounds__(pool_block) max_pool_backward_kernel(const __grid_constant__ MaxPoolBackward m) {
  constexpr int per_word = sizeof(W) / sizeof(T), unroll = 2;  // 3x3 kernels of stride 2 meet in 2 columns at most
  using Places = typename WordOf<per_word>::type;
  const Index words = Index(m.c / per_word), total = Index(m.n * m.h * m.w) * words;
  for (Index i = Index(blockIdx.x) * pool_block + threadIdx.x; i < total; i += Index(gridDim.x) * pool_block) {
    const Index word = i % words, pixel = i / words, row = pixel / Index(m.w);
    const Outputs rows(int(row % Index(m.h)), 0, m, m.p), columns(int(pixel % Index(m.w)), 1, m, m.q);
    const int64_t image = row / Index(m.h);
    float sum[per_word] = {};
    for (int p = rows.first; p <= rows.last; ++p) {
      const int r = rows.tap(p);
      if (r < 0) continue;
      const int64_t of_row = (image * m.p + p) * m.q * int64_t(words) + word;
      for (int q = columns.first; q <= columns.last; q += unroll) {
        Elements<T, W> grad[unroll];
        Elements<uint8_t, Places> places[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u)
          if (q + u <= columns.last) {
            const int64_t at = of_row + (q + u) * int64_t(words);
            grad[u].word = __ldg(static_cast<const W*>(m.grad) + at);
            places[u].word = __ldg(reinterpret_cast<const Places*>(m.indices) + at);
          }
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
          const int s = q + u <= columns.last ? columns.tap(q + u) : -1;
          if (s < 0) continue;
#pragma unroll
          for (int e = 0; e < per_word; ++e)
            if (places[u].values[e] == r * m.kernel[1] + s) sum[e] += to_float(grad[u].values[e]);
        }
      }
    }
    Elements<T, W> out;
#pragma unroll
    for (int e = 0; e < per_word; ++e) out.values[e] = from_float<T>(sum[e]);
    static_cast<W*>(m.out)[i] = out.word;
  }
}

}  // namespace

int launch_max_pool_with_indices(const MaxPool& m, void* stream) {
  if (m.n * m.p * m.q * m.c == 0) return int(cudaSuccess);
  return with_type(m.type, [&](auto value) {
    using T = decltype(value);
    const uintptr_t bits = uintptr_t(m.x) | uintptr_t(m.out) | (uintptr_t(m.indices) | uintptr_t(m.c)) * sizeof(T);
    return with_widest_word_or_one<T>(bits, [&](auto word) {
      return launch_max_pool<T, decltype(word), true>(m, static_cast<cudaStream_t>(stream));
    });
  });
}

int launch_max_pool_backward(const MaxPoolBackward& m, void* stream) {
  if (m.n * m.h * m.w * m.c == 0) return int(cudaSuccess);
  return with_type(m.type, [&](auto value) {
    using T = decltype(value);
    const uintptr_t bits = uintptr_t(m.grad) | uintptr_t(m.out) | (uintptr_t(m.indices) | uintptr_t(m.c)) * sizeof(T);
    return with_widest_word_or_one<T>(bits, [&](auto word) {
      using W = decltype(word);
      return launch_words<max_pool_backward_kernel<T, W, uint32_t>, max_pool_backward_kernel<T, W, uint64_t>>(
          m.n * m.h * m.w, m.c / int64_t(sizeof(W) / sizeof(T)), m, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace resnet_fast
