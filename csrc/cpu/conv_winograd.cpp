// The host side of Winograd convolution: transforms and packs the weight, splits the work over torch's thread pool.
// The transforms of the activations and the products are in kernels/conv_winograd.cpp.
#include <optional>

#include "conv.h"
#include "parallel.h"
#include "winograd.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Transformed {};
struct Products {};
struct PackedWeight {};
struct PackedChunk {};

// A weight [K, C, 3, 3] of any strides, to be transformed; `turned`: for the convolution that computes the gradient of
// the input from that of the output.
class RawWeight {
 public:
  RawWeight(const Tensor& weight, int64_t m, bool bfloat16, bool turned) : m_(m) {
    STD_TORCH_CHECK(
        weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == ScalarType::Float,
        "weight must be [K, C, 3, 3], float32");
    STD_TORCH_CHECK(!bfloat16 || (m == 2 && kernels().multiplies_bf16),
                    "in bfloat16, at level avx512_bf16, Winograd tiles are 2 pixels wide, got ", m);
    for (const auto& row : winograd_weight_transform(m, 3)) transform_.insert(transform_.end(), row.begin(), row.end());
    weight_ = {static_cast<const float*>(weight.const_data_ptr()),
               weight.stride(turned),
               weight.stride(1 - turned),
               weight.stride(2),
               weight.stride(3),
               weight.size(turned),
               weight.size(1 - turned),
               transform_.data(),
               bfloat16 ? Storage::bf16 : Storage::f32};
    if (turned) {  // each filter's last tap first
      weight_.from += 2 * (weight_.row_stride + weight_.tap_stride);
      weight_.row_stride = -weight_.row_stride, weight_.tap_stride = -weight_.tap_stride;
    }
  }
  Storage type() const { return weight_.type; }
  int64_t filters() const { return weight_.filters; }
  int64_t channels() const { return weight_.channels; }
  int64_t padded_filters() const {
    const int64_t width = kernels().vector_width;
    return (weight_.filters + width - 1) / width * width;
  }
  int64_t depth() const {  // channels in whole steps
    const int64_t step = type() == Storage::bf16 ? 2 : 1;
    return (weight_.channels + step - 1) / step * step;
  }
  int64_t bytes_of_filter() const { return (m_ + 2) * (m_ + 2) * depth() * bytes_of(type()); }

  // All panels, each in chunks of so many channels.
  void pack(int64_t chunk, void* to) const {
    const int64_t panel = kernels().gemm_panel;
    for_each_item((padded_filters() + panel - 1) / panel, 8 * padded_filters() * weight_.channels, [&](int64_t item) {
      for (int64_t c = 0; c < weight_.channels; c += chunk)
        pack_chunk(item * panel, c, chunk, static_cast<char*>(to) + place_of(item * panel, c));
    });
  }
  void pack_chunk(int64_t filter, int64_t channel, int64_t chunk, void* to) const {
    kernels().winograd_weight(weight_, m_, filter, channel, std::min(weight_.channels, channel + chunk), to);
  }
  // Where `pack` puts the panel at `filter`, from that channel on.
  int64_t place_of(int64_t filter, int64_t channel) const {
    const int64_t columns = std::min(kernels().gemm_panel, padded_filters() - filter);
    return filter * bytes_of_filter() + columns * (m_ + 2) * (m_ + 2) * channel * bytes_of(type());
  }

 private:
  int64_t m_;
  std::vector<double> transform_;
  WinogradWeight weight_;
};

// How the work is shared. Either each thread takes blocks of tiles through all panels of filters and reads the weight
// for each block; or all threads transform up to `most_tiles` tiles, then share the panels, and the weight is read
// once. Blocks are faster as long as so many tiles of them fit into the L2 cache with the products. GFLOP/s of blocks
// and of sharing at batch 8: 372 and 334 for 128 channels, 355 and 407 for 256 (2 Zen 3 cores, 512 KiB of L2 cache),
// 1800 and 1600 for 256 (2 Zen 5 cores, 1 MiB); 377 and 349 for 128, 299 and 358 for 256 (2 Cascade Lake cores, 1 MiB).
constexpr int64_t most_tiles = 96;

// For 256 channels at 14x14 blocks are of 12 tiles with an L2 cache of 1 MiB: faster on Zen 5, slower on Cascade Lake.
// Other Intel CPUs were not measured.
int64_t least_tiles() {
#if defined(__x86_64__)
  static const int64_t tiles = __builtin_cpu_is("intel") ? 16 : 12;
  return tiles;
#else
  return 12;
#endif
}

// Channels of a panel that are packed and multiplied at a time where the weight changes with every call: 1.2 MB for
// tiles of 4 x 4.
constexpr int64_t packed_channels = 128;

