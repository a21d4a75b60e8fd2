// Runs one CUDA thread block after the other on the host, every CUDA thread a fiber of its own.
//
// A fiber runs until it has to wait: at a barrier, in a warp-wide instruction, for something asynchronous. The
// scheduler then takes the next one, in an order that Options says. What the twins of CUDA's instructions need of it is
// below; kernels see only include/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

enum class Schedule { forward, reverse, random };  // the order of a block's threads, between any two waits
enum class Landing { late, early, random };        // when an asynchronous copy's bytes arrive

struct Options {
  Schedule schedule = Schedule::forward;
  Landing landing = Landing::late;
  uint64_t seed = 1;
};

struct Counters {
  uint64_t blocks, collectives;         // thread blocks run, warp-wide instructions
  uint64_t accesses, wavefronts, best;  // of shared memory: instructions, passes they took, passes without conflicts
};

constexpr size_t max_shared_bytes = 227 * 1024;  // of sm_90, the most that any architecture gives a block

struct Thread {
  dim3 index;
  int linear, warp, lane;
};

struct Block {
  dim3 index, size, grid;
  char* shared;  // dynamic shared memory
  size_t shared_bytes;
};

extern Thread* current;  // of the fiber that runs
extern Block block;

// --- what the twins call -------------------------------------------------------------------------------------------

// Ends the launch; `format` as printf. Never returns to the calling thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits until every thread of the block that has not returned is here. Threads at two places of the source are an
// error.
void sync_threads(const char* file, int line);

// Waits until `count` threads are at barrier `id`.
void sync_named(int id, int count);

// Waits until `done()`; somebody else's arrival or an asynchronous operation must make it so.
void wait_until(const std::function<bool()>& done, const char* what);

// Something happened that a waiting thread may have waited for.
void progress();

// Lets others run now and then, with Schedule::random.
void preempt();

// All 32 lanes meet in the instruction `name`; then `run` is called once with what each of them passed. Like the real
// instructions it orders no memory accesses.
using Collective = void (*)(const void* const in[32], void* const out[32]);
void meet(const char* name, const void* in, void* out, Collective run);

// `land` is called once: at once, when nothing else can go on, or any time between, as Options::landing says; on a
// thread of its own as far as races are concerned. `what` is named should the block end before, unless that is allowed.
void launch_async(std::function<void()> land, const char* what, bool may_outlive_block = false);

// True, by chance, where something asynchronous may happen at this moment.
bool happens_now();
bool lands_early();

// The calling thread accesses shared memory in an instruction of its warp: the k-th access of every lane belongs to the
// same instruction. Counts bank conflicts.
void note_shared(const void* address, int bytes);

// For ThreadSanitizer, which does not see into the engine.
void note_read(const void* address, size_t bytes);
void note_write(void* address, size_t bytes);
void note_release(const void* object);
void note_acquire(const void* object);

// For ThreadSanitizer: a thread that begins with what the calling one knows, for hardware beside the block's threads.
class Agent {
 public:
  Agent();
  ~Agent();
  Agent(const Agent&) = delete;
  void run(const std::function<void()>& work);

 private:
  void* fiber_ = nullptr;
};

// For ThreadSanitizer, which sees every malloc, free and memcpy: while one exists it sees of this thread only what
// note_read and note_write say, so that the emulator's own data pass for nobody's. The thread must not wait meanwhile.
struct Unseen {
  Unseen();
  ~Unseen();
};

// Fills shared memory that is not to be read with NaN (of every type).
void poison(void* address, size_t bytes);

// At most once per block, when it starts and ends; for state that outlives no block. Called by static initialisers.
void at_block_start(void (*function)());
void at_block_end(void (*function)());
void at_thread_exit(void (*function)());

// --- what launches call --------------------------------------------------------------------------------------------

// Runs `body(context)` for every thread of the grid. 0, or 1 after `fail`, whose words error_message() returns.
int launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);
const char* error_message();

}  // namespace emulator

// For Python (ctypes) and for drivers.
extern "C" {
void emulator_configure(int schedule, int landing, uint64_t seed);
void emulator_counters(emulator::Counters* out);
void emulator_count(int accesses_too);  // from 0; of shared memory only if asked for, which takes a while
const char* emulator_error_message();
const char* emulator_launches();  // the kernels launched since the last call, one name a line
}
