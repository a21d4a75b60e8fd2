// The host side of the gradient of a convolution's weight; the loops are in kernels/conv_weight_grad.cpp. Blocks of
// pixels (or tiles) are copied and multiplied in turn, in an order that does not depend on the number of threads.
#include "conv.h"
#include "parallel.h"
#include "winograd.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Inputs {};
struct Grads {};
struct Sums {};

// Units of a block: as many as fit into the L2 caches of two cores with the sums that they go to, but so many that
// reading and writing the sums costs little.
int64_t block_of(int64_t units, int64_t unit_bytes) {
  const int64_t most = std::max<int64_t>(96, l2_bytes() / unit_bytes), blocks = (units + most - 1) / most;
  return (units + blocks - 1) / blocks;
}

bool run(WeightGrad& g, int64_t units) {
  const ConvShape& s = g.shape;
  const Kernels& run = kernels();
  const int64_t panel = run.gemm_panel, positions = g.winograd ? weight_grad_size * weight_grad_size : s.r * s.s;
  const int64_t grad_positions = g.winograd ? positions : 1;
  const int64_t k_panels = (s.k + panel - 1) / panel, c_panels = (s.c + panel - 1) / panel;
  const int64_t unit_bytes = (positions * c_panels + grad_positions * k_panels) * panel * int64_t(sizeof(float));
  g.block = block_of(units, unit_bytes);
  const Scratch<Inputs> inputs(positions * c_panels * g.block * panel * sizeof(float));
  const Scratch<Grads> grads(grad_positions * k_panels * g.block * panel * sizeof(float));
  const Scratch<Sums> sums(positions * k_panels * c_panels * panel * panel * sizeof(float));
  const auto sums_of = [&](int64_t k, int64_t c) {
    return sums.floats() + (k * c_panels + c) * positions * panel * panel;
  };

  const int64_t threads = torch::stable::get_num_threads();
  // A panel of filters and one of channels at a time or, for few of them, a part of the filters.
  const int64_t items = positions * k_panels * c_panels;
  const int64_t parts = std::clamp<int64_t>(4 * threads / items, 1, panel / 8);
  for (int64_t begin = 0; begin < units; begin += g.block) {
    const int64_t count = std::min(g.block, units - begin);
    const int64_t copied = std::clamp<int64_t>(count / (8 * threads), 1, 64);
    for_each_item((count + copied - 1) / copied, 4 * count * (positions * s.c + s.k), [&](int64_t i) {
      const int64_t first = i * copied, last = std::min(count, first + copied);
      run.weight_grad_input(g, begin + first, begin + last, inputs.floats() + first * panel);
      run.weight_grad_grad(g, begin + first, begin + last, grads.floats() + first * panel);
    });
    for_each_item(items * parts, count * positions * s.k * s.c, [&](int64_t i) {
      const int64_t part = i % parts, c = i / parts % c_panels, k = i / parts / c_panels % k_panels;
      const int64_t position = i / parts / c_panels / k_panels, filters = std::min(panel, s.k - k * panel);
      const int64_t first = filters * part / parts, last = filters * (part + 1) / parts;
      if (first == last) return;
      const int64_t from = g.winograd ? position : 0;
      run.weight_grad_products(grads.floats() + (k * grad_positions + from) * g.block * panel + first,
                               inputs.floats() + (c * positions + position) * g.block * panel, count, last - first,
                               s.c - c * panel, sums_of(k, c) + (position * panel + first) * panel, begin > 0);
    });
  }
  std::atomic<bool> finite{true};
  for_each_item(k_panels * c_panels, 8 * positions * s.k * s.c, [&](int64_t i) {
    const int64_t k = i / c_panels, c = i % c_panels;
    if (!run.weight_grad_output(g, k * panel, c * panel, sums_of(k, c))) finite = false;
  });
  return finite.load();
}

}  // namespace

std::tuple<Tensor, bool> conv_weight_grad(const Tensor& grad, const Tensor& input, const Tensor& like,
                                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                                          std::vector<int64_t> dilation, bool winograd,
                                          const std::optional<Tensor>& norm) {
  using torch::headeronly::MemoryFormat;
  const Tensor x = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const Tensor g = torch::stable::contiguous(grad, MemoryFormat::ChannelsLast);
  Tensor out = torch::stable::empty_like(like);
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Float && like.dim() == 4 && like.size(0) == grad.size(1) &&
                      like.size(1) == input.size(1),
                  "like must be the weight [K, C, R, S], in float32");
  WeightGrad job{};
  job.shape = {x.size(0),
               x.size(2),
               x.size(3),
               x.size(1),
               g.size(1),
               like.size(2),
               like.size(3),
               g.size(2),
               g.size(3),
               {stride[0], stride[1]},
               {padding[0], padding[1]},
               {dilation[0], dilation[1]},
               1};
  job.input = x.const_data_ptr(), job.input_type = storage_of(x.scalar_type());
  job.grad = g.const_data_ptr(), job.grad_type = storage_of(g.scalar_type());
  job.winograd = winograd;
  job.output = static_cast<float*>(out.mutable_data_ptr());
  for (int d = 0; d < 4; ++d) job.output_stride[d] = out.stride(d);
  const NormOfChannels channels(norm, x.size(1));
  job.norm = channels.pointers();
  std::vector<float> transform;
  if (winograd) {
    STD_TORCH_CHECK(like.size(2) == 3 && like.size(3) == 3 && stride[0] == 1 && stride[1] == 1 && dilation[0] == 1 &&
                        dilation[1] == 1,
                    "Winograd's algorithm takes 3x3 kernels without stride and dilation");
    for (const auto& row : winograd_weight_transform(weight_grad_taps, weight_grad_tile))
      for (const double v : row) transform.push_back(float(v));
  }
  job.transform = transform.data();
  const ConvShape& s = job.shape;
  const auto tiles = [](int64_t outputs) { return (outputs + weight_grad_tile - 1) / weight_grad_tile; };
  const int64_t units = s.n * (winograd ? tiles(s.p) * tiles(s.q) : s.p * s.q);
  return {out, run(job, units)};
}

}  // namespace resnet_fast
