#pragma once

#include <cstdint>

#include "filter_vector.h"

namespace resnet_fast {

// BatchNorm folded into a convolution, in float32:
//   scale[k] = bn_weight[k] / sqrt(running_var[k] + eps)
//   folded_weight[k, r, s, c] = weight[k, c, r, s] * scale[k]
//   folded_bias[k] = (bias[k] - running_mean[k]) * scale[k] + bn_bias[k]
struct FoldBatchNorm {
  const void* weight;   // read by its strides
  void* folded_weight;  // [K, R, S, C], dense, weight's type
  void* folded_bias;    // [K], weight's type
  Type type;            // float32, bfloat16 or float16
  int k, c, r, s;
  int64_t stride_k, stride_c, stride_r, stride_s;
  FilterVector bias, bn_weight, bn_bias, running_mean, running_var;
  float eps;
};

// On `stream` (a cudaStream_t). Returns a cudaError_t.
int launch_fold_batch_norm(const FoldBatchNorm& fold, void* stream);

}  // namespace resnet_fast
