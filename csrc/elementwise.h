// What the host sides of element-wise operators share, on the CPU and on CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace resnet_fast {

inline void check_elementwise(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  bool same_shape = a.dim() == b.dim();
  for (int64_t d = 0; same_shape && d < a.dim(); ++d) same_shape = a.size(d) == b.size(d);
  STD_TORCH_CHECK(same_shape, "a and b must have the same shape");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have the same dtype");
  STD_TORCH_CHECK(a.device() == b.device(), "a and b must be on the same device");
}

// `t` itself if it already lies in memory as `like` does (which is dense), else a copy that does.
inline torch::stable::Tensor in_layout_of(const torch::stable::Tensor& t, const torch::stable::Tensor& like) {
  bool same_strides = true;
  for (int64_t d = 0; d < t.dim(); ++d)
    same_strides = same_strides && (t.size(d) <= 1 || t.stride(d) == like.stride(d));
  if (same_strides) return t;
  torch::stable::Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace resnet_fast
