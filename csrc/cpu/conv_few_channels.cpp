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

// The convolution row by row.
class FewChannels {
 public:
  FewChannels(
      const Tensor& input,          // [N, C, H, W], any strides
      const Tensor& packed_weight,  // of pack_gemm: [1, K', R, 1, S * C] or, in rows with dilation, [1, K', R, S, C]
      const Tensor& bias,           // [K], float32
      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
      bool relu)
      : shape(conv_shape(input, bias, packed_weight.size(2), kernel_width(input, packed_weight), stride, padding,
                         dilation, 1)),
        x_(input),
        bias_(shape.k + kernels().gemm_panel) {
    const int64_t width = kernels().vector_width;
    const bool whole_rows = packed_weight.size(3) == 1;
    const Storage type = storage_of(input.scalar_type()), weight_type = storage_of(packed_weight.scalar_type());
    const int64_t taps = packed_weight.size(2) * packed_weight.size(3), most_taps = kernels().conv_row_taps;
    STD_TORCH_CHECK(shape.c <= 4, "input must have at most 4 channels, got ", shape.c);
    STD_TORCH_CHECK(taps <= most_taps, "packed_weight must have at most ", most_taps, " rows or positions, got ", taps);
    STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == 1 &&
                        packed_weight.size(1) == (shape.k + width - 1) / width * width &&
                        packed_weight.size(4) == shape.c * (whole_rows ? shape.s : 1) &&
                        (!whole_rows || shape.s == 1 || dilation[1] == 1),
                    "packed_weight must be packed for this input, bias and dilation");
    check_weight_type(weight_type, type);
    std::memcpy(bias_.data(), bias.const_data_ptr(), shape.k * sizeof(float));
    pixels_ = {nullptr, type, input.stride(3), input.stride(1), shape.w, shape.c};
    row_.taps = taps;
    row_.depth = packed_weight.size(4);
    row_.pixel_step = stride[1] * shape.c;
    row_.weight = packed_weight.const_data_ptr();
    row_.weight_type = weight_type;
    row_.bias = bias_.data();
    row_.pixels = shape.q;
    row_.filters = shape.k;
    row_.relu = relu;
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
  static int64_t kernel_width(const Tensor& input, const Tensor& packed_weight) {
    return packed_weight.size(3) > 1 ? packed_weight.size(3) : packed_weight.size(4) / input.size(1);
  }

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
      row.pixels =
          static_cast<const char*>(x_.const_data_ptr()) + (n * x_.stride(0) + y * x_.stride(2)) * bytes_of(row.type);
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

  const Tensor x_;
  std::vector<float> bias_;
  PixelRow pixels_{};
  ConvRow row_{};
};

}  // namespace

Tensor conv_few_channels(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool relu) {
  const FewChannels conv(input, packed_weight, bias, stride, padding, dilation, relu);
  const ConvShape& s = conv.shape;
  Tensor out = empty_map({s.n, s.k, s.p, s.q}, input.scalar_type());
  const Storage type = storage_of(input.scalar_type());
  char* output = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = s.q * s.k * bytes_of(type);
  const int64_t grain = std::max<int64_t>(1, least_work / std::max<int64_t>(1, conv.multiplications_of_row()));
  torch::stable::parallel_for(0, s.n * s.p, grain, [&](int64_t begin, int64_t end) {
    FewChannels::Rows rows = conv.rows();
    for (int64_t i = begin; i < end; ++i) conv.row(i / s.p, i % s.p, rows, type, output + i * row_bytes);
  });
  return with_exact_strides(out);
}

// A thread keeps as many rows of the convolution as the pooling kernel has (86 KiB for ResNet's stem: they stay in the
// L2 cache), so that the map between the two, 3.2 MB an image, never exists.
Tensor conv_few_channels_max_pool(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, std::vector<int64_t> kernel_size,
                                  std::vector<int64_t> pool_stride, std::vector<int64_t> pool_padding) {
  const FewChannels conv(input, packed_weight, bias, stride, padding, dilation, true);
  const ConvShape& s = conv.shape;
  const int64_t height = output_extent(s.p, kernel_size[0], pool_stride[0], pool_padding[0], 1);
  const int64_t width = output_extent(s.q, kernel_size[1], pool_stride[1], pool_padding[1], 1);
  STD_TORCH_CHECK(height > 0 && width > 0, "the pooling kernel must fit into the padded map");
  Tensor out = empty_map({s.n, s.k, height, width}, input.scalar_type());
  const Storage type = storage_of(input.scalar_type());
  char* output = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_size = s.q * s.k, kept = kernel_size[0];

  // Bands of output rows, as few as give every thread the same number: where two bands meet both compute a row.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = std::min(height, threads / std::gcd(s.n, threads));
  for_each_item(s.n * bands, s.n * s.p * conv.multiplications_of_row(), [&](int64_t item) {
    const int64_t n = item / bands, band = item % bands;
    FewChannels::Rows input_rows = conv.rows();
    const Scratch<PoolBands> scratch(kept * row_size * sizeof(float));
    std::vector<int64_t> holds(kept, -1);  // which row lies where
    std::vector<const void*> rows(kept);
    PoolRow pool{rows.data(),     0, s.q,     s.k,   kernel_size[1], pool_stride[1],
                 pool_padding[1], 1, nullptr, width, Storage::f32,   type};
    for (int64_t i = height * band / bands; i < height * (band + 1) / bands; ++i) {
      const int64_t top = i * pool_stride[0] - pool_padding[0];
      pool.num_rows = 0;
      for (int64_t p = std::max<int64_t>(top, 0); p < std::min(top + kept, s.p); ++p) {
        float* row = scratch.floats() + p % kept * row_size;
        if (holds[p % kept] != p) conv.row(n, p, input_rows, Storage::f32, row);
        holds[p % kept] = p;
        rows[pool.num_rows++] = row;
      }
      pool.output = output + (n * height + i) * width * s.k * bytes_of(type);
      kernels().max_pool_row(pool);
    }
  });
  return with_exact_strides(out);
}

}  // namespace resnet_fast
