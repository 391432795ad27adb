// The emulated device: blocks, warps, barriers, schedules, and what it finds wrong.
//
// Compiled without sanitizers (sanitizers.h). Under ThreadSanitizer each emulated thread is a thread to it, and so
// fibers neither allocate nor call the C library's memory functions on the emulator's own data, whose uses it would
// take for the kernel's: tables are sized before they run.
#include "emulated_device.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <array>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "fiber.h"
#include "sanitizers.h"

namespace bnfused::emulator {

Options options;

namespace {

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxThreadsPerSm = 2048;
constexpr unsigned kMaxClusterBlocks = 16;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of a block, on sm_90
constexpr size_t kReservedSharedBytes = 1024;   // of each block, for the device itself
constexpr size_t kArenaBytes = 256 * 1024;      // shared memory and the red zones in it
constexpr size_t kRedZoneBytes = 128;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSanitizedStackBytes = 256 * 1024;  // sanitizers make frames larger
constexpr size_t kPage = 4096;
constexpr uint64_t kMaxSpins = 1'000'000;  // before it is a livelock
constexpr unsigned kMaxPolls = 1'000;      // of one thread before others have to run
constexpr size_t kCopyBytes = 16;          // of a cp.async
constexpr unsigned char kPoison = 0xff;

struct Block;
struct Thread;

struct Warp {
  unsigned alive = 0, waiting = 0, generation = 0;
  std::array<Thread*, kWarpLanes> lanes{};
  std::array<char, 8> order{};  // addresses for ThreadSanitizer, one for each of the last generations
};

// Threads that wait for each other: of a block, a cluster or the grid.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  int true_predicates = 0;
  std::array<int, 2> result{};  // of the last two generations
  Location where;               // of the first that arrived
  Thread *first = nullptr, *last = nullptr;
  std::array<char, 2> order{};
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  unsigned group;  // of cp.async
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

  // The warp intrinsic that it waits in.
  WarpOp op{};
  unsigned mask = 0;
  LaneValue value{}, result{};
  int argument = 0, width = 0;

  std::vector<Copy> copies;
  unsigned copies_in_flight = 0, groups_committed = 0;

  // ThreadSanitizer's picture of fences: what this thread had done at its last one, the atomics since the last.
  bool fenced = false;
  char fence_order = 0;
  void* carrier = nullptr;
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
  // Threads that can run, a ring; and where the block is among the blocks that have some.
  std::vector<Thread*> ring;
  unsigned ring_head = 0, runnable = 0;
  size_t place = 0;

  unsigned size() const { return static_cast<unsigned>(threads.size()); }
};

struct SharedPlace {
  size_t offset = 0, bytes = 0;  // bytes == 0: not met in this launch
};

struct Site {
  const char* file;
  unsigned line;
  bool dropped;
};

// Everything about the launch that runs, and what is kept between launches to be used again.
struct Machine {
  LaunchConfig config;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;

  std::vector<std::unique_ptr<Cluster>> live;
  std::vector<Block*> with_runnable;
  Block* current = nullptr;
  bool rotate = false;  // the current thread spins: let another block run
  Barrier grid_barrier;
  std::vector<SharedPlace> shared_places;
  size_t arena_end = 0;  // of the last object's red zone
  uint64_t random = 1, switches = 0;
  uint64_t spins = 0, polls = 0;  // waits in vain: since something moved, and since the current thread runs
  char end_order = 0;

  bool running = false;
  std::array<char, 1024> failure{};

  std::vector<std::unique_ptr<Block>> idle;     // to be used by the next block of that size
  std::vector<std::unique_ptr<Block>> retired;  // ThreadSanitizer: using it again would order the two blocks
};

Machine machine;
Thread main_thread;
Thread* current = &main_thread;
int shared_objects = 0;
std::string last_report;
std::vector<LaunchRecord> launch_records;
std::vector<Site> all_sites;
std::string dropped_file;
unsigned dropped_line = 0;
sigjmp_buf after_fault;

uint64_t draw() {  // xorshift64
  uint64_t& r = machine.random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return r >> 11;
}

// Not memset, which sanitizers watch.
void poison(char* p, size_t bytes) {
#ifdef BNFUSED_OWN_SWITCH
  asm volatile("rep stosb" : "+D"(p), "+c"(bytes) : "a"(kPoison) : "memory");
#else
  for (volatile char* q = p; q < p + bytes; ++q) *q = static_cast<char>(kPoison);
#endif
}

// ------------------------------------------------------------------------------------------- reports

// A location as "file.cuh:12"; several may be used in one printf.
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

// Ends the launch: it returns an error, and report() says this.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(machine.failure.data(), machine.failure.size(), format, arguments);
  va_end(arguments);
  if (current == &main_thread) {
    std::fprintf(stderr, "emulated device, outside a kernel: %s\n", machine.failure.data());
    std::abort();
  }
  Thread* from = current;
  current = &main_thread;
  switch_fiber(from->fiber, main_thread.fiber);
  std::abort();  // nobody switches to a thread of a failed launch
}

