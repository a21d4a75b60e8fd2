// Host functions of the CPU operators: they check, allocate and split work over torch's thread pool.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace resnet_fast {

torch::stable::Tensor add_relu_cpu(const torch::stable::Tensor& a, const torch::stable::Tensor& b);

// True if no element is NaN or infinite. `input` must be dense (any order of dimensions).
bool all_finite(const torch::stable::Tensor& input);

// A byte string that changes when packed weights go stale: see fingerprint.cpp.
torch::stable::Tensor fingerprint(const torch::stable::Tensor& weight, int64_t groups,
                                  const std::vector<torch::stable::Tensor>& vectors);
bool fingerprint_matches(const torch::stable::Tensor& fingerprint, const torch::stable::Tensor& weight, int64_t groups,
                         const std::vector<torch::stable::Tensor>& vectors);

// Position of the instruction-set level in use in the table of levels.cpp.
int64_t cpu_level_index();

}  // namespace resnet_fast
