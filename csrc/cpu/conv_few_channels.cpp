// The host side of the convolution for a network's first layer: packs the weight, splits the output rows over torch's
// thread pool and copies each input row once into a zero-padded buffer. The loops are in kernels/conv_few_channels.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "conv.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t row_length(const ConvShape& s) { return s.w + 2 * s.padding[1]; }

// Copies row `y` of image `n` into `out`, [C][row_length], whose padding is zero already.
void copy_row(const Tensor& x, const ConvShape& shape, int64_t n, int64_t y, float* out) {
  const float* row = static_cast<const float*>(x.const_data_ptr()) + n * x.stride(0) + y * x.stride(2);
  const int64_t channel_stride = x.stride(1), step = x.stride(3);
  for (int64_t c = 0; c < shape.c; ++c) {
    const float* from = row + c * channel_stride;
    float* to = out + c * row_length(shape) + shape.padding[1];
    if (step == 1) {
      std::memcpy(to, from, shape.w * sizeof(float));
    } else {
      for (int64_t i = 0; i < shape.w; ++i) to[i] = from[i * step];
    }
  }
}

// Output rows [begin, end) of all n * p.
void conv_rows(const Tensor& x, const ConvShape& shape, ConvRow row, float* output, int64_t begin, int64_t end) {
  const int64_t row_size = shape.c * row_length(shape);
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

Tensor conv_few_channels(const Tensor& input,          // [N, C, H, W], any strides
                         const Tensor& packed_weight,  // from pack_few_channels
                         const Tensor& bias,           // [K], float32
                         std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                         bool relu) {
  const int64_t block = kernels().conv_block;
  const ConvShape s =
      conv_shape(input, bias, packed_weight.size(1), packed_weight.size(2), stride, padding, dilation, 1);
  STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == (s.k + block - 1) / block &&
                      packed_weight.size(3) == s.c && packed_weight.size(4) == block,
                  "packed_weight must come from _pack_few_channels and have the input's channels");
  const Tensor x = to_dtype(input, ScalarType::Float);
  Tensor out = empty_map({s.n, s.k, s.p, s.q}, ScalarType::Float);

  std::vector<float> padded_bias(packed_weight.size(0) * block);
  std::memcpy(padded_bias.data(), bias.const_data_ptr(), s.k * sizeof(float));
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r < s.r; ++r)
    for (int64_t t = 0; t < s.s; ++t)
      for (int64_t c = 0; c < s.c; ++c) offsets.push_back((r * s.c + c) * row_length(s) + t * dilation[1]);

  ConvRow row{};
  row.offsets = offsets.data();
  row.pixel_step = stride[1];
  row.weight = static_cast<const float*>(packed_weight.const_data_ptr());
  row.block_stride = s.r * s.s * s.c * block;
  row.bias = padded_bias.data();
  row.pixels = s.q;
  row.filters = s.k;
  row.relu = relu;
  float* output = static_cast<float*>(out.mutable_data_ptr());
  // Less than 2^18 multiplications (6 us at the 90 GFLOP/s that one Zen 3 core reaches) is not worth a second thread.
  const int64_t work = s.q * s.k * s.r * s.s * s.c;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, s.n * s.p, grain,
                              [&](int64_t begin, int64_t end) { conv_rows(x, s, row, output, begin, end); });
  return with_exact_strides(to_dtype(out, input.scalar_type()));
}

}  // namespace resnet_fast
