// Small kernels, each with one fault that the emulator has to find, or without a fault, which it must accept.
//
//   faulty_kernels NAME [SITE]      runs kernel NAME under every schedule; drops barrier or fence SITE
//
// It prints one line for each schedule: "forward: right", "forward: wrong", or "forward: " and the emulator's report.
// Then it prints the sites, one line each. The names are in kCases, at the end.
#include <cooperative_groups.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "kernels/platform.cuh"
#include "schedules.h"

namespace faulty {  // a named namespace, because launches are recorded by their linker names

using namespace bnfused;
using emulator::GuardedBuffer;
using emulator::options;

enum class Fault {
  kNone,
  kNoBarrier,
  kNoSyncwarp,
  kReadPastEnd,
  kWritePastEnd,
  kPlainReadPastEnd,
  kSharedOverrun,
  kSharedNotInitialised,
  kMisaligned,
  kNoFence,
  kDivergentBarrier,
  kTicketNotReset,
  kNoGridSync,
  kNoClusterSync,
  kEarlyClusterExit,
  kNoCopyWait,
  kReadInFlight,
};

constexpr int kThreads = 64;

struct alignas(16) Four {
  float v[4];
};

// ------------------------------------------------------------------------------------------- kernels

// The sum of x over all blocks. The block that takes the last ticket adds the partial sums in order.
template <Fault F>
__global__ void sum(const float* x, int n, float* partials, unsigned* tickets, float* result) {
  BNFUSED_SHARED(float, of_warp, [kThreads / 32]);
  BNFUSED_SHARED(bool, last);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float s = 0;
  if (F == Fault::kMisaligned) {
    for (int i = (blockIdx.x * kThreads + threadIdx.x) * 4; i < n; i += gridDim.x * kThreads * 4) {
      const Four four = load_global(reinterpret_cast<const Four*>(x + i));
      s += four.v[0] + four.v[1] + four.v[2] + four.v[3];
    }
  } else {
    const int end = n + (F == Fault::kReadPastEnd || F == Fault::kPlainReadPastEnd ? 1 : 0);
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < end; i += gridDim.x * kThreads) {
      s += F == Fault::kPlainReadPastEnd ? x[i] : load_global(x + i);
    }
  }
  for (int lanes = 16; lanes; lanes /= 2) s += shuffle_xor(s, lanes);
  if (lane == 0 && !(F == Fault::kSharedNotInitialised && warp == 1)) of_warp[warp + (F == Fault::kSharedOverrun)] = s;
  if (F == Fault::kDivergentBarrier) {
    if (warp == 0) __syncthreads();
  } else if (F != Fault::kNoBarrier) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    float of_block = 0;
    for (float v : of_warp) of_block += v;
    store_global(partials + blockIdx.x + (F == Fault::kWritePastEnd), of_block);
    if (F != Fault::kNoFence) __threadfence();
    const unsigned ticket = F == Fault::kTicketNotReset ? atomicAdd(tickets, 1u) : atomicInc(tickets, gridDim.x - 1);
    last = ticket == gridDim.x - 1;
    if (F != Fault::kNoFence) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += load_from_other_block(partials + b);
  store_global(result, total);
}

// Within each block y[i] = x[n - 1 - i], through dynamic shared memory.
template <Fault F>
__global__ void reverse(const float* x, float* y) {
  BNFUSED_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = load_global(x + threadIdx.x);
  if (F != Fault::kNoBarrier) __syncthreads();
  store_global(y + threadIdx.x, tile[blockDim.x - 1 - threadIdx.x]);
}

// The same within a warp, whose threads do not run in step.
template <Fault F>
__global__ void reverse_in_warp(const float* x, float* y) {
  BNFUSED_SHARED(float, tile, [32]);
  tile[threadIdx.x] = load_global(x + threadIdx.x);
  if (F != Fault::kNoSyncwarp) __syncwarp();
  store_global(y + threadIdx.x, tile[31 - threadIdx.x]);
}

