// Instruction-set levels. Every file in csrc/cpu/kernels/ is compiled once per level, with that level's flags and
// RESNET_FAST_LEVEL set to its name, into a namespace of that name; the table in levels.cpp lists the results and one
// entry is picked at first use. Kernel files include no C++ library header and nothing inline from outside their
// namespace: a shared inline function built for AVX-512 could be linked into the portable path.
#pragma once

#include <cstdint>

namespace resnet_fast {

// One row of output pixels of a convolution with few input channels; see kernels/conv_few_channels.cpp.
struct ConvRow {
  const float* input;      // the input rows that the kernel's rows meet; zeros stand for the padding left and right
  const int64_t* offsets;  // [taps]: where in `input` the tap of output pixel 0 lies
  int64_t taps;            // kernel positions times input channels
  int64_t pixel_step;      // from one output pixel to the next in `input`
  const float* weight;     // [blocks of filters][tap][conv_block], zeros behind the last filter
  int64_t block_stride;    // from one block of filters to the next in `weight`
  const float* bias;       // [filters], zeros up to a multiple of conv_block
  float* output;           // [pixels][filters]
  int64_t pixels, filters;
  bool relu;
};

struct Kernels {
  void (*add_relu_f32)(const float* a, const float* b, float* out, int64_t n);
  void (*add_relu_bf16)(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n);
  void (*add_relu_f16)(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n);
  bool (*all_finite_32)(const uint32_t* x, int64_t n, uint32_t exponent_mask);
  bool (*all_finite_16)(const uint16_t* x, int64_t n, uint16_t exponent_mask);
  void (*conv_row_f32)(const ConvRow& row);
  int64_t conv_block;  // filters that conv_row_f32 computes at a time
  float (*fma_f32)(int64_t n, float factor);
  float (*fma_bf16)(int64_t n, float factor);
  int64_t fma_f32_flops, fma_bf16_flops;  // of one of the n iterations; 0 where the level has no such instruction
};

// What a kernel file of one level exports.
#define RESNET_FAST_DECLARE_LEVEL(level)                                              \
  namespace level {                                                                   \
  void add_relu_f32(const float* a, const float* b, float* out, int64_t n);           \
  void add_relu_bf16(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n); \
  void add_relu_f16(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n);  \
  bool all_finite_32(const uint32_t* x, int64_t n, uint32_t exponent_mask);           \
  bool all_finite_16(const uint16_t* x, int64_t n, uint16_t exponent_mask);           \
  void conv_row_f32(const ConvRow& row);                                              \
  extern const int64_t conv_block;                                                    \
  float fma_f32(int64_t n, float factor);                                             \
  float fma_bf16(int64_t n, float factor);                                            \
  extern const int64_t fma_f32_flops, fma_bf16_flops;                                 \
  }

RESNET_FAST_DECLARE_LEVEL(portable)
RESNET_FAST_DECLARE_LEVEL(avx2)
RESNET_FAST_DECLARE_LEVEL(avx512)

// The kernels of the level in use: the best one this CPU has, or the one that RESNET_FAST_CPU_LEVEL names.
const Kernels& kernels();

}  // namespace resnet_fast