bool failed() { return machine.failure[0] != 0; }

unsigned block_number() { return current->block->number; }

std::string where_threads_are() {
  std::map<std::string, unsigned> counts;
  for (const auto& cluster : machine.live) {
    for (const Block* block : cluster->blocks) {
      for (const Thread& t : block->threads) {
        const std::string where = t.done ? "have exited"
                                  : t.waits_for
                                      ? std::string("wait in ") + t.waits_for + " at " + Place(t.waits_at).text
                                      : "can run";
        ++counts[where];
      }
    }
  }
  std::string text;
  for (const auto& [where, count] : counts) {
    text += (text.empty() ? "" : "; ") + std::to_string(count) + " threads " + where;
  }
  return text;
}

// ------------------------------------------------------------------------------------- which site is dropped

bool same_text(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

// Whether the barrier, fence or wait here is to do nothing; also keeps the list of those met.
bool dropped(Location at) {
  for (const Site& site : all_sites) {
    if (site.line == at.line() && site.file == at.file_name()) return site.dropped;
  }
  if (all_sites.size() == all_sites.capacity()) fail("more than %zu barriers and fences", all_sites.capacity());
  const bool drop = at.line() == dropped_line && same_text(Place::file_of(at.file_name()), dropped_file.c_str());
  all_sites.push_back({at.file_name(), at.line(), drop});
  return drop;
}

void choose_dropped_site() {
  const size_t colon = options.dropped_site.rfind(':');
  dropped_file = options.dropped_site.substr(0, colon);
  dropped_line =
      colon == std::string::npos ? 0 : static_cast<unsigned>(std::atoi(options.dropped_site.c_str() + colon + 1));
  for (Site& site : all_sites) site.dropped = site.line == dropped_line && Place::file_of(site.file) == dropped_file;
  constexpr size_t kMaxSites = 4096;
  all_sites.reserve(kMaxSites);
}

// ------------------------------------------------------------------------------------------- schedule

void make_runnable(Thread* thread) {
  Block& block = *thread->block;
  if (!block.runnable) {
    block.place = machine.with_runnable.size();
    machine.with_runnable.push_back(&block);
  }
  block.ring[(block.ring_head + block.runnable++) % block.ring.size()] = thread;
}

Block* choose_block() {
  Block* now = machine.current;
  const bool now_can_run = now && now->runnable;
  if (options.order == Order::kRandom) {
    const bool sticky = options.seed % 2 == 0;
    if (sticky && now_can_run && draw() % 64 != 0) return now;
    return machine.with_runnable[draw() % machine.with_runnable.size()];
  }
  if (now_can_run && !machine.rotate) return now;
  // The first block (the last, in reverse); after a spin the next one in turn, or the one waited for might never run.
  const auto key = [&](const Block* block) {
    if (machine.rotate && now) return block->number - now->number - 1;
    return options.order == Order::kReverse ? ~block->number : block->number;
  };
  Block* chosen = nullptr;
  for (Block* block : machine.with_runnable) {
    if (!chosen || key(block) < key(chosen)) chosen = block;
  }
  return chosen;
}

Thread* take_runnable() {
  if (machine.with_runnable.empty()) return nullptr;
  Block* block = machine.current = choose_block();
  machine.rotate = false;
  const auto place = [&](uint64_t i) -> Thread*& { return block->ring[(block->ring_head + i) % block->ring.size()]; };
  if (options.order == Order::kRandom) std::swap(place(0), place(draw() % block->runnable));
  Thread* thread = place(0);
  ++block->ring_head;
  if (--block->runnable == 0) {
    Block* moved = machine.with_runnable[block->place] = machine.with_runnable.back();
    moved->place = block->place;
    machine.with_runnable.pop_back();
  }
  return thread;
}

void switch_to(Thread* to) {
  Thread* from = current;
  if (to == from) return;
  current = to;
  ++machine.switches;
  machine.polls = 0;
  if (to->block) {
    threadIdx.x = to->index;
    blockIdx.x = to->block->number;
  }
  switch_fiber(from->fiber, to->fiber);
}

void run_next() {
  Thread* next = take_runnable();
  switch_to(next ? next : &main_thread);
}

void let_others_run() {
  make_runnable(current);
  run_next();
}

void let_another_block_run() {
  machine.rotate = true;
  let_others_run();
}

void count_spin() {
  if (++machine.spins <= kMaxSpins) return;
  const std::string where = where_threads_are();
  fail("livelock: thread %u of block %u spins and nothing moves: %s", current->index, block_number(), where.c_str());
}

void maybe_let_others_run() {
  if (options.order == Order::kRandom && draw() % 4 == 0) let_others_run();
}

void wait(const char* what, Location at) {
  current->waits_for = what;
  current->waits_at = at;
  run_next();
  current->waits_for = nullptr;
}

// ------------------------------------------------------------------------------------------- barriers

int arrive(Barrier& barrier, unsigned expected, int predicate, const char* what, Location at) {
  if (!barrier.arrived) {
    barrier.where = at;
    barrier.true_predicates = 0;
  } else if (at.line() != barrier.where.line() || !same_text(at.file_name(), barrier.where.file_name())) {
    fail("divergent %s: thread %u of block %u is at %s while others wait at %s", what, current->index, block_number(),
         Place(at).text, Place(barrier.where).text);
  }
  const unsigned parity = barrier.generation % 2;
  tsan_release(&barrier.order[parity]);
  barrier.true_predicates += predicate != 0;
  machine.spins = 0;
  if (++barrier.arrived == expected) {
    barrier.result[parity] = barrier.true_predicates;
    barrier.arrived = 0;
    ++barrier.generation;
    for (Thread *t = barrier.first, *next; t; t = next) {
      next = t->next_at_barrier;
      make_runnable(t);
    }
    barrier.first = barrier.last = nullptr;
  } else {
    current->next_at_barrier = nullptr;
    (barrier.last ? barrier.last->next_at_barrier : barrier.first) = current;
    barrier.last = current;
    wait(what, at);
  }
  tsan_acquire(&barrier.order[parity]);
  return barrier.result[parity];
}

void fail_if_some_exited(const Block& block, const Barrier& barrier) {
  if (barrier.arrived && block.threads_done && barrier.arrived + block.threads_done == block.size()) {
    fail("divergent __syncthreads: %u of %u threads of block %u have exited while the others wait at %s",
         block.threads_done, block.size(), block.number, Place(barrier.where).text);
  }
}

// ------------------------------------------------------------------------------------------- warps

const char* name_of(WarpOp op) {
  constexpr const char* kNames[] = {"__syncwarp",        "__shfl_sync",       "__shfl_up_sync",
                                    "__shfl_down_sync",  "__shfl_xor_sync",   "__ballot_sync",
                                    "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync"};
  return kNames[static_cast<int>(op)];
}

unsigned word_of(const LaneValue& value) {
  unsigned word;
  __builtin_memcpy(&word, &value, sizeof word);
  return word;
}

void fail_unless_same_call(const Thread& a, const Thread& b) {
  if (a.op == b.op && a.mask == b.mask) return;
  fail("warp mismatch in block %u: %s with mask %08x at %s, but %s with mask %08x at %s", a.block->number,
       name_of(a.op), a.mask, Place(a.waits_at).text, name_of(b.op), b.mask, Place(b.waits_at).text);
}

// The lane that `lane` reads from.
unsigned source_lane(const Thread& thread, unsigned lane) {
  const int width = thread.width, own = static_cast<int>(lane), segment = own & ~(width - 1);
  int source = own;
  switch (thread.op) {
    case WarpOp::kShuffle:
      return static_cast<unsigned>(segment + (thread.argument & (width - 1)));
    case WarpOp::kShuffleUp:
      source = own - thread.argument;
      break;
    case WarpOp::kShuffleDown:
      source = own + thread.argument;
      break;
    default:
      source = own ^ thread.argument;
  }
  return static_cast<unsigned>(source < segment || source >= segment + width ? own : source);
}

// If all living lanes of `mask` have come, gives each its result and lets those that wait go on.
bool complete(Warp& warp, unsigned mask, const Thread* last) {
  const unsigned lanes = mask & warp.alive;
  if ((warp.waiting & lanes) != lanes) return false;
  const Thread* first = nullptr;
  unsigned combined = 0;
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const Thread& t = *warp.lanes[lane];
    const unsigned word = word_of(t.value);
    if (first) fail_unless_same_call(*first, t);
    if (!first) {
      first = &t;
      combined = t.op == WarpOp::kBallot ? 0 : word;
    } else if (t.op == WarpOp::kAdd) {
      combined += word;
    } else if (t.op == WarpOp::kMin) {
      combined = std::min(combined, word);
    } else if (t.op == WarpOp::kMax) {
      combined = std::max(combined, word);
    }
    if (t.op == WarpOp::kBallot) combined |= word << lane;
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Thread& t = *warp.lanes[lane];
    const bool shuffles = t.op >= WarpOp::kShuffle && t.op <= WarpOp::kShuffleXor;
    if (!shuffles) {
      __builtin_memcpy(&t.result, &combined, sizeof combined);
    } else if (const unsigned source = source_lane(t, lane); lanes >> source & 1) {
      t.result = warp.lanes[source]->value;
    } else {
      for (unsigned char& byte : t.result.bytes) byte = kPoison;  // undefined on a device
    }
    if (&t != last) make_runnable(&t);
  }
  warp.waiting &= ~lanes;
  ++warp.generation;
  machine.spins = 0;
  return true;
}

