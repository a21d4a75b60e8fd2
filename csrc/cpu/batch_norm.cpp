// The host side of batch normalisation in training: statistics, normalisation with ReLU and residual, and its gradient.
// The loops are in kernels/batch_norm.cpp. What is summed is split into chunks of pixels that depend on the map alone
// and combined in their order, in float64, so that results do not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>

#include "conv.h"
#include "parallel.h"

namespace resnet_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Partial {};

// A map [N, C, H, W] as the kernels take it, [pixels][channels].
struct Map {
  Tensor kept;
  const void* data;
  Storage type;
  int64_t pixels, channels;

  explicit Map(const Tensor& t)
      : kept(torch::stable::contiguous(t, MemoryFormat::ChannelsLast)),
        data(kept.const_data_ptr()),
        type(storage_of(t.scalar_type())),
        pixels(t.size(0) * t.size(2) * t.size(3)),
        channels(t.size(1)) {}
  std::vector<int64_t> size() const { return {kept.size(0), kept.size(1), kept.size(2), kept.size(3)}; }
  ScalarType dtype() const { return kept.scalar_type(); }
};

// Pixels that are summed at once: 64 chunks give two or many threads equal shares; fewer than 64 pixels, the run of the
// kernels, would not be worth combining.
int64_t chunk_of(int64_t pixels) { return std::max<int64_t>(64, (pixels + 63) / 64); }

// Channels that a thread takes at a time, where there are fewer chunks than threads would like.
constexpr int64_t channel_block = 256;

// f(chunk, first pixel, last, first channel, last) for all chunks of all blocks of channels.
template <typename F>
void for_each_chunk(int64_t pixels, int64_t channels, const F& f) {
  const int64_t chunk = chunk_of(pixels), chunks = (pixels + chunk - 1) / chunk;
  const int64_t blocks = (channels + channel_block - 1) / channel_block;
  for_each_item(chunks * blocks, pixels * channels * 8, [&](int64_t item) {
    const int64_t i = item / blocks, begin = i * chunk, c = item % blocks * channel_block;
    f(i, begin, std::min(pixels, begin + chunk), c, std::min(channels, c + channel_block));
  });
}

// f(first pixel, last) for all pixels.
template <typename F>
void for_each_pixels(int64_t pixels, int64_t channels, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / channels), items = (pixels + grain - 1) / grain;
  for_each_item(items, pixels * channels * 8,
                [&](int64_t item) { f(item * grain, std::min(pixels, (item + 1) * grain)); });
}

// `count` vectors of `channels` floats, with the room behind that kernels ask for.
class Vectors {
 public:
  Vectors(int64_t count, int64_t channels)
      : stride_(channels + kernels().vector_width), values_(count * stride_, 0.0f) {}
  float* operator[](int64_t i) { return values_.data() + i * stride_; }

 private:
  int64_t stride_;
  std::vector<float> values_;
};

std::optional<Tensor> as_float(const std::optional<Tensor>& t) {
  if (!t.has_value()) return t;
  return torch::stable::contiguous(to_dtype(*t, ScalarType::Float));
}

// The vectors of a normalisation; see NormVectors.
struct Norm {
  Vectors vectors;
  std::vector<double> invstd;

  Norm(int64_t channels, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& bias, double eps)
      : vectors(3, channels), invstd(channels) {
    const std::optional<Tensor> m = as_float(mean), v = as_float(var), w = as_float(weight), b = as_float(bias);
    const auto at = [](const std::optional<Tensor>& t) { return static_cast<const float*>(t->const_data_ptr()); };
    for (int64_t c = 0; c < channels; ++c) {
      invstd[c] = 1.0 / std::sqrt(double(at(v)[c]) + eps);
      vectors[0][c] = at(m)[c];
      vectors[1][c] = float(w.has_value() ? at(w)[c] * invstd[c] : invstd[c]);
      vectors[2][c] = b.has_value() ? at(b)[c] : 0.0f;
    }
  }
  NormVectors pointers() { return {vectors[0], vectors[1], vectors[2]}; }

  // The gradient's slope and offset from the sums of the gradient and of its product with the deviation.
  void slope_of(const double* sum, const double* product, int64_t pixels, Vectors& to) {
    for (size_t c = 0; c < invstd.size(); ++c) {
      to[0][c] = float(-vectors[1][c] * invstd[c] * invstd[c] * product[c] / double(pixels));
      to[1][c] = float(-vectors[1][c] * sum[c] / double(pixels));
    }
  }
};

Tensor to_tensor(const std::vector<double>& values, const std::vector<double>* factors = nullptr) {
  Tensor t = torch::stable::empty({int64_t(values.size())}, ScalarType::Float);
  float* to = static_cast<float*>(t.mutable_data_ptr());
  for (size_t c = 0; c < values.size(); ++c) to[c] = float(factors ? values[c] * (*factors)[c] : values[c]);
  return t;
}

Tensor empty_tensor(ScalarType dtype) { return torch::stable::empty({0}, dtype); }

}  // namespace