// Tiles of a block, of which each thread gets as many; 0: the threads share.
int64_t tiles_of_block(int64_t tiles, int64_t tile_bytes, int64_t threads) {
  const int64_t least = least_tiles();
  if (least * tile_bytes > l2_bytes() * 5 / 8) return 0;
  const int64_t most = std::clamp(l2_bytes() * 7 / 16 / tile_bytes, least, most_tiles);
  const int64_t rounds = (tiles + most * threads - 1) / (most * threads);
  const int64_t block = (tiles + rounds * threads - 1) / (rounds * threads);
  return block < least ? 0 : block;
}

// Passes in which the threads share all tiles: a panel's products in one pass stay in the L2 cache. With 96 tiles in a
// pass 256 channels at 14x14 took 1.1 times as long as with 48 (2 Cascade Lake cores, batch 8 to 32).
int64_t passes_of(int64_t tiles, int64_t product_bytes) {  // bytes of one tile's products
  const int64_t most = std::clamp(l2_bytes() * 5 / 8 / product_bytes, least_tiles(), most_tiles);
  return (tiles + most - 1) / most;
}

}  // namespace

std::vector<std::vector<double>> winograd_weight_transform(int64_t m, int64_t r) {
  std::vector<double> points;
  if (m + r == 5) points = {0.0, 1.0, -1.0};
  if (m + r == 7) points = {0.0, 2.0 / 3, -2.0 / 3, 1.5, -1.5};
  if (m + r == 8) points = {0.25, -0.25, 0.875, -0.875, 1.75, -1.75};
  STD_TORCH_CHECK(!points.empty(), "Winograd tiles are 2, 4 or 5 pixels wide, got ", m);
  std::vector<std::vector<double>> rows;
  for (const double p : points) {
    double value = 1.0;
    for (const double q : points)
      if (q != p) value /= p - q;
    std::vector<double>& row = rows.emplace_back();
    for (int64_t i = 0; i < r; ++i, value *= p) row.push_back(value);
  }
  std::vector<double>& infinity = rows.emplace_back(r, 0.0);
  infinity.back() = 1.0;
  return rows;
}

