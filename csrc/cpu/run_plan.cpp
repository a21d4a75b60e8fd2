// A network's forward pass as a list of steps, each one kernel on maps whose places were planned before: nothing is
// allocated, and between two kernels lie a few hundred nanoseconds instead of a call from Python (20-50 us with its
// checks). Written by resnet_fast/inference/program.py.
#include <chrono>
#include <initializer_list>
#include <string>

#include "conv.h"
#include "parallel.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One row of `steps`; what a kind does not need is 0. Maps are in channels_last and lie `..._at` bytes into the tensor
// of that number in `maps`; weight and bias are numbers of tensors in `constants`. residual is -1 where there is none.
// `tile` is Winograd's. First layers (conv_few_channels, conv_winograd_stem) read the caller's map in its own strides,
// from `image` on.
// clang-format off
#define RESNET_FAST_STEP_FIELDS(F)                                                                                \
  F(kind)                                                                                                         \
  F(input) F(input_at) F(residual) F(residual_at) F(output) F(output_at) F(weight) F(bias)                        \
  F(n) F(h) F(w) F(c) F(k) F(r) F(s) F(p) F(q)                                                                    \
  F(stride_h) F(stride_w) F(padding_h) F(padding_w) F(dilation_h) F(dilation_w) F(groups)                         \
  F(input_type) F(output_type) F(relu) F(tile) F(image)                                                           \
  F(pool_kernel_h) F(pool_kernel_w) F(pool_stride_h) F(pool_stride_w) F(pool_padding_h) F(pool_padding_w)         \
  F(pooled_h) F(pooled_w)
// clang-format on

#define RESNET_FAST_FIELD(name) int64_t name;
struct Step {
  RESNET_FAST_STEP_FIELDS(RESNET_FAST_FIELD)
};
#undef RESNET_FAST_FIELD

// widen: a 16-bit map to float32.
// clang-format off
#define RESNET_FAST_STEP_KINDS(K)                                                                                 \
  K(conv_few_channels) K(conv_few_channels_max_pool) K(conv_gemm) K(conv_grouped) K(conv_depthwise)               \
  K(conv_winograd) K(conv_winograd_stem) K(conv_winograd_stem_max_pool) K(max_pool) K(avg_pool) K(add_relu)       \
  K(widen)
// clang-format on

#define RESNET_FAST_KIND(name) name,
enum Kind : int64_t { RESNET_FAST_STEP_KINDS(RESNET_FAST_KIND) };
#undef RESNET_FAST_KIND

#define RESNET_FAST_NAME(name) #name " "
constexpr char field_names[] = RESNET_FAST_STEP_FIELDS(RESNET_FAST_NAME);
constexpr char kind_names[] = RESNET_FAST_STEP_KINDS(RESNET_FAST_NAME);
#undef RESNET_FAST_NAME

// The first one of `zeros` is what kernels read where they meet padding.
constexpr size_t zeros = 0;

class Plan {
 public:
  Plan(const std::vector<Tensor>& constants, const std::vector<Tensor>& maps) : constants_(constants), maps_(maps) {}

  // False if Winograd's algorithm met values that are not finite.
  bool run(const Step& step) const {
    switch (step.kind) {
      case conv_few_channels:
        run_conv_few_channels(conv(step), strides(step));
        return true;
      case conv_few_channels_max_pool:
        run_conv_few_channels_max_pool(conv(step), strides(step), pool(step));
        return true;
      case conv_gemm:
        run_conv_gemm(conv(step));
        return true;
      case conv_grouped:
        run_conv_grouped(conv(step));
        return true;
      case conv_depthwise:
        run_conv_depthwise(conv(step));
        return true;
      case conv_winograd:
        return run_conv_winograd(conv(step), step.tile);
      case conv_winograd_stem:
        return run_conv_winograd_stem(conv(step), strides(step));
      case conv_winograd_stem_max_pool:
        return run_conv_winograd_stem_max_pool(conv(step), strides(step), pool(step));
      case max_pool: {
        const Storage type = storage(step.input_type);
        run_max_pool({step.n, step.h, step.w, step.c, step.p, step.q, pool(step), input(step), output(step), type});
        return true;
      }
      case avg_pool:
        run_avg_pool(input(step), storage(step.input_type), true, step.n, step.h * step.w, step.c, output(step));
        return true;
      case add_relu:
        run_add_relu(input(step), residual(step), output(step), output_size(step), storage(step.input_type));
        return true;
      case widen:
        run_widen(input(step), storage(step.input_type), static_cast<float*>(output(step)), output_size(step));
        return true;
      default:
        STD_TORCH_CHECK(false, "steps must come from this build of resnet_fast, got a step of kind ", step.kind);
    }
  }

