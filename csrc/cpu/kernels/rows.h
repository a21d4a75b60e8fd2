// What the kernels for groups and for depthwise convolution share.
#pragma once

#include "../levels.h"

namespace resnet_fast::RESNET_FAST_LEVEL {

// Whether the inner loop takes a kernel's row at once; otherwise one position after the other.
static inline bool takes_rows(const ConvShape& s) { return s.s == 3 && s.stride[1] <= 2 && s.dilation[1] == 1; }

}  // namespace resnet_fast::RESNET_FAST_LEVEL
