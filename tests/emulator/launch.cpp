// Starts and ends what runs: threads, blocks, clusters, launches.
#include <sys/mman.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <utility>

#include "machine.h"
#include "sanitizers.h"

namespace bnfused::emulator {

Options options;
Machine machine;
Thread main_thread;
Thread* current = &main_thread;
int shared_objects = 0;
sigjmp_buf after_fault;

namespace {

constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxThreadsPerSm = 2048;
constexpr unsigned kMaxClusterBlocks = 16;
constexpr size_t kReservedSharedBytes = 1024;  // the device reserves this much for each block
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSanitizedStackBytes = 256 * 1024;  // sanitizers need larger frames

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
  for (;;) {  // the next block uses the fiber again
    machine.body(machine.arguments);
    thread_ends();
  }
}

// -------------------------------------------------------------------------------------------- blocks

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
    mprotect(stack, kPage, PROT_NONE);  // so that an overflow of the stack faults
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
  // Enough for the thread's share of copies that fill the whole shared memory.
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

// ------------------------------------------------------------------------------------------- launches

const char* invalid(const LaunchConfig& c) {
  if (!c.grid || !c.block || !c.cluster) return "a grid, block or cluster has size 0";
  if (c.block > kMaxThreadsPerBlock) return "a block has more than 1024 threads";
  if (c.grid > 0x7fffffffu) return "the grid has more than 2^31 - 1 blocks";
  if (c.shared_bytes > kMaxSharedBytes) return "a block has more than 227 KiB of shared memory";
  if (c.cluster > kMaxClusterBlocks || c.grid % c.cluster) return "a cluster has more than 16 blocks, or is not whole";
  return nullptr;
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
  for (int i = 0; i < 8; ++i) draw();  // the first values of neighbouring seeds are similar
  machine.switches = machine.spins = machine.polls = 0;
  machine.failure[0] = 0;
  blockDim = dim3(config.block);
  gridDim = dim3(config.grid);
  for (GuardedBuffer* buffer : buffers()) buffer->read = buffer->written = Traffic{};
}

// How many blocks of the launch the device has room for at once.
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
  static size_t started;  // static, so that siglongjmp does not lose its value
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

// After a failure threads have stopped in the middle of the kernel, so their blocks cannot be used again.
void abandon_blocks() {
  for (auto& cluster : machine.live) {
    for (Block* block : cluster->blocks) {
      // Each thread is ordered before this one. Otherwise ThreadSanitizer would report every later free as a race.
      for (Thread& t : block->threads) {
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
  last_report = "in " + launches().back().kernel + ", " + last_report;
  return cudaErrorLaunchFailure;
}

}  // namespace bnfused::emulator
