// What kernels and their launches need that another compiler cannot be given as plain C++. Without nvcc this is the
// emulator's twin (tests/cuda_emulator), so that the same kernels run on a CPU.
#pragma once

#ifndef __CUDACC__
#include <emulated_runtime.h>
#else

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace resnet_fast {

// The block's dynamic shared memory, as large as `launch` was told; 1024-aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// One access of sizeof(V) bytes to shared memory; the emulator counts its bank conflicts.
template <typename V, typename T>
__device__ __forceinline__ V load_shared(const T* p) {
  return *reinterpret_cast<const V*>(p);
}
template <typename V, typename T>
__device__ __forceinline__ void store_shared(T* p, V value) {
  *reinterpret_cast<V*>(p) = value;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...). Returns a cudaError_t.
template <auto kernel, typename... A>
int launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const A&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {            // what a kernel may have without asking
    static std::atomic<size_t> granted[64];  // on each device
    int device = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess && shared_bytes > granted[device & 63].load()) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
      if (error == cudaSuccess) granted[device & 63].store(shared_bytes);
    }
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error != cudaSuccess) cudaGetLastError();  // so that it is not taken for that of a later launch
  return int(error);
}

}  // namespace resnet_fast

#endif
