// A 16-bit map to float32. Compiled once per level (levels.h).
#include "../levels.h"
#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

template <typename T>
static inline void widen_from(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + width <= n; i += width) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

void widen(const void* from, Storage type, float* to, int64_t n) {
  if (type == Storage::bf16) return widen_from(static_cast<const bf16*>(from), to, n);
  widen_from(static_cast<const f16*>(from), to, n);
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
