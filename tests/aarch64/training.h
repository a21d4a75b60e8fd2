// The kernels of training against naive loops: batch normalisation, max-pooling with indices, gradients of weights and
// weights transformed for Winograd's algorithm.
#pragma once

#include "cases.h"

namespace {

// A normalisation of integers and powers of two, with the room behind that kernels ask for.
struct NormCase {
  std::vector<float> mean, scale, shift;

  explicit NormCase(int64_t channels) : mean(floats(integers(channels))), scale(mean.size()), shift(mean.size()) {
    for (int64_t c = 0; c < channels; ++c) scale[c] = std::ldexp(1.0f, int(c % 3) - 1), shift[c] = float(c % 5) - 2;
    for (auto* v : {&mean, &scale, &shift}) v->resize(channels + level::vector_width);
  }
  NormVectors pointers() const { return {mean.data(), scale.data(), shift.data()}; }
  double of(double x, int64_t c) const { return (x - mean[c]) * scale[c] + shift[c]; }
};

void test_batch_norm_moments(Storage type, int64_t pixels, int64_t channels) {
  const std::vector<double> map = integers(pixels * channels);
  std::vector<double> expected(2 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) expected[c] += map[p * channels + c] / double(pixels);
    for (int64_t p = 0; p < pixels; ++p) expected[channels + c] += std::pow(map[p * channels + c] - expected[c], 2);
  }
  Values values(type, map), found(Storage::f32, 2 * channels);
  std::vector<float> moments(3 * channels);
  const int64_t middle = channels / 2;
  level::batch_norm_moments(values.data(), type, pixels, channels, 0, middle, moments.data());
  level::batch_norm_moments(values.data(), type, pixels, channels, middle, channels, moments.data());
  for (int64_t c = 0; c < channels; ++c) {
    found.set(c, float(double(moments[c]) + moments[channels + c]));
    found.set(channels + c, moments[2 * channels + c]);
  }
  expect_near(found, expected, 1e-6, "batch_norm_moments", name_of(type));
}

// kind: without a residual, with one, with a normalised one.
void test_batch_norm(Storage type, int64_t pixels, int64_t channels, int kind) {
  const int64_t n = pixels * channels, mask_bytes = ceil_div(channels, 8);
  const std::vector<double> x = integers(n), r = integers(n), g = integers(n);
  const NormCase norm(channels), other(channels);
  std::vector<double> out(n), behind(n);
  std::vector<uint8_t> expected_mask(pixels * mask_bytes), mask(pixels * mask_bytes, 0xff);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = i % channels;
    const double y = norm.of(x[i], c) + (kind == 0 ? 0 : kind == 1 ? r[i] : other.of(r[i], c));
    out[i] = std::max(y, 0.0);
    behind[i] = y > 0 ? g[i] : 0;
    if (y > 0) expected_mask[i / channels * mask_bytes + c / 8] |= uint8_t(1 << c % 8);
  }
  Values input(type, x), residual(type, r), grad(type, g), output(type, n);
  const bool masked = kind > 0;
  level::batch_norm_apply({input.data(), norm.pointers(), kind > 0 ? residual.data() : nullptr,
                           kind == 2 ? other.pointers() : NormVectors{}, output.data(), masked ? mask.data() : nullptr,
                           type, channels, true},
                          0, pixels);
  expect_values(output, out, type, "batch_norm_apply", name_of(type));
  expect(!masked || mask == expected_mask, "batch_norm_apply", "mask");

  std::vector<float> slope(channels + level::vector_width), offset(slope);
  for (int64_t c = 0; c < channels; ++c) slope[c] = float(c % 3) - 1, offset[c] = float(c % 2);
  Values to(type, n), to_shortcut(type, n);
  const bool two = kind == 2;
  NormGrad job{grad.data(),
               input.data(),
               norm.pointers(),
               {slope.data(), offset.data()},
               two ? residual.data() : nullptr,
               two ? other.pointers() : NormVectors{},
               {slope.data(), offset.data()},
               masked ? mask.data() : nullptr,
               to.data(),
               masked ? to_shortcut.data() : nullptr,
               type,
               channels,
               true};
  std::vector<double> sums(3 * channels), of_input(n), of_shortcut(n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = i % channels;
    const double from = x[i] - norm.mean[c], from_other = r[i] - other.mean[c];
    sums[c] += behind[i], sums[channels + c] += behind[i] * from;
    if (two) sums[2 * channels + c] += behind[i] * from_other;
    of_input[i] = norm.scale[c] * behind[i] + slope[c] * from + offset[c];
    of_shortcut[i] = two ? other.scale[c] * behind[i] + slope[c] * from_other + offset[c] : behind[i];
  }
  std::vector<float> partial(3 * channels);
  level::batch_norm_grad_sums(job, 0, pixels, 0, channels, partial.data());
  bool right = true;
  for (int64_t i = 0; i < (two ? 3 : 2) * channels; ++i) right = right && partial[i] == sums[i];
  expect(right, "batch_norm_grad_sums", name_of(type));
  level::batch_norm_grad(job, 0, pixels);
  expect_values(to, of_input, type, "batch_norm_grad", name_of(type));
  if (masked) expect_values(to_shortcut, of_shortcut, type, "batch_norm_grad, shortcut", name_of(type));
}

