// hopper_conv.cu against a plain loop on integers: hopper_conv_main schedule landing [seed]. Exit status 0: equal,
// 1: the launch failed, 2: wrong numbers.
#include <cuda_bf16.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int hopper_conv(void* x, void* w, void* y, int images, int height, int width, int channels, int out_channels,
                           int taps, int stride, int padding, int blocks);

namespace {

// More steps than stages, more tiles than one block, edges in both directions.
constexpr int images = 2, height = 9, width = 8, channels = 64, out_channels = 136, taps = 3, stride = 1, padding = 1;

std::vector<__nv_bfloat16> small_integers(size_t n, std::mt19937& random) {
  std::vector<__nv_bfloat16> out(n);
  for (auto& x : out) x = __float2bfloat16_rn(float(int(random() % 5) - 2));
  return out;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 3;
  emulator_configure(atoi(arguments[1]), atoi(arguments[2]), count > 3 ? atoi(arguments[3]) : 1);
  std::mt19937 random(1);
  // Of exactly the sizes needed, at addresses that TMA takes.
  const auto aligned = [](const std::vector<__nv_bfloat16>& from) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, from.size() * 2) != 0) abort();
    memcpy(memory, from.data(), from.size() * 2);
    return static_cast<__nv_bfloat16*>(memory);
  };
  const auto x = small_integers(size_t(images) * height * width * channels, random);
  const auto w = small_integers(size_t(out_channels) * taps * taps * channels, random);
  __nv_bfloat16* y = aligned(std::vector<__nv_bfloat16>(size_t(images) * height * width * out_channels));
  if (hopper_conv(aligned(x), aligned(w), y, images, height, width, channels, out_channels, taps, stride, padding, 1)) {
    printf("%s\n", emulator::error_message());
    return 1;
  }
  int wrong = 0;
  for (int pixel = 0; pixel < images * height * width; ++pixel)
    for (int k = 0; k < out_channels; ++k) {
      float sum = 0;
      for (int tap = 0; tap < taps * taps; ++tap) {
        const int row = pixel / width % height + tap / taps - padding, column = pixel % width + tap % taps - padding;
        if (row < 0 || row >= height || column < 0 || column >= width) continue;
        const auto* from = &x[((pixel / (height * width) * height + row) * size_t(width) + column) * channels];
        const auto* by = &w[(size_t(k) * taps * taps + tap) * channels];
        for (int c = 0; c < channels; ++c) sum += __bfloat162float(from[c]) * __bfloat162float(by[c]);
      }
      wrong += __float2bfloat16_rn(sum > 0 ? sum : 0).bits != y[size_t(pixel) * out_channels + k].bits;
    }
  if (wrong != 0) printf("%d wrong numbers\n", wrong);
  return wrong == 0 ? 0 : 2;
}
