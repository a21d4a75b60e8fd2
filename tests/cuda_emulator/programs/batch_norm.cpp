// Batch normalisation in training in every type, against plain loops in float64: for builds with sanitizers and with
// planted faults.
//
//   batch_norm CASE SCHEDULE LANDING SEED      0: right, 1: wrong values, 2: what the emulator says
#include "batch_norm.h"

#include <cmath>
#include <cstdlib>
#include <string>

#include "maps.h"

namespace {

using namespace resnet_fast;

// A map [pixels, C] of small integers around `mean`.
template <typename T>
Buffer<T> map_of(int64_t pixels, int c, unsigned seed, float mean = 0) {
  Buffer<T> map(pixels * c, 0, seed);
  for (T& value : map.memory) value = from_float<T>(to_float(value) + mean);
  return map;
}

using Vector = std::vector<double>;

struct Moments {
  Vector mean, var;
  template <typename T>
  Moments(const Buffer<T>& x, int64_t pixels, int c) : mean(c), var(c) {
    for (int64_t i = 0; i < pixels * c; ++i) mean[i % c] += x[i] / double(pixels);
    for (int64_t i = 0; i < pixels * c; ++i) var[i % c] += (x[i] - mean[i % c]) * (x[i] - mean[i % c]) / double(pixels);
  }
};

// A normalisation, and the tensors that the kernels read it from: one strided, one of another type.
struct Norm {
  Vector mean, scale, bias, deviation;
  std::vector<float> means, vars, weights, no_bias;
  std::vector<__nv_bfloat16> biases;
  BatchNorm norm;

  Norm(const Moments& m, unsigned seed, float eps)
      : mean(m.mean), scale(m.mean.size()), bias(scale.size()), deviation(scale.size()), weights(2 * scale.size() - 1) {
    Buffer<float> values(2 * int64_t(scale.size()), 0, seed);
    for (size_t c = 0; c < scale.size(); ++c) {
      means.push_back(float(m.mean[c])), vars.push_back(float(m.var[c]));
      weights[2 * c] = values[c] / 4 + 0.125f, biases.push_back(__float2bfloat16_rn(values[scale.size() + c]));
      deviation[c] = std::sqrt(m.var[c] + eps), scale[c] = weights[2 * c] / deviation[c];
      bias[c] = __bfloat162float(biases[c]);
    }
    norm = {{means.data()}, {vars.data()}, {weights.data(), Type::float32, 2}, {biases.data(), Type::bfloat16}, eps};
  }
  double operator()(int c, double x) const { return (x - mean[c]) * scale[c] + bias[c]; }
};

// As near as the type and sums in float32 allow.
template <typename T>
bool near(double found, double right, double size) {
  const double unit = sizeof(T) == 4 ? 1e-6 : TypeOf<T>::type == Type::float16 ? 1e-3 : 8e-3;
  return std::abs(found - right) <= unit * std::abs(right) + 1e-5 * size;
}

template <typename T>
int statistics(int64_t pixels, int c) {
  const Buffer<T> x = map_of<T>(pixels, c, 1, 100);
  const Moments right(x, pixels, c);
  BatchNormStatistics m{split_map(TypeOf<T>::type, pixels, c)};
  std::vector<float> partial(chunks_of(m.map) * 3 * c), mean(c), var(c);
  m.x = x.memory.data(), m.partial = partial.data(), m.mean = mean.data(), m.var = var.data();
  const int error = launch_batch_norm_statistics(m, nullptr);
  int64_t wrong = 0;
  for (int i = 0; i < c; ++i) wrong += !near<float>(mean[i], right.mean[i], 1) || !near<float>(var[i], right.var[i], 1);
  return verdict("batch_norm_statistics", error, wrong);
}

enum class Residual { none, plain, normalised };

template <typename T>
struct Problem {
  int64_t pixels;
  int c;
  Residual kind;
  Buffer<T> x, residual;
  Norm norm, other;
  std::vector<uint8_t> mask;

