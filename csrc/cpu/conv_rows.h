// What the host sides of a network's first layer share: they read images of any strides and make rows of the output,
// which are written or, while they are in the cache, max-pooled.
//
// A `Source` has
//   static constexpr int64_t rows_at_once  the rows of a block
//   const ConvShape shape
//   State state() const                    what one thread keeps
//   bool block(n, i, state, type, output)  rows [i * rows_at_once, (i + 1) * rows_at_once) of image n, as far as they
//                                          exist, into [rows][Q][K]; false where a result is not finite
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "conv.h"
#include "parallel.h"

namespace resnet_fast {

struct PoolBands {};  // rows of the convolution, kept for the pooling

inline int64_t pooled(int64_t size, const Pool& pool, int d) {
  return output_extent(size, pool.kernel[d], pool.stride[d], pool.padding[d], pool.dilation[d]);
}

inline int64_t multiplications(const ConvShape& s) { return s.n * s.p * s.q * s.k * s.r * s.s * s.c; }

template <typename Source>
bool write_rows(const Source& source, const Conv& c) {
  const ConvShape& s = source.shape;
  char* output = static_cast<char*>(c.output);
  const int64_t blocks = (s.p + Source::rows_at_once - 1) / Source::rows_at_once;
  const int64_t row_bytes = s.q * s.k * bytes_of(c.output_type), items = s.n * blocks;
  const int64_t grain = std::max<int64_t>(1, items * least_work / std::max<int64_t>(1, multiplications(s)));
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    auto state = source.state();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / blocks, i = item % blocks;
      char* to = output + (n * s.p + i * Source::rows_at_once) * row_bytes;
      if (!source.block(n, i, state, c.output_type, to)) finite = false;
    }
  });
  return finite.load();
}

// A thread keeps as many blocks of rows as a pooling kernel meets (86 KiB for the rows of ResNet's stem, 230 KiB for
// Winograd's: they stay in the L2 cache), so that the map between the two, 3.2 MB an image, never exists.
template <typename Source>
bool max_pool_rows(const Source& source, const Conv& c, const Pool& p) {
  constexpr int64_t step = Source::rows_at_once;
  const ConvShape& s = source.shape;
  const Storage type = c.output_type;
  char* output = static_cast<char*>(c.output);
  const int64_t height = pooled(s.p, p, 0), width = pooled(s.q, p, 1), row_size = s.q * s.k;
  const int64_t kept = (p.kernel[0] + step - 2) / step + 1;

  // Bands of output rows, as few as give every thread the same number: where two bands meet both compute a block.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = std::min(height, threads / std::gcd(s.n, threads));
  std::atomic<bool> finite{true};
  for_each_item(s.n * bands, multiplications(s), [&](int64_t item) {
    const int64_t n = item / bands, band = item % bands;
    auto state = source.state();
    const Scratch<PoolBands> scratch(kept * step * row_size * sizeof(float));
    std::vector<int64_t> holds(kept, -1);  // which block lies where
    std::vector<const void*> rows(p.kernel[0]);
    PoolRow pool{rows.data(),  0, s.q,     s.k,   p.kernel[1],  p.stride[1],
                 p.padding[1], 1, nullptr, width, Storage::f32, type};
    for (int64_t i = height * band / bands; i < height * (band + 1) / bands; ++i) {
      const int64_t top = i * p.stride[0] - p.padding[0];
      pool.num_rows = 0;
      for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + p.kernel[0], s.p); ++y) {
        const int64_t block = y / step, slot = block % kept;
        float* first = scratch.floats() + slot * step * row_size;
        if (holds[slot] != block && !source.block(n, block, state, Storage::f32, first)) finite = false;
        holds[slot] = block;
        rows[pool.num_rows++] = first + y % step * row_size;
      }
      pool.output = output + (n * height + i) * width * s.k * bytes_of(type);
      kernels().max_pool_row(pool);
    }
  });
  return finite.load();
}

// A call on tensors whose sizes fit.
struct ImageCall {
  ImageCall(const ConvShape& shape, const torch::stable::Tensor& input, const torch::stable::Tensor& packed_weight,
            const torch::stable::Tensor& bias, bool relu)
      : strides{input.stride(0), input.stride(1), input.stride(2), input.stride(3)},
        padded_bias(bias.size(0) + kernels().gemm_panel),
        dtype_(input.scalar_type()) {
    const Storage type = storage_of(dtype_), weight_type = storage_of(packed_weight.scalar_type());
    check_weight_type(weight_type, type);
    std::memcpy(padded_bias.data(), bias.const_data_ptr(), shape.k * sizeof(float));
    conv = {shape,
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

  // Where the result goes, [N, K, P, Q].
  torch::stable::Tensor allocate() { return allocate(conv.shape.p, conv.shape.q); }

  // Where the result of a max-pooling behind it goes.
  torch::stable::Tensor allocate(const Pool& pool) {
    const int64_t height = pooled(conv.shape.p, pool, 0), width = pooled(conv.shape.q, pool, 1);
    STD_TORCH_CHECK(height > 0 && width > 0, "the pooling kernel must fit into the padded map");
    return allocate(height, width);
  }

  const Strides strides;
  std::vector<float> padded_bias;
  Conv conv{};

 private:
  torch::stable::Tensor allocate(int64_t p, int64_t q) {
    torch::stable::Tensor out = empty_map({conv.shape.n, conv.shape.k, p, q}, dtype_);
    conv.output = out.mutable_data_ptr();
    return out;
  }

  const torch::headeronly::ScalarType dtype_;
};

inline Pool pool_of(const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding) {
  return {{kernel_size[0], kernel_size[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, {1, 1}};
}

}  // namespace resnet_fast
