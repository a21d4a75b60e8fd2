// What BatchNorm multiplies a filter's values with, read from tensors of any floating-point type.
#pragma once

#include "convert.cuh"
#include "filter_vector.h"

namespace resnet_fast {

__device__ inline float filter_value(const FilterVector& v, int k, float otherwise) {
  if (v.data == nullptr) return otherwise;
  const int64_t at = k * v.stride;
  switch (v.type) {
    case Type::float32:
      return static_cast<const float*>(v.data)[at];
    case Type::bfloat16:
      return to_float(static_cast<const __nv_bfloat16*>(v.data)[at]);
    case Type::float16:
      return to_float(static_cast<const __half*>(v.data)[at]);
    case Type::float64:
      return float(static_cast<const double*>(v.data)[at]);
  }
  return otherwise;
}

// bn_weight[k] / sqrt(running_var[k] + eps), in float32.
__device__ inline float filter_scale(const FilterVector& running_var, const FilterVector& bn_weight, float eps, int k) {
  return __frcp_rn(__fsqrt_rn(filter_value(running_var, k, 1.0f) + eps)) * filter_value(bn_weight, k, 1.0f);
}

}  // namespace resnet_fast