// --------------------------------------------------------------------------------- asynchronous copies

void perform(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

bool copies_happen_at_once() { return options.order == Order::kRandom ? draw() % 2 == 0 : options.early_copies; }

// ------------------------------------------------------------------------------------------- threads

void thread_ends() {
  Thread& t = *current;
  Block& block = *t.block;
  Warp& warp = *t.warp;
  if (t.copies_in_flight) fail("thread %u of block %u exited with copies in flight", t.index, block.number);
  t.done = true;
  ++block.threads_done;
  ++block.cluster->threads_done;
  machine.spins = 0;
  warp.alive &= ~(1u << t.lane);
  tsan_release(&machine.end_order);
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (warp.waiting >> lane & 1) complete(warp, warp.lanes[lane]->mask, nullptr);
  }
  fail_if_some_exited(block, block.barrier);
  const bool cluster_ends = block.cluster->threads_done == block.size() * block.cluster->blocks.size();
  if (cluster_ends) {
    switch_to(&main_thread);
  } else {
    run_next();
  }
}

[[noreturn]] void run_threads() {
  entered(main_thread.fiber);
  for (;;) {  // the fiber is used again by the next block
    machine.body(machine.arguments);
    thread_ends();
  }
}

// -------------------------------------------------------------------------------------------- blocks

