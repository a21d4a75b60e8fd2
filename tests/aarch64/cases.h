// What the tests in test_kernels.cpp share: values of a type, convolutions with their results by naive loops, and
// weights in the layouts of the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/levels.h"

using namespace resnet_fast;
namespace level = resnet_fast::RESNET_FAST_LEVEL;

namespace {

constexpr Storage types[] = {Storage::f32, Storage::bf16, Storage::f16};
constexpr Storage weight_types[] = {Storage::f32, Storage::bf16};
const double nan_value = std::numeric_limits<double>::quiet_NaN();
int failures = 0, checks = 0;

const char* name_of(Storage type) {
  return type == Storage::f32 ? "float32" : type == Storage::bf16 ? "bfloat16" : "float16";
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// n of [-3, 3], always the same ones.
std::vector<double> integers(int64_t n) {
  static std::minstd_rand random(1);
  std::vector<double> values(n);
  for (double& v : values) v = double(random() % 7) - 3;
  return values;
}

// To nearest even with that many bits of precision; no subnormals come up here.
double round_to(double v, int bits) {
  if (v == 0 || !std::isfinite(v)) return v;
  int exponent;
  const double mantissa = std::frexp(v, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, bits)), exponent - bits);
}

int precision(Storage type) { return type == Storage::f32 ? 24 : type == Storage::bf16 ? 8 : 11; }

// Values as the kernels see them.
class Values {
 public:
  Values(Storage type, int64_t n) : type_(type), bytes_(n * (type == Storage::f32 ? 4 : 2)) {}
  Values(Storage type, const std::vector<double>& from) : Values(type, int64_t(from.size())) {
    for (size_t i = 0; i < from.size(); ++i) set(i, from[i]);
  }

  void* data() { return bytes_.data(); }

  double get(int64_t i) const {
    if (type_ == Storage::f32) return at<float>(i);
    const uint16_t bits = at<uint16_t>(i);
    const int exponent_bits = type_ == Storage::bf16 ? 8 : 5, fraction_bits = 15 - exponent_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1, exponent = (bits & 0x7fff) >> fraction_bits;
    const double fraction = std::ldexp(bits & ((1 << fraction_bits) - 1), -fraction_bits), sign = bits >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? nan_value : sign * INFINITY;
    return sign * (exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias));
  }

  // Only what the type represents exactly, and NaN.
  void set(int64_t i, double v) {
    if (type_ == Storage::f32) return put<float>(i, float(v));
    const int exponent_bits = type_ == Storage::bf16 ? 8 : 5, fraction_bits = 15 - exponent_bits;
    if (std::isnan(v)) return put<uint16_t>(i, uint16_t(0x7fff));
    if (v == 0) return put<uint16_t>(i, 0);
    const int exponent = std::ilogb(v), bias = (1 << (exponent_bits - 1)) - 1;
    const int fraction = int(std::ldexp(std::fabs(v), fraction_bits - exponent)) - (1 << fraction_bits);
    put<uint16_t>(i, uint16_t((v < 0) << 15 | (exponent + bias) << fraction_bits | fraction));
  }

 private:
  template <typename T>
  T at(int64_t i) const {
    T v;
    std::memcpy(&v, bytes_.data() + i * sizeof(T), sizeof(T));
    return v;
  }
  template <typename T>
  void put(int64_t i, T v) {
    std::memcpy(bytes_.data() + i * sizeof(T), &v, sizeof(T));
  }
  Storage type_;
  std::vector<char> bytes_;
};

std::vector<float> floats(const std::vector<double>& from) { return {from.begin(), from.end()}; }

struct Freed {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, Freed> scratch(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes) != 0) std::abort();
  std::memset(p, 0xff, bytes);  // NaN: nothing may be read before it is written
  return std::unique_ptr<void, Freed>(p);
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void expect(bool right, const char* what, const char* details) {
  ++checks;
  if (right) return;
  ++failures;
  std::printf("FAILED %s: %s\n", what, details);
}

// Every value is `expected`, rounded to the type.
void expect_values(const Values& got, const std::vector<double>& expected, Storage type, const char* what,
                   const char* details) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double right = round_to(expected[i], precision(type));
    if (same(got.get(i), right)) continue;
    char text[400];
    std::snprintf(text, sizeof(text), "%s, %s: value %zu is %g instead of %g", details, name_of(type), i, got.get(i),
                  right);
    return expect(false, what, text);
  }
  expect(true, what, details);
}

// RMS(error) / RMS(expected) is at most `bound`; integers that are all zero count as 1.
void expect_near(const Values& got, const std::vector<double>& expected, double bound, const char* what,
                 const char* details) {
  double error = 0, total = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = got.get(i) - expected[i];
    error += difference * difference;
    total += expected[i] * expected[i];
  }
  total = std::max(total, 1.0);
  char text[400];
  std::snprintf(text, sizeof(text), "%s: relative error %g above %g", details, std::sqrt(error / total), bound);
  expect(std::sqrt(error) <= bound * std::sqrt(total), what, text);
}

