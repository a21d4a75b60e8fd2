#pragma once

#include <cstdint>

#include "filter_vector.h"
#include "type.h"

namespace resnet_fast {

// (x - mean) / sqrt(var + eps) * weight + bias, [C] each; what is missing changes nothing.
struct BatchNorm {
  FilterVector mean, var, weight, bias;
  float eps = 0;
};

// A map in channels_last, [pixels, C], that blocks take `chunk` pixels at a time.
struct NormMap {
  Type type;  // float32, bfloat16 or float16
  int64_t pixels, channels, chunk;
  int lanes;  // threads side by side, each with a word of channels; the launchers know
};

// Of the channels of x, through what every chunk has found: its first pixel, the mean of the distances to that one, and
// the sum of the squared distances to the mean.
struct BatchNormStatistics {
  NormMap map;
  const void* x;
  float* partial;  // [chunks, 3, C]
  float *mean, *var;
};

// out = relu(norm(x) + residual_norm(residual)).
struct BatchNormRelu {
  NormMap map;
  const void *x, *residual;  // residual: null if there is none
  void* out;
  uint8_t* mask;  // [pixels, ceil(C / 8)]: bit c % 8 of byte c / 8 where the sum is not <= 0; null: not asked for
  BatchNorm norm, residual_norm;
  bool relu;
};

// Its gradients. Behind the ReLU, which the mask knows or, without one, norm(x), `grad` is d; then
// sums = sum of d, of d * (x - mean) / sqrt(var + eps) and of the same with the shortcut's.
struct BatchNormReluBackward {
  NormMap map;
  const void *grad, *x, *shortcut;  // shortcut: that the residual was normalised from, null if it was not
  const uint8_t* mask;
  void *of_x, *of_residual;  // of_residual: of the shortcut where there is one; null: not asked for
  float* partial;            // [chunks, 2 or, with a shortcut, 3, C]
  float* sums[3];            // [C]: gradients of bias, weight and the shortcut's weight
  BatchNorm norm, shortcut_norm;
  bool relu;
};

// running_mean = keep * running_mean + share * mean, running_var = keep * running_var + var_share * var; [channels].
struct RunningStats {
  int64_t channels;
  float *running_mean, *running_var;
  FilterVector mean, var;
  float keep, share, var_share;
};

// The map as the kernels split it, whatever the GPU, so that sums are always the same.
NormMap split_map(Type type, int64_t pixels, int64_t channels);
inline int64_t chunks_of(const NormMap& map) { return (map.pixels + map.chunk - 1) / map.chunk; }

// On `stream` (a cudaStream_t); any alignment that the type itself has. Return a cudaError_t.
int launch_batch_norm_statistics(const BatchNormStatistics& statistics, void* stream);
int launch_batch_norm_relu(const BatchNormRelu& norm, void* stream);
int launch_batch_norm_relu_backward(const BatchNormReluBackward& backward, void* stream);
int launch_update_running_stats(const RunningStats& stats, void* stream);

}  // namespace resnet_fast
