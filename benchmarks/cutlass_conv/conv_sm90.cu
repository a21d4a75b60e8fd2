// relu(conv2d(x, weight) + bias + residual) by CUTLASS 3.x for sm_90a: TMA im2col loads, wgmma, one consumer warpgroup
// (persistent schedules are refused for convolutions in CUTLASS 4.2). bfloat16 and float16, tile 128x128x64.
// clang-format off: kernel_hardware_info.hpp before conv_universal.hpp, which needs it and does not include it
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/kernel_hardware_info.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/conv/convolution.h>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/thread/activation.h>
// clang-format on

#include "conv.h"

namespace {

using cute::_1;
using cute::_128;
using cute::_64;
using cute::Shape;
using cutlass::layout::TensorNHWC;
namespace conv = cutlass::conv;
namespace epilogue = cutlass::epilogue;

template <typename Element>
struct Conv {
  static constexpr int vector_width = 8;
  static constexpr auto fprop = conv::Operator::kFprop;
  using Cluster = Shape<_1, _1, _1>;
  using TensorCores = cutlass::arch::OpClassTensorOp;
  // out = relu(alpha * accumulator + beta * residual + bias of the column); the columns are the filters.
  using Fusion =
      epilogue::fusion::LinCombPerColBiasEltAct<epilogue::thread::ReLu, Element, float, Element, Element, float>;
  using Epilogue = typename epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, TensorCores, Shape<_128, _128, _64>, Cluster, epilogue::collective::EpilogueTileAuto, float,
      float, Element, TensorNHWC, vector_width, Element, TensorNHWC, vector_width, epilogue::TmaWarpSpecialized,
      Fusion>::CollectiveOp;
  using MainLoop = typename conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, TensorCores, fprop, Element, TensorNHWC, vector_width, Element, TensorNHWC, vector_width,
      float, Shape<_128, _128, Shape<_64>>, Cluster,
      conv::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  using Sizes = conv::ConvProblemShape<fprop, 2>;
  using Device = conv::device::ConvUniversalAdapter<conv::kernel::ConvUniversal<Sizes, MainLoop, Epilogue>>;
};

template <typename Element>
int run(const ConvSizes& f, const ConvPointers& at, cudaStream_t stream) {
  using Device = typename Conv<Element>::Device;
  const typename Conv<Element>::Sizes sizes(conv::Mode::kCrossCorrelation, {f.n, f.h, f.w, f.c}, {f.k, f.r, f.s, f.c},
                                            {f.padding, f.padding}, {f.padding, f.padding}, {f.stride, f.stride},
                                            {1, 1}, 1);
  typename Device::Arguments arguments{sizes,
                                       {static_cast<const Element*>(at.x), static_cast<const Element*>(at.weight)},
                                       {{}, nullptr, {}, static_cast<Element*>(at.out), {}},
                                       {}};
  auto& store = arguments.epilogue;
  static_assert(decltype(cute::rank<0>(store.dD))::value == 3);  // of a column of filters: Q, P, N
  cute::for_each(cute::make_seq<3>{}, [&](auto i) { cute::get<0, i>(store.dD) = sizes.stride_C[2 - i]; });
  store.dC = store.dD;
  // Without a residual its descriptor still needs an address; nothing is read from there where beta is 0.
  store.ptr_C = static_cast<const Element*>(at.residual != nullptr ? at.residual : at.out);
  store.thread.alpha = 1.0f;
  store.thread.beta = at.residual != nullptr ? 1.0f : 0.0f;
  store.thread.bias_ptr = static_cast<const Element*>(at.bias);

  Device convolution;
  if (convolution.can_implement(arguments) != cutlass::Status::kSuccess) return conv_refused;
  if (Device::get_workspace_size(arguments) > 0) return conv_not_prepared;  // build.py hands over none
  if (convolution.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return conv_not_prepared;
  return convolution.run(stream) == cutlass::Status::kSuccess ? conv_ok : conv_not_launched;
}

}  // namespace

// tile: 128. Returns a ConvResult.
CUTLASS_CONV_EXPORT int cutlass_conv_sm90(int is_bfloat16, int tile, const ConvSizes* sizes, const ConvPointers* at,
                                          cudaStream_t stream) {
  if (tile != 128) return conv_refused;
  return is_bfloat16 ? run<cutlass::bfloat16_t>(*sizes, *at, stream) : run<cutlass::half_t>(*sizes, *at, stream);
}
