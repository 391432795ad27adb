// The memory that kernels reach: global and shared memory, atomics, asynchronous copies. Also finds invalid accesses.
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <new>

#include "machine.h"
#include "sanitizers.h"

namespace bnfused::emulator {

char* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

// Does not call memset, because sanitizers intercept it.
void poison(char* p, size_t bytes) {
#ifdef BNFUSED_OWN_SWITCH
  asm volatile("rep stosb" : "+D"(p), "+c"(bytes) : "a"(kPoison) : "memory");
#else
  for (volatile char* q = p; q < p + bytes; ++q) *q = static_cast<char>(kPoison);
#endif
}

// ------------------------------------------------------------------------------------------- global memory

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

// ------------------------------------------------------------------------------------------- shared memory

void* shared_object(SharedObject& object, size_t bytes, size_t alignment) {
  if (object.number < 0) object.number = shared_objects++;
  const auto number = static_cast<size_t>(object.number);
  auto& places = machine.shared_places;
  if (number >= places.size()) {
    if (number >= places.capacity()) fail("more than %zu shared objects", places.capacity());
    places.resize(number + 1);
  }
  // An object has the same place in every block. It is made accessible in all live blocks at once, because a write from
  // another block of the cluster may come before the block's own first use.
  if (!places[number].bytes) {
    const size_t aligned = std::max<size_t>(alignment, 16);
    const size_t offset = (machine.arena_end + aligned - 1) / aligned * aligned;
    const size_t end = offset + bytes + kRedZoneBytes;
    size_t total = machine.config.shared_bytes + bytes;
    for (const SharedPlace& place : places) total += place.bytes;
    if (total > kMaxSharedBytes || end > kArenaBytes) {
      fail("%zu bytes of shared memory in a block, which has only %zu", total, kMaxSharedBytes);
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

// ------------------------------------------------------------------------------------------- atomics

namespace {

constexpr unsigned kMaxPolls = 1'000;  // after so many polls of one thread, another block has to run

}  // namespace

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
  // The atomic releases what the thread did before its last fence, and nothing later. So another fiber, the carrier,
  // acquires the state at the fence and releases it at the atomic.
  if (t.fenced) {
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
  if (++machine.polls > kMaxPolls) let_another_block_run();  // for loops that poll without __nanosleep
}

// --------------------------------------------------------------------------------- asynchronous copies

namespace {

void perform(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

bool copies_happen_at_once() { return options.order == Order::kRandom ? draw() % 2 == 0 : options.early_copies; }

}  // namespace

void copy_async(void* shared, const void* global, size_t bytes, Location at) {
  access_global(global, bytes, false, at);
  if (reinterpret_cast<uintptr_t>(shared) % bytes) fail("misaligned: asynchronous copy at %s", Place(at).text);
  Thread& t = *current;
  const Copy copy{shared, global, bytes, t.groups_committed};
  if (copies_happen_at_once()) return perform(copy);
  if (t.copies_in_flight == t.copies.size()) fail("more than %zu copies of a thread in flight", t.copies.size());
  t.copies[t.copies_in_flight++] = copy;
  poison(static_cast<char*>(shared), bytes);  // nobody may read it before the copy has ended
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

// ------------------------------------------------------------------------------------- memory faults

namespace {

struct sigaction previous_segv, previous_bus;

void on_fault(int signal, siginfo_t* info, void*) {
  if (!machine.running ||
      current == &main_thread) {  // no kernel caused it: after the return, the previous handler gets it
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

}  // namespace

void catch_faults() {
  if (under_asan() || under_tsan()) return;  // sanitizers have handlers of their own
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

}  // namespace bnfused::emulator
