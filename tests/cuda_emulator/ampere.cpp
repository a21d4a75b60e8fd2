// Twins of sm_80's instructions (csrc/cuda/ptx.cuh) and of the warp-wide ones of every architecture.
#include <cstring>
#include <deque>
#include <vector>

#include "emulated_ptx.h"
#include "emulated_runtime.h"
#include "hopper.h"

namespace emulator {

void sync_warp() {
  // Two objects by turns: with one, a race between two rounds would pass for ordered.
  static char order[32][2];
  static unsigned char round[32];
  const int warp = current->warp;
  char* object = &order[warp][round[warp] & 1];
  note_release(object);
  meet("__syncwarp", nullptr, nullptr, [](const void* const*, void* const*) { ++round[current->warp]; });
  note_acquire(object);
}

namespace {
struct Shuffle {
  uint32_t value;
  int source;
};
}  // namespace

uint32_t shuffle(uint32_t value, int source_lane, const char* name) {
  const Shuffle in{value, source_lane};
  uint32_t out;
  meet(name, &in, &out, [](const void* const* in, void* const* out) {
    for (int lane = 0; lane < 32; ++lane) {
      const int source = static_cast<const Shuffle*>(in[lane])->source;
      *static_cast<uint32_t*>(out[lane]) = static_cast<const Shuffle*>(in[source])->value;
    }
  });
  return out;
}

uint32_t ballot(bool predicate) {
  uint32_t out;
  meet("a vote", &predicate, &out, [](const void* const* in, void* const* out) {
    uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= uint32_t(*static_cast<const bool*>(in[lane])) << lane;
    for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(out[lane]) = votes;
  });
  return out;
}

}  // namespace emulator

namespace resnet_fast::ptx {

using emulator::current;
using emulator::fail;

uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const char*>(p) - emulator::block.shared;
  if (offset < 0 || size_t(offset) >= emulator::block.shared_bytes)
    fail("an address %td bytes from the start of %zu bytes of shared memory", offset, emulator::block.shared_bytes);
  return uint32_t(offset);
}

namespace {

char* at(uint32_t address, size_t bytes, const char* name) {
  if (address + bytes > emulator::block.shared_bytes)
    fail("%s of bytes %u to %zu of %zu of shared memory", name, address, address + bytes, emulator::block.shared_bytes);
  if (address % bytes != 0) fail("%s at %u is misaligned", name, address);
  return emulator::block.shared + address;
}

struct Copy {
  char* to;
  const void* from;  // null: zeros
};

void land(const Copy& copy) {
  if (copy.from != nullptr) {
    emulator::note_read(copy.from, 16);
    memcpy(copy.to, copy.from, 16);
  } else {
    memset(copy.to, 0, 16);
  }
  emulator::note_write(copy.to, 16);
  emulator::note_generic_write(copy.to, 16);
}

// A thread's copies that have not landed, by group; the last one is still open.
struct Copies {
  std::deque<std::vector<Copy>> groups;
};
std::vector<Copies> copies;

Copies& mine() {
  auto& of_thread = copies[current->linear];
  if (of_thread.groups.empty()) of_thread.groups.emplace_back();
  return of_thread;
}

const bool registered = [] {
  emulator::at_block_start([] { copies.assign(1024, Copies()); });
  emulator::at_thread_exit([] {
    for (auto& group : mine().groups)
      if (!group.empty()) fail("the thread returns with a cp.async in flight");
  });
  return true;
}();

void land_pending(const Copy& copy) {
  emulator::end_writes(copy.to, 16);
  land(copy);
}

// With Landing::random any of the thread's copies may land at any of its cp.async instructions.
void land_some() {
  for (auto& group : mine().groups)
    while (!group.empty() && emulator::happens_now()) {
      land_pending(group.back());
      group.pop_back();
    }
}

}  // namespace

