// Single values: between float and the types that maps are kept in, and ReLU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "type.h"

namespace resnet_fast {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// fmaxf(x, 0) would turn NaN into 0; the comparison below is false for NaN and keeps it, as torch.relu does.
__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// function(T()) for the type of a map. Returns a cudaError_t.
template <typename Function>
int with_type(Type type, const Function& function) {
  switch (type) {
    case Type::float32:
      return function(float());
    case Type::bfloat16:
      return function(__nv_bfloat16());
    case Type::float16:
      return function(__half());
    default:
      return int(cudaErrorInvalidValue);
  }
}

}  // namespace resnet_fast
