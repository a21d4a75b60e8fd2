// True if no element is NaN or infinite, i.e. none has all exponent bits set. Compiled once per level (levels.h).
#include "../levels.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Blocks of 4096 elements: long enough to vectorise well, short enough to stop early. One pass at memory speed.
template <typename T>
static inline bool scan(const T* __restrict x, int64_t n, T mask) {
  constexpr int64_t block = 4096;
  for (int64_t start = 0; start < n; start += block) {
    const int64_t end = start + block < n ? start + block : n;
    T found = 0;
    for (int64_t i = start; i < end; ++i) found |= T((x[i] & mask) == mask);
    if (found) return false;
  }
  return true;
}

bool all_finite_32(const uint32_t* x, int64_t n, uint32_t exponent_mask) { return scan(x, n, exponent_mask); }
bool all_finite_16(const uint16_t* x, int64_t n, uint16_t exponent_mask) { return scan(x, n, exponent_mask); }

}  // namespace resnet_fast::RESNET_FAST_LEVEL
