#pragma once

namespace resnet_fast {

// Element types as the kernels know them: their headers know no torch and no CUDA, so that neither has to be parsed on
// the other's side.
enum class Type { float32, bfloat16, float16, float64 };

}  // namespace resnet_fast
