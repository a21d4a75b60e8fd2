// Memory for large feature maps that is used again instead of going back to the system.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace resnet_fast {

// [N, C, H, W] of any values, in channels_last.
torch::stable::Tensor empty_map(const std::vector<int64_t>& size, torch::headeronly::ScalarType dtype);

// The same memory for anything that lives as briefly as a map, contiguous.
torch::stable::Tensor empty_reused(const std::vector<int64_t>& size, torch::headeronly::ScalarType dtype);

int64_t map_pool_bytes();  // idle
void clear_map_pool();

}  // namespace resnet_fast
