#pragma once

#include <cstdint>

#include "type.h"

namespace resnet_fast {

// out[i] = relu(a[i] + b[i]) for i in [0, n), on `stream` (a cudaStream_t). Any alignment that the type itself has.
// float32, bfloat16 or float16. Returns a cudaError_t.
int launch_add_relu(Type type, const void* a, const void* b, void* out, int64_t n, void* stream);

}  // namespace resnet_fast