// What a convolution is given: maps [N, H, W, C], weight [K, C / groups, R, S].
struct Case {
  ConvShape shape;
  bool relu, with_residual;
  std::vector<double> input, weight, bias, residual;

  Case(ConvShape s, bool relu, bool with_residual, double weight_step = 1) : relu(relu), with_residual(with_residual) {
    s.p = (s.h + 2 * s.padding[0] - s.dilation[0] * (s.r - 1) - 1) / s.stride[0] + 1;
    s.q = (s.w + 2 * s.padding[1] - s.dilation[1] * (s.s - 1) - 1) / s.stride[1] + 1;
    shape = s;
    input = integers(s.n * s.h * s.w * s.c);
    weight = integers(s.k * s.c / s.groups * s.r * s.s);
    for (double& w : weight) w *= weight_step;
    bias = integers(s.k);
    residual = integers(s.n * s.p * s.q * s.k);
  }

  double at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    const bool inside = y >= 0 && y < shape.h && x >= 0 && x < shape.w;
    return inside ? input[((n * shape.h + y) * shape.w + x) * shape.c + c] : 0;
  }

  std::vector<double> expected() const {
    const ConvShape& s = shape;
    const int64_t depth = s.c / s.groups, filters = s.k / s.groups;
    std::vector<double> out;
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t p = 0; p < s.p; ++p)
        for (int64_t q = 0; q < s.q; ++q)
          for (int64_t k = 0; k < s.k; ++k) {
            double sum = bias[k];
            for (int64_t c = 0; c < depth; ++c)
              for (int64_t r = 0; r < s.r; ++r)
                for (int64_t t = 0; t < s.s; ++t)
                  sum += weight[((k * depth + c) * s.r + r) * s.s + t] *
                         at(n, p * s.stride[0] - s.padding[0] + r * s.dilation[0],
                            q * s.stride[1] - s.padding[1] + t * s.dilation[1], k / filters * depth + c);
            if (with_residual) sum += residual[out.size()];
            out.push_back(relu && sum < 0 ? 0 : sum);
          }
    return out;
  }
};

// A Case as the kernels take it.
struct Call {
  Values input, residual, output, weight;
  std::vector<float> bias, zeros;
  Conv conv;

  Call(const Case& c, Storage input_type, Storage output_type, const std::vector<double>& packed,
       Storage weight_type = Storage::f32)
      : input(input_type, c.input),
        residual(output_type, c.residual),
        output(output_type, int64_t(c.residual.size())),
        weight(weight_type, packed),
        bias(floats(c.bias)),
        zeros(c.shape.c + level::vector_width) {
    bias.resize(c.shape.k + level::gemm_panel);
    conv.shape = c.shape;
    conv.input = input.data();
    conv.weight = weight.data();
    conv.bias = bias.data();
    conv.residual = c.with_residual ? residual.data() : nullptr;
    conv.output = output.data();
    conv.zeros = zeros.data();
    conv.input_type = input_type;
    conv.output_type = output_type;
    conv.weight_type = weight_type;
    conv.relu = c.relu;
  }
};

struct Text {
  char text[300];
  Text(const ConvShape& s, Storage type) {
    std::snprintf(
        text, sizeof(text), "%s [%d,%d,%d,%d] -> %d, %dx%d, stride %d,%d, padding %d,%d, dilation %d,%d, %d groups",
        name_of(type), int(s.n), int(s.c), int(s.h), int(s.w), int(s.k), int(s.r), int(s.s), int(s.stride[0]),
        int(s.stride[1]), int(s.padding[0]), int(s.padding[1]), int(s.dilation[0]), int(s.dilation[1]), int(s.groups));
  }
};

// The layouts of csrc/cpu/conv_gemm.cpp, conv_winograd.cpp, conv_winograd_stem.cpp, conv_grouped.cpp and
// conv_few_channels.cpp.

int64_t padded_filters(int64_t filters) { return ceil_div(filters, level::vector_width) * level::vector_width; }

// Whether kernels take weights of this type with maps of that one, and how many values such a step of the depth has.
bool takes(Storage weight, Storage map) {
  return weight == Storage::f32 || (level::multiplies_bf16 && map == Storage::bf16);
}
int64_t step_of(Storage weight) { return weight == Storage::f32 ? 1 : 2; }

// `weight` is [groups][filters][depth][taps].
std::vector<double> pack_gemm(const std::vector<double>& weight, int64_t groups, int64_t filters, int64_t depth,
                              int64_t taps, Storage type) {
  const int64_t padded = padded_filters(filters);
  std::vector<double> packed(groups * padded * taps * depth);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t k = 0; k < filters; ++k)
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t first = k / level::gemm_panel * level::gemm_panel;
          const int64_t columns = std::min(level::gemm_panel, padded - first);
          const int64_t step = d + step_of(type) - d % step_of(type) <= depth ? step_of(type) : 1;
          packed[(g * padded + first) * taps * depth + (t * depth + d / step * step) * columns + (k - first) * step +
                 d % step] = weight[((g * filters + k) * depth + d) * taps + t];
        }
  return packed;
}

