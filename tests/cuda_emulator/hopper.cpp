// Twins of sm_90's instructions (csrc/cuda/ptx.cuh) but TMA (tma.cpp) and wgmma (wgmma.cpp).
#include "hopper.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "emulated_ptx.h"
#include "emulated_runtime.h"

namespace emulator {
namespace {

constexpr int unit = 16;  // bytes; all asynchronous accesses are of whole aligned units

struct Unit {
  uint16_t reads = 0, writes = 0;  // asynchronous ones that are still to come
};

struct SharedMemory {
  std::vector<char> async;
  std::vector<Unit> units;
  std::vector<std::pair<uint32_t, int>> unfenced[1024];  // address and bytes of what each thread has written
  std::vector<int> writers;                              // the threads whose list is not empty
};
SharedMemory memory;

constexpr int64_t max_tx = (1 << 20) - 1;
constexpr uint64_t mark =
    0x7265697272616271;  // what an mbarrier's 8 bytes hold here, to see that nobody overwrites them

struct Barrier {
  uint32_t arrivals, pending;
  int initialised_by;
  bool fenced = false;
  int64_t tx = 0;
  uint64_t phase = 0;
  char order[2];  // objects for ThreadSanitizer, one per parity of the phase: a single one would hide races
};
std::map<uint32_t, Barrier> barriers;

int registers[32];  // of each warp, since setmaxnreg; 0: as launched

const bool registered = [] {
  at_block_start([] {
    memory.async.clear();
    memory.units.clear();
    for (int thread : memory.writers) memory.unfenced[thread].clear();
    memory.writers.clear();
    barriers.clear();
    std::fill(std::begin(registers), std::end(registers), 0);
  });
  return true;
}();

Barrier& find(uint32_t address) {
  char* shared = shared_at(address, 8, 8, "an mbarrier");
  note_read(shared, 8);
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("the mbarrier at %u is used before its init", address);
  if (memcmp(shared, &mark, 8) != 0) fail("the mbarrier at %u has been overwritten", address);
  return found->second;
}

void end_phase_if_complete(uint32_t address, Barrier& barrier) {
  if (barrier.tx > max_tx || barrier.tx < -max_tx)
    fail("the mbarrier at %u counts %lld bytes, %lld at most", address, (long long)barrier.tx, (long long)max_tx);
  if (barrier.pending > 0) return;
  if (barrier.tx < 0)
    fail("%lld more bytes arrive at the mbarrier at %u than expected", -(long long)barrier.tx, address);
  if (barrier.tx > 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  progress();
}

void arrive(uint32_t address, uint32_t bytes) {
  {
    Unseen unseen;
    Barrier& barrier = find(address);
    note_release(&barrier.order[barrier.phase & 1]);
    if (barrier.pending == 0)
      fail("more arrivals at the mbarrier at %u than the %u of its init", address, barrier.arrivals);
    --barrier.pending;
    barrier.tx += bytes;
    end_phase_if_complete(address, barrier);
  }
  wgmma_land_some();
  preempt();
}

}  // namespace

char* shared_at(uint32_t address, size_t bytes, size_t alignment, const char* what) {
  if (address + bytes > block.shared_bytes)
    fail("%s of bytes %u to %zu of %zu of shared memory", what, address, address + bytes, block.shared_bytes);
  if (address % alignment != 0) fail("%s at %u, which is no multiple of %zu", what, address, alignment);
  return block.shared + address;
}

char* async_view(const char* shared) {
  Unseen unseen;
  if (memory.async.empty()) memory.async.assign(block.shared_bytes + unit, char(0xff));
  return memory.async.data() + (shared - block.shared);
}

namespace {
template <typename Function>
void for_units(const char* shared, size_t bytes, Function function) {
  Unseen unseen;
  if (memory.units.empty()) memory.units.resize(block.shared_bytes / unit + 1);
  const size_t first = (shared - block.shared) / unit, last = (shared - block.shared + bytes - 1) / unit;
  for (size_t i = first; i <= last; ++i) function(memory.units[i], i * unit);
}
}  // namespace

void check_reads(const char* shared, size_t bytes, const char* what) {
  for_units(shared, bytes, [&](Unit& u, size_t at) {
    if (u.writes > 0)
      fail("%s reads byte %zu of shared memory, which an asynchronous copy has still to write", what, at);
  });
}

void check_writes(const char* shared, size_t bytes, const char* what) {
  for_units(shared, bytes, [&](Unit& u, size_t at) {
    if (u.writes > 0)
      fail("%s writes byte %zu of shared memory, which an asynchronous copy has still to write", what, at);
    if (u.reads > 0)
      fail("%s writes byte %zu of shared memory, which an asynchronous operation has still to read", what, at);
  });
}

void begin_reads(const char* shared, size_t bytes, const char* what) {
  check_reads(shared, bytes, what);
  for_units(shared, bytes, [](Unit& u, size_t) { ++u.reads; });
}

void end_reads(const char* shared, size_t bytes) {
  for_units(shared, bytes, [](Unit& u, size_t) { --u.reads; });
}

void begin_writes(const char* shared, size_t bytes, const char* what) {
  check_writes(shared, bytes, what);
  for_units(shared, bytes, [](Unit& u, size_t) { ++u.writes; });
}

void end_writes(const char* shared, size_t bytes) {
  for_units(shared, bytes, [](Unit& u, size_t) { --u.writes; });
}

void check_fenced(const char* shared, size_t bytes, const char* what) {
  const char* async = async_view(shared);
  if (memcmp(shared, async, bytes) == 0) return;
  const size_t i = std::mismatch(shared, shared + bytes, async).first - block.shared;
  fail("%s reads byte %zu of shared memory, written without a fence.proxy.async since", what, i);
}

void note_generic_write(const void* address, int bytes) {
  Unseen unseen;
  const auto* shared = static_cast<const char*>(address);
  if (shared < block.shared || shared + bytes > block.shared + block.shared_bytes) return;
  if (!memory.units.empty()) check_writes(shared, bytes, "a thread");
  auto& list = memory.unfenced[current->linear];
  if (list.empty()) memory.writers.push_back(current->linear);
  list.emplace_back(uint32_t(shared - block.shared), bytes);
}

uint64_t mbarrier_phase_for_tma(uint32_t address) {
  Barrier& barrier = find(address);
  if (!barrier.fenced)
    fail("TMA uses the mbarrier at %u, which thread %d has not made visible by fence.mbarrier_init", address,
         barrier.initialised_by);
  return barrier.phase;
}

void mbarrier_complete_tx(uint32_t address, uint32_t bytes, uint64_t phase) {
  Barrier& barrier = find(address);
  if (barrier.phase != phase)
    fail("%u bytes arrive at the mbarrier at %u when the phase that they were issued in is over", bytes, address);
  note_release(&barrier.order[barrier.phase & 1]);
  barrier.tx -= bytes;
  end_phase_if_complete(address, barrier);
}

}  // namespace emulator

namespace resnet_fast::ptx {

using namespace emulator;

void mbarrier_init(uint32_t address, uint32_t arrivals) {
  Unseen unseen;
  char* shared = shared_at(address, 8, 8, "an mbarrier");
  if (arrivals == 0 || arrivals > max_tx) fail("an mbarrier of %u arrivals", arrivals);
  if (barriers.count(address) != 0) fail("the mbarrier at %u is initialised twice", address);
  check_writes(shared, 8, "mbarrier.init");
  note_write(shared, 8);
  memcpy(shared, &mark, 8);
  Barrier& barrier = barriers[address];
  barrier.arrivals = barrier.pending = arrivals;
  barrier.initialised_by = current->linear;
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : barriers)
    if (barrier.initialised_by == current->linear) barrier.fenced = true;
}

void mbarrier_arrive(uint32_t address) { arrive(address, 0); }

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes) {
  if (bytes > max_tx) fail("an mbarrier is to expect %u bytes, %lld at most", bytes, (long long)max_tx);
  arrive(address, bytes);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  if (parity > 1) fail("a wait for parity %u", parity);
  Barrier& barrier = find(address);
  wgmma_land_some();
  wait_until([&] { return (barrier.phase & 1) != parity; }, "an mbarrier");
  note_acquire(&barrier.order[parity]);
}

