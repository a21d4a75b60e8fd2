// The host side of the convolution for a network's first layer, alone or with the max-pooling behind it: copies each
// input row once into a zero-padded buffer. The loops are in kernels/conv_few_channels.cpp and kernels/max_pool.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "conv_rows.h"

namespace resnet_fast {
namespace {

using torch::stable::Tensor;

// Whether a row of the kernel is one long product: what it meets lies side by side in the copy of the input.
bool has_whole_rows(const ConvShape& s) { return s.s == 1 || s.dilation[1] == 1; }

// The convolution row by row.
class FewChannels {
 public:
  static constexpr int64_t rows_at_once = 1;

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
  struct State {
    std::vector<float> ring;      // [as many as a kernel meets or skips][row_bytes]
    std::vector<const void*> at;  // [taps]
    int64_t n = -1, top = 0;      // image, where the kernel's first row lies
    int64_t copied = 0;           // rows before this one have been
  };
  State state() const {  // zeros: the padding
    return {std::vector<float>(ring_rows() * row_bytes() / sizeof(float)), std::vector<const void*>(row_.taps)};
  }

  bool block(int64_t n, int64_t p, State& state, Storage type, void* output) const {
    read(n, p * shape.stride[0] - shape.padding[0], state);
    ConvRow row = row_;
    row.input = state.at.data();
    row.output = output;
    row.output_type = type;
    kernels().conv_row(row);
    return true;
  }

  const ConvShape shape;

 private:
  int64_t ring_rows() const { return (shape.r - 1) * shape.dilation[0] + 1; }
  int64_t row_bytes() const {  // whole floats
    return ((shape.w + 2 * shape.padding[1]) * shape.c * bytes_of(row_.weight_type) + 3) / 4 * 4;
  }

  // Makes rows.at show what a kernel meets whose first row lies at `top`.
  void read(int64_t n, int64_t top, State& rows) const {
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
ImageCall checked(const Tensor& input,          // [N, C, H, W], any strides
                  const Tensor& packed_weight,  // of pack_gemm: [1, K', R, 1, S * C] or, in rows with dilation,
                                                // [1, K', R, S, C]
                  const Tensor& bias,           // [K], float32
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, bool relu) {
  const int64_t width = kernels().vector_width;
  const bool whole_rows = packed_weight.size(3) == 1;
  const int64_t columns = whole_rows ? packed_weight.size(4) / input.size(1) : packed_weight.size(3);
  const ConvShape s = conv_shape(input, bias, packed_weight.size(2), columns, stride, padding, dilation, 1);
  const int64_t taps = packed_weight.size(2) * packed_weight.size(3), most_taps = kernels().conv_row_taps;
  STD_TORCH_CHECK(s.c <= 4, "input must have at most 4 channels, got ", s.c);
  STD_TORCH_CHECK(taps <= most_taps, "packed_weight must have at most ", most_taps, " rows or positions, got ", taps);
  STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == 1 &&
                      packed_weight.size(1) == (s.k + width - 1) / width * width &&
                      packed_weight.size(4) == s.c * (whole_rows ? s.s : 1) && whole_rows == has_whole_rows(s),
                  "packed_weight must be packed for this input, bias and dilation");
  return {s, input, packed_weight, bias, relu};
}

}  // namespace

Tensor conv_few_channels(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool relu) {
  ImageCall call = checked(input, packed_weight, bias, stride, padding, dilation, relu);
  const Tensor out = call.allocate();
  run_conv_few_channels(call.conv, call.strides);
  return with_exact_strides(out);
}

void run_conv_few_channels(const Conv& c, const Strides& input) { write_rows(FewChannels(c, input), c); }

Tensor conv_few_channels_max_pool(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, std::vector<int64_t> kernel_size,
                                  std::vector<int64_t> pool_stride, std::vector<int64_t> pool_padding) {
  ImageCall call = checked(input, packed_weight, bias, stride, padding, dilation, true);
  const Pool pool = pool_of(kernel_size, pool_stride, pool_padding);
  const Tensor out = call.allocate(pool);
  run_conv_few_channels_max_pool(call.conv, call.strides, pool);
  return with_exact_strides(out);
}

void run_conv_few_channels_max_pool(const Conv& c, const Strides& input, const Pool& pool) {
  max_pool_rows(FewChannels(c, input), c, pool);
}

}  // namespace resnet_fast
