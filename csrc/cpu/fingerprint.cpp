// What decides whether a packed weight may be used again.
//
// A write through `.data` (EMA, clipping, pruning of filters) changes a parameter without changing its version, so the
// cache of packed weights cannot trust versions alone. A fingerprint is a byte string: every bit of the vectors (bias
// and BatchNorm tensors: a few KiB), and of the weight at least one element of every output filter and of every input
// channel. Comparing one costs max(K, C) scattered reads and the vectors' bytes: by estimate 1 % of ResNet-50's forward
// at batch 1. What samples cannot see, a single element written through `.data`, is documented with clear_cache().
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "ops.h"

namespace resnet_fast {
namespace {

using torch::stable::Tensor;

int64_t element_size(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "weights and BatchNorm tensors must be floating point");
  }
  return 0;
}

// Elements sampled per group: pair i is (filter i mod filters, channel i mod channels), so max(filters, channels)
// pairs visit every filter and every channel; the kernel tap moves along too.
struct Samples {
  int64_t groups, filters, channels, height, width;

  Samples(const Tensor& weight, int64_t groups_)
      : groups(groups_),
        filters(weight.size(0) / groups_),
        channels(weight.size(1)),
        height(weight.size(2)),
        width(weight.size(3)) {}

  int64_t per_group() const { return filters * channels * height * width == 0 ? 0 : std::max(filters, channels); }

  // Calls visit(offset of the element in the weight's storage, in elements).
  template <typename F>
  void each(const Tensor& weight, const F& visit) const {
    const int64_t sk = weight.stride(0), sc = weight.stride(1), sr = weight.stride(2), ss = weight.stride(3);
    const int64_t n = per_group();
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t tap = i % (height * width);
        visit((g * filters + i % filters) * sk + (i % channels) * sc + (tap / width) * sr + (tap % width) * ss);
      }
  }
};

// Walks the fingerprint's pieces in order: visit(address, bytes).
template <typename F>
void each_piece(const Tensor& weight, int64_t groups, const std::vector<Tensor>& vectors, const F& visit) {
  for (const Tensor& v : vectors) {
    const char* data = static_cast<const char*>(v.const_data_ptr());
    const int64_t size = element_size(v);
    if (v.dim() == 1 && v.stride(0) == 1) {
      visit(data, v.numel() * size);
    } else {
      for (int64_t i = 0; i < v.numel(); ++i) visit(data + i * v.stride(0) * size, size);
    }
  }
  const char* data = static_cast<const char*>(weight.const_data_ptr());
  const int64_t size = element_size(weight);
  Samples(weight, groups).each(weight, [&](int64_t offset) { visit(data + offset * size, size); });
}

int64_t fingerprint_bytes(const Tensor& weight, int64_t groups, const std::vector<Tensor>& vectors) {
  int64_t bytes = groups * Samples(weight, groups).per_group() * element_size(weight);
  for (const Tensor& v : vectors) bytes += v.numel() * element_size(v);
  return bytes;
}

void check(const Tensor& weight, int64_t groups, const std::vector<Tensor>& vectors) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have 4 dimensions [K, C / groups, R, S], got ", weight.dim());
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "groups must divide the number of filters");
  for (const Tensor& v : vectors) STD_TORCH_CHECK(v.dim() == 1, "bias and BatchNorm tensors must have 1 dimension");
}

}  // namespace

Tensor fingerprint(const Tensor& weight, int64_t groups, const std::vector<Tensor>& vectors) {
  check(weight, groups, vectors);
  Tensor out = torch::stable::empty({fingerprint_bytes(weight, groups, vectors)}, torch::headeronly::ScalarType::Byte);
  char* next = static_cast<char*>(out.mutable_data_ptr());
  each_piece(weight, groups, vectors, [&](const char* data, int64_t bytes) {
    std::memcpy(next, data, bytes);
    next += bytes;
  });
  return out;
}

bool fingerprint_matches(const Tensor& fingerprint, const Tensor& weight, int64_t groups,
                         const std::vector<Tensor>& vectors) {
  check(weight, groups, vectors);
  if (fingerprint.numel() != fingerprint_bytes(weight, groups, vectors)) return false;
  const char* next = static_cast<const char*>(fingerprint.const_data_ptr());
  bool same = true;
  each_piece(weight, groups, vectors, [&](const char* data, int64_t bytes) {
    same = same && std::memcmp(next, data, bytes) == 0;
    next += bytes;
  });
  return same;
}

}  // namespace resnet_fast
