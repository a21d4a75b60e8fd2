// The CPU kernels of one level, without torch, against naive loops in double. Built by run.py for aarch64, run under
// qemu, and for the levels of the machine at hand.
//
// Inputs are small integers: whatever is exact must be equal bit for bit. Buffers have exactly the sizes that levels.h
// asks for, so that a build with -fsanitize=address finds what reads or writes beyond.
#include "cases.h"
#include "training.h"

namespace {

void test_gemm() {
  const ConvShape shapes[] = {
      shape(1, 1, 1, 1, 1, 1, 1, 0),
      shape(2, 24, 40, 5, 7, 1, 1, 0),
      shape(1, 515, 20, 3, 3, 1, 1, 0),
      shape(2, 7, 9, 5, 4, 1, 1, 1, 2),
      shape(2, 8, 16, 9, 7, 3, 3, 1),
      shape(1, 17, 65, 6, 5, 3, 3, 1, 2),
      shape(1, 3, 130, 5, 5, 3, 3, 2, 1, 2),
      shape(1, 257, 5, 3, 4, 3, 3, 1),
      shape(1, 5, 63, 9, 8, 5, 5, 2),
      shape(1, 3, 33, 11, 12, 7, 7, 3, 2),
      shape(1, 2, 15, 1, 1, 3, 3, 4),
      shape(2, 34, 36, 5, 5, 3, 3, 1, 1, 1, 2),
      shape(1, 12, 20, 4, 6, 1, 1, 0, 1, 1, 4),
      shape(1, 8, 24, 5, 5, 3, 3, 1, 2, 1, 8),
  };
  bool flag = false;
  for (const ConvShape& s : shapes)
    for (const Storage type : types)
      for (const Storage weight_type : weight_types) {
        if (!takes(weight_type, type)) continue;
        const Case c(s, flag = !flag, s.k % 3 != 0);
        // Maps that a kernel larger than 1x1 reads in float32 were widened before.
        const bool as_they_are = s.r * s.s == 1 || weight_type == Storage::bf16;
        Call call(c, as_they_are ? type : Storage::f32, type, pack_gemm(c, weight_type), weight_type);
        const int64_t pixels = c.shape.n * c.shape.p * c.shape.q, half = ceil_div(pixels, 2);
        const int64_t filters = s.k / s.groups, middle = std::min(filters, level::gemm_panel);
        for (int64_t g = 0; g < s.groups; ++g)
          for (int64_t begin = 0; begin < pixels; begin += half) {
            const int64_t end = std::min(pixels, begin + half);
            const auto memory = scratch(level::conv_gemm_scratch(call.conv, end - begin));
            level::conv_gemm(call.conv, g, begin, end, 0, middle, memory.get());
            if (middle < filters) level::conv_gemm(call.conv, g, begin, end, middle, filters, memory.get());
          }
        expect_values(call.output, c.expected(), type, "conv_gemm", Text(c.shape, type).text);
      }
}

bool run_winograd(Call& call, int64_t m) {
  const ConvShape& s = call.conv.shape;
  const int64_t size = (m + 2) * (m + 2), tiles = s.n * ceil_div(s.p, m) * ceil_div(s.q, m), half = ceil_div(tiles, 2);
  bool finite = true;
  for (int64_t begin = 0; begin < tiles; begin += half) {
    const int64_t end = std::min(tiles, begin + half), stride = level::winograd_input_stride(s, end - begin);
    const auto transformed = scratch(stride * size * (call.conv.weight_type == Storage::f32 ? 4 : 2));
    level::winograd_input(call.conv, m, begin, end, transformed.get(), stride);
    const auto products = scratch(level::winograd_output_stride(end - begin) * size * sizeof(float));
    float* sums = static_cast<float*>(products.get());
    const int64_t step = call.conv.weight_type == Storage::f32 ? 1 : 2, depth = ceil_div(s.c, step) * step;
    for (int64_t filter = 0; filter < s.k; filter += level::gemm_panel) {
      const char* weight = static_cast<const char*>(call.conv.weight) + filter * size * depth * 4 / step;
      level::winograd_products(call.conv, m, transformed.get(), stride, end - begin, filter, 0, s.c, weight, sums);
      finite &= level::winograd_output(call.conv, m, begin, end, filter, sums);
    }
  }
  return finite;
}

void test_winograd() {
  const ConvShape shapes[] = {
      shape(1, 1, 1, 1, 1, 3, 3, 1),   shape(2, 7, 9, 9, 7, 3, 3, 1),   shape(1, 17, 33, 1, 17, 3, 3, 1),
      shape(1, 33, 65, 8, 8, 3, 3, 1), shape(1, 8, 130, 3, 3, 3, 3, 0), shape(2, 16, 15, 20, 21, 3, 3, 1),
      shape(1, 5, 7, 4, 6, 3, 3, 4),   shape(1, 260, 8, 5, 5, 3, 3, 1),
  };
  bool flag = false;
  for (const ConvShape& s : shapes)
    for (const Storage type : types)
      for (const int64_t m : {2, 4, 5})
        for (const Storage weight_type : weight_types) {
          if (!takes(weight_type, type) || (weight_type == Storage::bf16 && m != 2)) continue;
          const Case c(s, flag = !flag, s.k % 3 != 0, m == 2 ? 4 : 1);  // G of F(2,3) has quarters
          Call call(c, type, type, pack_winograd(c, m, weight_type), weight_type);
          const Text text(c.shape, type);
          expect(run_winograd(call, m), "winograd", text.text);
          if (m == 2) {
            expect_values(call.output, c.expected(), type, "winograd F(2,3)", text.text);
          } else {
            const double rounding = type == Storage::f32 ? 0 : std::ldexp(1, -precision(type));
            expect_near(call.output, c.expected(), 5e-6 + rounding, m == 4 ? "winograd F(4,3)" : "winograd F(5,3)",
                        text.text);
          }
        }
  for (const int64_t m : {2, 4, 5}) {
    Case c(shape(1, 9, 17, 11, 11, 3, 3, 1), true, false);
    c.input[9 * 11 * 11 - 1] = nan_value;
    Call call(c, Storage::f32, Storage::f32, pack_winograd(c, m, Storage::f32));
    expect(!run_winograd(call, m), "winograd", "a NaN was not noticed");
  }
}

void test_grouped() {
  const ConvShape shapes[] = {
      shape(1, 2, 2, 1, 1, 1, 1, 0, 1, 1, 2),    shape(2, 32, 32, 9, 11, 3, 3, 1, 1, 1, 8),
      shape(1, 24, 24, 7, 7, 3, 3, 1, 2, 1, 24), shape(1, 36, 60, 5, 9, 3, 3, 1, 1, 1, 3),
      shape(1, 40, 80, 8, 8, 3, 3, 1, 2, 1, 2),  shape(1, 15, 30, 6, 13, 5, 2, 2, 1, 2, 5),
      shape(1, 66, 33, 4, 4, 3, 3, 1, 1, 1, 33), shape(1, 12, 12, 1, 20, 1, 3, 1, 3, 1, 3),
  };
  bool flag = false;
  for (const ConvShape& s : shapes)
    for (const Storage type : types)
      for (const Storage weight_type : weight_types) {
        if (!takes(weight_type, type) || s.c / s.groups % step_of(weight_type) != 0) continue;
        const Case c(s, flag = !flag, s.k % 3 != 0);
        const GroupedUnit unit = level::grouped_unit(s.c, s.k, s.groups);
        Call call(c, type, type, pack_grouped(c, unit, weight_type), weight_type);
        const auto memory = scratch(level::conv_grouped_scratch(c.shape, unit.units));
        const int64_t middle = c.shape.p / 2;
        for (int64_t n = 0; n < s.n; ++n) {
          level::conv_grouped(call.conv, n, 0, middle, 0, unit.units, memory.get());
          level::conv_grouped(call.conv, n, middle, c.shape.p, 0, unit.units, memory.get());
        }
        expect_values(call.output, c.expected(), type, "conv_grouped", Text(c.shape, type).text);
      }
}

void test_depthwise() {
  const ConvShape shapes[] = {
      shape(1, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1),     shape(2, 20, 20, 9, 13, 3, 3, 1, 1, 1, 20),
      shape(1, 33, 33, 8, 17, 3, 3, 1, 2, 1, 33), shape(1, 16, 16, 3, 40, 3, 3, 2, 1, 1, 16),
      shape(1, 7, 7, 12, 29, 5, 5, 2, 1, 1, 7),   shape(1, 18, 18, 9, 9, 3, 3, 2, 2, 2, 18),
      shape(1, 5, 5, 2, 3, 3, 3, 5, 1, 1, 5),
  };
  bool flag = false;
  for (const ConvShape& s : shapes)
    for (const Storage type : types) {
      const Case c(s, flag = !flag, s.k % 3 != 0);
      std::vector<double> packed;
      for (int64_t tap = 0; tap < s.r * s.s; ++tap)
        for (int64_t k = 0; k < s.k; ++k) packed.push_back(c.weight[k * s.r * s.s + tap]);
      Call call(c, type, type, packed);
      const auto memory = scratch(level::conv_depthwise_scratch(c.shape));
      const int64_t rows = s.n * c.shape.p, middle = rows / 2;
      level::conv_depthwise(call.conv, 0, middle, memory.get());
      level::conv_depthwise(call.conv, middle, rows, memory.get());
      expect_values(call.output, c.expected(), type, "conv_depthwise", Text(c.shape, type).text);
    }
}

// The weight as conv_few_channels.cpp takes it: columns and channels of the kernel are one dimension.
std::vector<double> pack_few_channels(const Case& c, Storage type) {
  const ConvShape& s = c.shape;
  std::vector<double> weight;
  for (int64_t k = 0; k < s.k; ++k)
    for (int64_t t = 0; t < s.s; ++t)
      for (int64_t d = 0; d < s.c; ++d)
        for (int64_t r = 0; r < s.r; ++r) weight.push_back(c.weight[((k * s.c + d) * s.r + r) * s.s + t]);
  return pack_gemm(weight, 1, s.k, s.s * s.c, s.r, type);
}

// `read_pixels` and `conv_row`, as conv_few_channels.cpp calls them.
void test_few_channels() {
  const ConvShape shapes[] = {
      shape(1, 1, 1, 1, 1, 1, 1, 0),    shape(1, 3, 64, 15, 17, 7, 7, 3, 2),  shape(1, 3, 16, 8, 9, 3, 3, 1),
      shape(1, 4, 33, 6, 100, 3, 3, 1), shape(1, 2, 40, 7, 9, 3, 3, 2, 1, 2), shape(1, 3, 7, 5, 13, 5, 5, 2, 3),
      shape(1, 1, 70, 9, 70, 4, 5, 2),
  };
  bool flag = false;
  for (const ConvShape& given : shapes)
    for (const Storage type : types)
      for (const Storage weight_type : weight_types) {
        if (!takes(weight_type, type)) continue;
        const Case c(given, flag = !flag, false);
        const ConvShape& s = c.shape;
        const bool dilated = s.dilation[1] > 1;
        Values weight(weight_type, dilated ? pack_gemm(c, weight_type) : pack_few_channels(c, weight_type));
        Values input(type, c.input), output(type, s.p * s.q * s.k);
        std::vector<float> bias(c.bias.begin(), c.bias.end());
        bias.resize(s.k + level::gemm_panel);
        const int64_t bytes = type == Storage::f32 ? 4 : 2, value = weight_type == Storage::f32 ? 4 : 2;
        const int64_t length = (s.w + 2 * s.padding[1]) * s.c * value, columns = dilated ? s.s : 1;
        for (int64_t p = 0; p < s.p; ++p) {
          std::vector<char> rows(s.r * length);
          std::vector<const void*> taps(s.r * columns);
          for (int64_t r = 0; r < s.r; ++r) {
            const int64_t y = p * s.stride[0] - s.padding[0] + r * s.dilation[0];
            if (y < 0 || y >= s.h) continue;
            const PixelRow row{static_cast<char*>(input.data()) + y * s.w * s.c * bytes, type, s.c, 1, s.w, s.c};
            level::read_pixels(row, weight_type, rows.data() + r * length + s.padding[1] * s.c * value);
            for (int64_t t = 0; t < columns; ++t)
              taps[r * columns + t] = rows.data() + r * length + t * s.dilation[1] * s.c * value;
          }
          ConvRow row{};
          row.input = taps.data();
          row.taps = s.r * columns;
          row.depth = s.s * s.c / columns;
          row.pixel_step = s.stride[1] * s.c;
          row.weight = weight.data();
          row.bias = bias.data();
          row.output = static_cast<char*>(output.data()) + p * s.q * s.k * bytes;
          row.weight_type = weight_type;
          row.output_type = type;
          row.pixels = s.q;
          row.filters = s.k;
          row.relu = c.relu;
          level::conv_row(row);
        }
        expect_values(output, c.expected(), type, "conv_row", Text(s, type).text);
      }
}

// `stem_phases` and `winograd_stem`, as conv_winograd_stem.cpp calls them.
bool run_winograd_stem(const Case& c, Values& weight, Values& output, Storage type) {
  const ConvShape& s = c.shape;
  std::vector<float> bias(c.bias.begin(), c.bias.end());
  bias.resize(s.k + level::gemm_panel);
  const int64_t tiles = ceil_div(s.q, stem_tile), positions = stem_tile * tiles + stem_taps - 1;
  const int64_t lanes = ceil_div(4 * s.c, level::vector_width) * level::vector_width;
  const auto memory = scratch(level::winograd_stem_scratch(s.c));
  bool finite = true;
  for (int64_t p = 0; p < s.p; p += stem_tile) {
    std::vector<float> phases(stem_size * positions * lanes);
    const float* at[stem_size];
    for (int64_t i = 0; i < 2 * stem_size; ++i) {
      const int64_t y = 2 * p + i - s.padding[0];
      std::vector<float> row(2 * positions * s.c);
      for (int64_t j = 0; y >= 0 && y < s.h && j < s.w * s.c && j + s.padding[1] * s.c < int64_t(row.size()); ++j)
        row[s.padding[1] * s.c + j] = float(c.input[y * s.w * s.c + j]);
      float* to = phases.data() + i / 2 * positions * lanes;
      level::stem_phases(row.data(), s.c, positions, to + i % 2 * 2 * s.c);
      at[i / 2] = to;
    }
    const int64_t bytes = type == Storage::f32 ? 4 : 2;
    StemRows rows{};
    rows.input = at;
    rows.weight = static_cast<const float*>(weight.data());
    rows.bias = bias.data();
    rows.output = static_cast<char*>(output.data()) + p * s.q * s.k * bytes;
    rows.output_type = type;
    rows.channels = s.c;
    rows.tiles = tiles;
    rows.rows = std::min(stem_tile, s.p - p);
    rows.pixels = s.q;
    rows.filters = s.k;
    rows.relu = c.relu;
    finite &= level::winograd_stem(rows, static_cast<float*>(memory.get()));
  }
  return finite;
}

void test_winograd_stem() {
  const ConvShape shapes[] = {
      shape(1, 1, 1, 1, 1, 7, 7, 3, 2),    shape(1, 3, 64, 15, 47, 7, 7, 3, 2), shape(1, 2, 17, 8, 9, 7, 7, 0, 2),
      shape(1, 4, 130, 9, 12, 7, 7, 3, 2), shape(1, 3, 33, 10, 16, 7, 7, 5, 2),
  };
  bool flag = false;
  for (const ConvShape& s : shapes)
    for (const Storage type : types) {
      const Case c(s, flag = !flag, false);
      Values weight(Storage::f32, pack_winograd_stem(c)), output(type, c.shape.p * c.shape.q * c.shape.k);
      const Text text(c.shape, type);
      expect(run_winograd_stem(c, weight, output, type), "winograd_stem", text.text);
      const double rounding = type == Storage::f32 ? 0 : std::ldexp(1, -precision(type));
      expect_near(output, c.expected(), 5e-6 + rounding, "winograd_stem", text.text);
    }
  Case c(shape(1, 3, 17, 11, 12, 7, 7, 3, 2), true, false);
  c.input[10 * 12 * 3] = nan_value;
  Values weight(Storage::f32, pack_winograd_stem(c)), output(Storage::f32, c.shape.p * c.shape.q * c.shape.k);
  expect(!run_winograd_stem(c, weight, output, Storage::f32), "winograd_stem", "a NaN was not noticed");
}

// Pixels in channels_last, in planes, and neither.
void test_read_pixels() {
  for (const Storage type : types)
    for (const Storage to : weight_types)
      for (const int64_t width : {1, 3, 64, 133})
        for (const int64_t channels : {1, 2, 3, 4})
          for (const int64_t layout : {0, 1, 2}) {
            if (!takes(to, type)) continue;
            const int64_t pixel_step = layout == 0 ? channels : layout, channel_step = layout == 0 ? 1 : 2 * width;
            std::vector<double> from = integers(2 * width * channels), expected;
            from[0] = nan_value;
            for (int64_t x = 0; x < width; ++x)
              for (int64_t c = 0; c < channels; ++c) expected.push_back(from[x * pixel_step + c * channel_step]);
            Values values(type, from), pixels(to, width * channels);
            level::read_pixels({values.data(), type, pixel_step, channel_step, width, channels}, to, pixels.data());
            expect_values(pixels, expected, to, "read_pixels", name_of(type));
          }
}

void test_max_pool() {
  struct Sizes {
    int64_t width, channels, kernel, stride, padding, dilation;
  };
  const Sizes all[] = {
      {1, 1, 1, 1, 0, 1}, {9, 64, 3, 2, 1, 1}, {8, 17, 3, 2, 1, 1}, {13, 70, 2, 1, 1, 3}, {7, 5, 4, 3, 2, 1}};
  for (const Sizes& z : all)
    for (const Storage in : types)
      for (const Storage out : types) {
        if (in != out && in != Storage::f32) continue;
        const int64_t pixels = (z.width + 2 * z.padding - z.dilation * (z.kernel - 1) - 1) / z.stride + 1;
        std::vector<std::vector<double>> rows{integers(z.width * z.channels), integers(z.width * z.channels)};
        rows[1][z.width * z.channels / 2] = nan_value;
        std::vector<double> expected;
        for (int64_t q = 0; q < pixels; ++q)
          for (int64_t c = 0; c < z.channels; ++c) {
            double largest = -INFINITY;
            for (const auto& row : rows)
              for (int64_t t = 0; t < z.kernel; ++t) {
                const int64_t x = q * z.stride - z.padding + t * z.dilation;
                if (x < 0 || x >= z.width) continue;
                const double v = row[x * z.channels + c];
                if (v > largest || std::isnan(v)) largest = v;
              }
            expected.push_back(largest);
          }
        Values first(in, rows[0]), second(in, rows[1]), output(out, int64_t(expected.size()));
        const void* pointers[] = {first.data(), second.data()};
        level::max_pool_row({pointers, 2, z.width, z.channels, z.kernel, z.stride, z.padding, z.dilation, output.data(),
                             pixels, in, out});
        expect_values(output, expected, out, "max_pool_row", name_of(in));
      }
}

void test_avg_pool() {
  for (const Storage type : types)
    for (const bool channels_last : {true, false})
      for (const int64_t channels : {1, 15, 64, 130})
        for (const int64_t pixels : {1, 49, 64, 200}) {
          const std::vector<double> map = integers(pixels * channels);
          std::vector<double> expected(channels);
          for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < channels; ++c)
              expected[c] += map[channels_last ? p * channels + c : c * pixels + p];
          for (double& v : expected) v = float(v) / float(pixels);
          Values values(type, map), output(type, channels);
          const int64_t middle = channels / 2;
          level::avg_pool(values.data(), type, channels_last, pixels, channels, 0, middle, output.data());
          level::avg_pool(values.data(), type, channels_last, pixels, channels, middle, channels, output.data());
          expect_values(output, expected, type, "avg_pool", channels_last ? "channels_last" : "contiguous");
        }
}

