#include "levels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#include "ops.h"

namespace resnet_fast {
namespace {

struct Level {
  const char* name;
  bool (*present)();
  Kernels kernels;
};

#define RESNET_FAST_KERNELS(level)                                                         \
  {level::add_relu_f32,  level::add_relu_bf16, level::add_relu_f16,  level::all_finite_32, \
   level::all_finite_16, level::conv_row_f32,  level::conv_block,    level::fma_f32,       \
   level::fma_bf16,      level::fma_f32_flops, level::fma_bf16_flops}

// From the least to the most demanding; the Python side (backends.py) has the same names in the same order.
const Level levels[] = {
    {"portable", [] { return true; }, RESNET_FAST_KERNELS(portable)},
#if defined(__x86_64__)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     RESNET_FAST_KERNELS(avx2)},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("f16c");
     },
     RESNET_FAST_KERNELS(avx512)},
#endif
};
constexpr int64_t num_levels = sizeof(levels) / sizeof(levels[0]);

int64_t pick_level() {
  const char* forced = std::getenv("RESNET_FAST_CPU_LEVEL");
  if (forced == nullptr || *forced == '\0') {
    int64_t best = 0;
    for (int64_t i = 1; i < num_levels; ++i)
      if (levels[i].present()) best = i;
    return best;
  }
  for (int64_t i = 0; i < num_levels; ++i) {
    if (std::strcmp(forced, levels[i].name) != 0) continue;
    STD_TORCH_CHECK(levels[i].present(), "RESNET_FAST_CPU_LEVEL=", forced, ": this CPU does not have that level");
    return i;
  }
  STD_TORCH_CHECK(false, "RESNET_FAST_CPU_LEVEL must be portable, avx2 or avx512 (as far as this build has them), got ",
                  forced);
  return 0;
}

}  // namespace

int64_t cpu_level_index() {
  static const int64_t index = pick_level();
  return index;
}

const Kernels& kernels() { return levels[cpu_level_index()].kernels; }

}  // namespace resnet_fast
