// Instruction-set levels. Every file in csrc/cpu/kernels/ is compiled once per level, with that level's flags and
// RESNET_FAST_LEVEL set to its name, into a namespace of that name; the table in levels.cpp lists the results and one
// entry is picked at first use. Kernel files include no C++ library header and nothing inline from outside their
// namespace: a shared inline function built for AVX-512 could be linked into the portable path.
#pragma once

#include <cstdint>

#include "../conv_shape.h"

namespace resnet_fast {

// How values lie in memory.
enum class Storage { f32, bf16, f16 };

// A batch normalisation, (x - mean) * scale + shift. All vectors of these structures are [channels] with room for
// another vector behind; no mean: none.
struct NormVectors {
  const float *mean, *scale, *shift;
};

// One row of output pixels of a convolution with few input channels; see kernels/conv_few_channels.cpp.
struct ConvRow {
  const void* const* input;  // [taps]: what the kernel's rows meet at output pixel 0; null: padding
  int64_t taps, depth;       // rows of the kernel, values of one; or positions and channels
  int64_t pixel_step;        // from one output pixel to the next in `input`
  const void* weight;        // packed like conv_gemm's, in weight_type; `input` is of the same type
  const float* bias;         // [filters], zeros behind up to another gemm_panel
  void* output;              // [pixels][filters]
  Storage weight_type, output_type;
  int64_t pixels, filters;
  bool relu;
};

// One row of an image.
struct PixelRow {
  const void* pixels;
  Storage type;
  int64_t pixel_step, channel_step;
  int64_t width, channels;  // at most 4 channels
};

// A first layer by Winograd's algorithm, F(3, 4); see kernels/conv_winograd_stem.cpp.
constexpr int64_t stem_tile = 3, stem_taps = 4, stem_size = stem_tile + stem_taps - 1;

// Up to stem_tile rows of its output pixels.
struct StemRows {
  const float* const* input;  // [stem_size], rows of the phases, each
                              // [stem_tile * tiles + stem_taps - 1][phases * channels in whole vectors]
  const float* weight;        // [filters / gemm_panel][stem_size^2][phases * channels][gemm_panel]
  const float* bias;          // [filters], zeros behind up to another gemm_panel
  void* output;               // [rows][pixels][filters]
  Storage output_type;
  int64_t channels, tiles, rows, pixels, filters;
  bool relu;
};

// One row of output pixels of a max-pooling; see kernels/max_pool.cpp.
struct PoolRow {
  const void* const* rows;  // [num_rows], each [width][channels]: those of the kernel's rows that meet the map
  int64_t num_rows, width, channels;
  int64_t kernel, stride, padding, dilation;  // along the row
  void* output;                               // [pixels][channels]
  int64_t pixels;
  Storage input_type, output_type;  // the same, or the first is f32
};

// One row of a map's gradient behind max-pooling; see kernels/max_pool_with_indices.cpp.
struct PoolGradRow {
  const void* const* grads;       // [num_rows], each [pixels][channels]: those of the outputs' rows that saw this one
  const uint8_t* const* indices;  // the same rows of places under the kernel
  const int64_t* row_taps;        // the kernel's row that lay on this one
  int64_t num_rows, width, channels, pixels;
  int64_t kernel, stride, padding, dilation;  // along the row
  void* output;                               // [width][channels]
  Storage type;
};

// relu(norm(input) + residual_norm(residual)) of maps [pixels][channels]; see kernels/batch_norm.cpp.
struct NormApply {
  const void* input;
  NormVectors norm;
  const void* residual;  // or null
  NormVectors residual_norm;
  void* output;
  uint8_t* mask;  // [pixels][(channels + 7) / 8] or null; a bit a value: whether the gradient passes
  Storage type;
  int64_t channels;
  bool relu;
};

struct NormSlope {
  const float *slope, *offset;
};

// The gradient of it: scale * gradient behind the ReLU + slope * (input - mean) + offset, and the same for a normalised
// residual, here called shortcut.
struct NormGrad {
  const void *grad, *input;
  NormVectors norm;
  NormSlope slope;
  const void* shortcut;  // or null
  NormVectors shortcut_norm;
  NormSlope shortcut_slope;
  const uint8_t* mask;  // or null: with a ReLU, the sign is computed again
  void* to;             // may be `grad`
  void* to_shortcut;    // null; without a shortcut the residual's gradient, that behind the ReLU
  Storage type;
  int64_t channels;
  bool relu;
};

// F(3, 4) again: 3 x 3 taps from tiles of 4 x 4 values of the output's gradient.
constexpr int64_t weight_grad_taps = 3, weight_grad_tile = 4,
                  weight_grad_size = weight_grad_taps + weight_grad_tile - 1;

// The gradient of a convolution's weight, without groups; see kernels/conv_weight_grad.cpp. All maps in channels_last.
struct WeightGrad {
  ConvShape shape;
  const void* input;  // [N, H, W, C]
  NormVectors norm;   // that the convolution's input went through, with a ReLU behind; or none
  const void* grad;   // [N, P, Q, K]
  Storage input_type, grad_type;
  bool winograd;           // 3x3, stride 1: sums over tiles of 4 x 4 outputs instead of pixels
  const float* transform;  // [6][4], Winograd's of the gradient
  int64_t block;           // tiles or pixels that are summed at a time
  float* output;           // [K, C, R, S]
  int64_t output_stride[4];
};

// A weight for Winograd's algorithm, F(m, 3); see kernels/conv_winograd.cpp. Filters and channels are those of the
// convolution that is computed, whose weight may be another one turned around.
struct WinogradWeight {
  const float* from;  // [filters, channels, 3, 3]
  int64_t filter_stride, channel_stride, row_stride, tap_stride;
  int64_t filters, channels;
  const double* transform;  // [m + 2][3]
  Storage type;             // of the packed weight: f32 or bf16
};

// Groups that share input vectors, and the sizes of such a unit; see kernels/conv_grouped.cpp.
struct GroupedUnit {
  int64_t channels, filters;
  int64_t chunks, vectors;  // vectors of channels, of filters
  int64_t units;            // in the convolution
};

// A convolution as the kernels take it; all maps in channels_last.
struct Conv {
  ConvShape shape;
  const void* input;                // [N, H, W, C]
  const void* weight;               // packed as the kernel wants it, in weight_type
  const float* bias;                // [K], zeros behind up to another gemm_panel
  const void* residual;             // [N, P, Q, K] or null
  void* output;                     // [N, P, Q, K]
  const void* zeros;                // [C] of any type: zeros are the same bits
  Storage input_type, output_type;  // the latter of the residual, too
  Storage weight_type;              // bf16: products of bf16 pairs; all other arithmetic is in float32
  bool relu;
  NormVectors norm{};  // if there is one, the input is relu(norm(input)); Winograd and GEMM of 1x1 without padding only
};

// The one list of what a level has: K(result, name, arguments) for functions, C(name) for numbers (int64_t).
#define RESNET_FAST_LEVEL_LIST(K, C)                                                                                   \
  K(void, add_relu_f32, (const float* a, const float* b, float* out, int64_t n))                                       \
  K(void, add_relu_bf16, (const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n))                             \
  K(void, add_relu_f16, (const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t n))                              \
  K(void, widen, (const void* from, Storage type, float* to, int64_t n)) /* 16-bit values */                           \
  K(bool, all_finite_32, (const uint32_t* x, int64_t n, uint32_t exponent_mask))                                       \
  K(bool, all_finite_16, (const uint16_t* x, int64_t n, uint16_t exponent_mask))                                       \
  K(void, conv_row, (const ConvRow& row))                                                                              \
  C(conv_row_taps) /* the most that conv_row takes */                                                                  \
  K(void, read_pixels, (const PixelRow& row, Storage weight_type, void* to))                                           \
  K(void, max_pool_row, (const PoolRow& row))                                                                          \
  K(void, max_pool_row_with_indices, /* row_taps: the kernel's row of each of `row.rows` */                            \
    (const PoolRow& row, const int64_t* row_taps, uint8_t* indices))                                                   \
  K(void, max_pool_grad_row, (const PoolGradRow& row))                                                                 \
  K(void, avg_pool,                                                                                                    \
    (const void* map, Storage type, bool channels_last, int64_t pixels, int64_t channels, int64_t channel_begin,       \
     int64_t channel_end, void* output))                                                                               \
  K(void, batch_norm_moments,                                                                                          \
    (const void* map, Storage type, int64_t pixels, int64_t channels, int64_t begin, int64_t end, float* moments))     \
  K(void, batch_norm_apply, (const NormApply& apply, int64_t begin, int64_t end))                                      \
  K(void, batch_norm_grad_sums,                                                                                        \
    (const NormGrad& grad, int64_t begin, int64_t end, int64_t channel_begin, int64_t channel_end, float* sums))       \
  K(void, batch_norm_grad, (const NormGrad& grad, int64_t begin, int64_t end))                                         \
  K(void, conv_gemm,                                                                                                   \
    (const Conv& conv, int64_t group, int64_t pixel_begin, int64_t pixel_end, int64_t filter_begin,                    \
     int64_t filter_end, void* scratch))                                                                               \
  K(int64_t, conv_gemm_scratch, (const Conv& conv, int64_t pixels)) /* bytes */                                        \
  K(void, conv_depthwise, (const Conv& conv, int64_t begin, int64_t end, void* scratch))                               \
  K(int64_t, conv_depthwise_scratch, (const ConvShape& shape)) /* bytes */                                             \
  K(GroupedUnit, grouped_unit, (int64_t channels, int64_t filters, int64_t groups))                                    \
  K(void, conv_grouped,                                                                                                \
    (const Conv& conv, int64_t n, int64_t row_begin, int64_t row_end, int64_t unit_begin, int64_t unit_end,            \
     void* scratch))                                                                                                   \
  K(int64_t, conv_grouped_scratch, (const ConvShape& shape, int64_t units)) /* bytes */                                \
  K(void, winograd_weight, /* of the panel at `filter`, channels [begin, end) */                                       \
    (const WinogradWeight& weight, int64_t m, int64_t filter, int64_t begin, int64_t end, void* to))                   \
  K(void, winograd_input,                                                                                              \
    (const Conv& conv, int64_t m, int64_t begin, int64_t end, void* transformed, int64_t stride))                      \
  K(void, winograd_products, /* of channels [begin, end), to which `weight` belongs */                                 \
    (const Conv& conv, int64_t m, const void* transformed, int64_t stride, int64_t count, int64_t filter,              \
     int64_t begin, int64_t end, const void* weight, float* products))                                                 \
  K(bool, winograd_output, /* false where a result is not finite */                                                    \
    (const Conv& conv, int64_t m, int64_t begin, int64_t end, int64_t filter, const float* products))                  \
  K(void, weight_grad_input, (const WeightGrad& g, int64_t begin, int64_t end, float* to))                             \
  K(void, weight_grad_grad, (const WeightGrad& g, int64_t begin, int64_t end, float* to))                              \
  K(void, weight_grad_products,                                                                                        \
    (const float* grad, const float* input, int64_t units, int64_t filters, int64_t channels, float* sums, bool adds)) \
  K(bool, weight_grad_output, /* false where a result of Winograd's is not finite */                                   \
    (const WeightGrad& g, int64_t filter, int64_t channel, const float* sums))                                         \
  K(int64_t, winograd_input_stride, (const ConvShape& shape, int64_t tiles))                                           \
  K(int64_t, winograd_output_stride, (int64_t tiles))                                                                  \
  K(void, stem_phases, (const float* row, int64_t channels, int64_t positions, float* to))                             \
  K(bool, winograd_stem, (const StemRows& rows, float* scratch)) /* false where a result is not finite */              \
  K(int64_t, winograd_stem_scratch, (int64_t channels))          /* bytes */                                           \
  C(multiplies_bf16)                                             /* 1 where kernels take weights in bf16 */            \
  C(vector_width)                                                /* floats */                                          \
  C(gemm_panel)                                                  /* filters in a panel of a packed weight */           \
  K(float, fma_f32, (int64_t n, float factor))                                                                         \
  K(float, fma_bf16, (int64_t n, float factor))                                                                        \
  C(fma_f32_flops) /* of one of the n iterations; 0 where the level has no such instruction */                         \
  C(fma_bf16_flops)

#define RESNET_FAST_POINTER(result, name, arguments) result(*name) arguments;
#define RESNET_FAST_NUMBER(name) int64_t name;
struct Kernels {
  RESNET_FAST_LEVEL_LIST(RESNET_FAST_POINTER, RESNET_FAST_NUMBER)
};

// What the kernel files of one level export.
#define RESNET_FAST_FUNCTION(result, name, arguments) result name arguments;
#define RESNET_FAST_CONSTANT(name) extern const int64_t name;
#define RESNET_FAST_DECLARE_LEVEL(level)                             \
  namespace level {                                                  \
  RESNET_FAST_LEVEL_LIST(RESNET_FAST_FUNCTION, RESNET_FAST_CONSTANT) \
  }

RESNET_FAST_DECLARE_LEVEL(portable)
RESNET_FAST_DECLARE_LEVEL(avx2)
RESNET_FAST_DECLARE_LEVEL(avx512)
RESNET_FAST_DECLARE_LEVEL(avx512_bf16)

// The kernels of the level in use: the best one this CPU has, or the one that RESNET_FAST_CPU_LEVEL names.
const Kernels& kernels();

}  // namespace resnet_fast