char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

std::unique_ptr<Block> make_block(unsigned threads) {
  for (auto& idle : machine.idle) {
    if (idle->size() != threads) continue;
    std::unique_ptr<Block> block = std::move(idle);
    idle = std::move(machine.idle.back());
    machine.idle.pop_back();
    return block;
  }
  auto block = std::make_unique<Block>(threads);
  block->ring.resize(threads);
  block->arena = map_pages(kArenaBytes);
  block->stack_bytes = under_asan() || under_tsan() ? kSanitizedStackBytes : kStackBytes;
  block->stacks = map_pages(block->stack_bytes * threads);
  for (unsigned i = 0; i < threads; ++i) {
    Thread& t = block->threads[i];
    char* stack = block->stacks + i * block->stack_bytes;
    mprotect(stack, kPage, PROT_NONE);  // an overflow faults
    t.fiber.stack = stack + kPage;
    t.fiber.stack_bytes = block->stack_bytes - kPage;
    prepare(t.fiber, run_threads);
    if (under_tsan()) t.fiber.tsan_fiber = __tsan_create_fiber(0);
  }
  return block;
}

void destroy(std::unique_ptr<Block> block) {
  const size_t stacks_bytes = block->stack_bytes * block->size();
  asan_allow(block->arena, kArenaBytes);
  asan_allow(block->stacks, stacks_bytes);
  for (Thread& t : block->threads) {
    if (t.fiber.tsan_fiber) __tsan_destroy_fiber(t.fiber.tsan_fiber);
    if (t.carrier) __tsan_destroy_fiber(t.carrier);
  }
  munmap(block->stacks, stacks_bytes);
  munmap(block->arena, kArenaBytes);
}

void start(Block& block, unsigned number) {
  block.number = number;
  block.threads_done = block.runnable = block.ring_head = 0;
  block.barrier = Barrier{};
  poison(block.arena, machine.arena_end);
  asan_forbid(block.arena, kArenaBytes);
  asan_allow(block.arena, machine.config.shared_bytes);
  for (const SharedPlace& place : machine.shared_places) asan_allow(block.arena + place.offset, place.bytes);
  for (Warp& warp : block.warps) warp = Warp{};
  // Shared memory full of them, each thread with its share.
  const size_t most_copies = std::max<size_t>(64, machine.config.shared_bytes / kCopyBytes / block.size());
  for (unsigned i = 0; i < block.size(); ++i) {
    Thread& t = block.threads[i];
    t.copies.resize(most_copies);
    t.index = i;
    t.lane = i % kWarpLanes;
    t.block = &block;
    t.warp = &block.warps[i / kWarpLanes];
    t.done = t.fenced = false;
    t.copies_in_flight = t.groups_committed = t.atomics_count = 0;
    t.warp->alive |= 1u << t.lane;
    t.warp->lanes[t.lane] = &t;
  }
  const bool reverse = options.order == Order::kReverse;
  for (unsigned i = 0; i < block.size(); ++i) make_runnable(&block.threads[reverse ? block.size() - 1 - i : i]);
}

void start_cluster(unsigned first_block) {
  auto cluster = std::make_unique<Cluster>();
  for (unsigned rank = 0; rank < machine.config.cluster; ++rank) {
    Block* block = make_block(machine.config.block).release();
    block->cluster = cluster.get();
    block->rank_in_cluster = rank;
    cluster->blocks.push_back(block);
    start(*block, first_block + rank);
  }
  machine.live.push_back(std::move(cluster));
}

