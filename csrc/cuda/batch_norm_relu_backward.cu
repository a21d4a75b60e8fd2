// Gradients of relu(batch_norm(x) + residual) for maps in channels_last, the residual normalised too (the shortcut) or
// not. One read of gradient and map for the sums over pixels, one more to apply them:
//   of x: scale * (d - (sum of d + (x - mean) / var * sum of d * (x - mean)) / pixels), d the gradient behind the ReLU.
#include "batch_norm.cuh"

namespace resnet_fast {
namespace {

constexpr int unroll = 2;  // of two maps or three
// Kinds of numbers in shared memory, behind an Affine's three: for the sums the shortcut's mean, later two Slopes'
// four.
constexpr int mean_kind = 3, sums_kinds = 4, slope_kind = 3, shortcut_kind = 7, kinds = 11;

// Zeroes the gradients that the ReLU has stopped.
template <typename T, typename W>
__device__ void stop_gradients(const BatchNormReluBackward& m, const Part<T, W, unroll>& part, int pixel,
                               const Elements<T, W> (&x)[unroll], Elements<T, W> (&grad)[unroll]) {
  const T zero = from_float<T>(0.0f);
  if (m.mask) {
    uint32_t bits[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int at = pixel + u * part.rows;
      bits[u] = part.has(at) ? uint32_t(__ldg(m.mask + part.mask_at(at))) >> (part.channel(0) % 8) : 0;
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u)
#pragma unroll
      for (int e = 0; e < part.per_word; ++e)
        if (!(bits[u] >> e & 1)) grad[u].values[e] = zero;
  } else if (m.relu) {
#pragma unroll
    for (int e = 0; e < part.per_word; ++e) {
      const Affine norm = get_affine(0, part.place(e));
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (!passes(from_float<T>(norm(to_float(x[u].values[e]))))) grad[u].values[e] = zero;
    }
  }
}

template <typename T, typename W, bool has_shortcut>
__global__ void __launch_bounds__(block_size)
    batch_norm_relu_sums_kernel(const __grid_constant__ BatchNormReluBackward m) {
  const Part<T, W, unroll> part(m.map);
  constexpr int per_word = part.per_word, count = has_shortcut ? 3 : 2;
  part.each_channel([&](int place, int c) {
    put_affine(0, place, affine_of(m.norm, c));
    if (has_shortcut) put(mean_kind, place, filter_value(m.shortcut_norm.mean, c, 0.0f));
  });
  __syncthreads();

  float sums[count * per_word] = {};
  part.each([&](int pixel) {
    Elements<T, W> grad[unroll], x[unroll], shortcut[unroll];
    part.load(grad, m.grad, pixel);
    part.load(x, m.x, pixel);
    if (has_shortcut) part.load(shortcut, m.shortcut, pixel);
    stop_gradients(m, part, pixel, x, grad);
#pragma unroll
    for (int e = 0; e < per_word; ++e) {
      const float mean = get(0, part.place(e)), other = has_shortcut ? get(mean_kind, part.place(e)) : 0.0f;
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const float d = to_float(grad[u].values[e]);
        sums[e] += d;
        sums[per_word + e] += d * (to_float(x[u].values[e]) - mean);
        if constexpr (has_shortcut) sums[2 * per_word + e] += d * (to_float(shortcut[u].values[e]) - other);
      }
    }
  });

  combine_rows(sums, part, of_kind(sums_kinds), [](auto& mine, auto& others, int) {
#pragma unroll
    for (int i = 0; i < count * per_word; ++i) mine[i] += others[i];
  });
  if (part.row != 0 || !part.has(0)) return;
#pragma unroll
  for (int i = 0; i < count * per_word; ++i)
    m.partial[(part.chunk * count + i / per_word) * m.map.channels + part.channel(i % per_word)] = sums[i];
}

__global__ void __launch_bounds__(sum_block) batch_norm_relu_add_sums_kernel(const BatchNormReluBackward m) {
  const NormMap& map = m.map;
  const int c = int(blockIdx.x) * sum_channels + threadIdx.x % sum_channels;
  const int64_t chunks = (map.pixels + map.chunk - 1) / map.chunk;
  const int count = m.shortcut ? 3 : 2;
  double sums[3] = {};
#pragma unroll 8
  for (int64_t i = c < map.channels ? threadIdx.x / sum_channels : chunks; i < chunks; i += sum_rows)
#pragma unroll
    for (int k = 0; k < 3; ++k)
      if (k < count) sums[k] += m.partial[(i * count + k) * map.channels + c];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const double sum = add_rows(sums[k]);
    if (k >= count || threadIdx.x >= sum_channels || c >= map.channels) continue;
    const BatchNorm& norm = k == 2 ? m.shortcut_norm : m.norm;
    m.sums[k][c] = float(k == 0 ? sum : sum / deviation(norm, filter_value(norm.var, c, 1.0f)));
  }
}

