// out = relu(a + b), element by element: the simplest kernel of the project and its template for the others.
//
// Bound by memory: two reads and one write per element, so all that matters is wide accesses and enough of them in
// flight. A thread moves `unroll` vectors of 16 bytes per operand and step, a step of the grid covers
// gridDim * blockDim * unroll vectors, and a grid-stride loop with 64-bit indices takes any size. Buffers whose start
// is not 16-byte aligned (a view that begins inside a tensor) run the same kernel with narrower vectors.
#include <cstdint>

#include "add_relu.h"
#include "convert.cuh"
#include "runtime.cuh"
#include "words.cuh"

namespace resnet_fast {
namespace {

constexpr int block_size = 256;
constexpr int unroll = 2;

template <typename T, typename W>
__device__ W add_relu_word(W a, W b) {
  const Elements<T, W> x{a}, y{b};
  Elements<T, W> out;
#pragma unroll
  for (int i = 0; i < int(sizeof(W) / sizeof(T)); ++i)
    out.values[i] = from_float<T>(relu(to_float(x.values[i]) + to_float(y.values[i])));
  return out.word;
}

template <typename T, typename W>
__global__ void __launch_bounds__(block_size)
    add_relu_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int64_t n) {
  constexpr int64_t per_word = sizeof(W) / sizeof(T);
  const int64_t words = n / per_word;
  const W* wa = reinterpret_cast<const W*>(a);
  const W* wb = reinterpret_cast<const W*>(b);
  W* wo = reinterpret_cast<W*>(out);

  const int64_t step = int64_t(gridDim.x) * block_size * unroll;
  for (int64_t base = int64_t(blockIdx.x) * block_size * unroll + threadIdx.x; base < words; base += step) {
    W x[unroll], y[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (base + u * block_size < words) {
        x[u] = wa[base + u * block_size];
        y[u] = wb[base + u * block_size];
      }
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (base + u * block_size < words) wo[base + u * block_size] = add_relu_word<T, W>(x[u], y[u]);
  }

  // The last n mod per_word elements: fewer than 8, one thread each.
  const int64_t tail = words * per_word + threadIdx.x;
  if (blockIdx.x == 0 && tail < n) out[tail] = from_float<T>(relu(to_float(a[tail]) + to_float(b[tail])));
}

template <typename T>
int launch_add_relu(const void* a, const void* b, void* out, int64_t n, void* stream) {
  const uintptr_t bits = uintptr_t(a) | uintptr_t(b) | uintptr_t(out);
  return with_widest_word<T>(bits, [&](auto word) {
    using W = decltype(word);
    const int64_t words = n / int64_t(sizeof(W) / sizeof(T));
    const int64_t blocks = (words + block_size * unroll - 1) / (block_size * unroll);
    // 2^16 blocks of 512 vectors cover 512 MiB a step; more blocks would only add launch work.
    const unsigned grid = unsigned(blocks < 1 ? 1 : blocks > 65536 ? 65536 : blocks);
    return launch<add_relu_kernel<T, W>>(grid, block_size, 0, static_cast<cudaStream_t>(stream),
                                         static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), n);
  });
}

}  // namespace

int launch_add_relu(Type type, const void* a, const void* b, void* out, int64_t n, void* stream) {
  if (n == 0) return int(cudaSuccess);
  return with_type(type, [&](auto value) { return launch_add_relu<decltype(value)>(a, b, out, n, stream); });
}

}  // namespace resnet_fast
