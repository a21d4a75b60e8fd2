// add_relu, max_pool with and without indices and avg_pool_flatten in every type, against plain loops: for builds with
// sanitizers and with planted faults.
//
//   pooling CASE SCHEDULE LANDING SEED      0: right, 1: wrong values, 2: what the emulator says
#include "pooling.h"

#include <cmath>
#include <cstdlib>
#include <string>

#include "add_relu.h"
#include "maps.h"

namespace {

using namespace resnet_fast;

template <typename T>
int add_relu(int64_t n, int64_t skip) {
  Buffer<T> a(n, skip, 1), b(n, skip, 2), out(n, skip, 3);
  const int error = launch_add_relu(TypeOf<T>::type, a.begin(), b.begin(), out.begin(), n, nullptr);
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) wrong += !(out[i] == std::max(0.0f, a[i] + b[i]));
  return verdict("add_relu", error, wrong);
}

void set_windows(Windows& m, int c, int kernel) {
  m.n = 2, m.h = 9, m.w = 7, m.c = c, m.p = 5, m.q = 4;
  for (int d = 0; d < 2; ++d) m.kernel[d] = kernel, m.stride[d] = 2, m.padding[d] = kernel / 2, m.dilation[d] = 1;
}

// Places of x and of its windows; f(output, place under the kernel, input) for all of them that meet.
template <typename F>
void each_place(const Windows& m, const F& f) {
  int64_t at = 0;
  for (int n = 0; n < m.n; ++n)
    for (int p = 0; p < m.p; ++p)
      for (int q = 0; q < m.q; ++q)
        for (int c = 0; c < m.c; ++c, ++at)
          for (int place = 0; place < m.kernel[0] * m.kernel[1]; ++place) {
            const int h = p * m.stride[0] - m.padding[0] + place / m.kernel[1];
            const int w = q * m.stride[1] - m.padding[1] + place % m.kernel[1];
            if (h >= 0 && h < m.h && w >= 0 && w < m.w) f(at, place, ((int64_t(n) * m.h + h) * m.w + w) * m.c + c);
          }
}

// The values of one channel are all -inf.
template <typename T>
int max_pool(int c, int kernel, bool with_indices) {
  MaxPool m{};
  m.type = TypeOf<T>::type;
  set_windows(m, c, kernel);
  const int64_t outputs = m.n * m.p * m.q * c;
  Buffer<T> x(m.n * m.h * m.w * c, 0, 1), out(outputs, 0, 2);
  for (T& value : x.memory) value = from_float<T>(to_float(value) - 16.0f);  // padding must not win
  for (size_t i = 0; i < x.memory.size(); i += c) x.memory[i] = from_float<T>(-INFINITY);
  std::vector<uint8_t> indices(outputs, 255);
  m.x = x.begin(), m.out = out.begin(), m.indices = indices.data();
  const int error = with_indices ? launch_max_pool_with_indices(m, nullptr) : launch_max_pool(m, nullptr);
  std::vector<float> largest(outputs, -INFINITY);
  std::vector<int> index(outputs, -1);
  each_place(m, [&](int64_t at, int place, int64_t from) {
    if (index[at] < 0 || x[from] > largest[at]) largest[at] = x[from], index[at] = place;
  });
  int64_t wrong = 0;
  for (int64_t at = 0; at < outputs; ++at)
    wrong += !(out[at] == largest[at]) || (with_indices && indices[at] != index[at]);
  return verdict(with_indices ? "max_pool_with_indices" : "max_pool", error, wrong);
}

template <typename T>
int max_pool_backward(int c, int kernel) {
  MaxPoolBackward m{};
  m.type = TypeOf<T>::type;
  set_windows(m, c, kernel);
  const int64_t outputs = m.n * m.p * m.q * c, inputs = m.n * m.h * m.w * c;
  Buffer<T> grad(outputs, 0, 1), out(inputs, 0, 2);
  std::vector<uint8_t> indices(outputs);
  std::vector<float> sum(inputs, 0.0f);
  each_place(m, [&](int64_t at, int place, int64_t) {
    if (place % (1 + at % 5) == 0) indices[at] = uint8_t(place);  // any of the places that are there
  });
  each_place(m, [&](int64_t at, int place, int64_t to) {
    if (indices[at] == place) sum[to] += grad[at];
  });
  m.grad = grad.begin(), m.indices = indices.data(), m.out = out.begin();
  const int error = launch_max_pool_backward(m, nullptr);
  int64_t wrong = 0;
  for (int64_t i = 0; i < inputs; ++i) wrong += !(out[i] == to_float(from_float<T>(sum[i])));
  return verdict("max_pool_backward", error, wrong);
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
  const bool races = name == "races";  // of what has barriers, and of the simplest without
  int result = 0;
  const auto note = [&](int of_case) { result = result != 0 ? result : of_case; };
  if (name == "add_relu" || races || name == "all")
    note(add_relu<T>(1030, 0)), note(add_relu<T>(77, 1)), note(add_relu<T>(9000, 4));
  if (name == "max_pool" || races || name == "all")
    note(max_pool<T>(24, 3, false)), note(max_pool<T>(5, 2, false)), note(max_pool<T>(17, 3, false));
  if (name == "max_pool_with_indices" || name == "all") {
    note(max_pool<T>(24, 3, true)), note(max_pool<T>(5, 2, true));
    note(max_pool_backward<T>(24, 3)), note(max_pool_backward<T>(5, 4)), note(max_pool_backward<T>(3, 1));
  }
  if (name == "avg_pool" || races || name == "all")
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
