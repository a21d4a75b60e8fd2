// The host sides of max_pool and avg_pool_flatten on CUDA.
#include "pooling.h"

#include "ops.h"

namespace resnet_fast {

using torch::stable::Tensor;

Tensor max_pool_cuda(const Tensor& input,  // [N, C, H, W], any strides
                     std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, std::vector<int64_t> output_size) {
  bool ok = on_device(input) && input.dim() == 4;
  for (const auto* pair : {&kernel_size, &stride, &padding, &dilation, &output_size}) {
    ok = ok && pair->size() == 2;
    for (const int64_t value : *pair) ok = ok && value >= (pair == &padding ? 0 : 1) && value < int64_t(1) << 24;
  }
  STD_TORCH_CHECK(ok, "max_pool: bad arguments");
  for (int d = 0; d < 2; ++d)
    STD_TORCH_CHECK((output_size[d] - 1) * stride[d] < input.size(2 + d) + padding[d] &&
                        input.size(2 + d) + padding[d] + dilation[d] * kernel_size[d] < int64_t(1) << 31,
                    "max_pool: the last kernel must start inside the map, and positions have 31 bits");
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  MaxPool pool{};
  pool.n = x.size(0), pool.c = x.size(1), pool.h = x.size(2), pool.w = x.size(3);
  pool.p = output_size[0], pool.q = output_size[1];
  pool.type = type_of(x.scalar_type());
  for (int d = 0; d < 2; ++d) {
    pool.kernel[d] = int(kernel_size[d]), pool.stride[d] = int(stride[d]);
    pool.padding[d] = int(padding[d]), pool.dilation[d] = int(dilation[d]);
  }
  const Tensor out = empty_channels_last({pool.n, pool.c, pool.p, pool.q}, input);
  pool.x = x.const_data_ptr(), pool.out = out.mutable_data_ptr();
  check_launch(launch_max_pool(pool, current_stream(input)), "max_pool");
  return out;
}

Tensor avg_pool_flatten_cuda(const Tensor& input) {  // [N, C, H, W], any strides
  STD_TORCH_CHECK(on_device(input) && input.dim() == 4, "avg_pool_flatten: bad arguments");
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  AvgPool pool{};
  pool.n = x.size(0), pool.c = x.size(1), pool.pixels = x.size(2) * x.size(3);
  pool.type = type_of(x.scalar_type());
  const Tensor out = empty_strided<2>({pool.n, pool.c}, {pool.c, 1}, input);
  pool.x = x.const_data_ptr(), pool.out = out.mutable_data_ptr();
  check_launch(launch_avg_pool_flatten(pool, current_stream(input)), "avg_pool_flatten");
  return out;
}

}  // namespace resnet_fast