 private:
  static Storage storage(int64_t type) {
    STD_TORCH_CHECK(type >= 0 && type <= 2, "steps must come from this build of resnet_fast, got the type ", type);
    return static_cast<Storage>(type);
  }

  // The bytes [at, at + size) of a tensor.
  static char* inside(const std::vector<Tensor>& tensors, int64_t index, int64_t at, int64_t size) {
    STD_TORCH_CHECK(index >= 0 && index < int64_t(tensors.size()), "steps name tensor ", index, " of ", tensors.size());
    const Tensor& t = tensors[index];
    const int64_t bytes = t.numel() * t.element_size();
    STD_TORCH_CHECK(at >= 0 && at <= bytes && size <= bytes - at, "steps reach byte ", at, " + ", size, " of ", bytes);
    return static_cast<char*>(t.data_ptr()) + at;
  }

  static int64_t product(std::initializer_list<int64_t> factors) {
    int64_t result = 1;
    for (const int64_t f : factors)
      STD_TORCH_CHECK(f >= 0 && !__builtin_mul_overflow(result, f, &result), "steps must have sizes, got ", f);
    return result;
  }

  static int64_t output_size(const Step& step) {
    const bool pools = step.kind == conv_few_channels_max_pool || step.kind == conv_winograd_stem_max_pool;
    return product({step.n, pools ? step.pooled_h : step.p, pools ? step.pooled_w : step.q, step.k});
  }

  const void* input(const Step& step) const {
    const int64_t size = product({step.n, step.h, step.w, step.c, bytes_of(storage(step.input_type))});
    return inside(maps_, step.input, step.input_at, size);
  }

  static bool is_first_layer(const Step& step) {
    return step.kind == conv_few_channels || step.kind == conv_few_channels_max_pool ||
           step.kind == conv_winograd_stem || step.kind == conv_winograd_stem_max_pool;
  }

  // Values of a packed weight.
  static int64_t weight_size(const Step& step, Storage type) {
    STD_TORCH_CHECK(step.groups > 0 && step.c % step.groups == 0 && step.k % step.groups == 0,
                    "steps must have groups that divide the channels, got ", step.groups);
    const int64_t width = kernels().vector_width, filters = step.k / step.groups, depth = step.c / step.groups;
    const int64_t padded = (filters + width - 1) / width * width;
    switch (step.kind) {
      case conv_winograd: {
        STD_TORCH_CHECK(step.tile == 2 || step.tile == 4 || step.tile == 5, "Winograd tiles are 2, 4 or 5 wide");
        return product({padded, step.tile + 2, step.tile + 2, type == Storage::bf16 ? (depth + 1) / 2 * 2 : depth});
      }
      case conv_winograd_stem:
      case conv_winograd_stem_max_pool:
        STD_TORCH_CHECK(step.r == 7 && step.s == 7 && step.stride_h == 2 && step.stride_w == 2 && step.c <= 4 &&
                            type == Storage::f32,
                        "Winograd's stem is 7x7 with stride 2 on at most 4 channels, its weight float32");
        return product({padded, stem_size * stem_size, 4 * step.c});
      case conv_grouped: {
        const GroupedUnit unit = kernels().grouped_unit(step.c, step.k, step.groups);
        STD_TORCH_CHECK(type == Storage::f32 || depth % 2 == 0, "groups of pairs have an even number of channels");
        return product({unit.units, unit.vectors, step.r, depth, step.s, width});
      }
      case conv_depthwise:
        return product({step.r, step.s, step.c});
      default:
        return product({step.groups, padded, step.r, step.s, depth});
    }
  }
  const void* residual(const Step& step) const {
    if (step.residual < 0) return nullptr;
    return inside(maps_, step.residual, step.residual_at, output_size(step) * bytes_of(storage(step.output_type)));
  }
  void* output(const Step& step) const {
    return inside(maps_, step.output, step.output_at, output_size(step) * bytes_of(storage(step.output_type)));
  }