void test_add_relu() {
  for (const Storage type : types)
    for (const int64_t n : {1, 15, 16, 17, 100}) {
      std::vector<double> a = integers(n), b = integers(n), expected(n);
      a[n / 2] = nan_value;
      for (int64_t i = 0; i < n; ++i) expected[i] = a[i] + b[i] < 0 ? 0 : a[i] + b[i];
      Values x(type, a), y(type, b), out(type, n);
      const auto bits = [](Values& v) { return static_cast<uint16_t*>(v.data()); };
      const auto real = [](Values& v) { return static_cast<float*>(v.data()); };
      if (type == Storage::f32) level::add_relu_f32(real(x), real(y), real(out), n);
      if (type == Storage::bf16) level::add_relu_bf16(bits(x), bits(y), bits(out), n);
      if (type == Storage::f16) level::add_relu_f16(bits(x), bits(y), bits(out), n);
      expect_values(out, expected, type, "add_relu", name_of(type));
    }
}

void test_all_finite() {
  for (const int64_t n : {1, 17, 4096, 5000})
    for (const Storage type : types) {
      Values values(type, integers(n));
      const auto finite = [&] {
        if (type == Storage::f32) return level::all_finite_32(static_cast<uint32_t*>(values.data()), n, 0x7f800000u);
        return level::all_finite_16(static_cast<uint16_t*>(values.data()), n, type == Storage::bf16 ? 0x7f80 : 0x7c00);
      };
      expect(finite(), "all_finite", name_of(type));
      values.set(n - 1, nan_value);
      expect(!finite(), "all_finite", name_of(type));
    }
}

}  // namespace

int main() {
  test_gemm();
  test_winograd();
  test_grouped();
  test_depthwise();
  test_few_channels();
  test_winograd_stem();
  test_read_pixels();
  test_max_pool();
  test_avg_pool();
  test_add_relu();
  test_training();
  test_all_finite();
  std::printf("%d checks, %d failed, vectors of %d\n", checks, failures, int(level::vector_width));
  return failures == 0 ? 0 : 1;
}
