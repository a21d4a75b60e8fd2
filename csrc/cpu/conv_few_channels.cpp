// The host side of the convolution for a network's first layer, alone or with the max-pooling behind it: splits the
// output rows over torch's thread pool and copies each input row once into a zero-padded buffer. The loops are in
// kernels/conv_few_channels.cpp and kernels/max_pool.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "conv.h"
#include "parallel.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct PoolBands {};  // rows of the convolution, kept for the pooling

// Whether a row of the kernel is one long product: what it meets lies side by side in the copy of the input.
bool has_whole_rows(const ConvShape& s) { return s.s == 1 || s.dilation[1] == 1; }

// The convolution row by row.
class FewChannels {
 public:
  FewChannels(const Conv& conv, const Strides& input) : shape(conv.shape), conv_(conv), input_(input) {
    const bool whole_rows = has_whole_rows(shape);
    pixels_ = {nullptr, conv.input_type, input.w, input.c, shape.w, shape.c};
    row_.taps = shape.r * (whole_rows ? 1 : shape.s);
    row_.depth = shape.c * (whole_rows ? shape.s : 1);
    row_.pixel_step = shape.stride[1] * shape.c;
    row_.weight = conv.weight;
    row_.weight_type = conv.weight_type;
    row_.bias = conv.bias;
    row_.pixels = shape.q;
    row_.filters = shape.k;
    row_.relu = conv.relu;
  }

  // The last input rows that a thread has read.
  struct Rows {
    std::vector<float> ring;      // [as many as a kernel meets or skips][row_bytes]
    std::vector<const void*> at;  // [taps]
    int64_t n = -1, top = 0;      // image, where the kernel's first row lies
    int64_t copied = 0;           // rows before this one have been
  };
  Rows rows() const {  // zeros: the padding
    return {std::vector<float>(ring_rows() * row_bytes() / sizeof(float)), std::vector<const void*>(row_.taps)};
  }

  // Output row p of image n, [Q][K].
  void row(int64_t n, int64_t p, Rows& rows, Storage type, void* output) const {
    read(n, p * shape.stride[0] - shape.padding[0], rows);
    ConvRow row = row_;
    row.input = rows.at.data();
    row.output = output;
    row.output_type = type;
    kernels().conv_row(row);
  }

  int64_t multiplications_of_row() const { return shape.q * shape.k * shape.r * shape.s * shape.c; }

  const ConvShape shape;

 private:
  int64_t ring_rows() const { return (shape.r - 1) * shape.dilation[0] + 1; }
  int64_t row_bytes() const {  // whole floats
    return ((shape.w + 2 * shape.padding[1]) * shape.c * bytes_of(row_.weight_type) + 3) / 4 * 4;
  }

  // Makes rows.at show what a kernel meets whose first row lies at `top`.
  void read(int64_t n, int64_t top, Rows& rows) const {
    if (rows.n != n || top < rows.top) rows.copied = 0;
    rows.n = n, rows.top = top;
    char* ring = reinterpret_cast<char*>(rows.ring.data());
    const auto slot = [&](int64_t y) { return ring + y % ring_rows() * row_bytes(); };
    const int64_t value = bytes_of(row_.weight_type), bottom = std::min(top + ring_rows(), shape.h);
    for (int64_t y = std::max(top, rows.copied); y < bottom; ++y) {
      PixelRow row = pixels_;
      row.pixels = static_cast<const char*>(conv_.input) + (n * input_.n + y * input_.h) * bytes_of(row.type);
      kernels().read_pixels(row, row_.weight_type, slot(y) + shape.padding[1] * shape.c * value);
      rows.copied = y + 1;
    }
    const int64_t taps = row_.taps / shape.r;
    for (int64_t r = 0; r < shape.r; ++r) {
      const int64_t y = top + r * shape.dilation[0];
      for (int64_t t = 0; t < taps; ++t)
        rows.at[r * taps + t] = y >= 0 && y < shape.h ? slot(y) + t * shape.dilation[1] * shape.c * value : nullptr;
    }
  }

  const Conv conv_;
  const Strides input_;
  PixelRow pixels_{};
  ConvRow row_{};
};

