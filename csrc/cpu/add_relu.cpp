// The host side of add_relu on the CPU: check, allocate, split over torch's thread pool. The loops are in
// kernels/add_relu.cpp. Read next: resnet_fast/ops/add_relu.py, where the operator gets its checks, its fake, its
// gradient and its reference.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../elementwise.h"
#include "levels.h"
#include "ops.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below 32768 elements (128 KiB of float32) waking a second thread costs more than it saves.
constexpr int64_t grain = 32768;

template <typename T>
void run(void (*kernel)(const T*, const T*, T*, int64_t), const Tensor& a, const Tensor& b, Tensor& out) {
  const T* pa = static_cast<const T*>(a.const_data_ptr());
  const T* pb = static_cast<const T*>(b.const_data_ptr());
  T* po = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, out.numel(), grain, [=](int64_t begin, int64_t end) {
    kernel(pa + begin, pb + begin, po + begin, end - begin);
  });
}

}  // namespace

Tensor add_relu_cpu(const Tensor& a, const Tensor& b) {
  check_elementwise(a, b);
  Tensor out = torch::stable::empty_like(a);  // keeps a's strides if a is dense
  const Tensor x = in_layout_of(a, out), y = in_layout_of(b, out);
  switch (a.scalar_type()) {
    case ScalarType::Float:
      run(kernels().add_relu_f32, x, y, out);
      break;
    case ScalarType::BFloat16:
      run(kernels().add_relu_bf16, x, y, out);
      break;
    case ScalarType::Half:
      run(kernels().add_relu_f16, x, y, out);
      break;
    default:
      STD_TORCH_CHECK(false, "add_relu on the CPU takes float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace resnet_fast
