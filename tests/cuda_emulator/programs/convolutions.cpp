// Convolutions of small integers by the CUDA kernel of one element type (-DELEMENT=...), against plain loops: for
// builds with sanitizers and with planted faults. Every buffer ends where its tensor does.
//
//   convolutions CASE SCHEDULE LANDING SEED      0: right, 1: wrong values, 2: what the emulator says
//
// CASE is a name below, "all", or "banks" (1 also for bank conflicts).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "conv_bn_relu_sm80_launch.cuh"

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif

namespace resnet_fast {
extern template int launch_conv_bn_relu_sm80<ELEMENT>(const ConvBnRelu& conv, ConvTile tile, void* stream);
}

namespace {

using namespace resnet_fast;

struct Case {
  const char* name;
  ConvTile tile;
  int n, c, h, w, k, r, s, stride, padding, dilation, groups;
  bool residual;
};

const Case cases[] = {
    {"1x1", ConvTile::m64n64, 1, 64, 6, 11, 72, 1, 1, 1, 0, 1, 1, true},
    {"deep", ConvTile::m128n64, 1, 232, 5, 5, 64, 1, 1, 1, 0, 1, 1, false},
    {"3x3", ConvTile::m128n128, 1, 40, 12, 11, 136, 3, 3, 1, 1, 1, 1, true},
    {"3x3 stride 2", ConvTile::m128n64, 2, 16, 17, 15, 72, 3, 3, 2, 1, 1, 1, false},
    {"dilated", ConvTile::m128n32, 1, 16, 13, 11, 24, 3, 3, 1, 2, 2, 1, false},
    {"groups", ConvTile::m128n32, 1, 32, 7, 7, 32, 3, 3, 1, 1, 1, 4, false},
    {"stem", ConvTile::m128n64, 1, 3, 17, 19, 64, 7, 7, 2, 3, 1, 1, false},
    {"odd", ConvTile::m128n64, 1, 9, 7, 6, 5, 3, 3, 1, 1, 1, 1, true},
    {"halo", ConvTile::halo_m128n64, 2, 72, 9, 10, 64, 3, 3, 1, 1, 1, 1, true},
    {"halo wide", ConvTile::halo_m128n128, 1, 40, 12, 13, 136, 3, 3, 1, 1, 1, 1, false},
};

// A tensor's memory, filled with small integers.
template <typename T>
struct Buffer {
  int64_t size;
  std::unique_ptr<T, void (*)(void*)> memory;
  explicit Buffer(int64_t size) : size(size), memory(nullptr, [](void* p) { free(p); }) {
    void* p = nullptr;
    if (posix_memalign(&p, 16, size * sizeof(T)) != 0) abort();
    memset(p, 0xff, size * sizeof(T));
    memory.reset(static_cast<T*>(p));
  }
  void fill(unsigned seed) {
    for (int64_t i = 0; i < size; ++i)
      memory.get()[i] = from_float<T>(float(int(seed = seed * 1664525 + 1013904223) >> 29));
  }
  float operator[](int64_t i) const { return to_float(memory.get()[i]); }
};

int run(const Case& t) {
  ConvBnRelu conv{};
  ConvShape& f = conv.shape;
  const int p = (t.h + 2 * t.padding - t.dilation * (t.r - 1) - 1) / t.stride + 1;
  const int q = (t.w + 2 * t.padding - t.dilation * (t.s - 1) - 1) / t.stride + 1;
  f = {t.n,
       t.h,
       t.w,
       t.c,
       t.k,
       t.r,
       t.s,
       p,
       q,
       {t.stride, t.stride},
       {t.padding, t.padding},
       {t.dilation, t.dilation},
       t.groups};
  const int c = t.c / t.groups, k = t.k / t.groups;
  Buffer<ELEMENT> x(int64_t(t.n) * t.h * t.w * t.c), weight(int64_t(t.k) * t.r * t.s * c);
  Buffer<ELEMENT> residual(int64_t(t.n) * p * q * t.k), out(residual.size);
  Buffer<float> mean(t.k), var(t.k), beta(t.k);
  x.fill(1), weight.fill(2), residual.fill(3), mean.fill(4), beta.fill(5);
  for (int i = 0; i < t.k; ++i) var.memory.get()[i] = i % 2 ? 4.0f : 0.25f;
  conv.x = x.memory.get(), conv.weight = weight.memory.get(), conv.out = out.memory.get();
  conv.residual = t.residual ? residual.memory.get() : nullptr;
  conv.running_mean.data = mean.memory.get(), conv.running_var.data = var.memory.get();
  conv.bn_bias.data = beta.memory.get();
  conv.relu = true;
  if (launch_conv_bn_relu_sm80<ELEMENT>(conv, t.tile, nullptr) != 0) {
    printf("%s\n", emulator::error_message());
    return 2;
  }
  int64_t wrong = 0, at = 0;
  for (int n = 0; n < t.n; ++n)
    for (int i = 0; i < p; ++i)
      for (int j = 0; j < q; ++j)
        for (int filter = 0; filter < t.k; ++filter, ++at) {
          const int group = filter / k;
          float sum = 0;
          for (int r = 0; r < t.r; ++r)
            for (int s = 0; s < t.s; ++s) {
              const int h = i * t.stride - t.padding + r * t.dilation, w = j * t.stride - t.padding + s * t.dilation;
              if (h < 0 || h >= t.h || w < 0 || w >= t.w) continue;
              for (int channel = 0; channel < c; ++channel)
                sum += x[((int64_t(n) * t.h + h) * t.w + w) * t.c + group * c + channel] *
                       weight[((int64_t(filter) * t.r + r) * t.s + s) * c + channel];
            }
          float value = (sum - mean[filter]) / (filter % 2 ? 2.0f : 0.5f) + beta[filter];
          if (t.residual) value += residual[at];
          value = to_float(from_float<ELEMENT>(value < 0 ? 0 : value));
          wrong += !(out[at] == value);
        }
  if (wrong != 0) printf("%lld of %lld values are wrong\n", (long long)wrong, (long long)out.size);
  return wrong != 0;
}

// Whether operands and accumulators pass through shared memory almost without bank conflicts.
int count_conflicts() {
  emulator_count(1);
  const int result = run(cases[0]);
  emulator::Counters found;
  emulator_counters(&found);
  printf("%llu passes, %llu without conflicts\n", (unsigned long long)found.wavefronts, (unsigned long long)found.best);
  return result != 0 ? result : found.accesses == 0 || found.wavefronts > 1.15 * found.best;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 3;
  emulator_configure(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
  if (std::string(argv[1]) == "banks") return count_conflicts();
  int result = 3;
  for (const Case& t : cases)
    if (std::string(argv[1]) == t.name || std::string(argv[1]) == "all") {
      result = run(t);
      if (result != 0) return printf("%s\n", t.name), result;
    }
  return result;
}
