// Which thread runs next, and how it gets the CPU.
#include <utility>

#include "machine.h"

namespace bnfused::emulator {
namespace {

constexpr uint64_t kMaxSpins = 1'000'000;  // more are a livelock

Block* choose_block() {
  Block* now = machine.current;
  const bool now_can_run = now && now->runnable;
  if (options.order == Order::kRandom) {
    const bool sticky = options.seed % 2 == 0;
    if (sticky && now_can_run && draw() % 64 != 0) return now;
    return machine.with_runnable[draw() % machine.with_runnable.size()];
  }
  if (now_can_run && !machine.rotate) return now;
  // The first block runs, or the last one in reverse order. After a spin it is the next block in turn: otherwise the
  // block that the spinning thread waits for might never run.
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

void let_others_run() {
  make_runnable(current);
  run_next();
}

}  // namespace

void make_runnable(Thread* thread) {
  Block& block = *thread->block;
  if (!block.runnable) {
    block.place = machine.with_runnable.size();
    machine.with_runnable.push_back(&block);
  }
  block.ring[(block.ring_head + block.runnable++) % block.ring.size()] = thread;
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

void yield() {
  count_spin();
  let_another_block_run();
}

}  // namespace bnfused::emulator
