// out = relu(a + b), element by element: the simplest kernel of the project and its template for the others.
//
// Bound by memory: two reads and one write per element, so all that matters is wide accesses and enough of them in
// flight. A thread moves `unroll` vectors of 16 bytes per operand and step, a step of the grid covers
// gridDim * blockDim * unroll vectors, and a grid-stride loop with 64-bit indices takes any size. Buffers whose start
// is not 16-byte aligned (a view that begins inside a tensor) run the same kernel with narrower vectors.
#include <cstdint>

#include "add_relu.h"
#include "convert.cuh"

namespace resnet_fast {
namespace {

constexpr int block_size = 256;
constexpr int unroll = 2;

// fmaxf(x, 0) would turn NaN into 0; the comparison below is false for NaN and keeps it, as torch.relu does.
__device__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

// An integer of the vector's width. A struct of 16-bit floats compiles to several 32-bit loads; uint4 gives LDG.E.128.
template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};

template <typename T, typename W>
__device__ W add_relu_word(W a, W b) {
  constexpr int n = sizeof(W) / sizeof(T);
  const T* pa = reinterpret_cast<const T*>(&a);
  const T* pb = reinterpret_cast<const T*>(&b);
  W out;
  T* po = reinterpret_cast<T*>(&out);
#pragma unroll
  for (int i = 0; i < n; ++i) po[i] = from_float<T>(relu(to_float(pa[i]) + to_float(pb[i])));
  return out;
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

template <typename T, int bytes>
int launch(const T* a, const T* b, T* out, int64_t n, cudaStream_t stream) {
  using W = typename Word<bytes>::type;
  const int64_t words = n / int64_t(sizeof(W) / sizeof(T));
  const int64_t blocks = (words + block_size * unroll - 1) / (block_size * unroll);
  // 2^16 blocks of 512 vectors cover 512 MiB a step; more blocks would only add launch work.
  const unsigned grid = unsigned(blocks < 1 ? 1 : blocks > 65536 ? 65536 : blocks);
  add_relu_kernel<T, W><<<grid, block_size, 0, stream>>>(a, b, out, n);
  return int(cudaGetLastError());
}

// The widest vector that all three addresses are aligned to.
template <typename T>
int launch_aligned(const void* a, const void* b, void* out, int64_t n, cudaStream_t stream) {
  const T* pa = static_cast<const T*>(a);
  const T* pb = static_cast<const T*>(b);
  T* po = static_cast<T*>(out);
  const uintptr_t bits = uintptr_t(a) | uintptr_t(b) | uintptr_t(out);
  if (bits % 16 == 0) return launch<T, 16>(pa, pb, po, n, stream);
  if (bits % 8 == 0) return launch<T, 8>(pa, pb, po, n, stream);
  if constexpr (sizeof(T) == 2) {
    if (bits % 4 != 0) return launch<T, 2>(pa, pb, po, n, stream);
  }
  return launch<T, 4>(pa, pb, po, n, stream);
}

}  // namespace

int launch_add_relu(Type type, const void* a, const void* b, void* out, int64_t n, void* stream) {
  if (n == 0) return int(cudaSuccess);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (type) {
    case Type::float32:
      return launch_aligned<float>(a, b, out, n, s);
    case Type::bfloat16:
      return launch_aligned<__nv_bfloat16>(a, b, out, n, s);
    case Type::float16:
      return launch_aligned<__half>(a, b, out, n, s);
    default:
      return int(cudaErrorInvalidValue);
  }
}

}  // namespace resnet_fast
