// What a batch leaves behind in BatchNorm's buffers, in one launch: in torch's operators they are four, a fifth of what
// a training step of ResNet-50 launches. A thread has a channel.
#include "batch_norm.h"
#include "filter_vector.cuh"
#include "runtime.cuh"

namespace resnet_fast {
namespace {

constexpr int update_block = 128;

__global__ void __launch_bounds__(update_block) update_running_stats_kernel(const __grid_constant__ RunningStats m) {
  const int64_t c = int64_t(blockIdx.x) * update_block + threadIdx.x;
  if (c >= m.channels) return;
  const float mean = m.running_mean[c] * m.keep, var = m.running_var[c] * m.keep;
  m.running_mean[c] = fmaf(filter_value(m.mean, int(c), 0.0f), m.share, mean);
  m.running_var[c] = fmaf(filter_value(m.var, int(c), 0.0f), m.var_share, var);
}

}  // namespace

int launch_update_running_stats(const RunningStats& stats, void* stream) {
  return launch<update_running_stats_kernel>(unsigned((stats.channels + update_block - 1) / update_block), update_block,
                                             0, static_cast<cudaStream_t>(stream), stats);
}

}  // namespace resnet_fast
