// How a problem is cut into launches, blocks and threads: a pure function of the problem and the device's limits, so
// that it can be tested, and explained, without a GPU.
//
// Everything is counted in units: 8 consecutive values, one thread's share of one step (kernels/pack.cuh). Unit numbers
// fit 32 bits for all tensors that `fits` allows; offsets of values are 64 bits wide everywhere.
//
//   kSmall      one launch: a block has all values of its channels, sums them, and applies what follows from the sums,
//               reading again what it has just read (from the L1 or L2 cache)
//   kStreaming  two launches: the values of a channel are split over blocks, the last of which merges the partial sums
//               in a fixed order; the second launch applies, last-read first
//   kApply      one launch: nothing to sum (eval; the gradient of x under given statistics)
//   kReduce     one launch that only sums, or sums and writes what does not depend on the sums
//   kEmpty      no values: a launch that counts the batch and clears what it returns
#pragma once
#include <algorithm>

#include "batch_norm.h"

namespace bnfused {

struct DeviceLimits {
  int sm_count;
  int compute_capability;  // 90 for sm_90
};

enum class Strategy : int32_t { kEmpty, kSmall, kStreaming, kApply, kReduce };
enum class Layout : int32_t { kRows, kPlanes };

// A number known to the host by which a GPU divides, as a multiplication: kernels/layout.cuh.
struct Divisor {
  uint64_t value = 1, multiplier = ~uint64_t(0);  // floor((2^64 - 1) / value)
};

constexpr Divisor divisor_of(uint64_t value) { return {value, ~uint64_t(0) / value}; }

// Channels innermost: (N, C), channels_last. C need not be a multiple of 8: memory is read as rows of lcm(C, 8)
// columns, in which each channel occurs `copies` times, so that a thread keeps its channels from row to row.
struct Rows {
  uint32_t channels, copies;
  uint32_t columns;  // units in a row
  uint32_t rows;     // the last may have fewer units
  uint32_t tile;     // columns of a block
  uint32_t tiles;
  uint32_t lanes;  // rows that a block reads at once
  uint32_t parts;  // blocks that share a tile
  uint32_t threads;

  constexpr uint32_t blocks() const { return tiles * parts; }
  // Blocks whose partial sums are merged together, by the last of them: those of a tile, or all where copies of a
  // channel lie in several tiles.
  constexpr uint32_t domains() const { return copies > 1 ? 1 : tiles; }
};

// A channel is `outer` planes of `inner` values; a plane touches up to `units_per_plane` units, the outermost of which
// it may share with its neighbours.
struct Planes {
  uint32_t channels, outer;
  uint64_t inner;
  uint32_t units_per_plane, units_per_channel;
  Divisor by_units;
  uint32_t parts;  // blocks that share a channel
  uint32_t threads;

  constexpr uint32_t blocks() const { return channels * parts; }
  constexpr uint32_t domains() const { return channels; }
};

// A tensor of planes in memory order: a block has a run of units, whatever planes they are of.
struct Flat {
  uint64_t inner;
  uint32_t channels;
  uint32_t units, units_per_block;
  uint32_t planes_per_block;  // at most: what the table of constants must hold
  Divisor by_inner, by_channels;
  uint32_t threads;

  constexpr uint32_t blocks() const { return (units + units_per_block - 1) / units_per_block; }
};

struct Plan {
  Strategy strategy;
  Layout layout;
  bool wide;  // 16-byte accesses
  Rows reduce_rows{}, apply_rows{};
  Planes planes{};
  Flat flat{};
  int64_t partials = 0;  // of a Moments or a GradSums each
  int64_t tickets = 0;   // counters that are 0 before and after
  int launches = 0;
  int64_t bytes_read = 0, bytes_written = 0;  // of tensors, not of per-channel values
  const char* why = "";
};

// What a call does beside the problem itself.
struct Request {
  bool wide = true;  // all tensors start at a multiple of 16 bytes
  bool residual = false;
  bool mask = false;
};
struct BackwardRequest {
  bool wide = true;
  bool residual = false;  // read again to recompute the activation's argument
  bool mask = false;
  bool training = true;
  bool grad_x = true, grad_residual = false, grad_parameters = true;

