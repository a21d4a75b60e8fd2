// relu(conv2d(x, weight) + bias + residual) by CUTLASS 2.x: an implicit GEMM on mma.sync with cp.async.
// clang-format off: the device's header after those of kernels, which it needs and does not include
#include <cutlass/conv/kernel/default_conv2d_fprop.h>
#include <cutlass/conv/kernel/default_conv2d_fprop_with_broadcast.h>
#include <cutlass/conv/device/implicit_gemm_convolution.h>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/epilogue/thread/linear_combination_relu.h>
#include <cutlass/epilogue/thread/linear_combination_residual_block.h>
// clang-format on

#include "conv.h"

namespace {

using cutlass::gemm::GemmShape;
using cutlass::layout::TensorNHWC;
namespace conv = cutlass::conv;
namespace epilogue = cutlass::epilogue::thread;

constexpr int vector_width = 8;  // elements of 16 bytes
constexpr auto iterator = conv::IteratorAlgorithm::kOptimized;
constexpr auto strides = conv::StrideSupport::kStrided;
using Accumulator = float;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;
using Instruction = GemmShape<16, 8, 16>;
using TensorCores = cutlass::arch::OpClassTensorOp;
using Add = cutlass::arch::OpMultiplyAdd;

// tile x tile x 32 of four warps.
template <typename Element, int tile, int stages>
struct Kernels {
  using Block = GemmShape<tile, tile, 32>;
  using Warp = GemmShape<tile / 2, tile / 2, 32>;

  // The bias stands in the place of the addend C, with strides of 0.
  using BiasRelu = epilogue::LinearCombinationRelu<Element, vector_width, Accumulator, Accumulator,
                                                   epilogue::ScaleType::NoBetaScaling>;
  using Plain = typename conv::kernel::DefaultConv2dFprop<
      Element, TensorNHWC, Element, TensorNHWC, Element, TensorNHWC, Accumulator, TensorCores, cutlass::arch::Sm80,
      Block, Warp, Instruction, BiasRelu, Swizzle, stages, Add, iterator, strides, vector_width, vector_width>::Kernel;

  using BiasAddRelu = epilogue::LinearCombinationResidualBlock<Element, Accumulator, Accumulator, Element, vector_width,
                                                               epilogue::Identity, cutlass::plus, epilogue::ReLu>;
  using WithResidual = typename conv::kernel::DefaultConv2dFpropWithBroadcast<
      Element, TensorNHWC, Element, TensorNHWC, Element, TensorNHWC, Accumulator, TensorCores, cutlass::arch::Sm80,
      Block, Warp, Instruction, BiasAddRelu, Swizzle, stages, Add, iterator, strides, vector_width,
      vector_width>::Kernel;
};

template <typename Kernel>
int launch(const typename conv::device::ImplicitGemmConvolution<Kernel>::Arguments& arguments, cudaStream_t stream) {
  conv::device::ImplicitGemmConvolution<Kernel> convolution;
  if (convolution.can_implement(arguments) != cutlass::Status::kSuccess) return conv_refused;
  if (convolution.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return conv_not_prepared;
  return convolution(stream) == cutlass::Status::kSuccess ? conv_ok : conv_not_launched;
}

template <typename Element, int tile, int stages>
int run(const ConvSizes& f, const ConvPointers& at, cudaStream_t stream) {
  using Plain = typename Kernels<Element, tile, stages>::Plain;
  using WithResidual = typename Kernels<Element, tile, stages>::WithResidual;
  const conv::Conv2dProblemSize sizes({f.n, f.h, f.w, f.c}, {f.k, f.r, f.s, f.c},
                                      {f.padding, f.padding, f.padding, f.padding}, {f.stride, f.stride}, {1, 1},
                                      {f.n, f.p, f.q, f.k}, conv::Mode::kCrossCorrelation, 1);
  const auto dense = [](const void* p, int n, int h, int w, int c) {
    return cutlass::TensorRef<Element, TensorNHWC>{static_cast<Element*>(const_cast<void*>(p)),
                                                   TensorNHWC::packed({n, h, w, c})};
  };
  const auto x = dense(at.x, f.n, f.h, f.w, f.c), weight = dense(at.weight, f.k, f.r, f.s, f.c);
  const auto out = dense(at.out, f.n, f.p, f.q, f.k);
  void* const bias = const_cast<void*>(at.bias);
  if (at.residual == nullptr) {
    const cutlass::TensorRef<Element, TensorNHWC> addend{static_cast<Element*>(bias),
                                                         TensorNHWC(TensorNHWC::Stride(0))};
    return launch<Plain>({sizes, x, weight, addend, out, {1.0f}}, stream);
  }
  const auto residual = dense(at.residual, f.n, f.p, f.q, f.k);
  return launch<WithResidual>(
      {sizes, x, weight, residual, out, {1.0f, 1.0f}, conv::SplitKMode::kSerial, bias, nullptr, 0, f.k}, stream);
}

template <typename Element>
int run_tile(int tile, const ConvSizes& sizes, const ConvPointers& at, cudaStream_t stream) {
  if (tile == 128) return run<Element, 128, 3>(sizes, at, stream);
  if (tile == 64) return run<Element, 64, 5>(sizes, at, stream);
  return conv_refused;
}

}  // namespace

// tile: 128 or 64 pixels and as many filters. Returns a ConvResult.
CUTLASS_CONV_EXPORT int cutlass_conv_sm80(int is_bfloat16, int tile, const ConvSizes* sizes, const ConvPointers* at,
                                          cudaStream_t stream) {
  return is_bfloat16 ? run_tile<cutlass::bfloat16_t>(tile, *sizes, *at, stream)
                     : run_tile<cutlass::half_t>(tile, *sizes, *at, stream);
}
