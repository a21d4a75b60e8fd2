// What the functions in plain C take that build.py calls. Maps are dense: x [N, H, W, C], weight [K, R, S, C],
// residual (or null) and out [N, P, Q, K], bias [K]; all of one 16-bit type, C and K multiples of 8, pointers on 16
// bytes.
#pragma once

#include <cuda_runtime_api.h>

#define CUTLASS_CONV_EXPORT extern "C" __attribute__((visibility("default")))

struct ConvSizes {
  int n, h, w, c, k, r, s, p, q, stride, padding;
};

struct ConvPointers {
  const void *x, *weight, *bias, *residual;
  void* out;
};

enum ConvResult { conv_ok = 0, conv_refused = 1, conv_not_prepared = 2, conv_not_launched = 3 };