  Problem(int64_t pixels, int c, Residual kind)
      : pixels(pixels),
        c(c),
        kind(kind),
        x(map_of<T>(pixels, c, 1)),
        residual(map_of<T>(pixels, c, 2)),
        norm(Moments(x, pixels, c), 3, 1e-5f),
        other(Moments(residual, pixels, c), 4, 1e-4f),
        mask(pixels * ((c + 7) / 8)) {}
  double sum(int64_t i) const {
    const double y = norm(int(i % c), x[i]);
    return kind == Residual::none ? y : y + (kind == Residual::plain ? residual[i] : other(int(i % c), residual[i]));
  }
  uint8_t& byte(int64_t i) { return mask[i / c * ((c + 7) / 8) + i % c / 8]; }
  bool bit(int64_t i) { return byte(i) >> (i % c % 8) & 1; }
};

template <typename T>
int forward(int64_t pixels, int c, Residual kind, bool relu) {
  Problem<T> p(pixels, c, kind);
  Buffer<T> out(pixels * c, 0, 5);
  BatchNormRelu m{split_map(TypeOf<T>::type, pixels, c)};
  std::fill(p.mask.begin(), p.mask.end(), uint8_t(255));
  m.x = p.x.begin(), m.out = out.begin(), m.mask = p.mask.data(), m.norm = p.norm.norm, m.relu = relu;
  if (kind != Residual::none) m.residual = p.residual.begin();
  if (kind == Residual::normalised) m.residual_norm = p.other.norm;
  const int error = launch_batch_norm_relu(m, nullptr);
  int64_t wrong = 0;
  for (int64_t i = 0; i < pixels * c; ++i) {
    const double y = p.sum(i);
    wrong += !near<T>(out[i], relu && y < 0 ? 0 : y, 16) || (std::abs(y) > 1e-3 && p.bit(i) != (y > 0));
    if (i % c == c - 1) wrong += c % 8 != 0 && p.byte(i) >> (c % 8) != 0;  // bits of no channel
  }
  return verdict("batch_norm_relu", error, wrong);
}

// The gradient of a normalised map and of its weight, behind d.
struct Through {
  Vector of_map, of_weight, of_bias;
  template <typename T>
  Through(const Vector& d, const Buffer<T>& x, const Norm& norm, int64_t pixels, int c)
      : of_map(d.size()), of_weight(c), of_bias(c) {
    for (int64_t i = 0; i < pixels * c; ++i) {
      of_weight[i % c] += d[i] * (x[i] - norm.mean[i % c]) / norm.deviation[i % c];
      of_bias[i % c] += d[i];
    }
    for (int64_t i = 0, k = 0; i < pixels * c; ++i, k = i % c) {
      const double along = (x[i] - norm.mean[k]) / norm.deviation[k] * of_weight[k];
      of_map[i] = norm.scale[k] * (d[i] - (of_bias[k] + along) / double(pixels));
    }
  }
};

// Through a mask of any bits or, without one, through the ReLU of norm(x).
template <typename T>
int backward(int64_t pixels, int c, Residual kind, bool masked) {
  Problem<T> p(pixels, c, kind);
  Buffer<T> grad = map_of<T>(pixels, c, 6), of_x(pixels * c, 0, 7), of_residual(pixels * c, 0, 8);
  Vector d(pixels * c);
  for (int64_t i = 0; i < pixels * c; ++i) {
    if (masked && i * 2654435761u >> 7 & 1) p.byte(i) |= uint8_t(1u << i % c % 8);
    d[i] = (masked ? p.bit(i) : p.norm(int(i % c), p.x[i]) > 0) ? grad[i] : 0;
  }
  BatchNormReluBackward m{split_map(TypeOf<T>::type, pixels, c)};
  std::vector<float> partial(chunks_of(m.map) * (kind == Residual::normalised ? 3 : 2) * c), sums(3 * c);
  m.grad = grad.begin(), m.x = p.x.begin(), m.mask = masked ? p.mask.data() : nullptr, m.relu = true;
  m.of_x = of_x.begin(), m.partial = partial.data(), m.norm = p.norm.norm, m.shortcut_norm = p.other.norm;
  for (int k = 0; k < 3; ++k) m.sums[k] = sums.data() + k * c;
  if (kind != Residual::none) m.of_residual = of_residual.begin();
  if (kind == Residual::normalised) m.shortcut = p.residual.begin();
  const int error = launch_batch_norm_relu_backward(m, nullptr);

  const Through right(d, p.x, p.norm, pixels, c), other(d, p.residual, p.other, pixels, c);
  const double total = double(pixels);
  int64_t wrong = 0;
  for (int64_t i = 0; i < pixels * c; ++i) {
    wrong += !near<T>(of_x[i], right.of_map[i], 16);
    const double residual = kind == Residual::normalised ? other.of_map[i] : d[i];
    if (kind != Residual::none) wrong += !near<T>(of_residual[i], residual, 16);
  }
  for (int i = 0; i < c; ++i) {
    wrong += !near<float>(sums[i], right.of_bias[i], total) || !near<float>(sums[c + i], right.of_weight[i], total);
    if (kind == Residual::normalised) wrong += !near<float>(sums[2 * c + i], other.of_weight[i], total);
  }
  return verdict("batch_norm_relu_backward", error, wrong);
}

// Words of 16 bytes and of one value, one chunk and several, one tile and two, more lanes than words, few pixels.
template <typename T>
int all_of(const std::string& name) {
  constexpr int wide = 16 / sizeof(T);  // values
  int result = 0;
  const auto note = [&](int of_case) { result = result != 0 ? result : of_case; };
  if (name == "statistics" || name == "all") {
    note(statistics<T>(99, 32 * wide)), note(statistics<T>(35, 3 * wide)), note(statistics<T>(70, 35));
    note(statistics<T>(1025, 1)), note(statistics<T>(1, 3));
    note(statistics<T>(4231, 35));  // more chunks than a quarter of the rows that add them up
  }
  if (name == "forward" || name == "all") {
    note(forward<T>(37, 33 * wide, Residual::plain, true)), note(forward<T>(35, 3 * wide, Residual::normalised, true));
    note(forward<T>(20, 35, Residual::none, false)), note(forward<T>(9, 3, Residual::plain, true));
    note(forward<T>(2, 1, Residual::normalised, true));
  }
  if (name == "backward" || name == "all") {
    note(backward<T>(37, 33 * wide, Residual::plain, true)), note(backward<T>(70, 35, Residual::normalised, true));
    note(backward<T>(35, 3 * wide, Residual::normalised, true)), note(backward<T>(40, 8 * wide, Residual::none, false));
    note(backward<T>(9, 3, Residual::none, false)), note(backward<T>(1025, 1, Residual::plain, true));
  }
  if (name == "races" && sizeof(T) == 2) {  // every barrier once: ThreadSanitizer takes its time for every thread
    note(statistics<T>(35, 3 * wide)), note(forward<T>(9, 3, Residual::normalised, true));
    note(backward<T>(35, wide, Residual::normalised, true)), note(backward<T>(40, 3, Residual::none, false));
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 3;
  emulator_configure(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
  int result = 0;
  for (const int of_type : {all_of<float>(argv[1]), all_of<__nv_bfloat16>(argv[1]), all_of<__half>(argv[1])})
    result = result != 0 ? result : of_type;
  return result;
}
