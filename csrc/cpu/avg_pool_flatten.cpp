// The host side of the global average pool on the CPU; the loops are in kernels/avg_pool.cpp.
#include <torch/csrc/stable/ops.h>

#include "conv.h"
#include "parallel.h"

namespace resnet_fast {

using torch::stable::Tensor;

Tensor avg_pool_flatten_cpu(const Tensor& input) {  // [N, C, H, W], any strides; returns [N, C]
  STD_TORCH_CHECK(input.dim() == 4, "input must have 4 dimensions [N, C, H, W]");
  const int64_t n = input.size(0), c = input.size(1), pixels = input.size(2) * input.size(3);
  const bool planes = input.is_contiguous() && pixels > 1;
  const Tensor x = planes ? input : torch::stable::contiguous(input, torch::headeronly::MemoryFormat::ChannelsLast);
  Tensor out = torch::stable::empty({n, c}, x.scalar_type());
  run_avg_pool(x.const_data_ptr(), storage_of(x.scalar_type()), !planes, n, pixels, c, out.mutable_data_ptr());
  return out;
}

void run_avg_pool(const void* input, Storage type, bool channels_last, int64_t n, int64_t pixels, int64_t c,
                  void* output) {
  const char* from = static_cast<const char*>(input);
  char* to = static_cast<char*>(output);
  // Channels that a thread takes at a time: whole cache lines of the output, and enough to be worth waking it.
  constexpr int64_t block = 256;
  const int64_t blocks = (c + block - 1) / block;
  for_each_item(n * blocks, n * c * pixels * 8, [&](int64_t item) {
    const int64_t image = item / blocks, first = item % blocks * block;
    kernels().avg_pool(from + image * c * pixels * bytes_of(type), type, channels_last, pixels, c, first,
                       std::min(c, first + block), to + image * c * bytes_of(type));
  });
}

}  // namespace resnet_fast
