// The sizes of a convolution. Built once at the boundary, travels whole.
#pragma once

#include <cstdint>

namespace resnet_fast {

struct ConvShape {
  int64_t n, h, w, c;  // input [N, C, H, W]
  int64_t k, r, s;     // weight [K, C / groups, R, S]
  int64_t p, q;        // output [N, K, P, Q]
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
};

}  // namespace resnet_fast