// The red zones between shared objects still hold poison, or something was written outside its object.
void check_red_zones(const Block& block) {
  std::vector<SharedPlace> places{{0, machine.config.shared_bytes}};
  for (const SharedPlace& place : machine.shared_places) {
    if (place.bytes) places.push_back(place);
  }
  std::sort(places.begin(), places.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  asan_allow(block.arena, kArenaBytes);
  for (size_t i = 0; i < places.size(); ++i) {
    const size_t begin = places[i].offset + places[i].bytes;
    const size_t end = i + 1 < places.size() ? places[i + 1].offset : machine.arena_end;
    for (size_t p = begin; p < end; ++p) {
      if (static_cast<unsigned char>(block.arena[p]) == kPoison || failed()) continue;
      std::snprintf(machine.failure.data(), machine.failure.size(),
                    "block %u wrote byte %zu of a shared object of %zu bytes", block.number, p - places[i].offset,
                    places[i].bytes);
    }
  }
}

void retire_ended_clusters() {
  for (size_t i = 0; i < machine.live.size();) {
    Cluster& cluster = *machine.live[i];
    if (cluster.threads_done < cluster.blocks.size() * machine.config.block) {
      ++i;
      continue;
    }
    for (Block* block : cluster.blocks) {
      check_red_zones(*block);
      (under_tsan() ? machine.retired : machine.idle).emplace_back(block);
    }
    machine.live.erase(machine.live.begin() + static_cast<ptrdiff_t>(i));
  }
}

// ------------------------------------------------------------------------------------- memory faults

struct sigaction previous_segv, previous_bus;

void on_fault(int signal, siginfo_t* info, void*) {
  if (!machine.running || current == &main_thread) {  // not ours: fault again, into the handler that was there before
    sigaction(signal, signal == SIGBUS ? &previous_bus : &previous_segv, nullptr);
    return;
  }
  const auto* address = static_cast<const char*>(info->si_addr);
  const char* stack = current->fiber.stack;
  char what[256];
  if (address >= stack - kPage && address < stack) {
    std::snprintf(what, sizeof what, "overflow of its stack");
  } else {
    describe_address(address, what, sizeof what);
    if (!what[0]) std::snprintf(what, sizeof what, "address %p, which is in no buffer", info->si_addr);
  }
  std::snprintf(machine.failure.data(), machine.failure.size(), "out of bounds: thread %u of block %u accesses %s",
                current->index, block_number(), what);
  siglongjmp(after_fault, 1);
}

void catch_faults() {
  if (under_asan() || under_tsan()) return;  // they have handlers of their own
  thread_local char* alternate_stack = nullptr;
  if (!alternate_stack) {
    constexpr size_t kBytes = 64 * 1024;
    alternate_stack = map_pages(kBytes);
    stack_t stack{};
    stack.ss_sp = alternate_stack;
    stack.ss_size = kBytes;
    sigaltstack(&stack, nullptr);
  }
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    return true;
  }();
  (void)installed;
}

// ------------------------------------------------------------------------------------------- launches

