#pragma once

#include <cstdint>

namespace resnet_fast {

enum class AddReluType { float32, bfloat16, float16 };

// out[i] = relu(a[i] + b[i]) for i in [0, n), on `stream` (a cudaStream_t). Any alignment that the type itself has.
// Returns a cudaError_t. The header knows no torch and no CUDA, so that neither has to be parsed on the other's side.
int launch_add_relu(AddReluType type, const void* a, const void* b, void* out, int64_t n, void* stream);

}  // namespace resnet_fast
