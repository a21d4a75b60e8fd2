// The transforms of Winograd's algorithm.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): F(m x m, r x r) computes m x m outputs of
// a convolution with r x r taps from (m + r - 1)^2 products instead of r^2 m^2, after a transform of the input tile
// (B^T d B) and before one of the products (A^T M A).
#pragma once

#include "vec.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// F(m, r). Each function transforms one column: `input` B^T x of m + r - 1 values, `output` A^T x of as many into m.
//
// The points: 0, +-2/3, +-3/2 for 6 values and +-1/4, +-7/8, +-7/4 for 7 lose 2 to 4 times less accuracy than 0, +-1,
// +-2 (, 1/2), and keep the pairs +-x that halve the work. All constants of the latter are exact in float32.
template <int m, int r>
struct Transform;

template <>
struct Transform<2, 3> {  // points 0, 1, -1, infinity
  static inline void input(const vec* x, vec* y) {
    y[0] = x[2] - x[0];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[3] - x[1];
  }
  static inline void output(const vec* x, vec* y) {
    y[0] = x[0] + x[1] + x[2];
    y[1] = x[1] - x[2] + x[3];
  }
};

// Points 0, a, -a, b, -b, infinity; a b = 1.
struct SixPoints {
  static constexpr float a = 2.0f / 3, b = 1.5f;
  static inline void input(const vec* x, vec* y) {
    constexpr float sum = float(4.0 / 9 + 9.0 / 4);
    y[0] = x[0] + x[4] - sum * x[2];
    y[5] = x[1] + x[5] - sum * x[3];
    vec even = x[4] - b * b * x[2], odd = x[3] - b * b * x[1];
    y[1] = even + a * odd;
    y[2] = even - a * odd;
    even = x[4] - a * a * x[2], odd = x[3] - a * a * x[1];
    y[3] = even + b * odd;
    y[4] = even - b * odd;
  }
  // Infinity adds x[5] to the last output alone.
  template <int m>
  static inline void outputs(const vec* x, vec* y) {
    const vec sum_a = x[1] + x[2], diff_a = x[1] - x[2], sum_b = x[3] + x[4], diff_b = x[3] - x[4];
    y[0] = x[0] + sum_a + sum_b;
    y[1] = a * diff_a + b * diff_b;
    y[2] = a * a * sum_a + b * b * sum_b;
    if constexpr (m == 4) y[3] = a * a * a * diff_a + b * b * b * diff_b;
    y[m - 1] += x[5];
  }
};

template <>
struct Transform<4, 3> : SixPoints {
  static inline void output(const vec* x, vec* y) { outputs<4>(x, y); }
};

template <>
struct Transform<3, 4> : SixPoints {
  static inline void output(const vec* x, vec* y) { outputs<3>(x, y); }
};

template <>
struct Transform<5, 3> {  // points a, -a, b, -b, c, -c, infinity
  static constexpr float a = 0.25f, b = 0.875f, c = 1.75f;
  static constexpr float a2 = a * a, b2 = b * b, c2 = c * c;
  static inline void pair(const vec* x, vec* y, float sum, float product, float point) {
    const vec odd = x[5] - sum * x[3] + product * x[1], even = x[4] - sum * x[2] + product * x[0];
    y[0] = odd + point * even;
    y[1] = odd - point * even;
  }
  static inline void input(const vec* x, vec* y) {
    pair(x, y, b2 + c2, b2 * c2, a);
    pair(x, y + 2, a2 + c2, a2 * c2, b);
    pair(x, y + 4, a2 + b2, a2 * b2, c);
    y[6] = x[6] - (a2 + b2 + c2) * x[4] + (a2 * b2 + a2 * c2 + b2 * c2) * x[2] - a2 * b2 * c2 * x[0];
  }
  static inline void output(const vec* x, vec* y) {
    const vec sum_a = x[0] + x[1], diff_a = x[0] - x[1], sum_b = x[2] + x[3], diff_b = x[2] - x[3], sum_c = x[4] + x[5],
              diff_c = x[4] - x[5];
    y[0] = sum_a + sum_b + sum_c;
    y[1] = a * diff_a + b * diff_b + c * diff_c;
    y[2] = a2 * sum_a + b2 * sum_b + c2 * sum_c;
    y[3] = a2 * a * diff_a + b2 * b * diff_b + c2 * c * diff_c;
    y[4] = a2 * a2 * sum_a + b2 * b2 * sum_b + c2 * c2 * sum_c + x[6];
  }
};

// B^T d B of a vector of channels: read(i, j) is the pixel in row i and column j, write(i, j, v) takes a result.
template <int m, int r, typename Read, typename Write>
static inline __attribute__((always_inline)) void transform_input(const Read& read, const Write& write) {
  constexpr int size = m + r - 1;
  vec rows[size][size];
  for (int j = 0; j < size; ++j) {
    vec column[size], t[size];
    for (int i = 0; i < size; ++i) column[i] = read(i, j);
    Transform<m, r>::input(column, t);
    for (int i = 0; i < size; ++i) rows[i][j] = t[i];
  }
  for (int i = 0; i < size; ++i) {
    vec t[size];
    Transform<m, r>::input(rows[i], t);
    for (int j = 0; j < size; ++j) write(i, j, t[j]);
  }
}

// A^T M A of a vector of filters: `products` lie [size][size] with `stride` between them, write(i, row) takes row i of
// the m outputs. `check` becomes NaN where one of them is not finite.
template <int m, int r, typename Write>
static inline __attribute__((always_inline)) void transform_output(const float* products, int64_t stride, vec* check,
                                                                   const Write& write) {
  constexpr int size = m + r - 1;
  vec columns[m][size];
  for (int j = 0; j < size; ++j) {
    vec column[size], t[m];
    for (int i = 0; i < size; ++i) column[i] = load(products + (i * size + j) * stride);
    Transform<m, r>::output(column, t);
    for (int i = 0; i < m; ++i) columns[i][j] = t[i];
  }
  vec sum{};
  for (int i = 0; i < m; ++i) {
    vec t[m];
    Transform<m, r>::output(columns[i], t);
    for (int j = 0; j < m; ++j) sum += t[j];
    write(i, t);
  }
  *check += sum - sum;
}

static inline bool is_finite(vec check) {
  bool finite = true;
  for (int i = 0; i < width; ++i) finite = finite && check[i] == 0.0f;
  return finite;
}

}  // namespace resnet_fast::RESNET_FAST_LEVEL