std::string name_of_kernel(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel without a name";
  int status;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  name = name.substr(0, name.find_first_of("<("));
  name = name.substr(name.rfind(' ') + 1);  // the return type
  const size_t scope = name.rfind("::");
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

const char* invalid(const LaunchConfig& c) {
  if (!c.grid || !c.block || !c.cluster) return "a grid, block or cluster of none";
  if (c.block > kMaxThreadsPerBlock) return "more than 1024 threads a block";
  if (c.grid > 0x7fffffffu) return "more than 2^31 - 1 blocks";
  if (c.shared_bytes > kMaxSharedBytes) return "more than 227 KiB of shared memory";
  if (c.cluster > kMaxClusterBlocks || c.grid % c.cluster) return "a cluster of more than 16 blocks, or a part of one";
  return nullptr;
}

void record_launch(const void* kernel) {
  LaunchRecord record{name_of_kernel(kernel), machine.config, 0, machine.switches, {}};
  for (const SharedPlace& place : machine.shared_places) record.static_shared_bytes += place.bytes;
  for (const GuardedBuffer* buffer : buffers()) {
    const Traffic &read = buffer->read, &written = buffer->written;
    if (read.wide || read.narrow || written.wide || written.narrow) {
      record.buffers.push_back({buffer->name(), read, written});
    }
  }
  launch_records.push_back(std::move(record));
}

void reset_machine(const LaunchConfig& config, void (*body)(void*), void* arguments) {
  machine.config = config;
  machine.body = body;
  machine.arguments = arguments;
  machine.with_runnable.clear();
  machine.current = nullptr;
  machine.rotate = false;
  machine.grid_barrier = Barrier{};
  constexpr size_t kMaxObjects = 1024;
  machine.shared_places.assign(kMaxObjects, SharedPlace{});
  machine.shared_places.resize(static_cast<size_t>(shared_objects));
  machine.arena_end = config.shared_bytes + kRedZoneBytes;
  machine.random = options.seed * 0x9E3779B97F4A7C15u | 1;
  for (int i = 0; i < 8; ++i) draw();  // neighbouring seeds begin alike
  machine.switches = machine.spins = machine.polls = 0;
  machine.failure[0] = 0;
  blockDim = dim3(config.block);
  gridDim = dim3(config.grid);
  for (GuardedBuffer* buffer : buffers()) buffer->read = buffer->written = Traffic{};
}

// Blocks of the launch that are on the device at once.
unsigned room(const LaunchConfig& config) {
  const size_t by_shared = options.shared_per_sm / (config.shared_bytes + kReservedSharedBytes);
  const size_t blocks_per_sm = std::min<size_t>(kMaxThreadsPerSm / config.block, by_shared);
  return static_cast<unsigned>((options.sm_count - options.sms_taken) * blocks_per_sm);
}

std::vector<unsigned> first_blocks_of_clusters() {
  std::vector<unsigned> first;
  for (unsigned block = 0; block < machine.config.grid; block += machine.config.cluster) first.push_back(block);
  if (options.order == Order::kReverse) std::reverse(first.begin(), first.end());
  if (options.order == Order::kRandom) {
    for (size_t i = first.size(); i > 1; --i) std::swap(first[i - 1], first[draw() % i]);
  }
  return first;
}

void run_all_blocks(const std::vector<unsigned>& first_blocks, size_t resident_clusters) {
  static size_t started;  // static: it outlives siglongjmp
  started = 0;
  if (sigsetjmp(after_fault, 1)) return;
  while (!failed()) {
    while (machine.live.size() < resident_clusters && started < first_blocks.size()) {
      start_cluster(first_blocks[started++]);
    }
    if (Thread* next = take_runnable()) {
      switch_to(next);
      if (!failed()) retire_ended_clusters();
    } else if (machine.live.empty()) {
      return;
    } else {
      std::snprintf(machine.failure.data(), machine.failure.size(), "deadlock: %s", where_threads_are().c_str());
    }
  }
}

// After a failure threads are left in the middle of things: their blocks are not used again.
void abandon_blocks() {
  for (auto& cluster : machine.live) {
    for (Block* block : cluster->blocks) {
      for (Thread& t : block->threads) {  // joined, or ThreadSanitizer would take every later free for a race with it
        tsan_become(t.fiber.tsan_fiber);
        tsan_release(&machine.end_order);
        tsan_become(main_thread.fiber.tsan_fiber);
      }
    }
  }
  tsan_acquire(&machine.end_order);
  for (auto& cluster : machine.live) {
    for (Block* block : cluster->blocks) destroy(std::unique_ptr<Block>(block));
  }
  machine.live.clear();
}

}  // namespace

const std::vector<LaunchRecord>& launches() { return launch_records; }
void clear_launches() { launch_records.clear(); }
const std::string& report() { return last_report; }

std::vector<std::string> sites() {
  std::vector<std::string> names;
  for (const Site& site : all_sites) {
    std::string name = std::string(Place::file_of(site.file)) + ":" + std::to_string(site.line);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(std::move(name));
  }
  return names;
}

unsigned clusters_at_once(const LaunchConfig& config) { return room(config) / config.cluster; }

cudaError_t run(const LaunchConfig& asked, const void* kernel, void (*body)(void*), void* arguments) {
  LaunchConfig config = asked;
  if (options.hopes) config.cooperative = false, config.cluster = 1;
  last_report.clear();
  if (const char* why = invalid(config)) {
    last_report = "invalid launch of " + name_of_kernel(kernel) + ": " + why;
    return cudaErrorInvalidConfiguration;
  }
  if (config.cooperative && config.grid > room(config)) {
    last_report = "cooperative launch of " + std::to_string(config.grid) + " blocks on a device with room for " +
                  std::to_string(room(config));
    return cudaErrorCooperativeLaunchTooLarge;
  }
  if (config.cluster > 1 && clusters_at_once(config) == 0) {
    last_report = "clusters of " + std::to_string(config.cluster) + " blocks on a device with room for " +
                  std::to_string(room(config));
    return cudaErrorInvalidClusterSize;
  }
  choose_dropped_site();
  reset_machine(config, body, arguments);
  if (under_tsan()) main_thread.fiber.tsan_fiber = __tsan_get_current_fiber();
  catch_faults();

  const std::vector<unsigned> first_blocks = first_blocks_of_clusters();
  const size_t resident_clusters =
      config.cooperative ? first_blocks.size() : std::max(1u, options.resident_blocks / config.cluster);
  machine.with_runnable.reserve((resident_clusters + 1) * config.cluster);
  current = &main_thread;
  machine.running = true;
  run_all_blocks(first_blocks, resident_clusters);
  machine.running = false;
  current = &main_thread;
  abandon_blocks();
  for (auto& block : machine.retired) destroy(std::move(block));
  machine.retired.clear();

  last_report = machine.failure.data();
  if (last_report.empty()) last_report = damage_of_buffers();
  record_launch(kernel);
  if (last_report.empty()) return cudaSuccess;
  last_report = "in " + launch_records.back().kernel + ", " + last_report;
  return cudaErrorLaunchFailure;
}

