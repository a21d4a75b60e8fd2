// Twins of wgmma: a warpgroup's matrix products, which read shared memory and write accumulators any time between the
// instruction and the wait for it. They are executed in order, each as a whole, once all 128 threads have issued it.
//
// The registers of a are read at once; on a GPU they must not change before the wait, which is not checked.
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "emulated_ptx.h"
#include "hopper.h"

namespace emulator {

using resnet_fast::ptx::Swizzle;
using resnet_fast::ptx::WgmmaType;

namespace {

constexpr int group_threads = 128, rows = 64, depth_bytes = 32;

// --- operands in shared memory ---

struct Operand {
  uint64_t descriptor;
  uint32_t address, leading_bytes, stride_bytes;
  int span;  // of the swizzle; 0: none
};

Operand decode(uint64_t descriptor, const char* name) {
  const auto bytes = [&](int shift) { return uint32_t(descriptor >> shift & 0x3fff) << 4; };
  Operand o{descriptor, bytes(0), bytes(16), bytes(32), 0};
  switch (Swizzle(descriptor >> 62)) {
    case Swizzle::none:
      break;
    case Swizzle::bytes_32:
      o.span = 32;
      break;
    case Swizzle::bytes_64:
      o.span = 64;
      break;
    case Swizzle::bytes_128:
      o.span = 128;
      break;
  }
  if (descriptor & ~0xc00e3fff3fff3fffull)
    fail("wgmma: reserved bits in the descriptor %#llx of %s", (unsigned long long)descriptor, name);
  // Whether the hardware takes the rows' numbers from the address or counts them is told apart only by groups that
  // start elsewhere, or by a base offset.
  if (descriptor >> 49 & 7) fail("wgmma: a base offset in the descriptor of %s, which is not emulated", name);
  if (o.span != 0) {
    if (o.address % (8 * o.span) >= uint32_t(o.span))
      fail("wgmma: %s at %u, which is not in the first row of the swizzle's pattern of %d bytes", name, o.address,
           8 * o.span);
    if (o.stride_bytes % (8 * o.span) != 0)
      fail("wgmma: groups of rows of %s %u bytes apart, which is no multiple of the swizzle's pattern of %d bytes",
           name, o.stride_bytes, 8 * o.span);
    if (o.address % o.span + depth_bytes > uint32_t(o.span))
      fail("wgmma: %s at %u ends beyond its row of %d bytes", name, o.address, o.span);
  }
  return o;
}

// 16 bytes of a row: its first or second half.
char* half_row(const Operand& o, int row, int half, const char* name) {
  uint32_t address = o.address + row / 8 * o.stride_bytes;
  if (o.span == 0) {
    address += row % 8 * 16 + half * o.leading_bytes;
  } else {
    address += row % 8 * o.span + half * 16;
    address ^= address >> 3 & (o.span - 16);
  }
  return shared_at(address, 16, 16, name);
}

template <typename Function>
void for_half_rows(const Operand& o, int count, const char* name, Function function) {
  for (int row = 0; row < count; ++row)
    for (int half = 0; half < 2; ++half) function(half_row(o, row, half, name), row, half);
}

float value(WgmmaType type, const char* p, int i) {
  if (type == WgmmaType::tf32) {
    uint32_t bits;
    memcpy(&bits, p + i * 4, 4);
    return __uint_as_float(bits & 0xffffe000u);
  }
  uint16_t bits;
  memcpy(&bits, p + i * 2, 2);
  if (type == WgmmaType::bf16) return __uint_as_float(uint32_t(bits) << 16);
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}

// --- a warpgroup's state ---

// Accumulators [64, n] of a warpgroup. While a wgmma is in flight the values are here and the threads' registers hold
// NaN, so that whoever reads them too early finds out.
struct Accumulators {
  int n;
  std::array<float*, group_threads> registers{};
  std::array<int, group_threads> in_flight{};
  std::vector<float> values;
};

struct Operation {
  WgmmaType type;
  int n;
  bool a_in_registers, accumulate;
  Operand a, b;
  std::shared_ptr<Accumulators> d;
  uint32_t a_registers[group_threads][4];
  int issued = 0, waited = 0;
  bool done = false;
  char have_issued, have_done;  // objects for ThreadSanitizer
};

struct Warpgroup {
  std::deque<Operation> operations;
  size_t first = 0;  // the number of the first of them; earlier ones are done and waited for
  size_t executed = 0;
  size_t issued[group_threads] = {}, waited[group_threads] = {};
  std::deque<size_t> groups[group_threads];  // the numbers where the threads' commits close
  bool fenced[group_threads] = {};
  std::vector<std::shared_ptr<Accumulators>> accumulators;
  std::unique_ptr<Agent> tensor_cores;

