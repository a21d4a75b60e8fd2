#pragma once

#include <cstdint>

#include "type.h"

namespace resnet_fast {

// One value per filter; null if there is none.
struct FilterVector {
  const void* data = nullptr;
  Type type = Type::float32;
  int64_t stride = 1;
};

}  // namespace resnet_fast
