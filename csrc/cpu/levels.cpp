#include "levels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#include "ops.h"

namespace resnet_fast {

// Kernels table() of each level.
#define RESNET_FAST_ADDRESS(result, name, arguments) name,
#define RESNET_FAST_VALUE(name) name,
#define RESNET_FAST_TABLE(level)                                                                      \
  namespace level {                                                                                   \
  static Kernels table() { return {RESNET_FAST_LEVEL_LIST(RESNET_FAST_ADDRESS, RESNET_FAST_VALUE)}; } \
  }
RESNET_FAST_TABLE(portable)
#if defined(__x86_64__)
RESNET_FAST_TABLE(avx2)
RESNET_FAST_TABLE(avx512)
RESNET_FAST_TABLE(avx512_bf16)
#endif

namespace {

struct Level {
  const char* name;
  bool (*present)();
  Kernels kernels;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c");
}
#endif

// From the least to the most demanding; the Python side (backends.py) has the same names in the same order.
const Level levels[] = {
    {"portable", [] { return true; }, portable::table()},
#if defined(__x86_64__)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     avx2::table()},
    {"avx512", has_avx512, avx512::table()},
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, avx512_bf16::table()},
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
  STD_TORCH_CHECK(
      false,
      "RESNET_FAST_CPU_LEVEL must be portable, avx2, avx512 or avx512_bf16 (as far as this build has them), got ",
      forced);
  return 0;
}

}  // namespace

int64_t cpu_level_index() {
  static const int64_t index = pick_level();
  return index;
}

bool multiplies_bf16() { return kernels().multiplies_bf16; }

const Kernels& kernels() { return levels[cpu_level_index()].kernels; }

}  // namespace resnet_fast
