// The host sides of max_pool, max_pool_with_indices and avg_pool_flatten on CUDA.
#include "pooling.h"

#include "ops.h"

namespace resnet_fast {

using torch::stable::Tensor;

namespace {

using Pair = std::vector<int64_t>;

// Of maps [N, C, H, W] with that first map's N and C; checks that the kernels' numbers have 31 bits.
Windows windows_of(const char* kernel, const Tensor& map, const Pair& size, const Pair& output_size,
                   const Pair& kernel_size, const Pair& stride, const Pair& padding, const Pair& dilation) {
  bool ok = true;
  for (const auto* pair : {&kernel_size, &stride, &padding, &dilation, &output_size}) {
    ok = ok && pair->size() == 2;
    for (const int64_t value : *pair) ok = ok && value >= (pair == &padding ? 0 : 1) && value < int64_t(1) << 24;
  }
  STD_TORCH_CHECK(ok && size.size() == 2, kernel, ": bad arguments");
  for (int d = 0; d < 2; ++d)
    STD_TORCH_CHECK((output_size[d] - 1) * stride[d] < size[d] + padding[d] &&
                        size[d] + padding[d] + dilation[d] * kernel_size[d] < int64_t(1) << 31,
                    kernel, ": the last kernel must start inside the map, and positions have 31 bits");
  Windows w{};
  w.type = type_of(map.scalar_type());
  w.n = map.size(0), w.c = map.size(1), w.h = size[0], w.w = size[1], w.p = output_size[0], w.q = output_size[1];
  for (int d = 0; d < 2; ++d) {
    w.kernel[d] = int(kernel_size[d]), w.stride[d] = int(stride[d]);
    w.padding[d] = int(padding[d]), w.dilation[d] = int(dilation[d]);
  }
  return w;
}

void check_taps(const char* kernel, const Windows& w) {
  STD_TORCH_CHECK(w.kernel[0] * int64_t(w.kernel[1]) <= 256, kernel, ": an index has 8 bits");
}

}  // namespace

Tensor max_pool_cuda(const Tensor& input,  // [N, C, H, W], any strides
                     Pair kernel_size, Pair stride, Pair padding, Pair dilation, Pair output_size) {
  STD_TORCH_CHECK(on_device(input) && input.dim() == 4, "max_pool: bad arguments");
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  MaxPool pool{windows_of("max_pool", x, {x.size(2), x.size(3)}, output_size, kernel_size, stride, padding, dilation)};
  const Tensor out = empty_channels_last({pool.n, pool.c, pool.p, pool.q}, input);
  pool.x = x.const_data_ptr(), pool.out = out.mutable_data_ptr();
  check_launch(launch_max_pool(pool, current_stream(input)), "max_pool");
  return out;
}

std::tuple<Tensor, Tensor> max_pool_with_indices_cuda(const Tensor& input,  // [N, C, H, W], any strides
                                                      Pair kernel_size, Pair stride, Pair padding, Pair dilation,
                                                      Pair output_size) {
  const char* name = "max_pool_with_indices";
  STD_TORCH_CHECK(on_device(input) && input.dim() == 4, name, ": bad arguments");
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  MaxPool pool{windows_of(name, x, {x.size(2), x.size(3)}, output_size, kernel_size, stride, padding, dilation)};
  check_taps(name, pool);
  const std::array<int64_t, 4> size{pool.n, pool.c, pool.p, pool.q};
  const Tensor out = empty_channels_last(size, input);
  const Tensor indices = empty_channels_last(size, input, aoti_torch_dtype_uint8());
  pool.x = x.const_data_ptr(), pool.out = out.mutable_data_ptr();
  pool.indices = static_cast<uint8_t*>(indices.mutable_data_ptr());
  check_launch(launch_max_pool_with_indices(pool, current_stream(input)), name);
  return {out, indices};
}

Tensor max_pool_backward_cuda(const Tensor& grad, const Tensor& indices,  // [N, C, P, Q], any strides
                              Pair kernel_size, Pair stride, Pair padding, Pair dilation, Pair input_size) {
  const char* name = "max_pool_backward";
  bool ok = on_device(grad) && on_device(indices) && grad.dim() == 4 && indices.dim() == 4 &&
            indices.scalar_type() == torch::headeronly::ScalarType::Byte;
  for (int d = 0; d < 4; ++d) ok = ok && grad.size(d) == indices.size(d);
  STD_TORCH_CHECK(ok, name, ": bad arguments");
  const DeviceGuard guard(grad.get_device_index());
  const Tensor g = channels_last(grad), places = channels_last(indices);
  MaxPoolBackward pool{windows_of(name, g, input_size, {g.size(2), g.size(3)}, kernel_size, stride, padding, dilation)};
  check_taps(name, pool);
  const Tensor out = empty_channels_last({pool.n, pool.c, pool.h, pool.w}, grad);
  pool.grad = g.const_data_ptr(), pool.indices = static_cast<const uint8_t*>(places.const_data_ptr());
  pool.out = out.mutable_data_ptr();
  check_launch(launch_max_pool_backward(pool, current_stream(grad)), name);
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
