// The one list of operators. Schemas live here, in C++, so that a process without Python knows them too.
//
// Public operators (no underscore) are what users, autograd and torch.compile see. Their CPU and CUDA kernels are
// Python functions (resnet_fast/ops/<op>.py) that check, choose a backend and call the internal operators
// (underscore), each of which is one C++ or CUDA kernel. The CompositeExplicitAutograd kernels below are the plain
// stock-torch versions: a process that loads this library without the Python package still runs every graph, only
// not fused.
#include "cpu/ops.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/map_pool.h"
#include "dispatch.h"

namespace {

using resnet_fast::add;
using resnet_fast::call;
using torch::stable::Tensor;

Tensor relu(const Tensor& x) { return call("aten::relu", "", x); }

Tensor add_relu_plain(const Tensor& a, const Tensor& b) { return relu(add(a, b)); }

Tensor max_pool_plain(const Tensor& input,  // [N, C, H, W]
                      std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, bool ceil_mode) {
  return call("aten::max_pool2d", "", input, kernel_size, stride, padding, dilation, ceil_mode);
}

Tensor avg_pool_flatten_plain(const Tensor& input) {  // [N, C, H, W]
  const std::vector<int64_t> size{input.size(0), input.size(1)}, one{1, 1};
  return call("aten::reshape", "", call("aten::adaptive_avg_pool2d", "", input, one), size);
}

Tensor conv_bn_relu_plain(const Tensor& input,                     // [N, C, H, W]
                          const Tensor& weight,                    // [K, C / groups, R, S]
                          const std::optional<Tensor>& bias,       // [K]
                          const std::optional<Tensor>& bn_weight,  // [K]
                          const std::optional<Tensor>& bn_bias,    // [K]
                          const Tensor& running_mean,              // [K]
                          const Tensor& running_var,               // [K]
                          const std::optional<Tensor>& residual,   // [N, K, P, Q]
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups, double eps, bool apply_relu) {
  Tensor out = call("aten::conv2d", "", input, weight, bias, stride, padding, dilation, groups);
  const std::optional<Tensor> mean = running_mean, var = running_var;
  out = call("aten::batch_norm", "", out, bn_weight, bn_bias, mean, var, false, 0.0, eps, false);
  if (residual.has_value()) out = add(out, *residual);
  return apply_relu ? relu(out) : out;
}

Tensor conv_bn_relu_projection_plain(const Tensor& input,                              // [N, C, H, W]
                                     const Tensor& weight,                             // [K, C / groups, R, S]
                                     const std::optional<Tensor>& bias,                // [K]
                                     const std::optional<Tensor>& bn_weight,           // [K]
                                     const std::optional<Tensor>& bn_bias,             // [K]
                                     const Tensor& running_mean,                       // [K]
                                     const Tensor& running_var,                        // [K]
                                     const Tensor& shortcut,                           // [N, D, I, J]
                                     const Tensor& shortcut_weight,                    // [K, D / shortcut_groups, T, U]
                                     const std::optional<Tensor>& shortcut_bias,       // [K]
                                     const std::optional<Tensor>& shortcut_bn_weight,  // [K]
                                     const std::optional<Tensor>& shortcut_bn_bias,    // [K]
                                     const std::optional<Tensor>& shortcut_running_mean,  // [K]
                                     const std::optional<Tensor>& shortcut_running_var,   // [K]
                                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                                     std::vector<int64_t> dilation, int64_t groups, double eps,
                                     std::vector<int64_t> shortcut_stride, std::vector<int64_t> shortcut_padding,
                                     std::vector<int64_t> shortcut_dilation, int64_t shortcut_groups,
                                     double shortcut_eps) {
  const bool has_batch_norm = shortcut_running_mean.has_value() && shortcut_running_var.has_value();
  STD_TORCH_CHECK(has_batch_norm || !(shortcut_running_mean.has_value() || shortcut_running_var.has_value() ||
                                      shortcut_bn_weight.has_value() || shortcut_bn_bias.has_value()),
                  "conv_bn_relu_projection: the shortcut must have both running statistics or no BatchNorm at all");
  const Tensor residual =
      has_batch_norm
          ? conv_bn_relu_plain(shortcut, shortcut_weight, shortcut_bias, shortcut_bn_weight, shortcut_bn_bias,
                               *shortcut_running_mean, *shortcut_running_var, {}, shortcut_stride, shortcut_padding,
                               shortcut_dilation, shortcut_groups, shortcut_eps, false)
          : call("aten::conv2d", "", shortcut, shortcut_weight, shortcut_bias, shortcut_stride, shortcut_padding,
                 shortcut_dilation, shortcut_groups);
  return conv_bn_relu_plain(input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, stride,
                            padding, dilation, groups, eps, true);
}

Tensor conv_bn_relu_max_pool_plain(const Tensor& input,                     // [N, C, H, W]
                                   const Tensor& weight,                    // [K, C / groups, R, S]
                                   const std::optional<Tensor>& bias,       // [K]
                                   const std::optional<Tensor>& bn_weight,  // [K]
                                   const std::optional<Tensor>& bn_bias,    // [K]
                                   const Tensor& running_mean,              // [K]
                                   const Tensor& running_var,               // [K]
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation, int64_t groups, double eps,
                                   std::vector<int64_t> pool_kernel_size, std::vector<int64_t> pool_stride,
                                   std::vector<int64_t> pool_padding) {
  const Tensor out = conv_bn_relu_plain(input, weight, bias, bn_weight, bn_bias, running_mean, running_var, {}, stride,
                                        padding, dilation, groups, eps, true);
  return max_pool_plain(out, pool_kernel_size, pool_stride, pool_padding, {1, 1}, false);
}

}  // namespace