// A call on tensors, checked.
struct Call {
  Call(const Tensor& input,          // [N, C, H, W], any strides
       const Tensor& packed_weight,  // of pack_gemm: [1, K', R, 1, S * C] or, in rows with dilation, [1, K', R, S, C]
       const Tensor& bias,           // [K], float32
       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
       bool relu)
      : strides{input.stride(0), input.stride(1), input.stride(2), input.stride(3)},
        padded_bias(bias.size(0) + kernels().gemm_panel) {
    const int64_t width = kernels().vector_width;
    const bool whole_rows = packed_weight.size(3) == 1;
    const int64_t columns = whole_rows ? packed_weight.size(4) / input.size(1) : packed_weight.size(3);
    const ConvShape s = conv_shape(input, bias, packed_weight.size(2), columns, stride, padding, dilation, 1);
    const Storage type = storage_of(input.scalar_type()), weight_type = storage_of(packed_weight.scalar_type());
    const int64_t taps = packed_weight.size(2) * packed_weight.size(3), most_taps = kernels().conv_row_taps;
    STD_TORCH_CHECK(s.c <= 4, "input must have at most 4 channels, got ", s.c);
    STD_TORCH_CHECK(taps <= most_taps, "packed_weight must have at most ", most_taps, " rows or positions, got ", taps);
    STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == 1 &&
                        packed_weight.size(1) == (s.k + width - 1) / width * width &&
                        packed_weight.size(4) == s.c * (whole_rows ? s.s : 1) && whole_rows == has_whole_rows(s),
                    "packed_weight must be packed for this input, bias and dilation");
    check_weight_type(weight_type, type);
    std::memcpy(padded_bias.data(), bias.const_data_ptr(), s.k * sizeof(float));
    conv = {s,
            input.const_data_ptr(),
            packed_weight.const_data_ptr(),
            padded_bias.data(),
            nullptr,
            nullptr,
            nullptr,
            type,
            type,
            weight_type,
            relu};
  }

  // Where the result goes, [N, K, p, q].
  Tensor allocate(int64_t p, int64_t q, ScalarType dtype) {
    Tensor out = empty_map({conv.shape.n, conv.shape.k, p, q}, dtype);
    conv.output = out.mutable_data_ptr();
    return out;
  }

  const Strides strides;
  std::vector<float> padded_bias;
  Conv conv{};
};

int64_t pooled(int64_t size, const Pool& pool, int d) {
  return output_extent(size, pool.kernel[d], pool.stride[d], pool.padding[d], pool.dilation[d]);
}

}  // namespace

Tensor conv_few_channels(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool relu) {
  Call call(input, packed_weight, bias, stride, padding, dilation, relu);
  const Tensor out = call.allocate(call.conv.shape.p, call.conv.shape.q, input.scalar_type());
  run_conv_few_channels(call.conv, call.strides);
  return with_exact_strides(out);
}

void run_conv_few_channels(const Conv& c, const Strides& input) {
  const FewChannels conv(c, input);
  const ConvShape& s = conv.shape;
  const Storage type = c.output_type;
  char* output = static_cast<char*>(c.output);
  const int64_t row_bytes = s.q * s.k * bytes_of(type);
  const int64_t grain = std::max<int64_t>(1, least_work / std::max<int64_t>(1, conv.multiplications_of_row()));
  torch::stable::parallel_for(0, s.n * s.p, grain, [&](int64_t begin, int64_t end) {
    FewChannels::Rows rows = conv.rows();
    for (int64_t i = begin; i < end; ++i) conv.row(i / s.p, i % s.p, rows, type, output + i * row_bytes);
  });
}

Tensor conv_few_channels_max_pool(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, std::vector<int64_t> kernel_size,
                                  std::vector<int64_t> pool_stride, std::vector<int64_t> pool_padding) {
  Call call(input, packed_weight, bias, stride, padding, dilation, true);
  const Pool pool{
      {kernel_size[0], kernel_size[1]}, {pool_stride[0], pool_stride[1]}, {pool_padding[0], pool_padding[1]}, {1, 1}};
  const int64_t height = pooled(call.conv.shape.p, pool, 0), width = pooled(call.conv.shape.q, pool, 1);
  STD_TORCH_CHECK(height > 0 && width > 0, "the pooling kernel must fit into the padded map");
  const Tensor out = call.allocate(height, width, input.scalar_type());
  run_conv_few_channels_max_pool(call.conv, call.strides, pool);
  return with_exact_strides(out);
}

// A thread keeps as many rows of the convolution as the pooling kernel has (86 KiB for ResNet's stem: they stay in the
// L2 cache), so that the map between the two, 3.2 MB an image, never exists.
void run_conv_few_channels_max_pool(const Conv& c, const Strides& input, const Pool& p) {
  const FewChannels conv(c, input);
  const ConvShape& s = conv.shape;
  const Storage type = c.output_type;
  char* output = static_cast<char*>(c.output);
  const int64_t height = pooled(s.p, p, 0), width = pooled(s.q, p, 1), row_size = s.q * s.k, kept = p.kernel[0];

  // Bands of output rows, as few as give every thread the same number: where two bands meet both compute a row.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = std::min(height, threads / std::gcd(s.n, threads));
  for_each_item(s.n * bands, s.n * s.p * conv.multiplications_of_row(), [&](int64_t item) {
    const int64_t n = item / bands, band = item % bands;
    FewChannels::Rows input_rows = conv.rows();
    const Scratch<PoolBands> scratch(kept * row_size * sizeof(float));
    std::vector<int64_t> holds(kept, -1);  // which row lies where
    std::vector<const void*> rows(kept);
    PoolRow pool{rows.data(),  0, s.q,     s.k,   p.kernel[1],  p.stride[1],
                 p.padding[1], 1, nullptr, width, Storage::f32, type};
    for (int64_t i = height * band / bands; i < height * (band + 1) / bands; ++i) {
      const int64_t top = i * p.stride[0] - p.padding[0];
      pool.num_rows = 0;
      for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + kept, s.p); ++y) {
        float* row = scratch.floats() + y % kept * row_size;
        if (holds[y % kept] != y) conv.row(n, y, input_rows, Storage::f32, row);
        holds[y % kept] = y;
        rows[pool.num_rows++] = row;
      }
      pool.output = output + (n * height + i) * width * s.k * bytes_of(type);
      kernels().max_pool_row(pool);
    }
  });
}

}  // namespace resnet_fast
