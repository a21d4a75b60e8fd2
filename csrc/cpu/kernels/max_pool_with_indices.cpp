// Max-pooling that says where each largest value was, and its gradient; maps in channels_last. Compiled once per level
// (levels.h).
#include "../levels.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

static inline void store_indices(uint8_t* p, bits32 indices, int64_t n) {
  typedef uint8_t bits8 __attribute__((vector_size(width)));
  const bits8 b = __builtin_convertvector(indices, bits8);
  if (n >= width) {
    __builtin_memcpy(p, &b, width);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = b[i];
  }
}

static inline bits32 load_indices(const uint8_t* p, int64_t n) {
  typedef uint8_t bits8 __attribute__((vector_size(width)));
  bits8 b{};
  if (n >= width) {
    __builtin_memcpy(&b, p, width);
  } else {
    for (int64_t i = 0; i < n; ++i) b[i] = p[i];
  }
  return __builtin_convertvector(b, bits32);
}

template <typename T>
static inline vec load_some(const T* p, int64_t n) {
  return n < width ? load_part(p, n) : load(p);
}

template <typename T>
static void pool_row(const PoolRow& row, const int64_t* row_taps, uint8_t* indices) {
  T* out = static_cast<T*>(row.output);
  for (int64_t pixel = 0; pixel < row.pixels; ++pixel, out += row.channels, indices += row.channels) {
    const int64_t left = pixel * row.stride - row.padding;
    int64_t first = 0, last = row.kernel;
    while (first < last && left + first * row.dilation < 0) ++first;
    while (last > first && left + (last - 1) * row.dilation >= row.width) --last;
    for (int64_t c = 0; c < row.channels; c += width) {
      const int64_t n = row.channels - c;
      vec largest = broadcast(-__builtin_inff());
      bits32 index = bits32{} + uint32_t(row_taps[0] * row.kernel + first);
      for (int64_t r = 0; r < row.num_rows; ++r) {
        const T* x = static_cast<const T*>(row.rows[r]) + left * row.channels + c;
        for (int64_t tap = first; tap < last; ++tap) {
          const vec v = load_some(x + tap * row.dilation * row.channels, n);
          const auto takes = (v > largest) | (v != v);  // of equal values the first, of NaNs the last, as in torch
          largest = takes ? v : largest;
          index = takes ? bits32{} + uint32_t(row_taps[r] * row.kernel + tap) : index;
        }
      }
      n < width ? store_part(out + c, largest, n) : store(out + c, largest);
      store_indices(indices + c, index, n);
    }
  }
}

void max_pool_row_with_indices(const PoolRow& row, const int64_t* row_taps, uint8_t* indices) {
  if (row.output_type == Storage::f32) return pool_row<float>(row, row_taps, indices);
  if (row.output_type == Storage::bf16) return pool_row<bf16>(row, row_taps, indices);
  pool_row<f16>(row, row_taps, indices);
}

// The gradient of a pixel: that of the outputs whose largest value it was, from left to right, as torch adds them.
template <typename T>
static void grad_row(const PoolGradRow& row) {
  T* out = static_cast<T*>(row.output);
  for (int64_t pixel = 0; pixel < row.width; ++pixel, out += row.channels) {
    int64_t outputs[256], taps[256], count = 0;  // that saw it, and by which place along the kernel
    for (int64_t tap = row.kernel - 1; tap >= 0; --tap) {
      const int64_t from = pixel + row.padding - tap * row.dilation, at = from / row.stride;
      if (from < 0 || at * row.stride != from || at >= row.pixels) continue;
      outputs[count] = at * row.channels;
      taps[count++] = tap;
    }
    for (int64_t c = 0; c < row.channels; c += width) {
      const int64_t n = row.channels - c;
      vec sum{};
      for (int64_t r = 0; r < row.num_rows; ++r) {
        const T* grad = static_cast<const T*>(row.grads[r]) + c;
        for (int64_t i = 0; i < count; ++i) {
          const bits32 index = load_indices(row.indices[r] + outputs[i] + c, n);
          const vec g = load_some(grad + outputs[i], n);
          sum += index == uint32_t(row.row_taps[r] * row.kernel + taps[i]) ? g : vec{};
        }
      }
      n < width ? store_part(out + c, sum, n) : store(out + c, sum);
    }
  }
}

void max_pool_grad_row(const PoolGradRow& row) {
  if (row.type == Storage::f32) return grad_row<float>(row);
  if (row.type == Storage::bf16) return grad_row<bf16>(row);
  grad_row<f16>(row);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
