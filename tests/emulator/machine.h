// The emulated device as its own files see it: blocks, warps and threads, the launch that runs, and who does what.
//
//   launch.cpp     starts and ends launches, clusters, blocks and threads
//   scheduler.cpp  decides which thread runs next
//   barriers.cpp   lets threads wait for each other: barriers, warp intrinsics, fences
//   memory.cpp     has global and shared memory, atomics, asynchronous copies, and finds invalid accesses
//   report.cpp     says what was wrong with a launch, and records what it did
//
// These files are compiled without sanitizers (sanitizers.h). ThreadSanitizer takes each emulated thread for a thread.
// If emulated threads allocated the emulator's own data, or called the C library's memory functions on them, it would
// count these accesses as the kernel's. So the emulator sizes its tables before the threads run.
#pragma once
#include <array>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "emulated_device.h"
#include "fiber.h"

// Hidden, so that code in a shared library reaches these names directly and not through its tables.
#pragma GCC visibility push(hidden)

namespace bnfused::emulator {

constexpr unsigned kWarpLanes = 32;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // the limit for a block on sm_90
constexpr size_t kArenaBytes = 256 * 1024;      // a block's shared memory, and the red zones in it
constexpr size_t kRedZoneBytes = 128;
constexpr size_t kPage = 4096;
constexpr size_t kCopyBytes = 16;  // a cp.async copies this much
constexpr unsigned char kPoison = 0xff;

struct Block;
struct Thread;

struct Warp {
  unsigned alive = 0, waiting = 0;  // bits of lanes
  unsigned generation = 0;          // how many intrinsics have completed
  std::array<Thread*, kWarpLanes> lanes{};
  std::array<char, 8>
      order{};  // ThreadSanitizer orders threads by these addresses; one for each of the last generations
};

// A barrier of the threads of a block, a cluster or the grid.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  int true_predicates = 0;
  std::array<int, 2> result{};               // true predicates of the last two generations
  Location where;                            // where the thread that came first waits
  Thread *first = nullptr, *last = nullptr;  // list of the threads that wait, through next_at_barrier
  std::array<char, 2> order{};
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  unsigned group;  // how many groups the thread had committed before
};

struct Thread {
  Fiber fiber;
  unsigned index = 0, lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  bool done = false;
  const char* waits_for = nullptr;
  Location waits_at;
  Thread* next_at_barrier = nullptr;

  // The warp intrinsic in which the thread waits.
  WarpOp op{};
  unsigned mask = 0;
  LaneValue value{}, result{};
  int argument = 0, width = 0;

  std::vector<Copy> copies;
  unsigned copies_in_flight = 0, groups_committed = 0;

  // How fences are told to ThreadSanitizer, see fence(): `fence_order` has what the thread had done at its last fence,
  // `atomics` has the addresses of its atomics since then.
  bool fenced = false;
  char fence_order = 0;
  void* carrier = nullptr;  // a fiber of ThreadSanitizer, see before_atomic()
  std::array<const void*, 8> atomics{};
  unsigned atomics_count = 0;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
  unsigned threads_done = 0;
};

struct Block {
  explicit Block(unsigned thread_count) : threads(thread_count), warps((thread_count + kWarpLanes - 1) / kWarpLanes) {}

  std::vector<Thread> threads;
  std::vector<Warp> warps;
  char *arena = nullptr, *stacks = nullptr;
  size_t stack_bytes = 0;  // of each thread
  unsigned number = 0, rank_in_cluster = 0, threads_done = 0;
  Cluster* cluster = nullptr;
  Barrier barrier;
  // A ring of the threads that can run. `place` is the block's index in Machine::with_runnable.
  std::vector<Thread*> ring;
  unsigned ring_head = 0, runnable = 0;
  size_t place = 0;

  unsigned size() const { return static_cast<unsigned>(threads.size()); }
};

struct SharedPlace {
  size_t offset = 0, bytes = 0;  // bytes == 0: this launch has not used the object yet
};

// The state of the launch that runs, and blocks that are kept between launches because they are expensive to make.
struct Machine {
  LaunchConfig config;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;

  std::vector<std::unique_ptr<Cluster>> live;  // clusters on the device
  std::vector<Block*> with_runnable;           // blocks in which a thread can run
  Block* current = nullptr;
  bool rotate = false;  // the current thread spins, so another block has to run next
  Barrier grid_barrier;
  std::vector<SharedPlace> shared_places;
  size_t arena_end = 0;  // the end of the last object's red zone
  uint64_t random = 1, switches = 0;
  // Polls that found no change: `spins` counts them since any thread made progress, and `polls` since the last
  // switch to the current thread.
  uint64_t spins = 0, polls = 0;
  char end_order = 0;  // an address by which ThreadSanitizer orders ends of threads before the end of the launch

  bool running = false;
  std::array<char, 1024> failure{};

  std::vector<std::unique_ptr<Block>> idle;  // the next block of that size uses it
  // Under ThreadSanitizer blocks are not used again in a launch: that would order the old block before the new one.
  std::vector<std::unique_ptr<Block>> retired;
};

extern Machine machine;
extern Thread main_thread;  // the thread that launches
extern Thread* current;     // the thread that runs
extern int shared_objects;  // how many objects have a number
extern sigjmp_buf after_fault;
extern std::string last_report;

inline uint64_t draw() {  // xorshift64
  uint64_t& r = machine.random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return r >> 11;
}

// ------------------------------------------------------------------------------------------- report.cpp

// A location as text, "file.cuh:12". It owns the text, so one printf can have several.
struct Place {
  explicit Place(Location at) {
    std::snprintf(text, sizeof text, "%s:%u", file_of(at.file_name()), unsigned{at.line()});
  }
  static const char* file_of(const char* path) {
    const char* name = path;
    for (const char* p = path; *p; ++p) {
      if (*p == '/') name = p + 1;
    }
    return name;
  }
  char text[128];
};

// Ends the launch. It returns an error, and report() says the text.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
std::string where_threads_are();
std::string name_of_kernel(const void* kernel);
void record_launch(const void* kernel);

inline bool failed() { return machine.failure[0] != 0; }
inline unsigned block_number() { return current->block->number; }

// ------------------------------------------------------------------------------------------- scheduler.cpp

void make_runnable(Thread* thread);
Thread* take_runnable();  // nullptr if no thread can run
void switch_to(Thread* to);
void run_next();
void let_another_block_run();
void count_spin();
void maybe_let_others_run();
// Lets others run until one of them calls make_runnable for this thread. `what` is for reports.
void wait(const char* what, Location at);

// ------------------------------------------------------------------------------------------- barriers.cpp

// Whether options.dropped_site names this barrier, fence or wait, which then does nothing. Also records it for sites().
bool dropped(Location at);
void choose_dropped_site();
void fail_if_some_exited(const Block& block, const Barrier& barrier);
// If all living lanes of `mask` have arrived, gives each lane its result and wakes the lanes that wait. `last` is the
// thread that runs, which needs no wake-up; nullptr if it is none of these lanes. Returns whether all had arrived.
bool complete(Warp& warp, unsigned mask, const Thread* last);

// ------------------------------------------------------------------------------------------- memory.cpp

char* map_pages(size_t bytes);
void poison(char* p, size_t bytes);  // fills with kPoison
// Fails the launch if the red zones between shared objects have changed: a thread then wrote outside of an object.
void check_red_zones(const Block& block);
void catch_faults();  // turns SIGSEGV and SIGBUS of emulated threads into a failed launch

}  // namespace bnfused::emulator

#pragma GCC visibility pop