  Operation& operation(size_t number) { return operations[number - first]; }
};
Warpgroup warpgroups[1024 / group_threads];
bool used = false;

const bool registered = [] {
  at_block_start([] {
    if (used)
      for (auto& group : warpgroups) group = Warpgroup();
    used = false;
  });
  at_thread_exit([] {
    Warpgroup& group = warpgroups[current->linear / group_threads];
    const int thread = current->linear % group_threads;
    for (size_t i = group.first; i < group.issued[thread]; ++i)
      if (!group.operation(i).done) fail("the thread returns while a wgmma of it is in flight");
  });
  return true;
}();

Warpgroup& mine() { return warpgroups[current->linear / group_threads]; }
int my_number() { return current->linear % group_threads; }

// Element i of a thread's accumulators.
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

void read_registers(Accumulators& d, int thread) {
  for (int i = 0; i < d.n / 2; ++i) d.values[row_of(thread, i) * d.n + column_of(thread, i)] = d.registers[thread][i];
}

bool registers_unchanged(const Accumulators& d, int thread) {
  for (int i = 0; i < d.n / 2; ++i)
    if (memcmp(&d.values[row_of(thread, i) * d.n + column_of(thread, i)], &d.registers[thread][i], 4) != 0)
      return false;
  return true;
}

void write_registers(const Accumulators& d, int thread) {
  for (int i = 0; i < d.n / 2; ++i) {
    if (__float_as_uint(d.registers[thread][i]) != 0xffffffffu)
      fail("thread %d has written to the accumulators of a wgmma in flight", current->linear / 128 * 128 + thread);
    d.registers[thread][i] = d.values[row_of(thread, i) * d.n + column_of(thread, i)];
  }
}

std::shared_ptr<Accumulators> find_accumulators(Warpgroup& group, int thread, float* registers, int n) {
  for (auto& d : group.accumulators)
    if (d->registers[thread] == registers && d->n == n) return d;
  auto d = std::make_shared<Accumulators>();
  d->n = n;
  d->values.resize(rows * n);
  group.accumulators.push_back(d);
  return d;
}

void hand_over(Warpgroup& group, Accumulators& d, int thread, float* registers) {
  if (d.in_flight[thread] > 0 && d.registers[thread] != registers)
    fail("wgmma: the threads of the warpgroup pass different accumulators");
  if (d.in_flight[thread]++ > 0) return;
  const bool known = d.registers[thread] == registers;
  d.registers[thread] = registers;
  if (!group.fenced[thread] && !(known && registers_unchanged(d, thread)))
    fail("wgmma: no wgmma.fence since the accumulators were written");
  read_registers(d, thread);
  poison(registers, d.n / 2 * sizeof(float));
}

// --- execution ---

using Eight = float __attribute__((vector_size(32)));

constexpr int max_depth = 16;
float a_values[rows][max_depth];
Eight b_values[256 / 8][max_depth];

void load_operand(const Operation& o, const Operand& operand, int count, const char* name, float* first, int row_step,
                  int element_step, int group_step) {
  const int per_half = o.type == WgmmaType::tf32 ? 4 : 8;
  for_half_rows(operand, count, name, [&](const char* shared, int row, int half) {
    check_fenced(shared, 16, name);
    note_read(shared, 16);
    const char* from = async_view(shared);
    float* to = first + row / 8 * group_step + row % 8 * row_step + half * per_half * element_step;
    for (int i = 0; i < per_half; ++i) to[i * element_step] = value(o.type, from, i);
    end_reads(shared, 16);
  });
}

// As in mma.sync: of its 16 rows a warp's lane has two, of each half of the depth one word, or two.
void load_a_registers(const Operation& o) {
  const int per_word = o.type == WgmmaType::tf32 ? 1 : 2;
  for (int thread = 0; thread < group_threads; ++thread)
    for (int word = 0; word < 4; ++word)
      for (int i = 0; i < per_word; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8;
        const int column = (word / 2 * 4 + thread % 4) * per_word + i;
        a_values[row][column] = value(o.type, reinterpret_cast<const char*>(&o.a_registers[thread][word]), i);
      }
}

void multiply(const Operation& o) {
  const int depth = o.type == WgmmaType::tf32 ? 8 : 16;
  float* values = o.d->values.data();
  for (int block = 0; block < o.n / 8; ++block)
    for (int row = 0; row < rows; row += 4) {
      Eight sum[4] = {};
      if (o.accumulate)
        for (int i = 0; i < 4; ++i) memcpy(&sum[i], values + (row + i) * o.n + block * 8, 32);
      for (int k = 0; k < depth; ++k)
        for (int i = 0; i < 4; ++i) sum[i] += a_values[row + i][k] * b_values[block][k];
      for (int i = 0; i < 4; ++i) memcpy(values + (row + i) * o.n + block * 8, &sum[i], 32);
    }
}

void execute(Operation& o) {
  note_acquire(&o.have_issued);
  if (o.a_in_registers)
    load_a_registers(o);
  else
    load_operand(o, o.a, rows, "wgmma's a", &a_values[0][0], max_depth, 1, 8 * max_depth);
  load_operand(o, o.b, o.n, "wgmma's b", reinterpret_cast<float*>(b_values), 1, 8, 8 * max_depth);
  multiply(o);
  for (int thread = 0; thread < group_threads; ++thread)
    if (--o.d->in_flight[thread] == 0) write_registers(*o.d, thread);
  note_release(&o.have_done);
  o.done = true;
  progress();
}

bool can_execute(Warpgroup& group) {
  return group.executed < group.first + group.operations.size() &&
         group.operation(group.executed).issued == group_threads;
}

void execute_next(Warpgroup& group) {
  Operation& o = group.operation(group.executed++);
  group.tensor_cores->run([&] { execute(o); });
}

void retire(Warpgroup& group) {
  while (!group.operations.empty() && group.operations.front().waited == group_threads) {
    group.operations.pop_front();
    ++group.first;
  }
}

void meet_warp(const char* name) {
  meet(name, nullptr, nullptr, [](const void* const*, void* const*) {});
}

}  // namespace

void wgmma_land_some() {
  if (!used) return;
  Unseen unseen;
  for (auto& group : warpgroups)
    while (can_execute(group) && happens_now()) execute_next(group);
}

}  // namespace emulator

