// CUDA's language and the little of its runtime that kernels and their launches use, for a host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // blocks run one after the other; unlike dynamic shared memory it is not poisoned

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)
constexpr int warpSize = 32;

#define __syncthreads() emulator::sync_threads(__FILE__, __LINE__)

#define EMULATED_VECTOR(name, type, n, ...)                \
  struct __attribute__((aligned(n * sizeof(type)))) name { \
    type __VA_ARGS__;                                      \
  };
EMULATED_VECTOR(int2, int, 2, x, y)
EMULATED_VECTOR(int4, int, 4, x, y, z, w)
EMULATED_VECTOR(uint2, uint32_t, 2, x, y)
EMULATED_VECTOR(uint4, uint32_t, 4, x, y, z, w)
EMULATED_VECTOR(float2, float, 2, x, y)
EMULATED_VECTOR(float4, float, 4, x, y, z, w)
#undef EMULATED_VECTOR
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __uint_as_float(uint32_t x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

// --- warp-wide instructions; all 32 lanes take part ---
namespace emulator {
inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp-wide instruction with mask %#x; only whole warps are emulated", mask);
}
void sync_warp();
uint32_t shuffle(uint32_t value, int source_lane, const char* name);  // of every lane, from the lane that it names
uint32_t ballot(bool predicate);
template <typename T>
T shuffled(unsigned mask, T value, int source_lane, const char* name) {
  static_assert(sizeof(T) == 4, "shuffles of 32 bits are emulated");
  whole_warp(mask);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shuffle(bits, source_lane, name);
  memcpy(&value, &bits, 4);
  return value;
}
}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::whole_warp(mask);
  emulator::sync_warp();
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffled(mask, value, lane & 31, "__shfl_sync");
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffled(mask, value, emulator::current->lane ^ (bits & 31), "__shfl_xor_sync");
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = emulator::current->lane + delta;
  return emulator::shuffled(mask, value, lane < 32 ? int(lane) : emulator::current->lane, "__shfl_down_sync");
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int lane = emulator::current->lane - int(delta);
  return emulator::shuffled(mask, value, lane >= 0 ? lane : emulator::current->lane, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulator::whole_warp(mask);
  return emulator::ballot(predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

// --- the runtime ---
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::error_message()
         : error == cudaSuccess          ? "no error"
                                         : "invalid value";
}