void cp_async_16(uint32_t to, const void* from, bool valid) {
  const Copy copy{at(to, 16, "cp.async"), valid ? from : nullptr};
  if (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async from a misaligned address");
  emulator::note_shared(copy.to, 16);
  if (emulator::lands_early()) return land(copy);
  emulator::begin_writes(copy.to, 16, "cp.async");
  emulator::note_write(copy.to, 16);
  emulator::poison(copy.to, 16);
  mine().groups.back().push_back(copy);
  land_some();
}

void cp_async_commit() {
  mine().groups.emplace_back();
  land_some();
}

void cp_async_wait_groups(int n) {
  auto& groups = mine().groups;
  while (int(groups.size()) - 1 > n) {
    for (const Copy& copy : groups.front()) land_pending(copy);
    groups.pop_front();
  }
  land_some();
}

void ldmatrix_x4(uint32_t (&out)[4], uint32_t row) {
  struct Row {
    uint32_t words[4];
  } in, result;
  const char* from = at(row, 16, "ldmatrix");
  emulator::note_read(from, 16);
  emulator::note_shared(from, 16);
  memcpy(&in, from, 16);
  emulator::meet("ldmatrix.x4", &in, &result, [](const void* const* in, void* const* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        static_cast<Row*>(out[lane])->words[matrix] =
            static_cast<const Row*>(in[matrix * 8 + lane / 4])->words[lane % 4];
  });
  memcpy(out, result.words, 16);
}

namespace {

struct Operands {
  uint32_t a[4], b[2];
  float c[4];
};

float from_bf16(uint32_t word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

float from_fp16(uint32_t word, int half) {
  _Float16 value;
  const uint16_t bits = uint16_t(half ? word >> 16 : word);
  memcpy(&value, &bits, 2);
  return float(value);
}

// The fragments as the PTX ISA lays them out: lane = 4 row + column, rows 8 apart in one register after the other.
template <int depth, int per_word, typename Value>
void multiply(const void* const in[32], void* const out[32], Value value) {
  alignas(32) float a[16][depth], b[depth][8], c[16][8];
  constexpr int half = depth / 2;
  for (int lane = 0; lane < 32; ++lane) {
    const Operands& o = *static_cast<const Operands*>(in[lane]);
    const int row = lane / 4, column = lane % 4;
    for (int e = 0; e < per_word; ++e) {
      const int k = column * per_word + e;
      a[row][k] = value(o.a[0], e), a[row + 8][k] = value(o.a[1], e);
      a[row][k + half] = value(o.a[2], e), a[row + 8][k + half] = value(o.a[3], e);
      b[k][row] = value(o.b[0], e), b[k + half][row] = value(o.b[1], e);
    }
    for (int i = 0; i < 4; ++i) c[row + i / 2 * 8][column * 2 + i % 2] = o.c[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 8; ++n) c[row][n] += a[row][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) static_cast<float*>(out[lane])[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void mma(const char* name, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Collective run) {
  Operands in;
  memcpy(in.a, a, sizeof(a)), memcpy(in.b, b, sizeof(b)), memcpy(in.c, c, sizeof(c));
  float out[4];
  emulator::meet(name, &in, out, run);
  memcpy(c, out, sizeof(c));
}

}  // namespace

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma("mma.sync in bfloat16", c, a, b,
      [](const void* const* in, void* const* out) { multiply<16, 2>(in, out, from_bf16); });
}

void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma("mma.sync in float16", c, a, b,
      [](const void* const* in, void* const* out) { multiply<16, 2>(in, out, from_fp16); });
}

void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma("mma.sync in TF32", c, a, b, [](const void* const* in, void* const* out) {
    multiply<8, 1>(in, out, [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
  });
}

uint32_t round_to_tf32(uint32_t x) {
  if ((x & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;  // NaN of any kind
  return (x & 0x7f800000u) == 0x7f800000u ? x : (x + 0x1000u) & 0xffffe000u;
}

}  // namespace resnet_fast::ptx
