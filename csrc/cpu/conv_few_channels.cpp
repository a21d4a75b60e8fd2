// The host side of the convolution for a network's first layer: packs the weight, splits the output rows over torch's
// thread pool and copies each input row once into a zero-padded buffer. The loops are in kernels/conv_few_channels.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "levels.h"
#include "ops.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Shape {
  int64_t n, c, h, w;  // input
  int64_t k, r, s;     // filters, kernel
  int64_t p, q;        // output
  std::vector<int64_t> stride, padding, dilation;

  int64_t row_length() const { return w + 2 * padding[1]; }
};

// Copies row `y` of image `n` into `out`, [C][row_length], whose padding is zero already.
void copy_row(const Tensor& x, const Shape& shape, int64_t n, int64_t y, float* out) {
  const float* row = static_cast<const float*>(x.const_data_ptr()) + n * x.stride(0) + y * x.stride(2);
  const int64_t channel_stride = x.stride(1), step = x.stride(3);
  for (int64_t c = 0; c < shape.c; ++c) {
    const float* from = row + c * channel_stride;
    float* to = out + c * shape.row_length() + shape.padding[1];
    if (step == 1) {
      std::memcpy(to, from, shape.w * sizeof(float));
    } else {
      for (int64_t i = 0; i < shape.w; ++i) to[i] = from[i * step];
    }
  }
}

// Output rows [begin, end) of all n * p.
void conv_rows(const Tensor& x, const Shape& shape, ConvRow row, float* output, int64_t begin, int64_t end) {
  const int64_t row_size = shape.c * shape.row_length();
  std::vector<float> rows(shape.r * row_size);
  const float* weight = row.weight;
  const int64_t* offsets = row.offsets;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / shape.p, top = i % shape.p * shape.stride[0] - shape.padding[0];
    // Kernel rows [first, last) meet the image; the others meet padding and add nothing.
    int64_t first = 0, last = shape.r;
    while (first < last && top + first * shape.dilation[0] < 0) ++first;
    while (last > first && top + (last - 1) * shape.dilation[0] >= shape.h) --last;
    for (int64_t r = first; r < last; ++r)
      copy_row(x, shape, n, top + r * shape.dilation[0], rows.data() + (r - first) * row_size);
    const int64_t taps_of_row = shape.s * shape.c;
    row.input = rows.data();
    row.taps = (last - first) * taps_of_row;
    row.weight = weight + first * taps_of_row * kernels().conv_block;
    row.offsets = offsets;
    row.output = output + i * shape.q * shape.k;
    kernels().conv_row_f32(row);
  }
}

}  // namespace

Tensor pack_few_channels(const Tensor& weight) {  // [K, C, R, S]
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
                  "weight must be [K, C, R, S], float32 and contiguous");
  const int64_t block = kernels().conv_block, k = weight.size(0), c = weight.size(1),
                taps = weight.size(2) * weight.size(3);
  Tensor packed = torch::stable::empty({(k + block - 1) / block, weight.size(2), weight.size(3), c, block});
  const float* from = static_cast<const float*>(weight.const_data_ptr());
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  std::memset(to, 0, packed.numel() * sizeof(float));
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < c; ++j)
      for (int64_t t = 0; t < taps; ++t)
        to[((i / block * taps + t) * c + j) * block + i % block] = from[(i * c + j) * taps + t];
  return packed;
}

Tensor conv_few_channels(const Tensor& input,          // [N, C, H, W], float32, any strides
                         const Tensor& packed_weight,  // from pack_few_channels
                         const Tensor& bias,           // [K]
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                         const std::vector<int64_t>& dilation, bool relu) {
  const int64_t block = kernels().conv_block;
  Shape shape{input.size(0),
              input.size(1),
              input.size(2),
              input.size(3),
              bias.size(0),
              packed_weight.size(1),
              packed_weight.size(2),
              0,
              0,
              stride,
              padding,
              dilation};
  STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == (shape.k + block - 1) / block &&
                      packed_weight.size(3) == shape.c && packed_weight.size(4) == block,
                  "packed_weight must come from _pack_few_channels and have the input's channels");
  const auto extent = [&](int64_t size, int64_t kernel, int d) {
    return (size + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) / stride[d] + 1;
  };
  shape.p = extent(shape.h, shape.r, 0);
  shape.q = extent(shape.w, shape.s, 1);
  Tensor out = torch::stable::empty({shape.n, shape.k, shape.p, shape.q}, ScalarType::Float, std::nullopt, std::nullopt,
                                    std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);

  std::vector<float> padded_bias(packed_weight.size(0) * block);
  std::memcpy(padded_bias.data(), bias.const_data_ptr(), shape.k * sizeof(float));
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r < shape.r; ++r)
    for (int64_t s = 0; s < shape.s; ++s)
      for (int64_t c = 0; c < shape.c; ++c) offsets.push_back((r * shape.c + c) * shape.row_length() + s * dilation[1]);

  ConvRow row{};
  row.offsets = offsets.data();
  row.pixel_step = stride[1];
  row.weight = static_cast<const float*>(packed_weight.const_data_ptr());
  row.block_stride = shape.r * shape.s * shape.c * block;
  row.bias = padded_bias.data();
  row.pixels = shape.q;
  row.filters = shape.k;
  row.relu = relu;
  float* output = static_cast<float*>(out.mutable_data_ptr());
  // Less than 2^18 multiplications (6 us at the 90 GFLOP/s that one Zen 3 core reaches) is not worth a second thread.
  const int64_t work = shape.q * shape.k * shape.r * shape.s * shape.c;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, shape.n * shape.p, grain,
                              [&](int64_t begin, int64_t end) { conv_rows(input, shape, row, output, begin, end); });
  return out;
}

}  // namespace resnet_fast
