// Accesses as wide as the addresses allow. An integer vector stands for several elements: a struct of 16-bit floats
// compiles to several 32-bit loads, uint4 gives LDG.E.128.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace resnet_fast {

template <int bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

// A word as its elements.
template <typename T, typename W>
union Elements {
  W word;
  T values[sizeof(W) / sizeof(T)];
};

// Calls function(W()) with the widest word W that divides `bits`: all addresses and distances between words, or'ed.
template <typename T, typename Function>
int with_widest_word(uintptr_t bits, Function function) {
  if (bits % 16 == 0) return function(uint4());
  if (bits % 8 == 0) return function(uint2());
  if constexpr (sizeof(T) == 2) {
    if (bits % 4 != 0) return function(uint16_t());
  }
  return function(uint32_t());
}

// The same with 16 bytes or one T and no word between, which halves what large kernels take to compile.
template <typename T, typename Function>
int with_widest_word_or_one(uintptr_t bits, Function function) {
  return bits % 16 == 0 ? function(uint4()) : function(typename WordOf<sizeof(T)>::type());
}

}  // namespace resnet_fast