// Each block contributes a number and reads the sum of all. The launch is cooperative.
template <Fault F>
__global__ void sum_in_grid(float* numbers, float* sums) {
  if (threadIdx.x == 0) store_global(numbers + blockIdx.x, blockIdx.x + 1.0f);
  if (F != Fault::kNoGridSync) cooperative_groups::this_grid().sync();
  float s = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) s += load_from_other_block(numbers + b);
  if (threadIdx.x == 0) store_global(sums + blockIdx.x, s);
}

// The same among the blocks of a cluster, through their shared memory.
template <Fault F>
__global__ void sum_in_cluster(float* sums) {
  BNFUSED_SHARED(float, number);
  const auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) number = cluster.block_rank() + 1.0f;
  if (F != Fault::kNoClusterSync) cluster.sync();
  if (threadIdx.x == 0) {
    float s = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) s += *cluster.map_shared_rank(&number, rank);
    store_global(sums + blockIdx.x, s);
  }
  if (F != Fault::kEarlyClusterExit) cluster.sync();  // no block leaves while another reads its memory
}

// y = 2 x, tile after tile through two buffers. The next tile is copied while the current one is used.
template <Fault F>
__global__ void double_async(const float* x, float* y, int tiles) {
  BNFUSED_DYNAMIC_SHARED(float, buffers);
  constexpr int kTile = kThreads * 4;
  const auto fetch = [&](int t) {
    cp_async_16<false>(buffers + t % 2 * kTile + threadIdx.x * 4, x + t * kTile + threadIdx.x * 4);
    cp_async_commit();
  };
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) fetch(t + 1);
    if (t + 1 == tiles) {
      cp_async_wait<0>();
    } else if (F != Fault::kNoCopyWait) {
      cp_async_wait<1>();
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += kThreads) store_global(y + t * kTile + i, 2 * buffers[t % 2 * kTile + i]);
    __syncthreads();
  }
}

// The same, but each tile is copied twice into one buffer, which must not be read during the second copy.
template <Fault F>
__global__ void double_copied_again(const float* x, float* y, int tiles) {
  BNFUSED_DYNAMIC_SHARED(float, buffer);
  float* const own = buffer + threadIdx.x * 4;
  for (int t = 0; t < tiles; ++t) {
    const int at = (t * kThreads + threadIdx.x) * 4;
    for (int copy = 0; copy < 2; ++copy) {
      cp_async_16<false>(own, x + at);
      cp_async_commit();
      if (copy == 0 || F != Fault::kReadInFlight) cp_async_wait<0>();
    }
    for (int i = 0; i < 4; ++i) store_global(y + at + i, 2 * own[i]);
    if (F == Fault::kReadInFlight) cp_async_wait<0>();
  }
}

// Each block waits for the one before it, which is right only if all blocks are resident.
__global__ void chain(unsigned* flags, float* y) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x) {
    while (atomicAdd(flags + blockIdx.x - 1, 0u) == 0) __nanosleep(20);
  }
  __threadfence();
  store_global(y + blockIdx.x, blockIdx.x ? load_from_other_block(y + blockIdx.x - 1) + 1 : 1.0f);
  __threadfence();
  atomicAdd(flags + blockIdx.x, 1u);
}

// Blocks 0 and 1 each wait for the other's flag before they set their own.
__global__ void wait_for_each_other(unsigned* flags) {
  if (threadIdx.x != 0) return;
  while (atomicAdd(flags + (blockIdx.x + 1) % 2, 0u) == 0) {
  }
  atomicAdd(flags + blockIdx.x, 1u);
}

// The two halves of a warp call with different masks.
__global__ void different_masks(float* y) {
  float v = threadIdx.x;
  v = threadIdx.x < 16 ? __shfl_xor_sync(0xffffffffu, v, 1) : __shfl_xor_sync(0xffff0000u, v, 1);
  store_global(y + threadIdx.x, v);
}
// Only half of the lanes in the mask make the call.
__global__ void half_warp(float* y) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  __syncwarp();
  store_global(y + threadIdx.x, v);
}
// A lane calls with a mask that does not have its own bit.
__global__ void mask_without_self(float* y) {
  float v = threadIdx.x;
  v = __shfl_xor_sync(0x0000ffffu, v, 1);
  store_global(y + threadIdx.x, v);
}
// A lane outside of the mask is read, which is undefined.
__global__ void read_inactive_lane(float* y) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0x0000ffffu, v, 16);
  store_global(y + threadIdx.x, v);
}

