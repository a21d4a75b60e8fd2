#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#ifdef EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif
#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#endif

// Saves what a function has to keep, exchanges stacks, restores.
extern "C" void emulator_switch(void** save_stack, void* stack);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
constexpr int saved_registers = 6;
#else
#error "the emulator changes stacks in x86-64 assembly; another processor needs its own emulator_switch"
#endif

namespace emulator {

Thread* current = nullptr;
Block block;

namespace {

int unseen_depth = 0;  // of the running thread or agent

constexpr size_t stack_bytes = 256 * 1024;

enum class State { ready, at_barrier, in_collective, waiting, done };

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::done;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  const std::function<bool()>* condition = nullptr;
  const char* waits_for = "";
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  std::vector<std::pair<uintptr_t, int>> accesses;  // of shared memory, since the lanes of the warp last met
};

struct Warp {
  uint32_t lanes = 0, arrived = 0;  // which exist, and which wait in the collective
  const char* collective = nullptr;
  const void* in[32];
  void* out[32];
};

struct NamedBarrier {
  int count = 0, arrived = 0;
  uint64_t generation = 0;
  std::set<int> warps, last_warps;
  char order[2];  // objects for ThreadSanitizer, one per parity of the generation: a single one would hide races
};

struct Async {
  std::function<void()> land;
  const char* what;
  bool may_outlive_block;
  std::unique_ptr<Agent> agent;
};

struct Engine {
  Options options;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::deque<Async> async;
  NamedBarrier named[16];
  int threads = 0, alive = 0;
  uint64_t generation = 0, events = 0;
  char order[2];
  void* main_stack_pointer = nullptr;
  void* main_tsan = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  bool failed = false;
  std::string message, launches, launches_read;
  Counters counters{};
  bool counting = false;
  std::vector<void (*)()> block_start, block_end, thread_exit;
  std::mutex mutex;
};

Engine& engine() {
  static Engine e;
  return e;
}

Fiber* fiber() { return static_cast<Fiber*>(current); }

void yield() {
  Engine& e = engine();
  Fiber* me = fiber();
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(e.main_tsan, 1);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(me->state == State::done ? nullptr : &me->fake_stack, e.main_stack,
                                 e.main_stack_bytes);
#endif
  emulator_switch(&me->stack_pointer, e.main_stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(me->fake_stack, &e.main_stack, &e.main_stack_bytes);
#endif
}

void enter() {
  Engine& e = engine();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &e.main_stack, &e.main_stack_bytes);
#endif
  note_acquire(&e.body);
  e.body(e.context);
  for (auto function : e.thread_exit) function();
  note_release(&e.context);
  fiber()->state = State::done;
  yield();
  abort();
}

void resume(Fiber& f) {
  Engine& e = engine();
  current = &f;
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(f.tsan, 1);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&e.main_fake_stack, f.stack, stack_bytes);
#endif
  emulator_switch(&e.main_stack_pointer, f.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(e.main_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void prepare(Fiber& f, int linear, dim3 size) {
  if (f.stack == nullptr) {
    void* memory =
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    f.stack = static_cast<char*>(memory);
  }
  f.index = dim3(linear % size.x, linear / size.x % size.y, linear / (size.x * size.y));
  f.linear = linear, f.warp = linear / 32, f.lane = linear % 32;
  f.state = State::ready, f.condition = nullptr;
  f.accesses.clear();
  void** top = reinterpret_cast<void**>(f.stack + stack_bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  for (int i = 0; i < saved_registers; ++i) *--top = nullptr;
  f.stack_pointer = top;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(f.stack, stack_bytes);
#endif
#ifdef EMULATOR_TSAN
  f.tsan = __tsan_create_fiber(0);
#endif
}

// The passes that one instruction of a warp takes: shared memory serves 32 banks of 4 bytes at a time, to as many lanes
// as ask for 128 bytes together (32 of 4 bytes, 16 of 8, 8 of 16); lanes that ask for the same word share it.
void count_conflicts(const uintptr_t address[32], int bytes, uint32_t lanes) {
  Counters& c = engine().counters;
  const int together = bytes <= 4 ? 32 : 128 / bytes;
  ++c.accesses;
  for (int first = 0; first < 32; first += together) {
    std::vector<uintptr_t> words[32];
    for (int lane = first; lane < first + together; ++lane)
      if (lanes >> lane & 1)
        for (uintptr_t word = address[lane] / 4; word * 4 < address[lane] + bytes; ++word) {
          auto& of_bank = words[word % 32];
          if (std::find(of_bank.begin(), of_bank.end(), word) == of_bank.end()) of_bank.push_back(word);
        }
    size_t passes = 0, total = 0;
    for (auto& of_bank : words) passes = std::max(passes, of_bank.size()), total += of_bank.size();
    c.wavefronts += passes;
    c.best += (total + 31) / 32;
  }
}

// What the lanes of a warp have accessed since they last met.
void flush_accesses(int warp) {
  Engine& e = engine();
  if (!e.counting) return;
  Fiber* lanes[32] = {};
  size_t instructions = 0;
  for (int lane = 0; lane < 32 && warp * 32 + lane < e.threads; ++lane) {
    lanes[lane] = e.fibers[warp * 32 + lane].get();
    instructions = std::max(instructions, lanes[lane]->accesses.size());
  }
  for (size_t i = 0; i < instructions; ++i) {
    uintptr_t address[32] = {};
    uint32_t active = 0;
    int bytes = 4;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane] != nullptr && i < lanes[lane]->accesses.size()) {
        active |= 1u << lane;
        address[lane] = lanes[lane]->accesses[i].first;
        bytes = lanes[lane]->accesses[i].second;
      }
    count_conflicts(address, bytes, active);
  }
  for (Fiber* lane : lanes)
    if (lane != nullptr) lane->accesses.clear();
}

void land(Async& a) {
  Engine& e = engine();
  ++e.events;
  a.agent->run([&] {
    a.land();
    note_release(&e.context);  // the end of the block comes after it
  });
}

void land(size_t i) {
  Engine& e = engine();
  Unseen unseen;
  Async a = std::move(e.async[i]);
  e.async.erase(e.async.begin() + i);
  land(a);
}

void release_barrier() {
  Engine& e = engine();
  for (size_t w = 0; w < e.warps.size(); ++w) flush_accesses(int(w));
  for (int i = 0; i < e.threads; ++i)
    if (e.fibers[i]->state == State::at_barrier) e.fibers[i]->state = State::ready;
  ++e.generation, ++e.events;
}

// Nobody can go on: the barrier is complete, something asynchronous lands, or it is a deadlock.
void unblock() {
  Engine& e = engine();
  Fiber *first = nullptr, *other = nullptr, *waiting = nullptr, *collective = nullptr;
  int at_barrier = 0;
  for (int i = 0; i < e.threads; ++i) {
    Fiber& f = *e.fibers[i];
    if (f.state == State::at_barrier) {
      ++at_barrier;
      if (first == nullptr) first = &f;
      if (f.barrier_line != first->barrier_line || strcmp(f.barrier_file, first->barrier_file) != 0) other = &f;
    } else if (f.state == State::waiting) {
      waiting = &f;
    } else if (f.state == State::in_collective) {
      collective = &f;
    }
  }
  if (other != nullptr)
    fail("threads wait at different barriers: thread %d at %s:%d, thread %d at %s:%d", first->linear,
         first->barrier_file, first->barrier_line, other->linear, other->barrier_file, other->barrier_line);
  if (at_barrier == e.alive) return release_barrier();
  if (!e.async.empty()) return land(0);
  if (collective != nullptr)
    fail("deadlock: thread %d is in %s, which not all lanes of its warp have reached", collective->linear,
         e.warps[collective->warp].collective);
  if (waiting != nullptr) fail("deadlock: thread %d waits for %s", waiting->linear, waiting->waits_for);
  fail("deadlock");
}

void step(std::vector<Fiber*>& ready) {
  Engine& e = engine();
  ready.clear();
  for (int i = 0; i < e.threads; ++i) {
    Fiber& f = *e.fibers[i];
    if (f.state == State::ready || (f.state == State::waiting && (*f.condition)())) ready.push_back(&f);
  }
  if (ready.empty()) return unblock();
  if (e.options.schedule == Schedule::reverse) std::reverse(ready.begin(), ready.end());
  if (e.options.schedule == Schedule::random) std::shuffle(ready.begin(), ready.end(), e.random);
  for (Fiber* f : ready) {
    if (e.failed) return;
    if (e.options.landing == Landing::random && !e.async.empty() && e.random() % 64 == 0)
      land(e.random() % e.async.size());
    f->state = State::ready;
    resume(*f);
    if (f->state != State::done) continue;
    --e.alive, ++e.events;
#ifdef EMULATOR_TSAN
    __tsan_destroy_fiber(f->tsan);
#endif
  }
}

void run_block() {
  Engine& e = engine();
  ++e.counters.blocks;
  e.alive = e.threads;
  e.warps.assign((e.threads + 31) / 32, Warp());
  e.async.clear();
  for (auto& barrier : e.named) barrier = NamedBarrier();
  for (auto function : e.block_start) function();
#ifdef EMULATOR_TSAN
  e.main_tsan = __tsan_get_current_fiber();
#endif
  for (int i = 0; i < e.threads; ++i) {
    prepare(*e.fibers[i], i, block.size);
    e.warps[i / 32].lanes |= 1u << i % 32;
  }
  note_release(&e.body);
  static std::vector<Fiber*> ready;
  while (e.alive > 0 && !e.failed) step(ready);
  for (size_t i = 0; i < e.async.size() && !e.failed;)
    if (e.async[i].may_outlive_block)
      land(i);
    else
      ++i;
  note_acquire(&e.context);
  for (size_t w = 0; w < e.warps.size(); ++w) flush_accesses(int(w));
  if (!e.failed)
    for (auto function : e.block_end) function();
  if (!e.failed && !e.async.empty()) fail("the block ended before %s was complete", e.async.front().what);
}

}  // namespace

#ifdef EMULATOR_TSAN
namespace {

struct Seen {
  Seen() {
    for (int i = 0; i < unseen_depth; ++i) __tsan_ignore_thread_end();
  }
  ~Seen() {
    for (int i = 0; i < unseen_depth; ++i) __tsan_ignore_thread_begin();
  }
};
}  // namespace

Unseen::Unseen() {
  ++unseen_depth;
  __tsan_ignore_thread_begin();
}
Unseen::~Unseen() {
  --unseen_depth;
  __tsan_ignore_thread_end();
}

Agent::Agent() { fiber_ = __tsan_create_fiber(0); }
Agent::~Agent() { __tsan_destroy_fiber(fiber_); }

void Agent::run(const std::function<void()>& work) {
  struct Switched {
    void* back = __tsan_get_current_fiber();
    int depth = std::exchange(unseen_depth, 0);
    ~Switched() {
      __tsan_switch_to_fiber(back, 1);
      unseen_depth = depth;
    }
  } switched;
  __tsan_switch_to_fiber(fiber_, 1);
  Unseen unseen;
  work();
}

void note_read(const void* address, size_t bytes) {
  Seen seen;
  __tsan_read_range(const_cast<void*>(address), bytes);
}
void note_write(void* address, size_t bytes) {
  Seen seen;
  __tsan_write_range(address, bytes);
}
void note_release(const void* object) { __tsan_release(const_cast<void*>(object)); }
void note_acquire(const void* object) { __tsan_acquire(const_cast<void*>(object)); }
#else
Unseen::Unseen() {}
Unseen::~Unseen() {}
Agent::Agent() {}
Agent::~Agent() { (void)fiber_; }
void Agent::run(const std::function<void()>& work) { work(); }
void note_read(const void*, size_t) {}
void note_write(void*, size_t) {}
void note_release(const void*) {}
void note_acquire(const void*) {}
#endif

// With a running thread its stack is left for good; without one (the scheduler itself) the loop sees `failed`.
void fail(const char* format, ...) {
  Unseen unseen;
  Engine& e = engine();
  char text[512], where[160];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  snprintf(where, sizeof(where), "emulator: block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
  e.message = where;
  if (current != nullptr) e.message += ", thread " + std::to_string(current->linear);
  e.message += std::string(": ") + text;
  e.failed = true;
  if (current == nullptr) throw e.failed;
  unseen_depth = 0;
  yield();
  abort();
}

void sync_threads(const char* file, int line) {
  Engine& e = engine();
  char* order = &e.order[e.generation & 1];
  note_release(order);
  Fiber* me = fiber();
  me->state = State::at_barrier, me->barrier_file = file, me->barrier_line = line;
  yield();
  note_acquire(order);
}

void sync_named(int id, int count) {
  Engine& e = engine();
  if (id < 0 || id > 15) fail("bar.sync: barrier %d, there are 16", id);
  if (count % 32 != 0 || count < 32 || count > e.threads) fail("bar.sync: %d threads of %d", count, e.threads);
  NamedBarrier& barrier = e.named[id];
  if (barrier.arrived > 0 && barrier.count != count)
    fail("bar.sync %d: %d threads here, %d elsewhere", id, count, barrier.count);
  char* order = &barrier.order[barrier.generation & 1];
  note_release(order);
  barrier.count = count;
  const uint64_t generation = barrier.generation;
  {
    Unseen unseen;
    barrier.warps.insert(current->warp);
  }
  if (++barrier.arrived == count) {
    Unseen unseen;
    if (int(barrier.warps.size()) * 32 != count)
      fail("bar.sync %d: %d threads of %zu warps; a warp counts whole", id, count, barrier.warps.size());
    if (!barrier.last_warps.empty() && barrier.last_warps != barrier.warps)
      fail("bar.sync %d: other warps than last time, so that two groups share one barrier", id);
    for (int w : barrier.warps) flush_accesses(w);
    barrier.last_warps = std::move(barrier.warps);
    barrier.warps.clear();
    barrier.arrived = 0;
    ++barrier.generation;
    progress();
  }
  wait_until([&] { return barrier.generation != generation; }, "a named barrier");
  note_acquire(order);
  preempt();
}

void wait_until(const std::function<bool()>& done, const char* what) {
  Fiber* me = fiber();
  while (!done()) {
    me->state = State::waiting, me->condition = &done, me->waits_for = what;
    yield();
  }
}

void progress() { ++engine().events; }

void preempt() {
  Engine& e = engine();
  if (e.options.schedule == Schedule::random && e.random() % 4 == 0) yield();
}

void meet(const char* name, const void* in, void* out, Collective run) {
  Engine& e = engine();
  Fiber* me = fiber();
  Warp& warp = e.warps[me->warp];
  if (warp.arrived != 0 && strcmp(warp.collective, name) != 0)
    fail("lanes of one warp are in %s and in %s", warp.collective, name);
  warp.collective = name;
  warp.in[me->lane] = in, warp.out[me->lane] = out;
  warp.arrived |= 1u << me->lane;
  if (warp.arrived != warp.lanes) {
    me->state = State::in_collective;
    yield();
    return;
  }
  if (warp.lanes != ~0u) fail("%s in a warp of fewer than 32 threads", name);
  ++e.counters.collectives, ++e.events;
  flush_accesses(me->warp);
  run(warp.in, warp.out);
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i) e.fibers[me->warp * 32 + i]->state = State::ready;
}

void launch_async(std::function<void()> function, const char* what, bool may_outlive_block) {
  Unseen unseen;
  progress();
  Async a{std::move(function), what, may_outlive_block, std::make_unique<Agent>()};
  if (lands_early()) return land(a);
  engine().async.push_back(std::move(a));
}

bool happens_now() {
  Engine& e = engine();
  return e.options.landing == Landing::random && e.random() % 4 == 0;
}

bool lands_early() { return engine().options.landing == Landing::early || happens_now(); }

void note_shared(const void* address, int bytes) {
  if (engine().counting) fiber()->accesses.emplace_back(reinterpret_cast<uintptr_t>(address), bytes);
}

void poison(void* address, size_t bytes) { memset(address, 0xff, bytes); }

void at_block_start(void (*function)()) { engine().block_start.push_back(function); }
void at_block_end(void (*function)()) { engine().block_end.push_back(function); }
void at_thread_exit(void (*function)()) { engine().thread_exit.push_back(function); }

int launch(const char* name, dim3 grid, dim3 size, size_t shared_bytes, void (*body)(void*), void* context) {
  Engine& e = engine();
  std::lock_guard<std::mutex> lock(e.mutex);
  e.launches += std::string(name) + "\n";
  e.failed = false;
  e.message.clear();
  e.body = body, e.context = context;
  e.random.seed(e.options.seed);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(size.x) * size.y * size.z;
  block = Block{dim3(0, 0, 0), size, grid, nullptr, shared_bytes};
  try {
    if (blocks == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
      fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
    if (threads == 0 || threads > 1024) fail("a block of %u x %u x %u threads", size.x, size.y, size.z);
    if (shared_bytes > max_shared_bytes)
      fail("%zu bytes of shared memory, %zu at most", shared_bytes, max_shared_bytes);
    e.threads = int(threads);
    while (e.fibers.size() < threads) e.fibers.push_back(std::make_unique<Fiber>());
    for (uint64_t i = 0; i < blocks && !e.failed; ++i) {
      block.index = dim3(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
      // Of exactly the size asked for, so that AddressSanitizer sees its end.
      void* shared = nullptr;
      if (shared_bytes && posix_memalign(&shared, 1024, shared_bytes) != 0) abort();
      const auto memory = std::unique_ptr<char, void (*)(void*)>(static_cast<char*>(shared), [](void* p) { free(p); });
      block.shared = memory.get();
      if (shared_bytes) poison(block.shared, shared_bytes);
      run_block();
    }
  } catch (bool) {
  }
  return e.failed ? 1 : 0;
}

const char* error_message() { return engine().message.c_str(); }

}  // namespace emulator

extern "C" {

void emulator_configure(int schedule, int landing, uint64_t seed) {
  emulator::engine().options = {emulator::Schedule(schedule), emulator::Landing(landing), seed};
}

void emulator_counters(emulator::Counters* out) { *out = emulator::engine().counters; }

void emulator_count(int accesses_too) {
  emulator::engine().counters = {};
  emulator::engine().counting = accesses_too != 0;
}

const char* emulator_error_message() { return emulator::error_message(); }

const char* emulator_launches() {
  auto& e = emulator::engine();
  e.launches_read.swap(e.launches);
  e.launches.clear();
  return e.launches_read.c_str();
}
}
