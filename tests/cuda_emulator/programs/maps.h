// What programs on maps share: buffers that end where their tensors do, and verdicts.
#pragma once

#include <cstdio>
#include <vector>

#include "convert.cuh"
#include "type.h"

namespace resnet_fast {

template <typename T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr Type type = Type::float32;
};
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr Type type = Type::bfloat16;
};
template <>
struct TypeOf<__half> {
  static constexpr Type type = Type::float16;
};

// `skip` elements inside memory that ends where the tensor does.
template <typename T>
struct Buffer {
  std::vector<T> memory;
  int64_t skip;
  Buffer(int64_t size, int64_t skip, unsigned seed) : memory(size + skip), skip(skip) {
    for (T& value : memory) value = from_float<T>(float(int(seed = seed * 1664525 + 1013904223) >> 28));
  }
  T* begin() { return memory.data() + skip; }
  float operator[](int64_t i) const { return to_float(memory[skip + i]); }
};

inline int verdict(const char* name, int error, int64_t wrong) {
  if (error != 0) return printf("%s: %s\n", name, emulator::error_message()), 2;
  if (wrong != 0) return printf("%s: %lld values are wrong\n", name, (long long)wrong), 1;
  return 0;
}

}  // namespace resnet_fast
