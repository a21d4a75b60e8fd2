// Mean and variance of every channel of a map in channels_last, in one read. A thread goes through its pixels in runs
// of `unroll`, which it has in registers: their mean, then the squared distances to it, combined with those of the runs
// before (Chan, Golub and LeVeque, 1979), and in the same way with those of the block's other rows. All are of the
// distance to the chunk's first pixel, since float32 would lose digits in a mean that is much larger than the
// deviation.
#include "batch_norm.cuh"

namespace resnet_fast {
namespace {

constexpr int unroll = 4;

// Adds b values to a ones: mean and sum of squared distances to it.
__device__ void add_moments(float& mean, float& squares, float a, float other_mean, float other_squares, float share) {
  const float delta = other_mean - mean;  // share: b / (a + b)
  mean += delta * share;
  squares += other_squares + delta * delta * (a * share);
}

// The chunk's pixels r, r + step, ...
__device__ float count_of(int pixels, int r, int step) {
  return r < pixels ? float((pixels - r - 1) / step + 1) : 0.0f;
}

template <typename T, typename W>
__global__ void __launch_bounds__(block_size) batch_norm_moments_kernel(const __grid_constant__ BatchNormStatistics m) {
  const Part<T, W, unroll> part(m.map);
  constexpr int per_word = part.per_word;
  Elements<T, W> first;
  first.word = part.has(0) ? __ldg(static_cast<const W*>(m.x) + part.at(0)) : W{};
  float moments[2 * per_word] = {};  // means, sums of squares
  float seen = 0;
  part.each([&](int pixel) {
    Elements<T, W> x[unroll];
    part.load(x, m.x, pixel);
    const int there = min(unroll, (part.pixels - pixel + part.rows - 1) / part.rows);  // of these pixels
    if (there <= 0) return;
    const float inverse = 1.0f / float(there), share = float(there) / (seen + float(there));
#pragma unroll
    for (int e = 0; e < per_word; ++e) {
      float distance[unroll], mean = 0, rest = 0, squares = 0;
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        distance[u] = to_float(x[u].values[e]) - to_float(first.values[e]);
        if (u < there) mean += distance[u];
      }
      mean *= inverse;
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const float from_mean = u < there ? distance[u] - mean : 0.0f;
        rest += from_mean;  // what rounding has left of the mean
        squares += from_mean * from_mean;
      }
      add_moments(moments[e], moments[per_word + e], seen, mean + rest * inverse, squares, share);
    }
    seen += float(there);
  });

  combine_rows(moments, part, of_kind(0), [&](auto& mine, auto& others, int half) {
    const float a = count_of(part.pixels, part.row, 2 * half), b = count_of(part.pixels, part.row + half, 2 * half);
    if (b == 0) return;
    const float share = b / (a + b);
#pragma unroll
    for (int e = 0; e < per_word; ++e)
      add_moments(mine[e], mine[per_word + e], a, others[e], others[per_word + e], share);
  });
  if (part.row != 0 || !part.has(0)) return;
  float* to = m.partial + part.chunk * 3 * m.map.channels + part.channel(0);
#pragma unroll
  for (int e = 0; e < per_word; ++e) {
    to[e] = to_float(first.values[e]);
    to[e + m.map.channels] = moments[e];
    to[e + 2 * m.map.channels] = moments[per_word + e];
  }
}

// The chunks' means and squares in one: sums of n m and of squares + n m^2, m relative to the map's first pixel.
__global__ void __launch_bounds__(sum_block) batch_norm_mean_var_kernel(const BatchNormStatistics m) {
  const NormMap& map = m.map;
  const int64_t c = int64_t(blockIdx.x) * sum_channels + threadIdx.x % sum_channels;
  const int64_t chunks = (map.pixels + map.chunk - 1) / map.chunk;
  const double origin = c < map.channels ? m.partial[c] : 0;
  double sum = 0, squares = 0;
#pragma unroll 8
  for (int64_t i = c < map.channels ? threadIdx.x / sum_channels : chunks; i < chunks; i += sum_rows) {
    const float* at = m.partial + i * 3 * map.channels + c;
    const double n = double(min(map.chunk, map.pixels - i * map.chunk));
    const double mean = at[0] - origin + at[map.channels];
    sum += n * mean, squares += at[2 * map.channels] + n * mean * mean;
  }
  sum = add_rows(sum), squares = add_rows(squares);
  if (threadIdx.x >= sum_channels || c >= map.channels) return;
  const double mean = sum / double(map.pixels), var = (squares - sum * mean) / double(map.pixels);
  m.mean[c] = float(origin + mean);
  m.var[c] = var < 0 ? 0.0f : float(var);  // by rounding; NaN stays
}

}  // namespace

NormMap split_map(Type type, int64_t pixels, int64_t channels) {
  // As for words of 16 bytes, whatever the addresses are.
  const int64_t words = (channels * (type == Type::float32 ? 4 : 2) + 15) / 16;
  int64_t lanes = 1;
  while (lanes < words && lanes < most_lanes) lanes *= 2;
  // 12 blocks for each of an H100's 132 multiprocessors, which take 3, 4 or 6 at a time: they all end with the last
  // ones. But a thread shall have `unroll` pixels.
  constexpr int64_t blocks = 12 * 132;
  const int64_t tiles = (words + lanes - 1) / lanes, chunks = tiles < blocks ? blocks / tiles : 1;
  const int64_t step = block_size / lanes * unroll;
  return {type, pixels, channels, ((pixels + chunks - 1) / chunks + step - 1) / step * step, 0};
}

int launch_batch_norm_statistics(const BatchNormStatistics& statistics, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const int error = with_type_and_word(
      statistics.map, uintptr_t(statistics.x), [&](const NormMap& map, unsigned blocks, auto value, auto word) {
        using T = decltype(value);
        using W = decltype(word);
        BatchNormStatistics m = statistics;
        m.map = map;
        const size_t shared = 2 * sizeof(W) / sizeof(T) * block_size / 2 * sizeof(float);
        return launch<batch_norm_moments_kernel<T, W>>(blocks, block_size, shared, s, m);
      });
  return error != 0 ? error : launch_sum<batch_norm_mean_var_kernel>(statistics.map.channels, statistics, s);
}

}  // namespace resnet_fast
