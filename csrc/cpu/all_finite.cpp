#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "levels.h"
#include "ops.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
bool scan(bool (*kernel)(const T*, int64_t, T), const Tensor& input, T exponent_mask) {
  const T* data = static_cast<const T*>(input.const_data_ptr());
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, input.numel(), 65536, [&](int64_t begin, int64_t end) {
    if (!kernel(data + begin, end - begin, exponent_mask)) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

}  // namespace

bool all_finite(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return scan<uint32_t>(kernels().all_finite_32, input, 0x7f800000u);
    case ScalarType::BFloat16:
      return scan<uint16_t>(kernels().all_finite_16, input, 0x7f80);
    case ScalarType::Half:
      return scan<uint16_t>(kernels().all_finite_16, input, 0x7c00);
    default:
      STD_TORCH_CHECK(false, "_all_finite takes float32, bfloat16 or float16");
  }
  return false;
}

}  // namespace resnet_fast
