// The host side of max-pooling on the CPU; the loops are in kernels/max_pool.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "conv.h"

namespace resnet_fast {

using torch::stable::Tensor;

Tensor max_pool_cpu(const Tensor& input,  // [N, C, H, W], any strides
                    std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, std::vector<int64_t> output_size) {
  STD_TORCH_CHECK(input.dim() == 4 && std::min(output_size[0], output_size[1]) > 0,
                  "input must have 4 dimensions [N, C, H, W], and the output pixels");
  const Tensor x = torch::stable::contiguous(input, torch::headeronly::MemoryFormat::ChannelsLast);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), p = output_size[0], q = output_size[1];
  Tensor out = empty_map({n, c, p, q}, x.scalar_type());
  const Storage type = storage_of(x.scalar_type());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  // As in add_relu.cpp, an output counting as much as the values that it is the largest of.
  const int64_t values = std::max<int64_t>(1, q * c * kernel_size[0] * kernel_size[1]);
  torch::stable::parallel_for(0, n * p, std::max<int64_t>(1, 32768 / values), [&](int64_t begin, int64_t end) {
    std::vector<const void*> rows(kernel_size[0]);
    PoolRow row{rows.data(), 0, w, c, kernel_size[1], stride[1], padding[1], dilation[1], nullptr, q, type, type};
    for (int64_t i = begin; i < end; ++i) {
      row.num_rows = 0;
      for (int64_t r = 0; r < kernel_size[0]; ++r) {
        const int64_t y = i % p * stride[0] - padding[0] + r * dilation[0];
        if (y >= 0 && y < h) rows[row.num_rows++] = from + (i / p * h + y) * w * c * bytes_of(type);
      }
      row.output = to + i * q * c * bytes_of(type);
      kernels().max_pool_row(row);
    }
  });
  return with_exact_strides(out);
}

}  // namespace resnet_fast