std::vector<double> pack_gemm(const Case& c, Storage type) {
  const ConvShape& s = c.shape;
  return pack_gemm(c.weight, s.groups, s.k / s.groups, s.c / s.groups, s.r * s.s, type);
}

// Row `row` and column `power` of Winograd's transform of weights with that many taps.
double transform_of_weights(int64_t m, int64_t taps, int64_t row, int64_t power) {
  std::vector<double> points{0, 1, -1};
  if (m + taps == 7) points = {0, 2.0 / 3, -2.0 / 3, 1.5, -1.5};
  if (m + taps == 8) points = {0.25, -0.25, 0.875, -0.875, 1.75, -1.75};
  if (row == int64_t(points.size())) return power == taps - 1 ? 1.0 : 0.0;
  double v = std::pow(points[row], double(power));
  for (const double q : points)
    if (q != points[row]) v /= points[row] - q;
  return v;
}

std::vector<double> pack_winograd(const Case& c, int64_t m, Storage type) {
  const int64_t size = m + 2, padded = padded_filters(c.shape.k), channels = c.shape.c, step = step_of(type);
  const int64_t depth = ceil_div(channels, step) * step;
  const auto g = [&](int64_t row, int64_t power) { return transform_of_weights(m, 3, row, power); };
  std::vector<double> packed(padded * size * size * depth);
  for (int64_t k = 0; k < c.shape.k; ++k)
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t i = 0; i < size; ++i)
        for (int64_t j = 0; j < size; ++j) {
          double sum = 0;
          for (int64_t r = 0; r < 3; ++r)
            for (int64_t t = 0; t < 3; ++t) sum += g(i, r) * g(j, t) * c.weight[((k * channels + d) * 3 + r) * 3 + t];
          const int64_t first = k / level::gemm_panel * level::gemm_panel;
          const int64_t columns = std::min(level::gemm_panel, padded - first);
          packed[first * size * size * depth + ((i * size + j) * depth + d / step * step) * columns +
                 (k - first) * step + d % step] = float(sum);
        }
  return packed;
}

// Its depth: the phases of even rows, then of odd ones, in each the even columns, then the odd ones.
std::vector<double> pack_winograd_stem(const Case& c) {
  const int64_t padded = padded_filters(c.shape.k), channels = c.shape.c, depth = 4 * channels;
  constexpr int64_t products = stem_size * stem_size;
  const auto g = [](int64_t row, int64_t power) { return transform_of_weights(stem_tile, stem_taps, row, power); };
  std::vector<double> packed(padded * products * depth);
  for (int64_t k = 0; k < c.shape.k; ++k)
    for (int64_t r = 0; r < 7; ++r)
      for (int64_t t = 0; t < 7; ++t)
        for (int64_t d = 0; d < channels; ++d)
          for (int64_t xi = 0; xi < products; ++xi) {
            const int64_t first = k / level::gemm_panel * level::gemm_panel;
            const int64_t columns = std::min(level::gemm_panel, padded - first);
            packed[first * products * depth + (xi * depth + (r % 2 * 2 + t % 2) * channels + d) * columns + k -
                   first] +=
                g(xi / stem_size, r / 2) * g(xi % stem_size, t / 2) * c.weight[((k * channels + d) * 7 + r) * 7 + t];
          }
  return packed;
}

std::vector<double> pack_grouped(const Case& c, const GroupedUnit& unit, Storage type) {
  const ConvShape& s = c.shape;
  const int64_t depth = s.c / s.groups, width = level::vector_width, step = step_of(type);
  std::vector<double> packed(unit.units * unit.vectors * s.r * depth * s.s * width);
  for (int64_t k = 0; k < s.k; ++k) {
    const int64_t in_unit = k % unit.filters, v = k / unit.filters * unit.vectors + in_unit / width;
    for (int64_t d = 0; d < depth; ++d)
      for (int64_t r = 0; r < s.r; ++r)
        for (int64_t t = 0; t < s.s; ++t)
          packed[((((v * s.r + r) * depth + d) / step * s.s + t) * width + in_unit % width) * step + d % step] =
              c.weight[((k * depth + d) * s.r + r) * s.s + t];
  }
  return packed;
}

ConvShape shape(int64_t n, int64_t c, int64_t k, int64_t h, int64_t w, int64_t r, int64_t s, int64_t padding,
                int64_t stride = 1, int64_t dilation = 1, int64_t groups = 1) {
  return {n, h, w, c, k, r, s, 0, 0, {stride, stride}, {padding, padding}, {dilation, dilation}, groups};
}

}  // namespace
