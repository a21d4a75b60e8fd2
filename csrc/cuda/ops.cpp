// Host functions and registration of the CUDA operators: check, allocate, launch on the current stream. Schemas are in
// ../ops.cpp, kernels in the .cu files, which include no torch header.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../elementwise.h"
#include "add_relu.h"

namespace {

using resnet_fast::check_elementwise;
using resnet_fast::in_layout_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "no current CUDA stream");
  return stream;
}

resnet_fast::AddReluType add_relu_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return resnet_fast::AddReluType::float32;
    case ScalarType::BFloat16:
      return resnet_fast::AddReluType::bfloat16;
    case ScalarType::Half:
      return resnet_fast::AddReluType::float16;
    default:
      STD_TORCH_CHECK(false, "add_relu on CUDA takes float32, bfloat16 or float16");
  }
  return resnet_fast::AddReluType::float32;
}

Tensor add_relu_cuda(const Tensor& a, const Tensor& b) {
  check_elementwise(a, b);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  Tensor out = torch::stable::empty_like(a);  // keeps a's strides if a is dense
  const Tensor x = in_layout_of(a, out), y = in_layout_of(b, out);
  const int error = resnet_fast::launch_add_relu(add_relu_type(a.scalar_type()), x.const_data_ptr(), y.const_data_ptr(),
                                                 out.mutable_data_ptr(), out.numel(), current_stream(a));
  STD_TORCH_CHECK(error == cudaSuccess, "add_relu: ", cudaGetErrorString(cudaError_t(error)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CUDA, m) { m.impl("_add_relu_cuda", TORCH_BOX(&add_relu_cuda)); }

// Importing resnet_fast._C_cuda only loads the library; the static initialiser above does the registration.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
