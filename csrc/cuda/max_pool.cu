// Max-pooling: max_pool.cuh says how.
#include "max_pool.cuh"

namespace resnet_fast {

int launch_max_pool(const MaxPool& m, void* stream) {
  if (m.n * m.p * m.q * m.c == 0) return int(cudaSuccess);
  return with_type(m.type, [&](auto value) {
    using T = decltype(value);
    return with_widest_word<T>(uintptr_t(m.x) | uintptr_t(m.out) | uintptr_t(m.c) * sizeof(T), [&](auto word) {
      return launch_max_pool<T, decltype(word), false>(m, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace resnet_fast
