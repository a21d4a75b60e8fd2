// out = relu(a + b), element by element. Compiled once per instruction-set level (levels.h); plain loops that the
// compiler vectorises, since the operator is bound by memory bandwidth: per element it reads two values and writes one.
#include "../levels.h"
#include "convert.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// `x < 0 ? 0 : x` and not `x > 0 ? x : 0`: the comparison is false for NaN, so NaN stays NaN as in torch.relu.
static inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

void add_relu_f32(const float* __restrict a, const float* __restrict b, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = relu(a[i] + b[i]);
}

// 16-bit types: add in float32, round once. Rounding before the ReLU (as torch does) or after it gives the same bits.
void add_relu_bf16(const uint16_t* __restrict a, const uint16_t* __restrict b, uint16_t* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(relu(bf16_to_float(a[i]) + bf16_to_float(b[i])));
}

void add_relu_f16(const uint16_t* __restrict a, const uint16_t* __restrict b, uint16_t* __restrict out, int64_t n) {
  float x[f16_chunk], y[f16_chunk];
  int64_t i = 0;
  for (; i + f16_chunk <= n; i += f16_chunk) {
    f16_to_float(a + i, x);
    f16_to_float(b + i, y);
    for (int j = 0; j < f16_chunk; ++j) x[j] = relu(x[j] + y[j]);
    float_to_f16(x, out + i);
  }
  if (i == n) return;
  uint16_t ta[f16_chunk] = {}, tb[f16_chunk] = {};
  for (int64_t j = i; j < n; ++j) ta[j - i] = a[j], tb[j - i] = b[j];
  f16_to_float(ta, x);
  f16_to_float(tb, y);
  for (int j = 0; j < f16_chunk; ++j) x[j] = relu(x[j] + y[j]);
  float_to_f16(x, ta);
  for (int64_t j = i; j < n; ++j) out[j] = ta[j - i];
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
