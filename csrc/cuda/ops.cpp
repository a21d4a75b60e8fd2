// Host functions and registration of the CUDA operators: check, allocate, launch on the current stream. Schemas are in
// ../ops.cpp, kernels in the .cu files, which include no torch header.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../elementwise.h"
#include "add_relu.h"

namespace {

using resnet_fast::check_elementwise;
using resnet_fast::check_launch;
using resnet_fast::current_stream;
using resnet_fast::in_layout_of;
using resnet_fast::type_of;
using torch::stable::Tensor;

Tensor add_relu_cuda(const Tensor& a, const Tensor& b) {
  check_elementwise(a, b);
  const resnet_fast::DeviceGuard guard(a.get_device_index());
  Tensor out = torch::stable::empty_like(a);  // keeps a's strides if a is dense
  const Tensor x = in_layout_of(a, out), y = in_layout_of(b, out);
  check_launch(resnet_fast::launch_add_relu(type_of(a.scalar_type()), x.const_data_ptr(), y.const_data_ptr(),
                                            out.mutable_data_ptr(), out.numel(), current_stream(a)),
               "add_relu");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, RESNET_FAST_DEVICE, m) {
  m.impl("_add_relu_cuda", TORCH_BOX(&add_relu_cuda));
  m.impl("_conv_bn_relu_cuda", TORCH_BOX(&resnet_fast::conv_bn_relu_cuda));
  m.impl("_max_pool_cuda", TORCH_BOX(&resnet_fast::max_pool_cuda));
  m.impl("_avg_pool_flatten_cuda", TORCH_BOX(&resnet_fast::avg_pool_flatten_cuda));
  m.impl("_max_pool_with_indices_cuda", TORCH_BOX(&resnet_fast::max_pool_with_indices_cuda));
  m.impl("_max_pool_backward_cuda", TORCH_BOX(&resnet_fast::max_pool_backward_cuda));
  m.impl("_batch_norm_statistics_cuda", TORCH_BOX(&resnet_fast::batch_norm_statistics_cuda));
  m.impl("_update_running_stats_cuda_", TORCH_BOX(&resnet_fast::update_running_stats_cuda));
  m.impl("_batch_norm_relu_cuda", TORCH_BOX(&resnet_fast::batch_norm_relu_cuda));
  m.impl("_batch_norm_relu_backward_cuda", TORCH_BOX(&resnet_fast::batch_norm_relu_backward_cuda));
#ifndef RESNET_FAST_EMULATED
  m.impl("_conv_bn_relu_cudnn", TORCH_BOX(&resnet_fast::conv_bn_relu_cudnn));
#endif
}

#ifndef RESNET_FAST_EMULATED
#include <Python.h>

// Importing resnet_fast._C_cuda only loads the library; the static initialiser above does the registration.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
