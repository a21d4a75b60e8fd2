// Work over torch's thread pool, and the memory that it needs while it runs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace resnet_fast {

// Of one core; 256 KiB, a small one, where the system does not tell.
inline int64_t l2_bytes() {
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 << 10);
  return bytes;
}

// Multiplications that are worth waking a thread for: 6 us at the 90 GFLOP/s that one Zen 3 core reaches.
constexpr int64_t least_work = int64_t{1} << 18;

// f(item) for every item of [0, items), each by whichever thread is free: with a static split, one thread that the
// system interrupts would hold up all. What an item computes must not depend on the thread. `work`: multiplications of
// all items together.
template <typename F>
void for_each_item(int64_t items, int64_t work, const F& f) {
  if (items <= 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>({items, torch::stable::get_num_threads(), 1 + work / least_work});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) f(item);
  });
}

// Memory of the calling thread that stays for its next call, aligned to a cache line. Growing loses what was in it. One
// thread has one of each `Purpose`; more than `kept` bytes are given back at the end of the call that needed them.
template <typename Purpose>
class Scratch {
 public:
  static constexpr size_t kept = size_t{64} << 20;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool exact = true;  // so that the sanitizer knows where it ends
#else
  static constexpr bool exact = false;
#endif

  explicit Scratch(size_t bytes) {
    Block& block = of_this_thread();
    if (block.size < bytes || exact) {
      block.release();
      if (posix_memalign(&block.data, 64, bytes) != 0) {
        block.data = nullptr;
        throw std::bad_alloc();
      }
      block.size = bytes;
    }
    data_ = block.data;
  }
  ~Scratch() {
    Block& block = of_this_thread();
    if (block.size > kept) block.release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* floats() const { return static_cast<float*>(data_); }
  void* bytes() const { return data_; }

 private:
  struct Block {
    void* data = nullptr;
    size_t size = 0;
    void release() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
    ~Block() { release(); }
  };
  static Block& of_this_thread() {
    static thread_local Block block;
    return block;
  }
  void* data_;
};

}  // namespace resnet_fast
