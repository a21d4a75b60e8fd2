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

// How the sums are laid out: [filter panel][channel panel][position][panel][panel].
struct Layout {
  int64_t panel, positions, grad_positions, k_panels, c_panels;

  explicit Layout(const WeightGrad& g)
      : panel(kernels().gemm_panel),
        positions(g.winograd ? weight_grad_size * weight_grad_size : g.shape.r * g.shape.s),
        grad_positions(g.winograd ? positions : 1),
        k_panels((g.shape.k + panel - 1) / panel),
        c_panels((g.shape.c + panel - 1) / panel) {}
  int64_t items() const { return positions * k_panels * c_panels; }
  int64_t of_sums() const { return items() * panel * panel; }
  int64_t of_inputs() const { return positions * c_panels * panel; }  // of a unit, as of_grads
  int64_t of_grads() const { return grad_positions * k_panels * panel; }
  int64_t unit_bytes() const { return (of_inputs() + of_grads()) * int64_t(sizeof(float)); }
  int64_t sums_at(int64_t k, int64_t c, int64_t position) const {
    return ((k * c_panels + c) * positions + position) * panel * panel;
  }
};

// Adds to `sums` what `count` copied units give for filters [first, last) of panel k and the channels of panel c.
void multiply(const WeightGrad& g, const Layout& at, const float* grads, const float* inputs, int64_t count, int64_t k,
              int64_t c, int64_t position, int64_t first, int64_t last, float* sums, bool adds) {
  const int64_t from = g.winograd ? position : 0, panel = at.panel;
  kernels().weight_grad_products(grads + (k * at.grad_positions + from) * g.block * panel + first,
                                 inputs + (c * at.positions + position) * g.block * panel, count, last - first,
                                 g.shape.c - c * panel, sums + at.sums_at(k, c, position) + first * panel, adds);
}

bool write(const WeightGrad& g, const Layout& at, const float* sums) {
  std::atomic<bool> finite{true};
  for_each_item(at.k_panels * at.c_panels, 8 * at.positions * g.shape.k * g.shape.c, [&](int64_t i) {
    const int64_t k = i / at.c_panels, c = i % at.c_panels;
    if (!kernels().weight_grad_output(g, k * at.panel, c * at.panel, sums + at.sums_at(k, c, 0))) finite = false;
  });
  return finite.load();
}

// Where the sums of all filters and channels fit into an L2 cache with the units that are added to them: each thread
// has pixels of its own, and what it copies is read by no other core. Of the time below, 1x1 convolutions took
// 0.64-0.82, of 1024 channels at 14x14 0.96 (2 Emerald Rapids cores). So many parts, whatever the number of threads,
// whose sums are added up in their order.
constexpr int64_t parts = 16;

bool may_split_units(const Layout& at, int64_t units) {
  return at.of_sums() * int64_t(sizeof(float)) <= l2_bytes() / 2 && units >= parts * 32;  // so that no part is empty
}

bool run_by_units(WeightGrad& g, int64_t units) {
  const Layout at(g);
  const int64_t part_units = (units + parts - 1) / parts, most = l2_bytes() / 2 / at.unit_bytes();
  const int64_t blocks = (part_units + std::clamp<int64_t>(most, 64, 512) - 1) / std::clamp<int64_t>(most, 64, 512);
  g.block = (part_units + blocks - 1) / blocks;
  const Scratch<Sums> sums(parts * at.of_sums() * sizeof(float));
  for_each_item(parts, units * at.positions * g.shape.k * g.shape.c, [&](int64_t part) {
    const Scratch<Inputs> inputs(at.of_inputs() * g.block * sizeof(float));
    const Scratch<Grads> grads(at.of_grads() * g.block * sizeof(float));
    float* to = sums.floats() + part * at.of_sums();
    const int64_t first = std::min(units, part * part_units), last = std::min(units, first + part_units);
    for (int64_t begin = first; begin < last; begin += g.block) {
      const int64_t count = std::min(g.block, last - begin);
      kernels().weight_grad_input(g, begin, begin + count, inputs.floats());
      kernels().weight_grad_grad(g, begin, begin + count, grads.floats());
      for (int64_t i = 0; i < at.items(); ++i) {
        const int64_t c = i % at.c_panels, k = i / at.c_panels % at.k_panels, position = i / at.c_panels / at.k_panels;
        multiply(g, at, grads.floats(), inputs.floats(), count, k, c, position, 0,
                 std::min(at.panel, g.shape.k - k * at.panel), to, begin > first);
      }
    }
  });
  constexpr int64_t chunk = 4096;
  for_each_item((at.of_sums() + chunk - 1) / chunk, parts * at.of_sums(), [&](int64_t i) {
    float* to = sums.floats() + i * chunk;
    const int64_t count = std::min(chunk, at.of_sums() - i * chunk);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t j = 0; j < count; ++j) to[j] += to[part * at.of_sums() + j];
  });
  return write(g, at, sums.floats());
}

// Units of a block: as many as fit into the L2 caches of two cores with the sums that they go to, but so many that
// reading and writing the sums costs little.
int64_t block_of(int64_t units, int64_t unit_bytes) {
  const int64_t most = std::max<int64_t>(96, l2_bytes() / unit_bytes), blocks = (units + most - 1) / most;
  return (units + blocks - 1) / blocks;
}

bool run_by_panels(WeightGrad& g, int64_t units) {
  const Layout at(g);
  const ConvShape& s = g.shape;
  g.block = block_of(units, at.unit_bytes());
  const Scratch<Inputs> inputs(at.of_inputs() * g.block * sizeof(float));
  const Scratch<Grads> grads(at.of_grads() * g.block * sizeof(float));
  const Scratch<Sums> sums(at.of_sums() * sizeof(float));
  const int64_t threads = torch::stable::get_num_threads();
  // A panel of filters and one of channels at a time or, for few of them, a part of the filters.
  const int64_t splits = std::clamp<int64_t>(4 * threads / at.items(), 1, at.panel / 8);
  for (int64_t begin = 0; begin < units; begin += g.block) {
    const int64_t count = std::min(g.block, units - begin);
    const int64_t copied = std::clamp<int64_t>(count / (8 * threads), 1, 64);
    for_each_item((count + copied - 1) / copied, 4 * count * (at.positions * s.c + s.k), [&](int64_t i) {
      const int64_t first = i * copied, last = std::min(count, first + copied);
      kernels().weight_grad_input(g, begin + first, begin + last, inputs.floats() + first * at.panel);
      kernels().weight_grad_grad(g, begin + first, begin + last, grads.floats() + first * at.panel);
    });
    for_each_item(at.items() * splits, count * at.positions * s.k * s.c, [&](int64_t i) {
      const int64_t split = i % splits, c = i / splits % at.c_panels, k = i / splits / at.c_panels % at.k_panels;
      const int64_t position = i / splits / at.c_panels / at.k_panels, filters = std::min(at.panel, s.k - k * at.panel);
      const int64_t first = filters * split / splits, last = filters * (split + 1) / splits;
      if (first == last) return;
      multiply(g, at, grads.floats(), inputs.floats(), count, k, c, position, first, last, sums.floats(), begin > 0);
    });
  }
  return write(g, at, sums.floats());
}

bool run(WeightGrad& g, int64_t units) {
  return may_split_units(Layout(g), units) ? run_by_units(g, units) : run_by_panels(g, units);
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