// ------------------------------------------------------------------------- what kernels call, see the header

void* shared_object(SharedObject& object, size_t bytes, size_t alignment) {
  if (object.number < 0) object.number = shared_objects++;
  const auto number = static_cast<size_t>(object.number);
  auto& places = machine.shared_places;
  if (number >= places.size()) {
    if (number >= places.capacity()) fail("more than %zu shared objects", places.capacity());
    places.resize(number + 1);
  }
  if (!places[number].bytes) {  // the same place in every block; open at once in all, for remote writes may come first
    const size_t aligned = std::max<size_t>(alignment, 16);
    const size_t offset = (machine.arena_end + aligned - 1) / aligned * aligned;
    const size_t end = offset + bytes + kRedZoneBytes;
    size_t total = machine.config.shared_bytes + bytes;
    for (const SharedPlace& place : places) total += place.bytes;
    if (total > kMaxSharedBytes || end > kArenaBytes) {
      fail("%zu bytes of shared memory, a block has %zu", total, kMaxSharedBytes);
    }
    places[number] = {offset, bytes};
    for (const auto& cluster : machine.live) {
      for (Block* block : cluster->blocks) {
        poison(block->arena + machine.arena_end, end - machine.arena_end);
        asan_allow(block->arena + offset, bytes);
      }
    }
    machine.arena_end = end;
  }
  return current->block->arena + places[number].offset;
}

void* dynamic_shared() { return current->block->arena; }

int block_barrier(BarrierOp op, int predicate, Location at) {
  if (dropped(at)) return predicate;
  Block& block = *current->block;
  const unsigned size = block.size();
  if (block.threads_done) {
    fail("divergent __syncthreads at %s: %u of %u threads of block %u have exited", Place(at).text, block.threads_done,
         size, block.number);
  }
  const int count = arrive(block.barrier, size, predicate, "__syncthreads", at);
  if (op == BarrierOp::kAnd) return count == static_cast<int>(size);
  if (op == BarrierOp::kOr) return count > 0;
  return count;
}

void grid_barrier(Location at) {
  if (dropped(at)) return;
  if (!machine.config.cooperative) fail("grid sync at %s in a launch that is not cooperative", Place(at).text);
  arrive(machine.grid_barrier, machine.config.grid * machine.config.block, 0, "grid sync", at);
}

void cluster_barrier(unsigned blocks, Location at) {
  if (dropped(at)) return;
  Cluster& cluster = *current->block->cluster;
  if (blocks != cluster.blocks.size()) {
    fail("cluster sync at %s of %u blocks, in a cluster of %zu", Place(at).text, blocks, cluster.blocks.size());
  }
  arrive(cluster.barrier, blocks * machine.config.block, 0, "cluster sync", at);
}

unsigned cluster_rank() { return current->block->rank_in_cluster; }
unsigned cluster_size() { return static_cast<unsigned>(current->block->cluster->blocks.size()); }

void* shared_of_rank(const void* p, unsigned rank, Location at) {
  const ptrdiff_t offset = static_cast<const char*>(p) - current->block->arena;
  const auto& blocks = current->block->cluster->blocks;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(kArenaBytes)) {
    fail("map_shared_rank at %s: the address is not in shared memory of block %u", Place(at).text, block_number());
  }
  if (rank >= blocks.size()) fail("map_shared_rank at %s: rank %u of %zu", Place(at).text, rank, blocks.size());
  if (blocks[rank]->threads_done == blocks[rank]->size()) {
    fail("map_shared_rank at %s: the block of rank %u has exited", Place(at).text, rank);
  }
  return blocks[rank]->arena + offset;
}

