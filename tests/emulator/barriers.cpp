// How threads wait for each other: barriers of blocks, clusters and the grid, warp intrinsics, fences.
#include <algorithm>
#include <cstdlib>

#include "machine.h"
#include "sanitizers.h"

namespace bnfused::emulator {
namespace {

struct Site {
  const char* file;
  unsigned line;
  bool dropped;
};

std::vector<Site> all_sites;
std::string dropped_file;
unsigned dropped_line = 0;

bool same_text(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

}  // namespace

// ------------------------------------------------------------------------------------- which site is dropped

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

std::vector<std::string> sites() {
  std::vector<std::string> names;
  for (const Site& site : all_sites) {
    std::string name = std::string(Place::file_of(site.file)) + ":" + std::to_string(site.line);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(std::move(name));
  }
  return names;
}

// ------------------------------------------------------------------------------------------- barriers

namespace {

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

}  // namespace

void fail_if_some_exited(const Block& block, const Barrier& barrier) {
  if (barrier.arrived && block.threads_done && barrier.arrived + block.threads_done == block.size()) {
    fail("divergent __syncthreads: %u of %u threads of block %u have exited while the others wait at %s",
         block.threads_done, block.size(), block.number, Place(barrier.where).text);
  }
}

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
  if (!machine.config.cooperative) fail("grid sync at %s, but the launch is not cooperative", Place(at).text);
  arrive(machine.grid_barrier, machine.config.grid * machine.config.block, 0, "grid sync", at);
}

void cluster_barrier(unsigned blocks, Location at) {
  if (dropped(at)) return;
  Cluster& cluster = *current->block->cluster;
  if (blocks != cluster.blocks.size()) {
    fail("cluster sync at %s for %u blocks, but the cluster has %zu", Place(at).text, blocks, cluster.blocks.size());
  }
  arrive(cluster.barrier, blocks * machine.config.block, 0, "cluster sync", at);
}

// ------------------------------------------------------------------------------------------- warps

namespace {

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

// The lane whose value a shuffle gives to `lane`.
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

}  // namespace

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
      for (unsigned char& byte : t.result.bytes) byte = kPoison;  // a device leaves the result undefined
    }
    if (&t != last) make_runnable(&t);
  }
  warp.waiting &= ~lanes;
  ++warp.generation;
  machine.spins = 0;
  return true;
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
  if (op == WarpOp::kSync) tsan_release(order);  // the other intrinsics do not order memory
  warp.waiting |= 1u << t.lane;
  if (!complete(warp, mask, &t)) wait(name_of(op), at);
  if (op == WarpOp::kSync) tsan_acquire(order);
  return t.result;
}

// ------------------------------------------------------------------------------------------- fences

// ThreadSanitizer does not know fences. An atomic between two fences is described to it in this way: the atomics after
// the first fence release what the thread did before that fence, and the second fence acquires what the atomics since
// the first one have seen.
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

}  // namespace bnfused::emulator