// Half of a warp waits in a shuffle, the other half at the block's barrier.
__global__ void shuffle_during_barrier(float* y) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  if (threadIdx.x >= 16) __syncthreads();
  store_global(y + threadIdx.x, v);
}

// Calls every collective once and compares it with its definition.
__global__ void collectives(int* wrong) {
  const unsigned t = threadIdx.x, lane = t % 32, full = ~0u;
  bool ok = __ballot_sync(full, lane % 3 == 0) == 0x49249249u;
  ok &= __any_sync(full, lane == 31) && !__any_sync(full, 0) && __all_sync(full, 1) && !__all_sync(full, lane != 7);
  ok &= __shfl_sync(full, t, 5) == t / 32 * 32 + 5 && __shfl_sync(full, t, 1, 8) == t / 8 * 8 + 1;
  ok &= __shfl_up_sync(full, t, 3) == (lane < 3 ? t : t - 3) && __shfl_down_sync(full, t, 3) == (lane > 28 ? t : t + 3);
  ok &= __shfl_xor_sync(full, t, 9) == (t ^ 9) && shuffle_xor(double{1.0 * t}, 4) == (t ^ 4);
  ok &= __reduce_add_sync(full, lane) == 496 && __reduce_max_sync(full, lane) == 31;
  ok &= __reduce_min_sync(full, lane + 5) == 5;
  ok &= __syncthreads_count(t < 10) == 10 && __syncthreads_and(1) && !__syncthreads_and(t != 3);
  ok &= __syncthreads_or(t == 3) && !__syncthreads_or(0);
  if (!ok) atomicAdd(wrong, 1);
}

// y = x, 16 bytes at a time, and the remaining values one by one.
__global__ void copy(const float* x, float* y, int n) {
  const int wide = n / 4 * 4, step = gridDim.x * kThreads, first = blockIdx.x * kThreads + threadIdx.x;
  for (int i = first * 4; i < wide; i += step * 4) {
    store_global(reinterpret_cast<Four*>(y + i), load_global(reinterpret_cast<const Four*>(x + i)));
  }
  for (int i = wide + first; i < n; i += step) store_global(y + i, load_global(x + i));
}

// ------------------------------------------------------------------------------------------- cases

bool launched(cudaError_t error) { return error == cudaSuccess; }

struct Floats : GuardedBuffer {
  Floats(const char* name, int n, size_t phase = 0) : GuardedBuffer(name, n * sizeof(float), phase), n(n) {}
  float& operator[](int i) { return data<float>()[i]; }
  int n;
};

void count_up(Floats& x) {
  for (int i = 0; i < x.n; ++i) x[i] = static_cast<float>(i + 1);
}

template <Fault F>
bool run_sum() {
  constexpr unsigned kBlocks = 3;
  constexpr int kCount = 300;
  Floats x("x", kCount, F == Fault::kMisaligned ? 4 : 0), partials("partials", kBlocks), result("result", 1);
  GuardedBuffer tickets("tickets", sizeof(unsigned));
  count_up(x);
  *tickets.data<unsigned>() = 0;
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second launch uses the state that the first one left
    result[0] = -1;
    if (!launched(launch({kBlocks, kThreads}, sum<F>, x.data<float>(), kCount, partials.data<float>(),
                         tickets.data<unsigned>(), result.data<float>()))) {
      return false;
    }
    if (result[0] != kCount * (kCount + 1) / 2) return false;
  }
  return true;
}

template <Fault F>
bool run_reverse() {
  Floats x("x", kThreads), y("y", kThreads);
  count_up(x);
  const LaunchConfig config{1, kThreads, kThreads * sizeof(float)};
  if (!launched(launch(config, reverse<F>, x.data<float>(), y.data<float>()))) return false;
  for (int i = 0; i < kThreads; ++i) {
    if (y[i] != x[kThreads - 1 - i]) return false;
  }
  return true;
}

