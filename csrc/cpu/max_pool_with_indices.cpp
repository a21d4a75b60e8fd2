// The host side of max-pooling for training on the CPU; the loops are in kernels/max_pool_with_indices.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "conv.h"

namespace resnet_fast {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> max_pool_with_indices_cpu(const Tensor& input,  // [N, C, H, W], any strides
                                                     std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                     std::vector<int64_t> output_size) {
  STD_TORCH_CHECK(input.dim() == 4 && std::min(output_size[0], output_size[1]) > 0,
                  "input must have 4 dimensions [N, C, H, W], and the output pixels");
  const Tensor x = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), p = output_size[0], q = output_size[1];
  const std::vector<int64_t> size{n, c, p, q};
  Tensor out = empty_map(size, x.scalar_type());
  Tensor indices = torch::stable::empty(size, torch::headeronly::ScalarType::Byte, std::nullopt, std::nullopt,
                                        std::nullopt, MemoryFormat::ChannelsLast);
  const Storage type = storage_of(x.scalar_type());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  uint8_t* places = static_cast<uint8_t*>(indices.mutable_data_ptr());
  const int64_t row_bytes = c * bytes_of(type), values = std::max<int64_t>(1, q * c * kernel_size[0] * kernel_size[1]);
  torch::stable::parallel_for(0, n * p, std::max<int64_t>(1, 32768 / values), [&](int64_t begin, int64_t end) {
    std::vector<const void*> rows(kernel_size[0]);
    std::vector<int64_t> taps(kernel_size[0]);
    PoolRow row{rows.data(), 0, w, c, kernel_size[1], stride[1], padding[1], dilation[1], nullptr, q, type, type};
    for (int64_t i = begin; i < end; ++i) {
      row.num_rows = 0;
      for (int64_t r = 0; r < kernel_size[0]; ++r) {
        const int64_t y = i % p * stride[0] - padding[0] + r * dilation[0];
        if (y < 0 || y >= h) continue;
        taps[row.num_rows] = r;
        rows[row.num_rows++] = from + (i / p * h + y) * w * row_bytes;
      }
      row.output = to + i * q * row_bytes;
      kernels().max_pool_row_with_indices(row, taps.data(), places + i * q * c);
    }
  });
  return {with_exact_strides(out), with_exact_strides(indices)};
}

Tensor max_pool_backward_cpu(const Tensor& grad, const Tensor& indices,  // [N, C, P, Q]
                             std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                             std::vector<int64_t> padding, std::vector<int64_t> dilation,
                             std::vector<int64_t> input_size) {
  const Tensor g = torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  const Tensor places = torch::stable::contiguous(indices, MemoryFormat::ChannelsLast);
  const int64_t n = g.size(0), c = g.size(1), p = g.size(2), q = g.size(3), h = input_size[0], w = input_size[1];
  Tensor out = empty_map({n, c, h, w}, g.scalar_type());
  const Storage type = storage_of(g.scalar_type());
  const char* from = static_cast<const char*>(g.const_data_ptr());
  const uint8_t* index = static_cast<const uint8_t*>(places.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t value_bytes = bytes_of(type);
  torch::stable::parallel_for(
      0, n * h, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, 4 * w * c)), [&](int64_t begin, int64_t end) {
        std::vector<const void*> grads(kernel_size[0]);
        std::vector<const uint8_t*> rows(kernel_size[0]);
        std::vector<int64_t> taps(kernel_size[0]);
        PoolGradRow row{grads.data(),   rows.data(), taps.data(), 0,           w,       c,   q,
                        kernel_size[1], stride[1],   padding[1],  dilation[1], nullptr, type};
        for (int64_t i = begin; i < end; ++i) {
          row.num_rows = 0;
          for (int64_t r = kernel_size[0] - 1; r >= 0; --r) {  // rows of outputs from above, as torch adds them
            const int64_t at = i % h + padding[0] - r * dilation[0], y = at / stride[0];
            if (at < 0 || y * stride[0] != at || y >= p) continue;
            const int64_t offset = (i / h * p + y) * q * c;
            taps[row.num_rows] = r;
            rows[row.num_rows] = index + offset;
            grads[row.num_rows++] = from + offset * value_bytes;
          }
          row.output = to + i * w * c * value_bytes;
          kernels().max_pool_grad_row(row);
        }
      });
  return with_exact_strides(out);
}

}  // namespace resnet_fast
