#pragma once

#include <cstdint>

#include "type.h"

namespace resnet_fast {

// How a kernel moves over a map [N, H, W, C], and the size [N, P, Q, C] of what it finds there.
struct Windows {
  Type type;  // float32, bfloat16 or float16
  int64_t n, h, w, c, p, q;
  int kernel[2], stride[2], padding[2], dilation[2];
};

// The largest value under a moving kernel, as torch's max_pool2d: the first of equal ones, NaN before all others,
// -inf where a kernel meets nothing but padding.
struct MaxPool : Windows {
  const void* x;     // [N, H, W, C]
  void* out;         // [N, P, Q, C]
  uint8_t* indices;  // [N, P, Q, C], row * kernel's width + column, for those who ask; of NaNs the last one's
};

// The gradients of the values that were the largest.
struct MaxPoolBackward : Windows {
  const void* grad;        // [N, P, Q, C]
  const uint8_t* indices;  // [N, P, Q, C]
  void* out;               // [N, H, W, C]
};

// out[n, c] = mean over the pixels of x[n, pixel, c], summed in float32.
struct AvgPool {
  const void* x;  // [N, pixels, C]
  void* out;      // [N, C]
  Type type;      // float32, bfloat16 or float16
  int64_t n, pixels, c;
};

// On `stream` (a cudaStream_t); any alignment that the type itself has. Return a cudaError_t.
int launch_max_pool(const MaxPool& pool, void* stream);
int launch_max_pool_with_indices(const MaxPool& pool, void* stream);
int launch_max_pool_backward(const MaxPoolBackward& pool, void* stream);
int launch_avg_pool_flatten(const AvgPool& pool, void* stream);

}  // namespace resnet_fast