// What the gradient of a normalised map is made of, scale * d + (x - mean) * slope + offset; four kinds.
struct Slope {
  float mean, scale, slope, offset;
  __device__ float operator()(float d, float x) const { return fmaf(scale, d, fmaf(x - mean, slope, offset)); }
};

__device__ Slope slope_of(const BatchNormReluBackward& m, const BatchNorm& norm, const float* of_weight, int c) {
  const float sum = m.sums[0][c], product = of_weight[c], var = filter_value(norm.var, c, 1.0f);
  const Affine affine = affine_of(norm, c);
  const float share = -affine.scale / float(m.map.pixels);
  return {affine.mean, affine.scale, share * __fdiv_rn(product, deviation(norm, var)), share * sum};
}

__device__ void put_slope(int kind, int place, const Slope& s) {
  put(kind, place, s.mean), put(kind + 1, place, s.scale), put(kind + 2, place, s.slope),
      put(kind + 3, place, s.offset);
}
__device__ Slope get_slope(int kind, int place) {
  return {get(kind, place), get(kind + 1, place), get(kind + 2, place), get(kind + 3, place)};
}

template <typename T, typename W, bool has_shortcut>
__global__ void __launch_bounds__(block_size)
    batch_norm_relu_backward_kernel(const __grid_constant__ BatchNormReluBackward m) {
  const Part<T, W, unroll> part(m.map, true);
  part.each_channel([&](int place, int c) {
    put_affine(0, place, affine_of(m.norm, c));
    put_slope(slope_kind, place, slope_of(m, m.norm, m.sums[1], c));
    if constexpr (has_shortcut) put_slope(shortcut_kind, place, slope_of(m, m.shortcut_norm, m.sums[2], c));
  });
  __syncthreads();

  part.each([&](int pixel) {
    Elements<T, W> grad[unroll], x[unroll], shortcut[unroll];
    part.load(grad, m.grad, pixel);
    part.load(x, m.x, pixel);
    if (has_shortcut) part.load(shortcut, m.shortcut, pixel);
    stop_gradients(m, part, pixel, x, grad);
#pragma unroll
    for (int e = 0; e < part.per_word; ++e) {
      const Slope norm = get_slope(slope_kind, part.place(e));
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        x[u].values[e] = from_float<T>(norm(to_float(grad[u].values[e]), to_float(x[u].values[e])));
      if constexpr (has_shortcut) {
        const Slope other = get_slope(shortcut_kind, part.place(e));
#pragma unroll
        for (int u = 0; u < unroll; ++u)
          shortcut[u].values[e] = from_float<T>(other(to_float(grad[u].values[e]), to_float(shortcut[u].values[e])));
      }
    }
    part.store(m.of_x, x, pixel);
    if (has_shortcut)
      part.store(m.of_residual, shortcut, pixel);
    else if (m.of_residual)
      part.store(m.of_residual, grad, pixel);
  });
}

template <typename T, typename W, bool has_shortcut>
int launch_backward(const BatchNormReluBackward& m, unsigned blocks, cudaStream_t stream) {
  constexpr int count = (has_shortcut ? 3 : 2) * int(sizeof(W) / sizeof(T));
  constexpr size_t of_sums = (sums_kinds * block_size + count * block_size / 2) * sizeof(float);
  int error = launch<batch_norm_relu_sums_kernel<T, W, has_shortcut>>(blocks, block_size, of_sums, stream, m);
  if (error == 0) error = launch_sum<batch_norm_relu_add_sums_kernel>(m.map.channels, m, stream);
  if (error != 0) return error;
  return launch<batch_norm_relu_backward_kernel<T, W, has_shortcut>>(blocks, block_size,
                                                                     kinds * block_size * sizeof(float), stream, m);
}

}  // namespace

int launch_batch_norm_relu_backward(const BatchNormReluBackward& backward, void* stream) {
  const uintptr_t bits = uintptr_t(backward.grad) | uintptr_t(backward.x) | uintptr_t(backward.shortcut) |
                         uintptr_t(backward.of_x) | uintptr_t(backward.of_residual);
  return with_type_and_word(backward.map, bits, [&](const NormMap& map, unsigned blocks, auto value, auto word) {
    using T = decltype(value);
    using W = decltype(word);
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    BatchNormReluBackward m = backward;
    m.map = map;
    return m.shortcut ? launch_backward<T, W, true>(m, blocks, s) : launch_backward<T, W, false>(m, blocks, s);
  });
}

}  // namespace resnet_fast