template <Fault F>
bool run_reverse_in_warp() {
  Floats x("x", 32), y("y", 32);
  count_up(x);
  if (!launched(launch({1, 32}, reverse_in_warp<F>, x.data<float>(), y.data<float>()))) return false;
  for (int i = 0; i < 32; ++i) {
    if (y[i] != x[31 - i]) return false;
  }
  return true;
}

bool all_are(Floats& y, float expected) {
  for (int i = 0; i < y.n; ++i) {
    if (y[i] != expected) return false;
  }
  return true;
}

template <Fault F>
bool run_sum_in_grid() {
  constexpr int kBlocks = 5;
  Floats numbers("numbers", kBlocks), sums("sums", kBlocks);
  const LaunchConfig config{kBlocks, 32, 0, nullptr, true};
  if (!launched(launch(config, sum_in_grid<F>, numbers.data<float>(), sums.data<float>()))) return false;
  return all_are(sums, kBlocks * (kBlocks + 1) / 2);
}

template <Fault F>
bool run_sum_in_cluster() {
  constexpr int kBlocks = 4;
  Floats sums("sums", 2 * kBlocks);
  const LaunchConfig config{2 * kBlocks, 32, 0, nullptr, false, kBlocks};
  if (!launched(launch(config, sum_in_cluster<F>, sums.data<float>()))) return false;
  return all_are(sums, kBlocks * (kBlocks + 1) / 2);
}

bool run_staged(void (*kernel)(const float*, float*, int)) {
  constexpr int kTiles = 5;
  Floats x("x", kTiles * kThreads * 4), y("y", kTiles * kThreads * 4);
  count_up(x);
  const LaunchConfig config{1, kThreads, 2 * kThreads * 4 * sizeof(float)};
  if (!launched(launch(config, kernel, x.data<float>(), y.data<float>(), kTiles))) return false;
  for (int i = 0; i < x.n; ++i) {
    if (y[i] != 2 * x[i]) return false;
  }
  return true;
}

bool run_chain(bool cooperative) {
  constexpr int kBlocks = 6;
  GuardedBuffer flags("flags", kBlocks * sizeof(unsigned));
  Floats y("y", kBlocks);
  for (int i = 0; i < kBlocks; ++i) flags.data<unsigned>()[i] = 0;
  const LaunchConfig config{kBlocks, 32, 0, nullptr, cooperative};
  if (!launched(launch(config, chain, flags.data<unsigned>(), y.data<float>()))) return false;
  for (int i = 0; i < kBlocks; ++i) {
    if (y[i] != static_cast<float>(i + 1)) return false;
  }
  return true;
}

bool run_wait_for_each_other() {
  GuardedBuffer flags("flags", 2 * sizeof(unsigned));
  flags.data<unsigned>()[0] = flags.data<unsigned>()[1] = 0;
  return launched(launch({2, 32, 0, nullptr, true}, wait_for_each_other, flags.data<unsigned>()));
}

bool run_warp(void (*kernel)(float*)) {
  Floats y("y", 32);
  if (!launched(launch({1, 32}, kernel, y.data<float>()))) return false;
  for (int i = 0; i < 32; ++i) {
    if (!(y[i] == y[i])) return false;
  }
  return true;
}

bool run_collectives() {
  GuardedBuffer wrong("wrong", sizeof(int));
  *wrong.data<int>() = 0;
  return launched(launch({2, kThreads}, collectives, wrong.data<int>())) && *wrong.data<int>() == 0;
}

bool run_copy() {
  constexpr int kCount = 1003;
  Floats x("x", kCount), y("y", kCount);
  count_up(x);
  emulator::clear_launches();
  if (!launched(launch({2, kThreads}, copy, x.data<float>(), y.data<float>(), kCount))) return false;
  const auto& record = emulator::launches().back();
  if (record.kernel != "copy" || record.config.grid != 2 || record.buffers.size() != 2) return false;
  constexpr uint64_t kWide = kCount / 4 * 16, kNarrow = kCount % 4 * 4;
  for (const auto& b : record.buffers) {
    const auto &used = b.buffer == "x" ? b.read : b.written, &unused = b.buffer == "x" ? b.written : b.read;
    if (used.wide != kWide || used.narrow != kNarrow || unused.wide || unused.narrow) return false;
  }
  return true;
}