// Panels of filters: [padded / panel][(m + 2)^2][C / step][panel][step], where a step is one value or, in bfloat16,
// two.
Tensor pack_winograd(const Tensor& weight, int64_t m, bool bfloat16) {  // [K, C, 3, 3]
  const RawWeight raw(weight, m, bfloat16, false);
  Tensor packed = torch::stable::empty({raw.padded_filters(), (m + 2) * (m + 2), raw.depth()},
                                       bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  raw.pack(raw.channels(), packed.mutable_data_ptr());
  return packed;
}

std::tuple<Tensor, bool> conv_winograd(const Tensor& input, const Tensor& packed_weight, const Tensor& bias,
                                       const std::optional<Tensor>& residual, std::vector<int64_t> padding, bool relu,
                                       const std::optional<Tensor>& norm) {
  const std::vector<int64_t> ones{1, 1};
  const ConvShape s = conv_shape(input, bias, 3, 3, ones, padding, ones, 1);
  int64_t m = 2;
  while (m < 5 && (m + 2) * (m + 2) != packed_weight.size(1)) ++m;
  const int64_t width = kernels().vector_width, size = m + 2;
  const bool pairs = packed_weight.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(packed_weight.dim() == 3 && packed_weight.size(1) == size * size &&
                      packed_weight.size(2) == s.c + (pairs ? s.c % 2 : 0) &&
                      packed_weight.size(0) == (s.k + width - 1) / width * width,
                  "packed_weight must come from _pack_winograd for this input and bias");
  const ConvCall conv(s, input, packed_weight, bias, residual, relu, norm);
  const bool finite = s.n == 0 || run_conv_winograd(conv, m);
  return {conv.result(), finite};
}

namespace {

// With a `raw` weight, conv.weight is not set yet.
bool run(Conv conv, int64_t m, const RawWeight* raw) {
  const ConvShape& s = conv.shape;
  const int64_t width = kernels().vector_width, panel = kernels().gemm_panel, size = m + 2;
  const int64_t row_length = (s.c + width - 1) / width * width;
  const int64_t value_bytes = bytes_of(conv.weight_type);
  const Kernels& run = kernels();
  const int64_t work = s.n * s.p * s.q * s.k * s.c * (size * size) / (m * m);
  const int64_t tiles = s.n * ((s.p + m - 1) / m) * ((s.q + m - 1) / m);
  const int64_t panels = (s.k + panel - 1) / panel, threads = torch::stable::get_num_threads();
  const int64_t tile_bytes = run.winograd_input_stride(s, 1) * size * size * value_bytes;
  std::atomic<bool> finite{true};
  const auto products_bytes = [&](int64_t n) { return run.winograd_output_stride(n) * size * size * sizeof(float); };
  const int64_t filter_bytes = size * size * (s.c + (conv.weight_type == Storage::bf16 ? s.c % 2 : 0)) * value_bytes;
  bool packs_panels = false;
  const auto panel_of = [&](const void* transformed, int64_t stride, int64_t begin, int64_t end, int64_t filter) {
    const Scratch<Products> scratch(products_bytes(end - begin));
    float* products = scratch.floats();
    const char* weight = static_cast<const char*>(conv.weight);
    const auto multiply = [&](int64_t first, int64_t last, const void* at) {
      run.winograd_products(conv, m, transformed, stride, end - begin, filter, first, last, at, products);
    };
    if (!raw) multiply(0, s.c, weight + filter * filter_bytes);
    // Whoever packs, chunks are the same: the order of the sums must not depend on the number of threads.
    for (int64_t c = 0; raw && c < s.c; c += packed_channels) {
      const void* chunk = packs_panels ? nullptr : weight + raw->place_of(filter, c);
      std::optional<Scratch<PackedChunk>> own;
      if (packs_panels) {
        own.emplace(panel * size * size * packed_channels * value_bytes);
        raw->pack_chunk(filter, c, packed_channels, own->bytes());
        chunk = own->bytes();
      }
      multiply(c, std::min(s.c, c + packed_channels), chunk);
    }
    if (!run.winograd_output(conv, m, begin, end, filter, products)) finite = false;
  };

  const int64_t block = tiles_of_block(tiles, tile_bytes, threads), passes = passes_of(tiles, products_bytes(1));
  const auto splits_of = [&](int64_t count) {
    return std::clamp<int64_t>(2 * threads / panels, 1, std::max<int64_t>(1, count / least_tiles()));
  };
  // A panel that is needed once is packed by the thread that takes it, in its L2 cache: 512 channels at 7x7 have 38 MB
  // of transformed weight.
  packs_panels = raw && block == 0 && passes == 1 && splits_of(tiles) == 1;
  std::optional<Scratch<PackedWeight>> packed;
  if (raw && !packs_panels) {
    packed.emplace(raw->padded_filters() * raw->bytes_of_filter());
    raw->pack(packed_channels, packed->bytes());
    conv.weight = packed->bytes();
  }

  if (block > 0) {
    const int64_t blocks = (tiles + block - 1) / block;
    for_each_item(blocks, work, [&](int64_t item) {
      const int64_t begin = item * block, end = std::min(tiles, begin + block);
      const int64_t stride = run.winograd_input_stride(s, block);
      const Scratch<Transformed> transformed(stride * size * size * value_bytes);
      run.winograd_input(conv, m, begin, end, transformed.bytes(), stride);
      for (int64_t i = 0; i < panels; ++i) panel_of(transformed.bytes(), stride, begin, end, i * panel);
    });
    return finite.load();
  }
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t begin = tiles * pass / passes, count = tiles * (pass + 1) / passes - begin;
    const int64_t stride = run.winograd_input_stride(s, count);
    const Scratch<Transformed> scratch(stride * size * size * value_bytes);
    char* transformed = static_cast<char*>(scratch.bytes());
    const int64_t row_bytes = row_length * value_bytes;
    for_each_item(count, 8 * count * size * size * s.c, [&](int64_t i) {
      run.winograd_input(conv, m, begin + i, begin + i + 1, transformed + i * row_bytes, stride);
    });
    const int64_t splits = splits_of(count);
    for_each_item(panels * splits, work, [&](int64_t item) {
      const int64_t split = item % splits, first = count * split / splits, last = count * (split + 1) / splits;
      panel_of(transformed + first * row_bytes, stride, begin + first, begin + last, item / splits * panel);
    });
  }
  return finite.load();
}

}  // namespace

bool run_conv_winograd(const Conv& conv, int64_t m) { return run(conv, m, nullptr); }

std::tuple<Tensor, bool> conv_winograd_packing(const Tensor& input, const Tensor& weight, const Tensor& bias,
                                               std::vector<int64_t> padding, int64_t m, bool bfloat16, bool turned,
                                               const std::optional<Tensor>& norm) {
  const std::vector<int64_t> ones{1, 1};
  const ConvShape s = conv_shape(input, bias, 3, 3, ones, padding, ones, 1);
  const RawWeight raw(weight, m, bfloat16, turned);
  STD_TORCH_CHECK(raw.channels() == s.c && raw.filters() == s.k, "weight, input and bias must have the same sizes");
  const Tensor none = torch::stable::empty({0}, bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  const ConvCall conv(s, input, none, bias, std::nullopt, false, norm);
  const bool finite = s.n == 0 || run(conv, m, &raw);
  return {conv.result(), finite};
}

}  // namespace resnet_fast