namespace resnet_fast::ptx {

using namespace emulator;

uint64_t wgmma_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes, Swizzle swizzle,
                          uint32_t base_offset) {
  for (uint32_t bytes : {address, leading_bytes, stride_bytes})
    if (bytes % 16 != 0 || bytes >= 1u << 18) fail("wgmma_descriptor: %u bytes", bytes);
  return address >> 4 | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         uint64_t(base_offset & 7) << 49 | uint64_t(swizzle) << 62;
}

void wgmma_fence() {
  meet_warp("wgmma.fence");
  mine().fenced[my_number()] = true;
}

void wgmma_commit() {
  meet_warp("wgmma.commit_group");
  Unseen unseen;
  Warpgroup& group = mine();
  group.groups[my_number()].push_back(group.issued[my_number()]);
}

void wgmma_wait_groups(int n) {
  meet_warp("wgmma.wait_group");
  wgmma_land_some();
  Warpgroup& group = mine();
  const int thread = my_number();
  auto& groups = group.groups[thread];
  while (int(groups.size()) > n) {
    for (size_t& next = group.waited[thread]; next < groups.front(); ++next) {
      Operation& o = group.operation(next);
      wait_until([&] { return o.issued == group_threads; }, "the other threads of the warpgroup to issue a wgmma");
      Unseen unseen;
      while (!o.done) execute_next(group);
      note_acquire(&o.have_done);
      ++o.waited;
    }
    Unseen unseen;
    groups.pop_front();
    group.fenced[thread] = false;
    retire(group);
  }
}

void wgmma(WgmmaType type, float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate) {
  if (n % 8 != 0 || n < 8 || n > 256) fail("wgmma of %d columns", n);
  meet_warp("wgmma.mma_async");
  Unseen unseen;
  Warpgroup& group = mine();
  const int thread = my_number();
  used = true;
  if (group.tensor_cores == nullptr) group.tensor_cores = std::make_unique<Agent>();
  const size_t number = group.issued[thread]++;
  const bool first = number == group.first + group.operations.size();
  if (first) {
    group.operations.emplace_back();
    Operation& o = group.operations.back();
    o.type = type, o.n = n, o.a_in_registers = a_registers != nullptr, o.accumulate = accumulate;
    if (a_registers == nullptr) {
      o.a = decode(a, "a");
      for_half_rows(o.a, rows, "wgmma's a", [](char* at, int, int) { begin_reads(at, 16, "wgmma's a"); });
    }
    o.b = decode(b, "b");
    for_half_rows(o.b, n, "wgmma's b", [](char* at, int, int) { begin_reads(at, 16, "wgmma's b"); });
    o.d = find_accumulators(group, thread, d, n);
  }
  Operation& o = group.operation(number);
  if (o.type != type || o.n != n || o.a_in_registers != (a_registers != nullptr) || o.accumulate != accumulate ||
      (a_registers == nullptr && o.a.descriptor != a) || o.b.descriptor != b)
    fail("wgmma: the threads of the warpgroup pass different operands");
  if (a_registers != nullptr) memcpy(o.a_registers[thread], a_registers, sizeof(o.a_registers[thread]));
  hand_over(group, *o.d, thread, d);
  note_release(&o.have_issued);
  if (++o.issued < group_threads) return;
  progress();
  while (can_execute(group) && lands_early()) execute_next(group);
}

}  // namespace resnet_fast::ptx
