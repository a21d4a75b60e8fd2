// What a step of the depth multiplies in each lane: floats or, with AVX-512 BF16, pairs of bf16 values, whose products
// are summed in float32.
#pragma once

#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Values of one lane in a step.
template <typename In>
constexpr int64_t per_step = sizeof(float) / sizeof(In);

// The value, or pair, at `row` in all lanes; a vector of them at `panel`.
static inline vec row_step(const float* row) { return broadcast(*row); }
static inline vec panel_step(const float* panel) { return load(panel); }
static inline vec multiply_add(const float*, vec row, vec panel, vec sum) { return sum + row * panel; }

#if defined(__AVX512BF16__)
static inline vec row_step(const bf16* row) {
  uint32_t pair;
  __builtin_memcpy(&pair, row, sizeof(pair));
  return (vec)(bits32{} + pair);
}
static inline vec panel_step(const bf16* panel) {
  vec pairs;
  __builtin_memcpy(&pairs, panel, sizeof(pairs));
  return pairs;
}
static inline vec multiply_add(const bf16*, vec row, vec panel, vec sum) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)panel);
}
#endif

}  // namespace resnet_fast::RESNET_FAST_LEVEL