void test_max_pool_with_indices(Storage type, int64_t width, int64_t channels) {
  const int64_t kernel = 3, stride = 2, padding = 1, pixels = (width + 2 * padding - kernel) / stride + 1;
  const std::vector<double> rows[] = {integers(width * channels), integers(width * channels)};
  std::vector<double> largest(pixels * channels, -INFINITY), gradient(width * channels);
  std::vector<uint8_t> places(pixels * channels), found(pixels * channels);
  const int64_t taps[] = {1, 2};  // the kernel's first row lies in the padding
  const std::vector<double> g = integers(pixels * channels);
  for (int64_t q = 0; q < pixels; ++q)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = q * channels + c;
      int64_t at = -1;
      for (int64_t row = 0; row < 2; ++row)
        for (int64_t t = 0; t < kernel; ++t) {
          const int64_t x = q * stride - padding + t;
          if (x < 0 || x >= width || rows[row][x * channels + c] <= largest[i]) continue;
          largest[i] = rows[row][x * channels + c], places[i] = uint8_t(taps[row] * kernel + t), at = row == 0 ? x : -1;
        }
      if (at >= 0) gradient[at * channels + c] += g[i];
    }
  Values first(type, rows[0]), second(type, rows[1]), output(type, pixels * channels), grad(type, g),
      to(type, width * channels);
  const void* pointers[] = {first.data(), second.data()};
  level::max_pool_row_with_indices(
      {pointers, 2, width, channels, kernel, stride, padding, 1, output.data(), pixels, type, type}, taps,
      found.data());
  expect_values(output, largest, type, "max_pool_row_with_indices", name_of(type));
  expect(found == places, "max_pool_row_with_indices", "indices");
  const void* grads[] = {grad.data()};
  const uint8_t* indices[] = {found.data()};
  level::max_pool_grad_row(
      {grads, indices, taps, 1, width, channels, pixels, kernel, stride, padding, 1, to.data(), type});
  expect_values(to, gradient, type, "max_pool_grad_row", name_of(type));
}