bool run_too_large() {
  Floats numbers("numbers", 1);
  const LaunchConfig config{options.sm_count * 64 + 1, 32, 0, nullptr, true};
  return launched(launch(config, sum_in_grid<Fault::kNone>, numbers.data<float>(), numbers.data<float>()));
}

struct Case {
  const char* name;
  std::function<bool()> run;
};

const Case kCases[] = {
    {"sum", run_sum<Fault::kNone>},
    {"sum_no_barrier", run_sum<Fault::kNoBarrier>},
    {"sum_read_past_end", run_sum<Fault::kReadPastEnd>},
    {"sum_plain_read_past_end", run_sum<Fault::kPlainReadPastEnd>},
    {"sum_write_past_end", run_sum<Fault::kWritePastEnd>},
    {"sum_shared_overrun", run_sum<Fault::kSharedOverrun>},
    {"sum_shared_not_initialised", run_sum<Fault::kSharedNotInitialised>},
    {"sum_misaligned", run_sum<Fault::kMisaligned>},
    {"sum_no_fence", run_sum<Fault::kNoFence>},
    {"sum_divergent_barrier", run_sum<Fault::kDivergentBarrier>},
    {"sum_ticket_not_reset", run_sum<Fault::kTicketNotReset>},
    {"reverse", run_reverse<Fault::kNone>},
    {"reverse_no_barrier", run_reverse<Fault::kNoBarrier>},
    {"reverse_in_warp", run_reverse_in_warp<Fault::kNone>},
    {"reverse_in_warp_no_syncwarp", run_reverse_in_warp<Fault::kNoSyncwarp>},
    {"grid", run_sum_in_grid<Fault::kNone>},
    {"grid_no_sync", run_sum_in_grid<Fault::kNoGridSync>},
    {"grid_too_large", run_too_large},
    {"cluster", run_sum_in_cluster<Fault::kNone>},
    {"cluster_no_sync", run_sum_in_cluster<Fault::kNoClusterSync>},
    {"cluster_early_exit", run_sum_in_cluster<Fault::kEarlyClusterExit>},
    {"async", [] { return run_staged(double_async<Fault::kNone>); }},
    {"async_no_wait", [] { return run_staged(double_async<Fault::kNoCopyWait>); }},
    {"async_again", [] { return run_staged(double_copied_again<Fault::kNone>); }},
    {"async_read_in_flight", [] { return run_staged(double_copied_again<Fault::kReadInFlight>); }},
    {"chain", [] { return run_chain(true); }},
    {"chain_not_resident", [] { return run_chain(false); }},
    {"wait_for_each_other", run_wait_for_each_other},
    {"different_masks", [] { return run_warp(different_masks); }},
    {"half_warp", [] { return run_warp(half_warp); }},
    {"mask_without_self", [] { return run_warp(mask_without_self); }},
    {"read_inactive_lane", [] { return run_warp(read_inactive_lane); }},
    {"shuffle_during_barrier", [] { return run_warp(shuffle_during_barrier); }},
    {"collectives", run_collectives},
    {"copy", run_copy},
};

}  // namespace faulty

int main(int count, char** arguments) {
  using namespace faulty;
  if (count > 2) options.dropped_site = arguments[2];
  for (const Case& c : kCases) {
    if (count < 2 || std::string(c.name) != arguments[1]) continue;
    for (const emulator::Schedule& schedule : emulator::kSchedules) {
      schedule.choose();
      const bool right = c.run();
      const std::string& report = emulator::report();
      std::printf("%s: %s\n", schedule.name, right ? "right" : report.empty() ? "wrong" : report.c_str());
    }
    for (const std::string& site : emulator::sites()) std::printf("site %s\n", site.c_str());
    return 0;
  }
  std::fprintf(stderr, "faulty_kernels: expected the name of a case\n");
  return 2;
}
