#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <vector>

#include "levels.h"
#include "ops.h"

namespace resnet_fast {
namespace {

bool has_bf16() {
#if defined(__x86_64__)
  return kernels().fma_bf16_flops > 0 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

double fma_peak(int64_t iterations, bool bfloat16) {
  if (bfloat16 && !has_bf16()) return 0.0;
  const auto kernel = bfloat16 ? kernels().fma_bf16 : kernels().fma_f32;
  const int64_t flops = bfloat16 ? kernels().fma_bf16_flops : kernels().fma_f32_flops;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> rates(threads);
  std::atomic<float> sink{0.0f};  // so that no compiler drops the loop
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto start = std::chrono::steady_clock::now();
      sink.store(kernel(iterations, 0.5f));
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      rates[i] = double(iterations) * double(flops) / seconds.count();
    }
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace resnet_fast
