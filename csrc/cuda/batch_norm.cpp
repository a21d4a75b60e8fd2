// The host side of batch normalisation in training on CUDA: statistics, normalisation with ReLU and residual,
// gradients.
#include "batch_norm.h"

#include "ops.h"

namespace resnet_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace {

void check_map(const char* kernel, const Tensor& t) {
  STD_TORCH_CHECK(on_device(t) && t.dim() == 4 && t.numel() > 0, kernel,
                  ": a map must be on the device, with 4 dimensions [N, C, H, W], and not empty");
}

void check_same(const char* kernel, const Tensor& t, const Tensor& input) {
  bool same = on_device(t) && t.dim() == 4 && t.scalar_type() == input.scalar_type();
  for (int d = 0; same && d < 4; ++d) same = t.size(d) == input.size(d);
  STD_TORCH_CHECK(same, kernel, ": maps must have one size and dtype");
}

NormMap map_of(const char* kernel, const Tensor& t) {
  const int64_t pixels = t.size(0) * t.size(2) * t.size(3), channels = t.size(1);
  STD_TORCH_CHECK(channels < int64_t(1) << 31 && pixels < int64_t(1) << 40, kernel, ": the map is too large");
  return split_map(type_of(t.scalar_type()), pixels, channels);
}

BatchNorm norm_of(const char* kernel, int64_t channels, const Optional& mean, const Optional& var,
                  const Optional& weight, const Optional& bias, double eps) {
  STD_TORCH_CHECK(mean.has_value() && var.has_value(), kernel, ": a normalisation must have a mean and a variance");
  for (const Optional* v : {&mean, &var, &weight, &bias})
    STD_TORCH_CHECK(!v->has_value() || (on_device(**v) && (*v)->dim() == 1 && (*v)->size(0) == channels), kernel,
                    ": a vector must be on the device, with one value per channel");
  return {filter_vector(mean), filter_vector(var), filter_vector(weight), filter_vector(bias), float(eps)};
}

std::array<int64_t, 4> sizes_of(const Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

// [N, H, W, ceil(C / 8)]
std::array<int64_t, 4> mask_size(const Tensor& t) { return {t.size(0), t.size(2), t.size(3), (t.size(1) + 7) / 8}; }

Tensor empty_mask(const Tensor& t) {
  const auto [n, h, w, bytes] = mask_size(t);
  return empty_strided<4>({n, h, w, bytes}, {h * w * bytes, w * bytes, bytes, 1}, t, aoti_torch_dtype_uint8());
}

void check_mask(const char* kernel, const Tensor& mask, const Tensor& input) {
  bool ok = on_device(mask) && mask.dim() == 4 && mask.scalar_type() == ScalarType::Byte && mask.is_contiguous();
  for (int d = 0; ok && d < 4; ++d) ok = mask.size(d) == mask_size(input)[d];
  STD_TORCH_CHECK(ok, kernel, ": the mask must be what the forward kernel has returned");
}

Optional channels_last(const Optional& t) { return t.has_value() ? Optional(resnet_fast::channels_last(*t)) : t; }
const void* data_of(const Optional& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }
Tensor empty_floats(int64_t size, const Tensor& like) { return empty_vector(size, like, aoti_torch_dtype_float32()); }
float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_statistics_cuda(const Tensor& input) {  // [N, C, H, W], any strides
  const char* name = "batch_norm_statistics";
  check_map(name, input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  BatchNormStatistics statistics{map_of(name, x)};
  const int64_t c = statistics.map.channels;
  const Tensor mean = empty_floats(c, x), var = empty_floats(c, x);
  const Tensor partial = empty_floats(chunks_of(statistics.map) * 3 * c, x);
  statistics.x = x.const_data_ptr();
  statistics.partial = floats(partial), statistics.mean = floats(mean), statistics.var = floats(var);
  check_launch(launch_batch_norm_statistics(statistics, current_stream(input)), name);
  return {mean, var};
}

// Maps [N, C, H, W] of any strides, vectors [C].
std::tuple<Tensor, Tensor> batch_norm_relu_cuda(const Tensor& input, const Tensor& mean, const Tensor& var,
                                                const Optional& weight, const Optional& bias, double eps,
                                                const Optional& residual, const Optional& residual_mean,
                                                const Optional& residual_var, const Optional& residual_weight,
                                                const Optional& residual_bias, double residual_eps, bool relu,
                                                bool with_mask) {
  const char* name = "batch_norm_relu";
  check_map(name, input);
  if (residual.has_value()) check_same(name, *residual, input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input);
  const Optional r = channels_last(residual);
  BatchNormRelu job{map_of(name, x)};
  const int64_t c = job.map.channels;
  job.norm = norm_of(name, c, mean, var, weight, bias, eps);
  if (residual_mean.has_value())
    job.residual_norm = norm_of(name, c, residual_mean, residual_var, residual_weight, residual_bias, residual_eps);
  const Tensor out = empty_channels_last(sizes_of(x), x);
  const Tensor mask = with_mask ? empty_mask(x) : empty_vector(0, x, aoti_torch_dtype_uint8());
  job.x = x.const_data_ptr(), job.residual = data_of(r), job.out = out.mutable_data_ptr();
  job.mask = with_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  job.relu = relu;
  check_launch(launch_batch_norm_relu(job, current_stream(input)), name);
  return {out, mask};
}

// Maps [N, C, H, W] of any strides, vectors [C], mask [N, H, W, ceil(C / 8)].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward_cuda(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& var, const Optional& weight,
    const Optional& bias, double eps, const Optional& mask, const Optional& shortcut, const Optional& shortcut_mean,
    const Optional& shortcut_var, const Optional& shortcut_weight, double shortcut_eps, bool relu,
    bool needs_residual) {
  const char* name = "batch_norm_relu_backward";
  check_map(name, input);
  check_same(name, grad, input);
  if (shortcut.has_value()) check_same(name, *shortcut, input);
  if (mask.has_value()) check_mask(name, *mask, input);
  const DeviceGuard guard(input.get_device_index());
  const Tensor x = channels_last(input), g = channels_last(grad);
  const Optional s = channels_last(shortcut);
  BatchNormReluBackward job{map_of(name, x)};
  const int64_t c = job.map.channels, kinds = s.has_value() ? 3 : 2;
  job.norm = norm_of(name, c, mean, var, weight, bias, eps);
  if (s.has_value())
    job.shortcut_norm = norm_of(name, c, shortcut_mean, shortcut_var, shortcut_weight, {}, shortcut_eps);

  const bool two = s.has_value() || needs_residual;
  const Tensor of_input = empty_channels_last(sizes_of(x), x);
  const Tensor of_residual = two ? empty_channels_last(sizes_of(x), x) : empty_vector(0, x);
  const Tensor of_weight = empty_floats(c, x), of_bias = empty_floats(c, x);
  const Tensor of_shortcut_weight = empty_floats(s.has_value() ? c : 0, x);
  const Tensor partial = empty_floats(chunks_of(job.map) * kinds * c, x);
  job.grad = g.const_data_ptr(), job.x = x.const_data_ptr(), job.shortcut = data_of(s);
  job.mask = relu && mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  job.of_x = of_input.mutable_data_ptr(), job.of_residual = two ? of_residual.mutable_data_ptr() : nullptr;
  job.partial = floats(partial);
  job.sums[0] = floats(of_bias), job.sums[1] = floats(of_weight), job.sums[2] = floats(of_shortcut_weight);
  job.relu = relu;
  check_launch(launch_batch_norm_relu_backward(job, current_stream(input)), name);
  return {of_input, of_weight, of_bias, of_residual, of_shortcut_weight};
}

// [C] each; the running ones float32 without gaps.
Tensor update_running_stats_cuda(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                                 const Tensor& var, double momentum, int64_t count) {
  const char* name = "update_running_stats_";
  const int64_t c = running_mean.numel();
  for (const Tensor* t : {&running_mean, &running_var, &mean, &var})
    STD_TORCH_CHECK(on_device(*t) && t->dim() == 1 && t->size(0) == c, name,
                    ": a vector must be on the device, with one value per channel");
  for (const Tensor* t : {&running_mean, &running_var})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(), name,
                    ": the running statistics must be float32, without gaps");
  STD_TORCH_CHECK(count > 1, name, ": one value has no variance");
  const DeviceGuard guard(mean.get_device_index());
  const RunningStats stats{c,
                           floats(running_mean),
                           floats(running_var),
                           filter_vector(mean),
                           filter_vector(var),
                           float(1 - momentum),
                           float(momentum),
                           float(momentum * double(count) / double(count - 1))};
  if (c > 0) check_launch(launch_update_running_stats(stats, current_stream(mean)), name);
  return running_mean;
}

}  // namespace resnet_fast