std::tuple<Tensor, Tensor> batch_norm_statistics_cpu(const Tensor& input) {  // [N, C, H, W]
  const Map x(input);
  const int64_t chunk = chunk_of(x.pixels), chunks = (x.pixels + chunk - 1) / chunk;
  const Scratch<Partial> scratch(chunks * 3 * x.channels * sizeof(float));
  float* partial = scratch.floats();  // [chunks][3][channels], see kernels/batch_norm.cpp
  const char* data = static_cast<const char*>(x.data);
  for_each_chunk(x.pixels, x.channels, [&](int64_t i, int64_t begin, int64_t end, int64_t first, int64_t last) {
    kernels().batch_norm_moments(data + begin * x.channels * bytes_of(x.type), x.type, end - begin, x.channels, first,
                                 last, partial + i * 3 * x.channels);
  });

  std::vector<double> mean(x.channels), var(x.channels);
  const auto each_partial = [&](const auto& f) {
    for (int64_t i = 0; i < chunks; ++i) {
      const float* at = partial + i * 3 * x.channels;
      const double share = double(std::min(x.pixels, (i + 1) * chunk) - i * chunk) / double(x.pixels);
      for (int64_t c = 0; c < x.channels; ++c)
        f(c, share, double(at[c]) + at[x.channels + c], double(at[2 * x.channels + c]));
    }
  };
  each_partial([&](int64_t c, double share, double m, double) { mean[c] += share * m; });
  each_partial([&](int64_t c, double share, double m, double m2) {
    var[c] += m2 / double(x.pixels) + share * (m - mean[c]) * (m - mean[c]);
  });
  return {to_tensor(mean), to_tensor(var)};
}

std::tuple<Tensor, Tensor> batch_norm_relu_cpu(const Tensor& input, const Tensor& mean, const Tensor& var,
                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                               double eps, const std::optional<Tensor>& residual,
                                               const std::optional<Tensor>& residual_mean,
                                               const std::optional<Tensor>& residual_var,
                                               const std::optional<Tensor>& residual_weight,
                                               const std::optional<Tensor>& residual_bias, double residual_eps,
                                               bool relu, bool with_mask) {
  const Map x(input);
  Norm norm(x.channels, mean, var, weight, bias, eps);
  std::optional<Norm> residual_norm;
  std::optional<Map> r;
  if (residual.has_value()) r.emplace(*residual);
  if (residual_mean.has_value())
    residual_norm.emplace(x.channels, *residual_mean, *residual_var, residual_weight, residual_bias, residual_eps);
  Tensor out = empty_map(x.size(), x.dtype());
  Tensor mask = with_mask ? torch::stable::empty({input.size(0), input.size(2), input.size(3), (x.channels + 7) / 8},
                                                 ScalarType::Byte)
                          : empty_tensor(ScalarType::Byte);
  const NormApply apply{x.data,
                        norm.pointers(),
                        r ? r->data : nullptr,
                        residual_norm ? residual_norm->pointers() : NormVectors{},
                        out.mutable_data_ptr(),
                        with_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr,
                        x.type,
                        x.channels,
                        relu};
  for_each_pixels(x.pixels, x.channels,
                  [&](int64_t begin, int64_t end) { kernels().batch_norm_apply(apply, begin, end); });
  return {with_exact_strides(out), mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward_cpu(
    const Tensor& grad, const Tensor& input, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& shortcut, const std::optional<Tensor>& shortcut_mean,
    const std::optional<Tensor>& shortcut_var, const std::optional<Tensor>& shortcut_weight, double shortcut_eps,
    bool relu, bool needs_residual) {
  const Map g(grad), x(input);
  Norm norm(x.channels, mean, var, weight, bias, eps);
  std::optional<Map> other;
  std::optional<Norm> other_norm;
  if (shortcut.has_value()) {
    other.emplace(*shortcut);
    other_norm.emplace(x.channels, *shortcut_mean, *shortcut_var, shortcut_weight, std::nullopt, shortcut_eps);
  }
  Tensor to = empty_map(x.size(), x.dtype());
  const bool two = other || needs_residual;
  Tensor to_other = two ? empty_map(x.size(), x.dtype()) : empty_tensor(x.dtype());
  NormGrad job{g.data,
               x.data,
               norm.pointers(),
               {},
               other ? other->data : nullptr,
               other ? other_norm->pointers() : NormVectors{},
               {},
               mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
               to.mutable_data_ptr(),
               two ? to_other.mutable_data_ptr() : nullptr,
               x.type,
               x.channels,
               relu};

  const int64_t chunk = chunk_of(x.pixels), chunks = (x.pixels + chunk - 1) / chunk, kinds = other ? 3 : 2;
  const Scratch<Partial> scratch(std::max<int64_t>(1, chunks * 3 * x.channels) * sizeof(float));
  float* partial = scratch.floats();  // [chunks][3][channels]
  for_each_chunk(x.pixels, x.channels, [&](int64_t i, int64_t begin, int64_t end, int64_t first, int64_t last) {
    kernels().batch_norm_grad_sums(job, begin, end, first, last, partial + i * 3 * x.channels);
  });
  std::array<std::vector<double>, 3> sums;
  for (int64_t k = 0; k < kinds; ++k) {
    sums[k].resize(x.channels);
    for (int64_t i = 0; i < chunks; ++i)
      for (int64_t c = 0; c < x.channels; ++c) sums[k][c] += partial[(i * 3 + k) * x.channels + c];
  }

  Vectors slope(2, x.channels), other_slope(2, x.channels);
  norm.slope_of(sums[0].data(), sums[1].data(), x.pixels, slope);
  job.slope = {slope[0], slope[1]};
  if (other) {
    other_norm->slope_of(sums[0].data(), sums[2].data(), x.pixels, other_slope);
    job.shortcut_slope = {other_slope[0], other_slope[1]};
  }
  for_each_pixels(x.pixels, x.channels,
                  [&](int64_t begin, int64_t end) { kernels().batch_norm_grad(job, begin, end); });
  return {with_exact_strides(to), to_tensor(sums[1], &norm.invstd), to_tensor(sums[0]),
          two ? with_exact_strides(to_other) : to_other,
          other ? to_tensor(sums[2], &other_norm->invstd) : empty_tensor(ScalarType::Float)};
}

}  // namespace resnet_fast