  static Pool pool(const Step& step) {
    return {{step.pool_kernel_h, step.pool_kernel_w},
            {step.pool_stride_h, step.pool_stride_w},
            {step.pool_padding_h, step.pool_padding_w},
            {1, 1}};
  }

  Conv conv(const Step& step) const {
    const ConvShape shape{step.n,
                          step.h,
                          step.w,
                          step.c,
                          step.k,
                          step.r,
                          step.s,
                          step.p,
                          step.q,
                          {step.stride_h, step.stride_w},
                          {step.padding_h, step.padding_w},
                          {step.dilation_h, step.dilation_w},
                          step.groups};
    const bool first = is_first_layer(step);
    const Storage input_type = storage(step.input_type), output_type = storage(step.output_type);
    const void* weight = inside(constants_, step.weight, 0, 0);
    const Storage weight_type = storage_of(constants_[step.weight].scalar_type());
    check_weight_type(weight_type, input_type);
    const int64_t weights = weight_size(step, weight_type);
    STD_TORCH_CHECK(constants_[step.weight].numel() == weights, "steps want a weight of ", weights, " values, got ",
                    constants_[step.weight].numel());
    const int64_t bias_size = (step.k + kernels().gemm_panel) * 4, zeros_size = (step.c + kernels().vector_width) * 4;
    return {shape,
            first ? image(step) : input(step),
            weight,
            reinterpret_cast<const float*>(inside(constants_, step.bias, 0, bias_size)),
            residual(step),
            output(step),
            first ? nullptr : inside(constants_, zeros, 0, zeros_size),
            input_type,
            output_type,
            weight_type,
            step.relu != 0};
  }

  const void* image(const Step& step) const {
    const char* first = inside(maps_, step.input, 0, 0);
    const Tensor& t = maps_[step.input];
    STD_TORCH_CHECK(t.dim() == 4 && step.image >= 0 && step.image + step.n <= t.size(0) && t.size(1) == step.c &&
                        t.size(2) == step.h && t.size(3) == step.w,
                    "steps want an input of ", step.image + step.n, " x ", step.c, " x ", step.h, " x ", step.w);
    return first + step.image * t.stride(0) * t.element_size();
  }
  Strides strides(const Step& step) const {
    const Tensor& t = maps_[step.input];
    return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }

  const std::vector<Tensor>& constants_;
  const std::vector<Tensor>& maps_;
};

}  // namespace

void run_widen(const void* input, Storage type, float* output, int64_t size) {
  torch::stable::parallel_for(0, size, 1 << 15, [=](int64_t begin, int64_t end) {
    kernels().widen(static_cast<const char*>(input) + begin * bytes_of(type), type, output + begin, end - begin);
  });
}

int64_t run_plan(const Tensor& steps, std::vector<Tensor> constants, std::vector<Tensor> maps,
                 const std::optional<Tensor>& seconds) {
  constexpr int64_t fields = sizeof(Step) / sizeof(int64_t);
  STD_TORCH_CHECK(
      steps.dim() == 2 && steps.size(1) == fields && steps.is_contiguous() && steps.scalar_type() == ScalarType::Long,
      "steps must be [number, ", fields, "], int64");
  const int64_t number = steps.size(0);
  STD_TORCH_CHECK(!seconds.has_value() || (seconds->numel() == number && seconds->is_contiguous() &&
                                           seconds->scalar_type() == ScalarType::Double),
                  "seconds must be [", number, "], float64");
  const Step* step = static_cast<const Step*>(steps.const_data_ptr());
  double* times = seconds.has_value() ? static_cast<double*>(seconds->mutable_data_ptr()) : nullptr;
  const Plan plan(constants, maps);
  for (int64_t i = 0; i < number; ++i) {
    const auto start = std::chrono::steady_clock::now();
    if (!plan.run(step[i])) return i;
    if (times) times[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return -1;
}

std::string plan_format() { return std::string(field_names) + "| " + kind_names; }

}  // namespace resnet_fast
