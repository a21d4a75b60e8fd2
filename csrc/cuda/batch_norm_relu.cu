// relu(batch_norm(x) + residual) of maps in channels_last, the residual normalised too or not: one read of each and one
// write, with which goes the mask of the ReLU, a bit a value. A block computes the scales of its channels itself.
#include "batch_norm.cuh"

namespace resnet_fast {
namespace {

// With 4 words in flight the 64 registers would spill that let 4 blocks on a multiprocessor.
constexpr int unroll = 2, least_blocks = 4;

// The bits of the lanes that share a byte of the mask, in the first of them.
template <int per_word>
__device__ uint32_t gather_bits(uint32_t bits) {
#pragma unroll
  for (int lanes = 1; lanes < 8 / per_word; lanes *= 2)
    bits |= __shfl_down_sync(0xffffffffu, bits, lanes) << (lanes * per_word);
  return bits;
}

template <typename T, typename W>
__device__ void store_mask(uint8_t* mask, const uint32_t (&bits)[unroll], const Part<T, W, unroll>& part, int pixel) {
  const int64_t left = part.channels - part.channel(0);
  const uint32_t there = left < 8 ? (1u << (left & 7)) - 1 : 0xffu;  // not of the next row's lanes
#pragma unroll
  for (int u = 0; u < unroll; ++u) {
    const uint32_t byte = gather_bits<part.per_word>(bits[u]) & there;
    if (part.channel(0) % 8 == 0 && part.has(pixel + u * part.rows))
      mask[part.mask_at(pixel + u * part.rows)] = uint8_t(byte);
  }
}

template <typename T, typename W, bool has_residual>
__global__ void __launch_bounds__(block_size, least_blocks)
    batch_norm_relu_kernel(const __grid_constant__ BatchNormRelu m) {
  const Part<T, W, unroll> part(m.map, true);
  part.each_channel([&](int place, int c) {
    put_affine(0, place, affine_of(m.norm, c));
    if constexpr (has_residual) put_affine(3, place, affine_of(m.residual_norm, c));
  });
  __syncthreads();

  part.each([&](int pixel) {
    Elements<T, W> x[unroll], residual[has_residual ? unroll : 1];
    part.load(x, m.x, pixel);
    if constexpr (has_residual) part.load(residual, m.residual, pixel);
    uint32_t bits[unroll] = {};
#pragma unroll
    for (int e = 0; e < part.per_word; ++e) {
      const Affine norm = get_affine(0, part.place(e));
      const Affine residual_norm = has_residual ? get_affine(3, part.place(e)) : Affine{};
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        float y = norm(to_float(x[u].values[e]));
        if constexpr (has_residual) y += residual_norm(to_float(residual[u].values[e]));
        const T stored = from_float<T>(y);
        bits[u] |= uint32_t(passes(stored)) << e;
        x[u].values[e] = m.relu ? from_float<T>(relu(to_float(stored))) : stored;
      }
    }
    part.store(m.out, x, pixel);
    if (m.mask) store_mask(m.mask, bits, part, pixel);
  });
}

}  // namespace

int launch_batch_norm_relu(const BatchNormRelu& norm, void* stream) {
  const uintptr_t bits = uintptr_t(norm.x) | uintptr_t(norm.residual) | uintptr_t(norm.out);
  return with_type_and_word(norm.map, bits, [&](const NormMap& map, unsigned blocks, auto value, auto word) {
    BatchNormRelu m = norm;
    m.map = map;
    using T = decltype(value);
    using W = decltype(word);
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const size_t affine = 3 * block_size * sizeof(float);
    return norm.residual ? launch<batch_norm_relu_kernel<T, W, true>>(blocks, block_size, 2 * affine, s, m)
                         : launch<batch_norm_relu_kernel<T, W, false>>(blocks, block_size, affine, s, m);
  });
}

}  // namespace resnet_fast
