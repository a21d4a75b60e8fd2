// Calling an operator of torch through its dispatcher, for those that torch/csrc/stable/ops.h has no wrapper of.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace resnet_fast {

// `arguments` in the order of the operator's schema, all of them; a Scalar can only be left out (an empty optional).
// The first (only) result, a Tensor.
template <typename... Arguments>
torch::stable::Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array stack{torch::stable::detail::from(arguments)...};
  STD_TORCH_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) == 0, name, " failed");
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// a + b. (The stable ABI cannot pass the Scalar argument of aten::add; a - (-1) * b is exactly the same.)
inline torch::stable::Tensor add(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);
}

}  // namespace resnet_fast