STABLE_TORCH_LIBRARY(resnet_fast, m) {
  // relu(batch_norm(conv2d(input, weight, bias)) + residual), inference statistics, one pass over the output
  m.def(
      "conv_bn_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor running_mean, Tensor running_var, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, float eps, bool relu) -> Tensor");
  // max_pool(relu(batch_norm(conv2d(input, weight, bias)))): the first layers of a network; on the CPU the map between
  // the two is never written
  m.def(
      "conv_bn_relu_max_pool(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor running_mean, Tensor running_var, int[2] stride, int[2] padding, int[2] dilation, int groups, float eps, "
      "int[2] pool_kernel_size, int[2] pool_stride, int[2] pool_padding) -> Tensor");
  // relu(batch_norm(conv2d(input, weight, bias)) + batch_norm(conv2d(shortcut, ...))): the end of a residual block with
  // a projection shortcut; without the shortcut's running statistics its convolution alone
  m.def(
      "conv_bn_relu_projection(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor running_mean, Tensor running_var, Tensor shortcut, Tensor shortcut_weight, Tensor? shortcut_bias, "
      "Tensor? shortcut_bn_weight, Tensor? shortcut_bn_bias, Tensor? shortcut_running_mean, "
      "Tensor? shortcut_running_var, int[2] stride, int[2] padding, int[2] dilation, int groups, float eps, "
      "int[2] shortcut_stride, int[2] shortcut_padding, int[2] shortcut_dilation, int shortcut_groups, "
      "float shortcut_eps) -> Tensor");
  m.def(
      "max_pool(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) "
      "-> Tensor");
  // means over height and width, [N, C]
  m.def("avg_pool_flatten(Tensor input) -> Tensor");
  // relu(a + b)
  m.def("add_relu(Tensor a, Tensor b) -> Tensor");

  // Training. Mean and biased variance [C] of a map, in float32.
  m.def("batch_norm_statistics(Tensor input) -> (Tensor mean, Tensor var)");
  // relu(batch_norm(input) + residual), batch statistics; mask: where the ReLU lets gradients through, a bit a value,
  // [N, H, W, ceil(C / 8)], empty where the sign can be computed again
  m.def(
      "batch_norm_relu(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu) "
      "-> (Tensor out, Tensor mask, Tensor mean, Tensor var)");
  // relu(batch_norm(input) + batch_norm(shortcut))
  m.def(
      "batch_norm_relu_projection(Tensor input, Tensor? weight, Tensor? bias, Tensor shortcut, "
      "Tensor? shortcut_weight, Tensor? shortcut_bias, float eps, float shortcut_eps) "
      "-> (Tensor out, Tensor mask, Tensor mean, Tensor var, Tensor shortcut_mean, Tensor shortcut_var)");
  // conv2d(relu(batch_norm(input)), weight, bias); mean and var are batch_norm_statistics(input)
  m.def(
      "batch_norm_relu_conv(Tensor input, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, Tensor weight, "
      "Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, float eps) -> Tensor");
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups) "
      "-> Tensor");
  // indices: of each largest value its place under the kernel, row by row, in 8 bits
  m.def(
      "max_pool_with_indices(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "bool ceil_mode) -> (Tensor out, Tensor indices)");
  m.def(
      "update_running_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum, "
      "int count) -> ()");
  // Their gradients; where `needs` says that one is not asked for, an empty tensor.
  m.def(
      "_batch_norm_relu_backward(Tensor grad, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "Tensor? mask, float eps, bool relu, bool needs_residual) "
      "-> (Tensor input, Tensor weight, Tensor bias, Tensor residual)");
  m.def(
      "_batch_norm_relu_projection_backward(Tensor grad, Tensor input, Tensor mean, Tensor var, Tensor? weight, "
      "Tensor shortcut, Tensor shortcut_mean, Tensor shortcut_var, Tensor? shortcut_weight, Tensor mask, float eps, "
      "float shortcut_eps) -> (Tensor input, Tensor weight, Tensor bias, Tensor shortcut, Tensor shortcut_weight)");
  m.def(
      "_batch_norm_relu_conv_backward(Tensor grad, Tensor input, Tensor mean, Tensor var, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, float eps, "
      "bool[5] needs) -> (Tensor input, Tensor bn_weight, Tensor bn_bias, Tensor weight, Tensor bias)");
  m.def(
      "_conv2d_backward(Tensor grad, Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, bool[3] needs) -> (Tensor input, Tensor weight, Tensor bias)");
  m.def(
      "_max_pool_backward(Tensor grad, Tensor indices, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int[2] input_size) -> Tensor");

  m.def("_add_relu_cpu(Tensor a, Tensor b) -> Tensor");
  m.def("_add_relu_cuda(Tensor a, Tensor b) -> Tensor");
  m.def(
      "_conv_bn_relu_cuda(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor running_mean, Tensor running_var, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, float eps, bool relu, int tile=-1) -> Tensor");
  m.def(
      "_conv_bn_relu_cudnn(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor running_mean, Tensor running_var, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, "
      "int groups, float eps, bool relu) -> Tensor");
  m.def(
      "_max_pool_cuda(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "int[2] output_size) -> Tensor");
  m.def("_avg_pool_flatten_cuda(Tensor input) -> Tensor");
  // relu(conv2d(input, weight, bias) + residual) on the CPU, the weight packed before
  m.def(
      "_conv_onednn(Tensor input, Tensor packed_weight, Tensor bias, Tensor? residual, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool relu) -> Tensor");
  m.def(
      "_conv_few_channels(Tensor input, Tensor packed_weight, Tensor bias, int[2] stride, int[2] padding, "
      "int[2] dilation, bool relu) -> Tensor");
  m.def(
      "_conv_few_channels_max_pool(Tensor input, Tensor packed_weight, Tensor bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int[2] pool_kernel_size, int[2] pool_stride, int[2] pool_padding) -> Tensor");
  m.def(
      "_max_pool_cpu(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "int[2] output_size) -> Tensor");
  m.def("_avg_pool_flatten_cpu(Tensor input) -> Tensor");
  // The kernels of the training operators, with one signature for the CPU and for CUDA.
  for (const std::string device : {"_cpu", "_cuda"}) {
    const auto def = [&](const std::string& name, const std::string& rest) { m.def((name + device + rest).c_str()); };
    def("_batch_norm_statistics", "(Tensor input) -> (Tensor mean, Tensor var)");
    def("_batch_norm_relu",
        "(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
        "Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? residual_bias, "
        "float residual_eps, bool relu, bool with_mask) -> (Tensor out, Tensor mask)");
    def("_batch_norm_relu_backward",
        "(Tensor grad, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? mask, "
        "Tensor? shortcut, Tensor? shortcut_mean, Tensor? shortcut_var, Tensor? shortcut_weight, float shortcut_eps, "
        "bool relu, bool needs_residual) "
        "-> (Tensor input, Tensor weight, Tensor bias, Tensor shortcut, Tensor shortcut_weight)");
    def("_max_pool_with_indices",
        "(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int[2] output_size) "
        "-> (Tensor out, Tensor indices)");
    def("_max_pool_backward",
        "(Tensor grad, Tensor indices, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
        "int[2] input_size) -> Tensor");
  }
  m.def(
      "_update_running_stats_cuda_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
      "float momentum, int count) -> Tensor(a!)");
  m.def("_pack_gemm(Tensor weight, int groups, bool bfloat16=False, bool turned=False, bool reused=False) -> Tensor");
  m.def("_pack_grouped(Tensor weight, int groups, bool bfloat16=False) -> Tensor");
  m.def("_pack_winograd(Tensor weight, int tile, bool bfloat16=False) -> Tensor");
  m.def(
      "_conv_gemm(Tensor input, Tensor packed_weight, Tensor bias, Tensor? residual, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool relu, Tensor? norm=None) -> Tensor");
  m.def(
      "_conv_depthwise(Tensor input, Tensor packed_weight, Tensor bias, Tensor? residual, int[2] stride, "
      "int[2] padding, int[2] dilation, bool relu) -> Tensor");
  m.def(
      "_conv_grouped(Tensor input, Tensor packed_weight, Tensor bias, Tensor? residual, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, bool relu) -> Tensor");
  m.def(
      "_conv_winograd(Tensor input, Tensor packed_weight, Tensor bias, Tensor? residual, int[2] padding, bool relu, "
      "Tensor? norm=None) -> (Tensor, bool)");
  m.def(
      "_conv_winograd_packing(Tensor input, Tensor weight, Tensor bias, int[2] padding, int tile, bool bfloat16=False, "
      "bool turned=False, Tensor? norm=None) -> (Tensor, bool)");
  m.def("_pack_winograd_stem(Tensor weight) -> Tensor");
  m.def(
      "_conv_weight_grad(Tensor grad, Tensor input, Tensor like, int[2] stride, int[2] padding, int[2] dilation, "
      "bool winograd, Tensor? norm=None) -> (Tensor, bool)");
  m.def(
      "_conv_winograd_stem(Tensor input, Tensor packed_weight, Tensor bias, int[2] padding, bool relu) "
      "-> (Tensor, bool)");
  m.def(
      "_conv_winograd_stem_max_pool(Tensor input, Tensor packed_weight, Tensor bias, int[2] padding, "
      "int[2] pool_kernel_size, int[2] pool_stride, int[2] pool_padding) -> (Tensor, bool)");
  m.def("_run_plan(Tensor steps, Tensor[] constants, Tensor(a!)[] maps, Tensor(b!)? seconds=None) -> int");
  m.def("_plan_format() -> str");
  m.def("_all_finite(Tensor input) -> bool");
  m.def("_fingerprint(Tensor weight, int groups, Tensor[] vectors) -> Tensor");
  m.def("_fingerprint_matches(Tensor fingerprint, Tensor weight, int groups, Tensor[] vectors) -> bool");
  m.def("_map_pool_bytes() -> int");
  m.def("_clear_map_pool() -> ()");
  m.def("_cpu_level() -> int");
  m.def("_multiplies_bf16() -> bool");
  m.def("_fma_peak(int iterations, bool bfloat16) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu_plain));
  m.impl("conv_bn_relu_max_pool", TORCH_BOX(&conv_bn_relu_max_pool_plain));
  m.impl("conv_bn_relu_projection", TORCH_BOX(&conv_bn_relu_projection_plain));
  m.impl("max_pool", TORCH_BOX(&max_pool_plain));
  m.impl("avg_pool_flatten", TORCH_BOX(&avg_pool_flatten_plain));
  m.impl("add_relu", TORCH_BOX(&add_relu_plain));
  m.impl("_plan_format", TORCH_BOX(&resnet_fast::plan_format));
  m.impl("_map_pool_bytes", TORCH_BOX(&resnet_fast::map_pool_bytes));
  m.impl("_clear_map_pool", TORCH_BOX(&resnet_fast::clear_map_pool));
  m.impl("_cpu_level", TORCH_BOX(&resnet_fast::cpu_level_index));
  m.impl("_multiplies_bf16", TORCH_BOX(&resnet_fast::multiplies_bf16));
  m.impl("_fma_peak", TORCH_BOX(&resnet_fast::fma_peak));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("_add_relu_cpu", TORCH_BOX(&resnet_fast::add_relu_cpu));
  m.impl("_conv_few_channels", TORCH_BOX(&resnet_fast::conv_few_channels));
  m.impl("_conv_few_channels_max_pool", TORCH_BOX(&resnet_fast::conv_few_channels_max_pool));
  m.impl("_max_pool_cpu", TORCH_BOX(&resnet_fast::max_pool_cpu));
  m.impl("_avg_pool_flatten_cpu", TORCH_BOX(&resnet_fast::avg_pool_flatten_cpu));
  m.impl("_batch_norm_statistics_cpu", TORCH_BOX(&resnet_fast::batch_norm_statistics_cpu));
  m.impl("_batch_norm_relu_cpu", TORCH_BOX(&resnet_fast::batch_norm_relu_cpu));
  m.impl("_batch_norm_relu_backward_cpu", TORCH_BOX(&resnet_fast::batch_norm_relu_backward_cpu));
  m.impl("_max_pool_with_indices_cpu", TORCH_BOX(&resnet_fast::max_pool_with_indices_cpu));
  m.impl("_max_pool_backward_cpu", TORCH_BOX(&resnet_fast::max_pool_backward_cpu));
  m.impl("_pack_gemm", TORCH_BOX(&resnet_fast::pack_gemm));
  m.impl("_pack_grouped", TORCH_BOX(&resnet_fast::pack_grouped));
  m.impl("_pack_winograd", TORCH_BOX(&resnet_fast::pack_winograd));
  m.impl("_conv_gemm", TORCH_BOX(&resnet_fast::conv_gemm));
  m.impl("_conv_depthwise", TORCH_BOX(&resnet_fast::conv_depthwise));
  m.impl("_conv_grouped", TORCH_BOX(&resnet_fast::conv_grouped));
  m.impl("_conv_winograd", TORCH_BOX(&resnet_fast::conv_winograd));
  m.impl("_conv_weight_grad", TORCH_BOX(&resnet_fast::conv_weight_grad));
  m.impl("_conv_winograd_packing", TORCH_BOX(&resnet_fast::conv_winograd_packing));
  m.impl("_pack_winograd_stem", TORCH_BOX(&resnet_fast::pack_winograd_stem));
  m.impl("_conv_winograd_stem", TORCH_BOX(&resnet_fast::conv_winograd_stem));
  m.impl("_conv_winograd_stem_max_pool", TORCH_BOX(&resnet_fast::conv_winograd_stem_max_pool));
  m.impl("_run_plan", TORCH_BOX(&resnet_fast::run_plan));
  m.impl("_all_finite", TORCH_BOX(&resnet_fast::all_finite));
  m.impl("_fingerprint", TORCH_BOX(&resnet_fast::fingerprint));
  m.impl("_fingerprint_matches", TORCH_BOX(&resnet_fast::fingerprint_matches));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, MkldnnCPU, m) {  // the key of a packed weight
  m.impl("_conv_onednn", TORCH_BOX(&resnet_fast::conv_onednn));
}

// Importing resnet_fast._C only loads the library; the static initialisers above do the registration.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
