// add_relu, max_pool and avg_pool_flatten in every type, against plain loops: for builds with sanitizers and with
// planted faults. Every buffer ends where its tensor does.
//
//   pooling CASE SCHEDULE LANDING SEED      0: right, 1: wrong values, 2: what the emulator says
#include "pooling.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "add_relu.h"
#include "convert.cuh"

namespace {

using namespace resnet_fast;

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

int verdict(const char* name, int error, int64_t wrong) {
  if (error != 0) return printf("%s: %s\n", name, emulator::error_message()), 2;
  if (wrong != 0) return printf("%s: %lld values are wrong\n", name, (long long)wrong), 1;
  return 0;
}

template <typename T>
int add_relu(int64_t n, int64_t skip) {
  Buffer<T> a(n, skip, 1), b(n, skip, 2), out(n, skip, 3);
  const int error = launch_add_relu(TypeOf<T>::type, a.begin(), b.begin(), out.begin(), n, nullptr);
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) wrong += !(out[i] == std::max(0.0f, a[i] + b[i]));
  return verdict("add_relu", error, wrong);
}

template <typename T>
int max_pool(int c, int kernel) {
  MaxPool m{};
  m.type = TypeOf<T>::type;
  m.n = 2, m.h = 9, m.w = 7, m.c = c, m.p = 5, m.q = 4;
  for (int d = 0; d < 2; ++d) m.kernel[d] = kernel, m.stride[d] = 2, m.padding[d] = kernel / 2, m.dilation[d] = 1;
  Buffer<T> x(m.n * m.h * m.w * c, 0, 1), out(m.n * m.p * m.q * c, 0, 2);
  for (T& value : x.memory) value = from_float<T>(to_float(value) - 16.0f);  // padding must not win
  m.x = x.begin(), m.out = out.begin();
  const int error = launch_max_pool(m, nullptr);
  int64_t wrong = 0, at = 0;
  for (int n = 0; n < m.n; ++n)
    for (int p = 0; p < m.p; ++p)
      for (int q = 0; q < m.q; ++q)
        for (int channel = 0; channel < c; ++channel, ++at) {
          float largest = -INFINITY;
          for (int r = 0; r < kernel; ++r)
            for (int s = 0; s < kernel; ++s) {
              const int h = p * 2 - kernel / 2 + r, w = q * 2 - kernel / 2 + s;
              if (h >= 0 && h < m.h && w >= 0 && w < m.w)
                largest = std::max(largest, x[((int64_t(n) * m.h + h) * m.w + w) * c + channel]);
            }
          wrong += !(out[at] == largest);
        }
  return verdict("max_pool", error, wrong);
}

template <typename T>
int avg_pool(int c, int pixels) {
  AvgPool m{};
  m.type = TypeOf<T>::type;
  m.n = 2, m.pixels = pixels, m.c = c;
  Buffer<T> x(m.n * pixels * c, 0, 1), out(m.n * c, 0, 2);
  m.x = x.begin(), m.out = out.begin();
  const int error = launch_avg_pool_flatten(m, nullptr);
  int64_t wrong = 0;
  for (int n = 0; n < m.n; ++n)
    for (int channel = 0; channel < c; ++channel) {
      float sum = 0;
      for (int i = 0; i < pixels; ++i) sum += x[(int64_t(n) * pixels + i) * c + channel];
      wrong += !(out[n * c + channel] == to_float(from_float<T>(sum / float(pixels))));
    }
  return verdict("avg_pool_flatten", error, wrong);
}

template <typename T>
int all_of(const std::string& name) {
  int result = 0;
  const auto note = [&](int of_case) { result = result != 0 ? result : of_case; };
  if (name == "add_relu" || name == "all")
    note(add_relu<T>(1030, 0)), note(add_relu<T>(77, 1)), note(add_relu<T>(9000, 4));
  if (name == "max_pool" || name == "all") note(max_pool<T>(24, 3)), note(max_pool<T>(5, 2)), note(max_pool<T>(17, 3));
  if (name == "avg_pool" || name == "all")
    note(avg_pool<T>(72, 49)), note(avg_pool<T>(3, 7)), note(avg_pool<T>(264, 35));
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 3;
  emulator_configure(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
  int result = 0;
  for (const int of_type : {all_of<float>(argv[1]), all_of<__nv_bfloat16>(argv[1]), all_of<__half>(argv[1])})
    result = result != 0 ? result : of_type;
  return result;
}
