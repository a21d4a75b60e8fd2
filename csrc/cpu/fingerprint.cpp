// What decides whether a packed weight may be used again.
//
// A write through `.data` (EMA, clipping, pruning of filters) changes a parameter without changing its version, so the
// cache of packed weights cannot trust versions alone. A fingerprint is a byte string: where the tensors lie, with
// which dtype, sizes and strides, every bit of the vectors (bias and BatchNorm tensors: a few KiB), and of the weight
// at least one element of every output filter and of every input channel. Comparing one costs max(K, C) scattered
// reads and the vectors' bytes: with the lookup in Python 45 us a convolution, 2.6 % of ResNet-18 at batch 1 on 2 Zen 3
// cores. What samples cannot see, a single element written through `.data`, is documented with clear_cache().
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "ops.h"

namespace resnet_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t element_size(const Tensor& t) {
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

// The sampled elements, group by group: sample i is (filter i mod filters, channel i mod channels), so max(filters,
// channels) samples visit every filter and every channel; the kernel tap moves along too.
class Samples {
 public:
  Samples(const Tensor& weight, int64_t groups)
      : groups_(groups),
        filters_(weight.size(0) / groups),
        channels_(weight.size(1)),
        filter_stride_(weight.stride(0)),
        channel_stride_(weight.stride(1)) {
    for (int64_t r = 0; r < weight.size(2); ++r)
      for (int64_t s = 0; s < weight.size(3); ++s) taps_.push_back(r * weight.stride(2) + s * weight.stride(3));
  }

  int64_t count() const {
    return filters_ * channels_ == 0 || taps_.empty() ? 0 : groups_ * std::max(filters_, channels_);
  }

  // Calls visit(offset of a sample in elements) count() times. Counters and no divisions, so that the processor keeps
  // many of these cache misses in flight.
  template <typename F>
  void each(const F& visit) const {
    if (count() == 0) return;
    const int64_t n = std::max(filters_, channels_), taps = static_cast<int64_t>(taps_.size());
    for (int64_t g = 0; g < groups_; ++g) {
      int64_t k = 0, c = 0, tap = 0;
      for (int64_t i = 0; i < n; ++i) {
        visit((g * filters_ + k) * filter_stride_ + c * channel_stride_ + taps_[tap]);
        if (++k == filters_) k = 0;
        if (++c == channels_) c = 0;
        if (++tap == taps) tap = 0;
      }
    }
  }

 private:
  int64_t groups_, filters_, channels_, filter_stride_, channel_stride_;
  std::vector<int64_t> taps_;  // offsets of the kernel's positions
};

// Copies elements into a fingerprint.
struct Writer {
  char* next;

  void bytes(const void* data, int64_t n) {
    std::memcpy(next, data, n);
    next += n;
  }
  template <typename T>
  void samples(const Samples& samples, const T* weight) {
    samples.each([&](int64_t offset) { bytes(weight + offset, sizeof(T)); });
  }
};

// Compares elements with a fingerprint.
struct Comparer {
  const char* next;
  bool same = true;

  void bytes(const void* data, int64_t n) {
    same = same && std::memcmp(next, data, n) == 0;
    next += n;
  }
  template <typename T>
  void samples(const Samples& samples, const T* weight) {
    T difference = 0;
    samples.each([&](int64_t offset) {
      T stored;
      std::memcpy(&stored, next, sizeof(T));
      next += sizeof(T);
      difference |= stored ^ weight[offset];
    });
    same = same && difference == 0;
  }
};

// Where a tensor lies and how its bytes are to be read.
struct Place {
  const void* data;
  int64_t dtype, sizes[4] = {}, strides[4] = {};

  explicit Place(const Tensor& t) : data(t.const_data_ptr()), dtype(static_cast<int64_t>(t.scalar_type())) {
    for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d), strides[d] = t.stride(d);
  }
};

// Hands the fingerprint's parts to a Writer or a Comparer, always in the same order.
template <typename Visitor>
void visit(Visitor& visitor, const Tensor& weight, const Samples& samples, const std::vector<Tensor>& vectors) {
  const Place place(weight);
  visitor.bytes(&place, sizeof(place));
  for (const Tensor& v : vectors) {
    const Place place(v);
    visitor.bytes(&place, sizeof(place));
    const char* data = static_cast<const char*>(v.const_data_ptr());
    const int64_t size = element_size(v);
    if (v.stride(0) == 1) {
      visitor.bytes(data, v.numel() * size);
    } else {
      for (int64_t i = 0; i < v.numel(); ++i) visitor.bytes(data + i * v.stride(0) * size, size);
    }
  }
  const void* data = weight.const_data_ptr();
  switch (element_size(weight)) {
    case 2:
      return visitor.samples(samples, static_cast<const uint16_t*>(data));
    case 4:
      return visitor.samples(samples, static_cast<const uint32_t*>(data));
    default:
      return visitor.samples(samples, static_cast<const uint64_t*>(data));
  }
}

int64_t fingerprint_bytes(const Tensor& weight, const Samples& samples, const std::vector<Tensor>& vectors) {
  int64_t bytes = sizeof(Place) + samples.count() * element_size(weight);
  for (const Tensor& v : vectors) bytes += sizeof(Place) + v.numel() * element_size(v);
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
  const Samples samples(weight, groups);
  Tensor out = torch::stable::empty({fingerprint_bytes(weight, samples, vectors)}, ScalarType::Byte);
  Writer writer{static_cast<char*>(out.mutable_data_ptr())};
  visit(writer, weight, samples, vectors);
  return out;
}

bool fingerprint_matches(const Tensor& fingerprint, const Tensor& weight, int64_t groups,
                         const std::vector<Tensor>& vectors) {
  check(weight, groups, vectors);
  const Samples samples(weight, groups);
  if (fingerprint.numel() != fingerprint_bytes(weight, samples, vectors)) return false;
  Comparer comparer{static_cast<const char*>(fingerprint.const_data_ptr())};
  visit(comparer, weight, samples, vectors);
  return comparer.same;
}

}  // namespace resnet_fast