  constexpr bool sums() const { return grad_parameters || (training && grad_x); }
};

namespace detail {

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
constexpr uint64_t gcd(uint64_t a, uint64_t b) { return b == 0 ? a : gcd(b, a % b); }

constexpr uint32_t kUnitValues = 8;
constexpr uint32_t kThreads =
    256;  // of a block, at most: 255 registers each, and the merge's shared memory fits 48 KiB
constexpr uint32_t kTablePlanes =
    1024;  // 40 KiB of constants at the most, of float64: within what any GPU gives a block

// Thresholds of a model, not yet measured on a GPU. Launching a second kernel costs 2 to 3 us, in which one SM moves
// about 64 KiB; and a channel of up to 256 KiB is still in cache when its block reads it again.
constexpr int64_t kSmallBytes = 64 * 1024;
constexpr int64_t kCachedBytes = 256 * 1024;
// Blocks for each SM: two of 256 threads with 128 bytes in flight each cover the latency of the memory; a second round
// evens out the end.
constexpr uint32_t kReduceBlocksPerSm = 4;
constexpr uint32_t kApplyBlocksPerSm = 16;
constexpr uint32_t kRowsPerThread = 8;  // at least, so that the constants of 8 channels are worth their set-up

inline int64_t size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// `blocks`: how many are wanted over all tiles.
inline Rows rows_of(const Problem& p, uint32_t widest_tile, uint32_t blocks) {
  Rows r{};
  const uint64_t units = ceil_div(p.numel(), kUnitValues);
  r.channels = uint32_t(p.channels);
  r.copies = uint32_t(kUnitValues / gcd(p.channels, kUnitValues));
  r.columns = uint32_t(uint64_t(p.channels) * r.copies / kUnitValues);
  r.rows = uint32_t(ceil_div(units, r.columns));
  // Copies of a channel are best merged within a block; beyond 64 columns that would leave too few rows to a block.
  const uint32_t wanted = r.copies > 1 ? std::max(widest_tile, std::min(r.columns, 64u)) : widest_tile;
  r.tiles = uint32_t(ceil_div(r.columns, wanted));
  r.tile = uint32_t(ceil_div(r.columns, r.tiles));
  r.tiles = uint32_t(ceil_div(r.columns, r.tile));
  r.lanes = uint32_t(std::min<uint64_t>(kThreads / r.tile, r.rows));
  const uint64_t most = ceil_div(r.rows, uint64_t(r.lanes) * kRowsPerThread);
  r.parts = uint32_t(std::clamp<uint64_t>(ceil_div(blocks, r.tiles), 1, most));
  r.threads = uint32_t(ceil_div(uint64_t(r.tile) * r.lanes, 32) * 32);
  return r;
}

inline Planes planes_of(const Problem& p, bool one_part, const DeviceLimits& device) {
  Planes s{};
  s.channels = uint32_t(p.channels);
  s.outer = uint32_t(p.outer);
  s.inner = uint64_t(p.inner);
  s.units_per_plane = uint32_t(p.inner % kUnitValues == 0 ? p.inner / kUnitValues : (p.inner + 14) / kUnitValues);
  s.units_per_channel = s.units_per_plane * s.outer;
  s.by_units = divisor_of(s.units_per_plane);
  const uint64_t wanted = ceil_div(uint64_t(device.sm_count) * kReduceBlocksPerSm, s.channels);
  const uint64_t most = ceil_div(s.units_per_channel, uint64_t(kThreads) * kRowsPerThread);
  s.parts = one_part ? 1 : uint32_t(std::clamp<uint64_t>(wanted, 1, most));
  const uint64_t threads = ceil_div(ceil_div(s.units_per_channel, s.parts), 4);  // 4 units each, where there are few
  s.threads = uint32_t(std::clamp<uint64_t>(ceil_div(threads, 32) * 32, 32, kThreads));
  return s;
}

inline Flat flat_of(const Problem& p, const DeviceLimits& device) {
  Flat f{};
  f.inner = uint64_t(p.inner);
  f.channels = uint32_t(p.channels);
  f.units = uint32_t(ceil_div(p.numel(), kUnitValues));
  f.threads = kThreads;
  const uint64_t fair = ceil_div(f.units, uint64_t(device.sm_count) * kApplyBlocksPerSm);
  const uint64_t by_table = std::max<uint64_t>(1, (kTablePlanes - 2) * f.inner / kUnitValues);
  f.units_per_block = uint32_t(std::min<uint64_t>(by_table, std::clamp<uint64_t>(fair, kThreads, 8 * kThreads)));
  f.planes_per_block = uint32_t((uint64_t(f.units_per_block) * kUnitValues + f.inner - 2) / f.inner + 1);
  f.by_inner = divisor_of(f.inner);
  f.by_channels = divisor_of(f.channels);
  return f;
}

// One launch for sums and what follows from them, if a block can have all of a channel.
inline bool is_small(const Problem& p, const Rows& rows, const Planes& planes, bool mask, const DeviceLimits& device,
                     const char** why) {
  if (p.inner == 1) {
    if (rows.domains() != rows.tiles) {
      *why = "copies of a channel lie in several blocks";
      return false;
    }
    const int64_t bytes = int64_t(rows.rows) * rows.tile * kUnitValues * size_of(p.dtype);
    *why = bytes <= 2 * kSmallBytes ? "the rows of a channel tile are few" : "the rows of a channel tile are many";
    return bytes <= 2 * kSmallBytes;
  }
  if (mask && p.inner % kUnitValues != 0) {
    *why = "bytes of the mask are shared between channels";
    return false;
  }
  const int64_t bytes = p.rows() * size_of(p.dtype);
  if (bytes <= kSmallBytes) {
    *why = "a channel is small";
    return true;
  }
  if (bytes <= kCachedBytes && int64_t(planes.channels) >= 2 * int64_t(device.sm_count)) {
    *why = "a channel fits the cache, and the channels fill the device";
    return true;
  }
  *why = "a channel is too large for one block";
  return false;
}

inline void choose_reduce(Plan* plan, const Problem& p, bool mask, const DeviceLimits& device, bool may_be_small,
                          const Strategy* forced) {
  const uint32_t blocks = uint32_t(device.sm_count) * kReduceBlocksPerSm;
  // 64 bytes at least of each row that a block reads, and few enough columns that many rows fit a block.
  plan->reduce_rows = p.inner == 1 ? rows_of(p, 8, blocks) : Rows{};
  plan->planes = p.inner == 1 ? Planes{} : planes_of(p, false, device);
  Rows small_rows = p.inner == 1 ? rows_of(p, 4, 1) : Rows{};
  bool small = is_small(p, small_rows, plan->planes, mask, device, &plan->why);
  const bool possible = p.inner == 1 ? small_rows.domains() == small_rows.tiles : !(mask && p.inner % kUnitValues != 0);
  if (forced && *forced == Strategy::kSmall) small = possible;
  if (forced && *forced == Strategy::kStreaming) small = false;
  if (forced) plan->why = "it was asked for";
  if (!may_be_small) small = false;
  if (small) {
    plan->strategy = Strategy::kSmall;
    if (p.inner == 1) {
      small_rows.parts = 1;
      plan->reduce_rows = small_rows;
    } else {
      plan->planes = planes_of(p, true, device);
    }
    plan->tickets = 1;
    plan->launches = 1;
    return;
  }
  plan->strategy = Strategy::kStreaming;
  plan->launches = 2;
  if (p.inner == 1) {
    const Rows& r = plan->reduce_rows;
    plan->partials = int64_t(r.parts) * r.columns * kUnitValues;
    plan->tickets = r.domains() + 1;
  } else {
    const Planes& s = plan->planes;
    plan->partials = int64_t(s.parts) * s.channels;
    plan->tickets = s.domains() + 1;
  }
}

inline void choose_apply(Plan* plan, const Problem& p, const DeviceLimits& device) {
  const uint32_t blocks = uint32_t(device.sm_count) * kApplyBlocksPerSm;
  if (p.inner == 1) {
    plan->apply_rows = rows_of(p, 32, blocks);
  } else {
    plan->flat = flat_of(p, device);
  }
}

inline Plan empty_plan(const Problem& p) {
  Plan plan{};
  plan.strategy = Strategy::kEmpty;
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.launches = 1;
  plan.why = "there are no values";
  return plan;
}

}  // namespace detail

// Whether unit numbers fit 32 bits: up to 2^34 values, 32 GiB of float16.
constexpr bool fits(const Problem& p) {
  return p.numel() <= int64_t(1) << 34 && p.channels < int64_t(1) << 31 &&
         p.outer * (p.inner / detail::kUnitValues + 2) < int64_t(1) << 32;
}

inline Plan plan_train(const Problem& p, const Request& request, const DeviceLimits& device,
                       const Strategy* forced = nullptr) {
  if (p.numel() == 0) return detail::empty_plan(p);
  Plan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  detail::choose_reduce(&plan, p, request.mask, device, true, forced);
  if (plan.strategy == Strategy::kStreaming) detail::choose_apply(&plan, p, device);
  const int64_t a = p.numel() * detail::size_of(p.dtype);
  plan.bytes_read = (2 + request.residual) * a;
  plan.bytes_written = a + (request.mask ? (p.numel() + 7) / 8 : 0);
  return plan;
}

inline Plan plan_eval(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return detail::empty_plan(p);
  Plan plan{};
  plan.strategy = Strategy::kApply;
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  plan.launches = 1;
  plan.why = "the statistics are given";
  detail::choose_apply(&plan, p, device);
  const int64_t a = p.numel() * detail::size_of(p.dtype);
  plan.bytes_read = (1 + request.residual) * a;
  plan.bytes_written = a + (request.mask ? (p.numel() + 7) / 8 : 0);
  return plan;
}

inline Plan plan_backward(const Problem& p, const BackwardRequest& request, const DeviceLimits& device,
                          const Strategy* forced = nullptr) {
  if (p.numel() == 0) return detail::empty_plan(p);
  Plan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  const bool after_sums = request.training && request.grad_x;  // something waits for the sums
  if (!request.sums()) {
    plan.strategy = Strategy::kApply;
    plan.launches = 1;
    plan.why = "nothing has to be summed";
    detail::choose_apply(&plan, p, device);
  } else {
    detail::choose_reduce(&plan, p, false, device, after_sums, forced);
    if (!after_sums) {
      plan.strategy = Strategy::kReduce;
      plan.launches = 1;
      plan.why = "nothing that is written depends on the sums";
    } else if (plan.strategy == Strategy::kStreaming) {
      detail::choose_apply(&plan, p, device);
    }
  }
  const int64_t a = p.numel() * detail::size_of(p.dtype);
  const int64_t once = (2 + request.residual) * a + (request.mask ? (p.numel() + 7) / 8 : 0);
  const bool twice = plan.strategy == Strategy::kSmall || plan.strategy == Strategy::kStreaming;
  plan.bytes_read = twice ? 2 * once : once;
  plan.bytes_written = (int(request.grad_x) + int(request.grad_residual)) * a;
  return plan;
}

}  // namespace bnfused
