// The host side of add_relu on the CPU: check, allocate, split over torch's thread pool. The loops are in
// kernels/add_relu.cpp. Read next: resnet_fast/ops/add_relu.py, where the operator gets its checks, its fake, its
// gradient and its reference.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../elementwise.h"
#include "conv.h"

namespace resnet_fast {
namespace {

using torch::stable::Tensor;

// Below 32768 elements (128 KiB of float32) waking a second thread costs more than it saves.
constexpr int64_t grain = 32768;

template <typename T>
void run(void (*kernel)(const T*, const T*, T*, int64_t), const void* a, const void* b, void* out, int64_t size) {
  const T* pa = static_cast<const T*>(a);
  const T* pb = static_cast<const T*>(b);
  T* po = static_cast<T*>(out);
  torch::stable::parallel_for(
      0, size, grain, [=](int64_t begin, int64_t end) { kernel(pa + begin, pb + begin, po + begin, end - begin); });
}

}  // namespace

Tensor add_relu_cpu(const Tensor& a, const Tensor& b) {
  check_elementwise(a, b);
  Tensor out = torch::stable::empty_like(a);  // keeps a's strides if a is dense
  const Tensor x = in_layout_of(a, out), y = in_layout_of(b, out);
  run_add_relu(x.const_data_ptr(), y.const_data_ptr(), out.mutable_data_ptr(), out.numel(),
               storage_of(a.scalar_type()));
  return out;
}

void run_add_relu(const void* a, const void* b, void* output, int64_t size, Storage type) {
  if (type == Storage::f32) return run(kernels().add_relu_f32, a, b, output, size);
  if (type == Storage::bf16) return run(kernels().add_relu_bf16, a, b, output, size);
  run(kernels().add_relu_f16, a, b, output, size);
}

}  // namespace resnet_fast
