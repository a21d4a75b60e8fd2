// The host side of the convolution for a network's first layer, alone or with the max-pooling behind it: packs the
// weight, splits the output rows over torch's thread pool and copies each input row once into a zero-padded buffer. The
// loops are in kernels/conv_few_channels.cpp and kernels/max_pool.cpp.
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
  FewChannels(const Tensor& input,          // [N, C, H, W], any strides
              const Tensor& packed_weight,  // from pack_few_channels
              const Tensor& bias,           // [K], float32
              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
              const std::vector<int64_t>& dilation, bool relu)
      : shape(conv_shape(input, bias, packed_weight.size(1), packed_weight.size(2), stride, padding, dilation, 1)),
        x_(input),
        type_(storage_of(input.scalar_type())),
        bias_(packed_weight.size(0) * kernels().conv_block) {
    const int64_t block = kernels().conv_block;
    STD_TORCH_CHECK(packed_weight.dim() == 5 && packed_weight.size(0) == (shape.k + block - 1) / block &&
                        packed_weight.size(3) == shape.c && packed_weight.size(4) == block,
                    "packed_weight must come from _pack_few_channels and have the input's channels");
    std::memcpy(bias_.data(), bias.const_data_ptr(), shape.k * sizeof(float));
    for (int64_t r = 0; r < shape.r; ++r)
      for (int64_t t = 0; t < shape.s; ++t)
        for (int64_t c = 0; c < shape.c; ++c) offsets_.push_back((r * shape.c + c) * row_length() + t * dilation[1]);
    row_.offsets = offsets_.data();
    row_.pixel_step = stride[1];
    row_.weight = static_cast<const float*>(packed_weight.const_data_ptr());
    row_.block_stride = shape.r * shape.s * shape.c * block;
    row_.bias = bias_.data();
    row_.pixels = shape.q;
    row_.filters = shape.k;
    row_.relu = relu;
  }

  // The input rows that a thread's last output row has read, [R][C][row_length], kernel row r at r.
  struct Rows {
    std::vector<float> values;
    int64_t n = -1, top = 0, first = 0, last = 0;  // image; where kernel row 0 lies; kernel rows that are there
  };
  Rows rows() const { return {std::vector<float>(shape.r * row_size())}; }  // zeros: the padding

  // Output row p of image n, [Q][K].
  void row(int64_t n, int64_t p, Rows& rows, Storage type, void* output) const {
    read(n, p * shape.stride[0] - shape.padding[0], rows);
    ConvRow row = row_;
    row.input = rows.values.data() + rows.first * row_size();
    row.taps = (rows.last - rows.first) * shape.s * shape.c;
    row.weight += rows.first * shape.s * shape.c * kernels().conv_block;
    row.output = output;
    row.output_type = type;
    kernels().conv_row(row);
  }

  int64_t multiplications_of_row() const { return shape.q * shape.k * shape.r * shape.s * shape.c; }

  const ConvShape shape;

 private:
  int64_t row_length() const { return shape.w + 2 * shape.padding[1]; }

  int64_t row_size() const { return shape.c * row_length(); }

  // Makes `rows` hold what a kernel reads whose row 0 lies at `top`. Rows that it held for the output row above move:
  // they are 5 of the 7 of ResNet's stem, which an image in channels_last yields value by value only.
  void read(int64_t n, int64_t top, Rows& rows) const {
    const int64_t step = shape.dilation[0], shift = (top - rows.top) / step;
    // Kernel rows [first, last) meet the image; the others meet padding and add nothing.
    int64_t first = 0, last = shape.r, kept = 0;
    while (first < last && top + first * step < 0) ++first;
    while (last > first && top + (last - 1) * step >= shape.h) --last;
    if (rows.n == n && top - rows.top == shift * step && shift > 0 && first + shift >= rows.first)
      kept = std::max<int64_t>(0, std::min(last, rows.last - shift) - first);
    float* data = rows.values.data();
    if (kept > 0)
      std::memmove(data + first * row_size(), data + (first + shift) * row_size(), kept * row_size() * sizeof(float));
    for (int64_t r = first + kept; r < last; ++r) copy_row(n, top + r * step, data + r * row_size());
    rows.n = n, rows.top = top, rows.first = first, rows.last = last;
  }

  // Row y of image n as [C][row_length] into `out`, whose padding is zero already.
  void copy_row(int64_t n, int64_t y, float* out) const {
    const char* data = static_cast<const char*>(x_.const_data_ptr());
    for (int64_t c = 0; c < shape.c; ++c, out += row_length()) {
      const int64_t at = n * x_.stride(0) + c * x_.stride(1) + y * x_.stride(2);
      kernels().widen(data + at * bytes_of(type_), type_, x_.stride(3), shape.w, out + shape.padding[1]);
    }
  }

  const Tensor x_;
  const Storage type_;
  std::vector<float> bias_;  // [blocks * conv_block]
  std::vector<int64_t> offsets_;
  ConvRow row_{};
};

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