void barrier_sync(int barrier, int threads) {
  if (barrier == 0) fail("bar.sync 0 is __syncthreads");
  sync_named(barrier, threads);
}

void fence_proxy_async() {
  Unseen unseen;
  auto& list = memory.unfenced[current->linear];
  for (const auto& [address, bytes] : list) {
    char* shared = block.shared + address;
    memcpy(async_view(shared), shared, bytes);
  }
  if (list.empty()) return;
  list.clear();
  memory.writers.erase(std::find(memory.writers.begin(), memory.writers.end(), current->linear));
}

void set_max_registers(int n) {
  if (n < 24 || n > 256 || n % 8 != 0) fail("setmaxnreg to %d; a multiple of 8 from 24 to 256", n);
  meet("setmaxnreg", nullptr, nullptr, [](const void* const*, void* const*) {});
  registers[current->warp] = n;
  int total = 0;
  const int warps = int(block.size.x * block.size.y * block.size.z) / 32;
  for (int warp = 0; warp < warps; ++warp) total += registers[warp] * 32;
  if (total > 65536) fail("setmaxnreg: %d registers, an SM has 65536", total);
}

namespace {

struct Row {
  uint16_t elements[8];
};

struct Words {
  uint32_t words[4];
};

}  // namespace

void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t row) {
  Row in;
  Words result;
  const char* from = shared_at(row, 16, 16, "ldmatrix");
  note_read(from, 16);
  note_shared(from, 16);
  memcpy(&in, from, 16);
  meet("ldmatrix.x4.trans", &in, &result, [](const void* const* in, void* const* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int r) {
          return uint32_t(static_cast<const Row*>(in[matrix * 8 + r])->elements[lane / 4]);
        };
        static_cast<Words*>(out[lane])->words[matrix] = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
      }
  });
  memcpy(out, result.words, 16);
}

void stmatrix_x4(uint32_t row, const uint32_t (&in)[4]) {
  Words words, result;
  char* to = shared_at(row, 16, 16, "stmatrix");
  memcpy(words.words, in, 16);
  meet("stmatrix.x4", &words, &result, [](const void* const* in, void* const* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int word = 0; word < 4; ++word)
        static_cast<Words*>(out[lane])->words[word] =
            static_cast<const Words*>(in[lane % 8 * 4 + word])->words[lane / 8];
  });
  note_shared(to, 16);
  note_generic_write(to, 16);
  note_write(to, 16);
  memcpy(to, result.words, 16);
}

}  // namespace resnet_fast::ptx
