// Winograd's transform of weights.
#pragma once

#include <cstdint>
#include <vector>

namespace resnet_fast {

// G of F(m, r), [m + r - 1][r], for the points in kernels/winograd.h: row i of a finite point p is (1, p, .., p^(r -
// 1)) / product of (p - q) over the other points q; the last row belongs to infinity.
std::vector<std::vector<double>> winograd_weight_transform(int64_t m, int64_t r);

}  // namespace resnet_fast
