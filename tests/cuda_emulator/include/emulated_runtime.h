// The twin of csrc/cuda/runtime.cuh.
#pragma once

#include <cstddef>
#include <tuple>

#include "cuda_runtime.h"

namespace emulator {
// The calling thread writes to shared memory by an ordinary instruction: TMA and wgmma see it after the thread's next
// fence.proxy.async (hopper.cpp).
void note_generic_write(const void* address, int bytes);
}  // namespace emulator

namespace resnet_fast {

inline unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(emulator::block.shared); }

template <typename V, typename T>
V load_shared(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) emulator::fail("a load of %zu bytes is misaligned", sizeof(V));
  emulator::note_shared(p, sizeof(V));
  return *reinterpret_cast<const V*>(p);
}

template <typename V, typename T>
void store_shared(T* p, V value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) emulator::fail("a store of %zu bytes is misaligned", sizeof(V));
  emulator::note_shared(p, sizeof(V));
  emulator::note_generic_write(p, sizeof(V));
  *reinterpret_cast<V*>(p) = value;
}

namespace emulated {
template <auto kernel, typename... P>
void call(void* context) {
  // Every thread has its own copy, as its registers are.
  const auto& arguments = *static_cast<const std::tuple<P...>*>(context);
  std::apply([](P... p) { kernel(p...); }, arguments);
}
template <auto kernel, typename... P>
int launch(void (*)(P...), dim3 grid, dim3 block, size_t shared_bytes, P... arguments) {
  std::tuple<P...> context(arguments...);
  return emulator::launch(__PRETTY_FUNCTION__, grid, block, shared_bytes, call<kernel, P...>, &context)
             ? cudaErrorLaunchFailure
             : cudaSuccess;
}
}  // namespace emulated

template <auto kernel, typename... A>
int launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const A&... arguments) {
  return emulated::launch<kernel>(kernel, grid, block, shared_bytes, arguments...);
}

}  // namespace resnet_fast
