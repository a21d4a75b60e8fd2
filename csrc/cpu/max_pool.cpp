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
  run_max_pool(
      {n,
       h,
       w,
       c,
       p,
       q,
       {{kernel_size[0], kernel_size[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}},
       x.const_data_ptr(),
       out.mutable_data_ptr(),
       storage_of(x.scalar_type())});
  return with_exact_strides(out);
}

void run_max_pool(const MaxPool& m) {
  const int64_t* kernel = m.pool.kernel;
  const char* from = static_cast<const char*>(m.input);
  char* to = static_cast<char*>(m.output);
  const int64_t row_bytes = m.c * bytes_of(m.type);
  // As in add_relu.cpp, an output counting as much as the values that it is the largest of.
  const int64_t values = std::max<int64_t>(1, m.q * m.c * kernel[0] * kernel[1]);
  const auto rows_of = [&](int64_t begin, int64_t end) {
    std::vector<const void*> rows(m.pool.kernel[0]);
    PoolRow row{
        rows.data(), 0,   m.w,    m.c,   m.pool.kernel[1], m.pool.stride[1], m.pool.padding[1], m.pool.dilation[1],
        nullptr,     m.q, m.type, m.type};
    for (int64_t i = begin; i < end; ++i) {
      row.num_rows = 0;
      for (int64_t r = 0; r < m.pool.kernel[0]; ++r) {
        const int64_t y = i % m.p * m.pool.stride[0] - m.pool.padding[0] + r * m.pool.dilation[0];
        if (y >= 0 && y < m.h) rows[row.num_rows++] = from + (i / m.p * m.h + y) * m.w * row_bytes;
      }
      row.output = to + i * m.q * row_bytes;
      kernels().max_pool_row(row);
    }
  };
  torch::stable::parallel_for(0, m.n * m.p, std::max<int64_t>(1, 32768 / values), rows_of);
}

}  // namespace resnet_fast