LaneValue warp(WarpOp op, unsigned mask, const LaneValue& value, int argument, int width, Location at) {
  Thread& t = *current;
  Warp& warp = *t.warp;
  if (op == WarpOp::kSync && dropped(at)) return value;
  if (!(mask >> t.lane & 1))
    fail("%s at %s: mask %08x lacks its own lane %u", name_of(op), Place(at).text, mask, t.lane);
  t.op = op;
  t.mask = mask;
  t.value = value;
  t.argument = argument;
  t.width = width;
  t.waits_at = at;
  for (const Thread* other : warp.lanes) {
    const bool waits_for_me = other && (warp.waiting >> other->lane & 1) && (other->mask >> t.lane & 1);
    if (waits_for_me) fail_unless_same_call(*other, t);
  }
  char* order = &warp.order[warp.generation % warp.order.size()];
  if (op == WarpOp::kSync) tsan_release(order);  // no other intrinsic orders memory
  warp.waiting |= 1u << t.lane;
  if (!complete(warp, mask, &t)) wait(name_of(op), at);
  if (op == WarpOp::kSync) tsan_acquire(order);
  return t.result;
}

// ThreadSanitizer knows no fences. The pattern of an atomic between two fences is told to it as: the first publishes
// what the thread did before it with the next atomics, the second acquires what the atomics since the last fence saw.
void fence(Location at) {
  if (dropped(at)) return;
  Thread& t = *current;
  if (under_tsan()) {
    for (unsigned i = 0; i < std::min<size_t>(t.atomics_count, t.atomics.size()); ++i) {
      tsan_acquire(const_cast<void*>(t.atomics[i]));
    }
    t.atomics_count = 0;
    t.fenced = true;
    tsan_release(&t.fence_order);
  }
  maybe_let_others_run();
}

void before_atomic(const void* p, size_t bytes, Location at) {
  Thread& t = *current;
  const ptrdiff_t offset = static_cast<const char*>(p) - t.block->arena;
  const bool shared = offset >= 0 && offset < static_cast<ptrdiff_t>(kArenaBytes);
  if (!shared && !find_buffer(p, bytes)) {
    char what[256];
    describe_address(p, what, sizeof what);
    fail("out of bounds: thread %u of block %u has an atomic at %s on %s", t.index, t.block->number, Place(at).text,
         what[0] ? what : "an address that is in no buffer");
  }
  maybe_let_others_run();
  if (!under_tsan()) return;
  if (t.fenced) {  // not what the thread did since the fence: a carrier takes the clock of then to the atomic
    if (!t.carrier) {
      tsan_become(main_thread.fiber.tsan_fiber);
      t.carrier = __tsan_create_fiber(0);
    }
    tsan_become(t.carrier);
    tsan_acquire(&t.fence_order);
    tsan_release(const_cast<void*>(p));
    tsan_become(t.fiber.tsan_fiber);
  }
  t.atomics[t.atomics_count++ % t.atomics.size()] = p;
}

void after_atomic(bool changed) {
  if (changed) {
    machine.spins = machine.polls = 0;
    return;
  }
  count_spin();
  if (++machine.polls > kMaxPolls) let_another_block_run();  // a loop that waits without __nanosleep
}

void yield() {
  count_spin();
  let_another_block_run();
}

void access_global(const void* p, size_t bytes, bool write, Location at) {
  const char* verb = write ? "stores" : "loads";
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    char what[256];
    describe_address(p, what, sizeof what);
    fail("misaligned: thread %u of block %u %s %zu bytes at %s, %s", current->index, block_number(), verb, bytes,
         Place(at).text, what);
  }
  GuardedBuffer* buffer = find_buffer(p, bytes);
  if (!buffer) {
    char what[256];
    describe_address(p, what, sizeof what);
    fail("out of bounds: thread %u of block %u %s %zu bytes at %s, %s", current->index, block_number(), verb, bytes,
         Place(at).text, what[0] ? what : "an address that is in no buffer");
  }
  Traffic& traffic = write ? buffer->written : buffer->read;
  (bytes == 16 ? traffic.wide : traffic.narrow) += bytes;
}

void copy_async(void* shared, const void* global, size_t bytes, Location at) {
  access_global(global, bytes, false, at);
  if (reinterpret_cast<uintptr_t>(shared) % bytes) fail("misaligned: asynchronous copy at %s", Place(at).text);
  Thread& t = *current;
  const Copy copy{shared, global, bytes, t.groups_committed};
  if (copies_happen_at_once()) return perform(copy);
  if (t.copies_in_flight == t.copies.size()) fail("more than %zu copies of a thread in flight", t.copies.size());
  t.copies[t.copies_in_flight++] = copy;
  poison(static_cast<char*>(shared), bytes);  // what is there until the copy has ended is not to be read
}

void commit_copies() { ++current->groups_committed; }

void wait_for_copies(unsigned groups_left, Location at) {
  if (dropped(at)) return;
  Thread& t = *current;
  unsigned kept = 0;
  for (unsigned i = 0; i < t.copies_in_flight; ++i) {
    const Copy& copy = t.copies[i];
    if (copy.group + groups_left < t.groups_committed) {
      perform(copy);
    } else {
      t.copies[kept++] = copy;
    }
  }
  t.copies_in_flight = kept;
}

}  // namespace bnfused::emulator