void test_weight_grad(ConvShape s, Storage type, bool winograd, bool normalises) {
  const Case c(s, false, false);
  s = c.shape;
  const NormCase norm(s.c);
  const std::vector<double> g = integers(s.n * s.p * s.q * s.k);
  std::vector<double> expected(s.k * s.c * s.r * s.s);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t p = 0; p < s.p; ++p)
      for (int64_t q = 0; q < s.q; ++q)
        for (int64_t r = 0; r < s.r; ++r)
          for (int64_t t = 0; t < s.s; ++t) {
            const int64_t y = p * s.stride[0] - s.padding[0] + r, x = q * s.stride[1] - s.padding[1] + t;
            if (y < 0 || y >= s.h || x < 0 || x >= s.w) continue;
            for (int64_t k = 0; k < s.k; ++k)
              for (int64_t d = 0; d < s.c; ++d) {
                const double v = c.at(n, y, x, d), in = normalises ? std::max(norm.of(v, d), 0.0) : v;
                expected[((k * s.c + d) * s.r + r) * s.s + t] += in * g[((n * s.p + p) * s.q + q) * s.k + k];
              }
          }
  std::vector<float> transform;
  for (int64_t i = 0; winograd && i < weight_grad_size; ++i)
    for (int64_t j = 0; j < weight_grad_tile; ++j)
      transform.push_back(float(transform_of_weights(weight_grad_taps, weight_grad_tile, i, j)));
  Values input(type, c.input), grad(type, g), output(Storage::f32, int64_t(expected.size()));
  const int64_t units = winograd ? s.n * ceil_div(s.p, 4) * ceil_div(s.q, 4) : s.n * s.p * s.q;
  const int64_t panel = level::gemm_panel, positions = winograd ? weight_grad_size * weight_grad_size : s.r * s.s;
  const int64_t grad_positions = winograd ? positions : 1, k_panels = ceil_div(s.k, panel),
                c_panels = ceil_div(s.c, panel);
  const WeightGrad job{s,
                       input.data(),
                       normalises ? norm.pointers() : NormVectors{},
                       grad.data(),
                       type,
                       type,
                       winograd,
                       transform.data(),
                       units,
                       static_cast<float*>(output.data()),
                       {s.c * s.r * s.s, s.r * s.s, s.s, 1}};
  const auto inputs = scratch(positions * c_panels * units * panel * 4);
  const auto grads = scratch(grad_positions * k_panels * units * panel * 4);
  const auto sums = scratch(positions * panel * panel * 4);
  level::weight_grad_input(job, 0, units, static_cast<float*>(inputs.get()));
  level::weight_grad_grad(job, 0, units, static_cast<float*>(grads.get()));
  bool finite = true;
  for (int64_t k = 0; k < k_panels; ++k)
    for (int64_t d = 0; d < c_panels; ++d) {
      float* to = static_cast<float*>(sums.get());
      for (int64_t i = 0; i < positions; ++i)
        level::weight_grad_products(
            static_cast<float*>(grads.get()) + (k * grad_positions + (winograd ? i : 0)) * units * panel,
            static_cast<float*>(inputs.get()) + (d * positions + i) * units * panel, units,
            std::min(panel, s.k - k * panel), s.c - d * panel, to + i * panel * panel, false);
      finite &= level::weight_grad_output(job, k * panel, d * panel, to);
    }
  const Text text(s, type);
  expect(finite, "weight_grad", text.text);
  expect_near(output, expected, winograd ? 3e-6 : 0, winograd ? "weight_grad, winograd" : "weight_grad", text.text);
}

// As pack_winograd has it, from a weight of either layout, turned around or not.
void test_winograd_weight(int64_t m, int64_t filters, int64_t channels, bool channels_last) {
  const Case c(shape(1, channels, filters, 3, 3, 3, 3, 1), false, false);
  std::vector<float> weight(c.weight.size());
  for (int64_t k = 0; k < filters; ++k)
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t t = 0; t < 9; ++t)
        weight[channels_last ? (k * 9 + t) * channels + d : (k * channels + d) * 9 + t] =
            float(c.weight[(k * channels + d) * 9 + t]);
  std::vector<double> transform;
  for (int64_t i = 0; i < m + 2; ++i)
    for (int64_t j = 0; j < 3; ++j) transform.push_back(transform_of_weights(m, 3, i, j));
  const WinogradWeight w{weight.data(),
                         9 * channels,
                         channels_last ? 1 : 9,
                         channels_last ? 3 * channels : 3,
                         channels_last ? channels : 1,
                         filters,
                         channels,
                         transform.data(),
                         Storage::f32};
  const std::vector<double> expected = pack_winograd(c, m, Storage::f32);
  Values packed(Storage::f32, int64_t(expected.size()));
  for (int64_t k = 0; k < filters; k += level::gemm_panel)
    level::winograd_weight(w, m, k, 0, channels, static_cast<float*>(packed.data()) + k * (m + 2) * (m + 2) * channels);
  expect_near(packed, expected, 1e-7, "winograd_weight", channels_last ? "channels_last" : "contiguous");
}

void test_training() {
  for (const Storage type : types) {
    for (const int64_t channels : {1, 7, 8, 17, 64, 70}) {
      for (const int64_t pixels : {1, 2, 33, 100}) test_batch_norm_moments(type, pixels, channels);
      for (const int kind : {0, 1, 2}) test_batch_norm(type, 37, channels, kind);
      for (const int64_t width : {1, 8, 9}) test_max_pool_with_indices(type, width, channels);
    }
    for (const bool normalises : {false, true}) {
      for (const bool winograd : {false, true})
        test_weight_grad(shape(2, 17, 9, 9, 6, 3, 3, 1), type, winograd, normalises);
      test_weight_grad(shape(1, 70, 67, 5, 5, 1, 1, 0), type, false, normalises);
      test_weight_grad(shape(2, 5, 18, 7, 8, 3, 3, 1, 2), type, false, normalises);
    }
  }
  for (const int64_t m : {2, 4, 5})
    for (const bool channels_last : {false, true}) {
      test_winograd_weight(m, 7, 9, channels_last);
      test_winograd_weight(m, 70, 33, channels_last);
    }
}

}  // namespace
