// Calling an operator of torch through its dispatcher, for those that torch/csrc/stable/ops.h has no wrapper of.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

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

inline torch::stable::Tensor to_dtype(const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// `t` with the strides of a fresh channels_last tensor, also where a dimension of 1 leaves them open: what the
// operator's fake promises.
inline torch::stable::Tensor with_exact_strides(const torch::stable::Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const std::vector<int64_t> strides{c * h * w, 1, w * c, c};
  const auto exact = [&](const torch::stable::Tensor& x) {
    for (int64_t d = 0; d < 4; ++d)
      if (x.stride(d) != strides[d]) return false;
    return true;
  };
  if (exact(t)) return t;
  const torch::stable::Tensor dense = torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
  if (exact(dense)) return dense;
  const std::vector<int64_t> sizes{t.size(0), c, h, w};
  return call("aten::as_strided", "", dense, sizes, strides, std::optional<int64_t>());
}

}  // namespace resnet_fast
