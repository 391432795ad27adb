// How a problem is cut into launches, blocks and threads: a pure function of the problem and the device's limits, so
// that it can be tested, and explained, without a GPU.
//
// Everything is counted in units: 8 consecutive values, one thread's share of one step (kernels/pack.cuh). Unit numbers
// fit 32 bits for all tensors that `fits` allows; offsets of values are 64 bits wide everywhere.
//
//   kSmall      one launch: a block has all values of its channels, sums them, and applies what follows from the sums,
//               reading again what it has just read (from the L1 or L2 cache)
//   kResident   one launch: the blocks that share a channel keep what they have read in shared memory, wait for one of
//               them to merge the partial sums in a fixed order, and apply; what does not fit they read again,
//               last-read first. What they keep of their next channel they read meanwhile. They exchange the sums
//               through memory, or, where they are a cluster, through their shared memory
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
  int compute_capability;     // 90 for sm_90
  int64_t shared_per_sm = 0;  // bytes of shared memory; 0 where it is not known, and nothing is kept on chip
  bool cooperative = true;    // blocks of a launch may wait for each other
  bool clusters = true;       // and reach each other's shared memory, if the compute capability has clusters
};

enum class Strategy : int32_t { kEmpty, kSmall, kStreaming, kApply, kReduce, kResident };

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

// What stays on chip between the two passes of kSmall and kResident, which are the same kernels. The blocks of a team
// share a tile of columns, or a channel, and take every teams-th of them; `parts` of Rows and Planes are the blocks of
// a team, one behind the other in the grid.
struct Residency {
  uint32_t teams;
  uint32_t cluster;      // blocks of a cluster: a team, or 1 where teams of several exchange their sums through memory
  uint32_t steps;        // units that a thread keeps: the first that it reads, for the last are those that caches have
  uint32_t ahead;        // the first of them, those of the next tile have room beside those of this one
  uint32_t keeps_bytes;  // dynamic shared memory that they take
  int64_t values = 0;    // of a tensor, that are kept

  constexpr uint32_t blocks(uint32_t parts) const { return teams * parts; }
};

// Moments of parts of a batch, merged: a block has a run of columns, and shares their parts out among its threads where
// there are more than one. Of no device: the order of the merge, and so every bit of what it gives, is the same on all.
struct Merge {
  uint32_t parts;
  uint32_t columns;  // the channels, and one of the counts alone
  uint32_t columns_per_block;
  uint32_t threads;

  constexpr uint32_t blocks() const { return (columns + columns_per_block - 1) / columns_per_block; }
};

struct LaunchPlan {
  Strategy strategy;
  Layout layout;
  bool wide;  // 16-byte accesses
  Rows reduce_rows{}, apply_rows{};
  Planes planes{};
  Flat flat{};
  Residency residency{};
  int64_t partials = 0;  // of a Moments or a GradSums each
  int64_t tickets = 0;   // counters that are 0 before and after; the last one of a forward counts the batch
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
  bool means = false;  // of g and of g * xhat are given, over a batch of which x is a part

  // Something that is written waits for sums over x.
  constexpr bool waits() const { return training && grad_x && !means; }
  constexpr bool sums() const { return grad_parameters || waits(); }
};

namespace detail {

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
constexpr uint64_t gcd(uint64_t a, uint64_t b) { return b == 0 ? a : gcd(b, a % b); }

constexpr uint32_t kUnitValues = 8;
constexpr uint32_t kThreads =
    256;  // of a block, at most: 255 registers each, and the merge fits 48 KiB of shared memory
// 40 KiB of constants at the most, of float64: within what any GPU gives a block.
constexpr uint32_t kTablePlanes = 1024;

// Thresholds of a model, not yet measured on a GPU. Launching a second kernel costs 2 to 3 us, in which one SM moves
// about 64 KiB; and a channel of up to 256 KiB is still in cache when its block reads it again.
constexpr int64_t kSmallBytes = 64 * 1024;
constexpr int64_t kCachedBytes = 256 * 1024;
// Blocks for each SM: two of 256 threads with 128 bytes in flight each cover the latency of the memory; a second round
// evens out the end.
constexpr uint32_t kReduceBlocksPerSm = 4;
constexpr uint32_t kApplyBlocksPerSm = 16;
constexpr uint32_t kMergeColumns = 32;  // of a block: a warp reads 256 bytes of a part in a row
constexpr uint32_t kRowsPerThread = 8;  // at least, so that the constants of 8 channels are worth their set-up

// Waiting through memory for the last block of a team costs about what a second launch does; each further wait in which
// nothing else can run has to save what a GPU's memory moves in 3 us. The barrier of a cluster is taken for free.
constexpr int64_t kWaitBytes = 8 * 1024 * 1024;

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
  const uint64_t steps = std::clamp<uint64_t>(ceil_div(fair, kThreads), 1, 8);
  f.units_per_block = uint32_t(std::min<uint64_t>(by_table, steps * kThreads));
  f.planes_per_block = uint32_t((uint64_t(f.units_per_block) * kUnitValues + f.inner - 2) / f.inner + 1);
  f.by_inner = divisor_of(f.inner);
  f.by_channels = divisor_of(f.channels);
  return f;
}

// Shared memory of a block of the kernels of kSmall and kResident, beside what they keep: what the device takes for
// itself; the merge of a sum of each thread, for each of a unit's values where those are different channels; and the
// constants of a tile's columns, or what is merged of them. The launchers check the first two against the kernels, and
// tests/cuda_build against the compiler's report.
constexpr int64_t kReservedShared = 1024;
constexpr int64_t kSharedOfColumn = 64;
constexpr int64_t static_shared(bool rows) { return (rows ? kUnitValues + 1 : 1) * (kThreads / 2) * 24 + 64; }
inline int64_t table_bytes(const Rows& s) { return int64_t(s.tile) * kUnitValues * kSharedOfColumn; }

// Blocks of the kernels of kResident on an SM, by their registers: what their launch bounds promise.
inline int resident_blocks_per_sm(DType t, bool rows) { return t == DType::kFloat64 || rows ? 1 : 2; }

// Tiles, or channels, to be shared out among blocks.
struct Tiles {
  uint32_t count;
  uint64_t length;      // units of a column
  uint32_t at_once;     // units of a column that a block reads in one step
  uint32_t threads;     // of a block
  uint64_t most_parts;  // of a tile: more would have too little to do
  bool together;        // no tile can be finished without the others
  int64_t unit_bytes;   // of the tensors that are kept, together
  int64_t other_shared;

  // Units that a thread can keep, of `on_sm` blocks on an SM.
  uint64_t steps(const DeviceLimits& device, int on_sm) const {
    const int64_t shared = device.shared_per_sm / on_sm - kReservedShared - other_shared;
    return uint64_t(std::max<int64_t>(0, shared) / (threads * unit_bytes));
  }
};

// The blocks, and what they keep.
struct Cut {
  Residency residency{};
  uint32_t parts = 0;
  uint64_t kept = 0;        // units of a column
  uint64_t most_steps = 0;  // that a thread could keep
  double busy = 0;          // of the blocks that there is room for, the share that has work, over all rounds
};

inline Cut cut_of(const Tiles& t, uint64_t blocks, uint64_t most_steps) {
  const uint64_t tiles = t.count, length = t.length;
  const uint64_t capacity = most_steps * t.at_once;
  const uint64_t needed = capacity * blocks < length ? blocks : std::max<uint64_t>(1, ceil_div(length, capacity));
  const uint64_t most = std::min(std::max(t.most_parts, needed), ceil_div(length, t.at_once));
  Cut c{};
  uint64_t teams = tiles;
  const auto parts_of = [&](uint64_t n) { return std::clamp<uint64_t>(blocks / n, 1, most); };
  if (!t.together) {
    // As many rounds as leave few blocks without work: the fewest of up to 16 that are within an eighth of the best.
    const uint64_t fewest = ceil_div(tiles, std::min(tiles, blocks / needed));
    uint64_t busy_best = 0;  // blocks, over all rounds; compared as a share
    uint64_t rounds_best = 1;
    for (uint64_t rounds = fewest; rounds <= std::clamp<uint64_t>(16, fewest, tiles); ++rounds) {
      const uint64_t n = ceil_div(tiles, rounds), busy = tiles * parts_of(n);
      if (8 * busy * rounds_best <= 9 * busy_best * rounds) continue;
      busy_best = busy;
      rounds_best = rounds;
      teams = n;
    }
  }
  c.parts = uint32_t(parts_of(teams));
  c.busy = double(tiles * c.parts) / double(ceil_div(tiles, teams) * blocks);
  c.residency.teams = uint32_t(c.parts == 1 ? tiles : teams);  // who waits for nobody needs no place beside the others
  c.residency.cluster = 1;
  c.residency.steps = uint32_t(std::min(most_steps, ceil_div(ceil_div(length, c.parts), t.at_once)));
  const uint64_t kept = uint64_t(c.residency.steps) * t.at_once, longer = length % c.parts, shorter = length / c.parts;
  c.kept = longer * std::min(kept, shorter + 1) + (c.parts - longer) * std::min(kept, shorter);
  return c;
}

// The best cut for `blocks_per_sm` blocks on an SM where all is kept, else for one, which leaves the most to keep.
inline Cut best_cut(const Tiles& t, const DeviceLimits& device, int blocks_per_sm) {
  Cut cut{};
  for (int on_sm = blocks_per_sm;; --on_sm) {
    const uint64_t steps = t.steps(device, on_sm);
    cut = cut_of(t, uint64_t(device.sm_count) * on_sm, steps);
    cut.most_steps = steps;
    if (cut.kept == t.length || on_sm == 1) return cut;
  }
}

// Of a cluster, in blocks: 8 wherever there are clusters, 16 on the GPUs of data centers.
inline uint32_t largest_cluster(const DeviceLimits& device) {
  if (!device.clusters || device.compute_capability < 90) return 1;
  return device.compute_capability < 110 ? 16 : 8;
}

// The blocks of a cluster are on the SMs of one GPC, which are these or some more: powers of two leave few of them
// without work. How many clusters really run at once, launch_resident asks the device.
constexpr uint32_t kSmsOfGpc = 16;

// Teams that are clusters and keep all of their tiles: as many on an SM, and then as few blocks in each, as leave few
// blocks without work, as in cut_of. None of it is busy where there is no such cluster.
inline Cut cut_in_clusters(const Tiles& t, const DeviceLimits& device, int blocks_per_sm) {
  Cut best{};
  if (t.together) return best;
  const uint64_t sms = device.sm_count;
  for (int on_sm = blocks_per_sm; on_sm >= 1; --on_sm) {
    const uint64_t steps = t.steps(device, on_sm), capacity = steps * t.at_once;
    const uint64_t places = (sms < kSmsOfGpc ? sms : sms / kSmsOfGpc * kSmsOfGpc) * on_sm;
    for (uint32_t cluster = 2; cluster <= std::min<uint64_t>(largest_cluster(device), places); cluster *= 2) {
      const uint32_t half = cluster / 2;
      const bool half_would_do = capacity * half >= t.length && half >= t.most_parts;
      if (capacity * cluster < t.length || half_would_do) continue;
      const uint64_t rounds = ceil_div(t.count, places / cluster);
      const double busy = double(uint64_t(t.count) * cluster) / double(rounds * sms * on_sm);
      if (8 * busy <= 9 * best.busy) continue;
      best.parts = cluster;
      best.kept = t.length;
      best.most_steps = steps;
      best.busy = busy;
      best.residency.teams = uint32_t(ceil_div(t.count, rounds));
      best.residency.cluster = cluster;
      best.residency.steps = uint32_t(ceil_div(ceil_div(t.length, cluster), t.at_once));
    }
  }
  return best;
}

// Why a block cannot have all values of its channels, or nullptr where it can.
inline const char* obstacle_to_small(const Problem& p, const Rows& rows, bool mask) {
  if (p.inner == 1) return rows.domains() == rows.tiles ? nullptr : "copies of a channel lie in several blocks";
  if (mask && p.inner % kUnitValues != 0) return "bytes of the mask are shared between channels";
  return nullptr;
}

// Why blocks cannot wait for each other and keep what they have read, or nullptr where they can.
inline const char* obstacle_to_resident(const Problem& p, const Rows& rows, bool mask, const DeviceLimits& device) {
  if (!device.cooperative) return "blocks of this device cannot wait for each other";
  if (p.inner > 1) return obstacle_to_small(p, rows, mask);
  if (rows.domains() == rows.tiles || rows.tiles <= uint32_t(device.sm_count)) return nullptr;
  return "copies of a channel lie in more blocks than can wait for each other";
}

struct Choice {
  bool small;
  const char* why;
  bool cached = false;  // small, as long as the cache keeps a channel
};

// Whether one launch, with a block for each channel or tile, is expected to be the faster way.
inline Choice prefers_small(const Problem& p, const Rows& rows, const DeviceLimits& device) {
  if (p.inner == 1) {
    const int64_t bytes = int64_t(rows.rows) * rows.tile * kUnitValues * size_of(p.dtype);
    if (bytes <= 2 * kSmallBytes) return {true, "the rows of a channel tile are few"};
    return {false, "the rows of a channel tile are too many for one block"};
  }
  const int64_t bytes = p.values_per_channel() * size_of(p.dtype);
  if (bytes <= kSmallBytes) return {true, "a channel is small"};
  if (bytes <= kCachedBytes && p.channels >= 2 * int64_t(device.sm_count)) {
    return {true, "a channel fits the cache, and the channels fill the device", true};
  }
  return {false, "a channel is too large for one block"};
}

// 64 bytes of each row that a block reads: the narrower a tile, the more of its rows stay on chip.
inline Rows resident_rows(const Problem& p) {
  return rows_of(p, std::max(1u, 64u / uint32_t(kUnitValues * size_of(p.dtype))), 1);
}

// Whether what clusters leave idle costs less than a wait through memory. An eighth of the blocks is not missed: the
// memory is the limit. `bytes`: what a call moves.
inline bool prefers_clusters(const Cut& clusters, const Cut& others, int64_t bytes) {
  const double missing = others.busy * 7 / 8 - clusters.busy;
  return clusters.busy > 0 && double(bytes) * missing <= double(kWaitBytes) * clusters.busy;
}

// `tensors`: how many a call reads a second time once the sums are known, and may keep.
inline LaunchPlan resident_plan(LaunchPlan plan, const Problem& p, int tensors, const DeviceLimits& device) {
  plan.strategy = Strategy::kResident;
  plan.launches = 1;
  const bool rows = p.inner == 1;
  const int blocks_per_sm = resident_blocks_per_sm(p.dtype, rows);
  Tiles t{};
  t.unit_bytes = tensors * kUnitValues * size_of(p.dtype);
  t.other_shared = static_shared(rows);
  if (rows) {
    const Rows& s = plan.reduce_rows = resident_rows(p);
    t.count = s.tiles;
    t.length = s.rows;
    t.at_once = s.lanes;
    t.threads = s.threads;
    t.together = s.domains() != s.tiles;
    t.other_shared += table_bytes(s);
  } else {
    Planes& s = plan.planes = planes_of(p, true, device);
    s.threads = uint32_t(std::min<uint64_t>(ceil_div(s.units_per_channel, 32) * 32, kThreads));
    t.count = s.channels;
    t.length = s.units_per_channel;
    t.at_once = t.threads = s.threads;
  }
  t.most_parts = ceil_div(t.length, uint64_t(t.at_once) * kRowsPerThread);

  Cut cut = best_cut(t, device, blocks_per_sm);
  if (cut.parts > 1) {
    const Cut in_clusters = cut_in_clusters(t, device, blocks_per_sm);
    if (prefers_clusters(in_clusters, cut, (tensors + 1) * p.numel() * size_of(p.dtype))) cut = in_clusters;
  }
  Residency& r = plan.residency = cut.residency;
  // Units of the next tile can be on their way before this one is finished: kHasCopiesAsync of the kernels.
  const bool fetches = plan.wide && device.compute_capability >= 80;
  r.ahead = fetches && r.teams < t.count ? std::min(r.steps, uint32_t(cut.most_steps) - r.steps) : 0;
  r.keeps_bytes = uint32_t((r.steps + r.ahead) * t.threads * t.unit_bytes);
  // Exact but where planes share units: there the units of a channel are taken to have as many values each.
  plan.residency.values = cut.kept == t.length ? p.numel() : p.numel() / int64_t(t.length) * int64_t(cut.kept);
  int64_t domains, columns;
  if (rows) {
    plan.reduce_rows.parts = cut.parts;
    domains = plan.reduce_rows.domains();
    columns = int64_t(plan.reduce_rows.columns) * kUnitValues;
  } else {
    plan.planes.parts = cut.parts;
    domains = columns = plan.planes.channels;
  }
  const bool through_memory = cut.parts > cut.residency.cluster || t.together;
  plan.partials = through_memory ? cut.parts * columns : 0;
  plan.tickets = through_memory ? 2 * domains + 1 : 1;
  plan.why = cut.residency.cluster > 1
                 ? "what is needed twice stays on chip, and the blocks that share a channel are a cluster"
             : cut.kept == t.length ? "what is needed twice stays on chip"
             : cut.kept > 0         ? "a part of what is needed twice stays on chip"
                                    : "nothing of what is needed twice fits on the chip";
  return plan;
}

// Whether keeping saves more than the waits cost. What fits entirely does: a tile has half of what the chip holds, or
// it leaves room for another team, which runs while this one waits. Of larger ones one after the other has the whole
// chip.
inline bool gains(const LaunchPlan& plan, const Problem& p, int tensors) {
  if (plan.residency.values == p.numel()) return true;
  const int64_t rounds = p.inner == 1 ? plan.reduce_rows.domains() : plan.planes.channels;
  return plan.residency.values * tensors * size_of(p.dtype) > (rounds - 1) * kWaitBytes;
}

// How the sums are taken. `waits`: something that is written waits for them; else one launch does, however it is cut.
inline void choose_reduce(LaunchPlan* plan, const Problem& p, bool mask, int tensors, const DeviceLimits& device,
                          bool waits, const Strategy* forced) {
  const bool rows = p.inner == 1;
  const Rows small_rows = rows ? rows_of(p, 4, 1) : Rows{};
  const char* const obstacle = obstacle_to_small(p, small_rows, mask);
  const Choice choice = obstacle ? Choice{false, obstacle}
                        : forced ? Choice{*forced == Strategy::kSmall, "it was asked for"}
                                 : prefers_small(p, small_rows, device);
  const bool may_keep = waits && !obstacle_to_resident(p, rows ? resident_rows(p) : Rows{}, mask, device);
  if (may_keep && (forced ? *forced == Strategy::kResident : !choice.small || choice.cached)) {
    const LaunchPlan resident = resident_plan(*plan, p, tensors, device);
    if (forced || gains(resident, p, tensors)) {
      *plan = resident;
      return;
    }
  }
  plan->why = choice.why;
  if (choice.small && waits) {
    plan->strategy = Strategy::kSmall;
    plan->launches = 1;
    plan->tickets = 1;
    if (rows) {
      plan->reduce_rows = small_rows;
      plan->reduce_rows.parts = 1;
      plan->residency.teams = small_rows.tiles;
    } else {
      plan->planes = planes_of(p, true, device);
      plan->residency.teams = plan->planes.channels;
    }
    plan->residency.cluster = 1;
    return;
  }
  plan->strategy = Strategy::kStreaming;
  plan->launches = 2;
  if (rows) {
    // 64 bytes at least of each row that a block reads: the narrower its tile, the more threads of the last block merge
    // the partial sums of a channel. Copies multiply those, so that fewer blocks write them.
    const uint32_t blocks = uint32_t(device.sm_count) * (small_rows.copies == 1 ? kReduceBlocksPerSm : 2);
    const Rows& r = plan->reduce_rows = rows_of(p, 4, blocks);
    plan->partials = int64_t(r.parts) * r.columns * kUnitValues;
    plan->tickets = r.domains() + 1;
  } else {
    const Planes& s = plan->planes = planes_of(p, false, device);
    plan->partials = int64_t(s.parts) * s.channels;
    plan->tickets = s.domains() + 1;
  }
}

inline void choose_apply(LaunchPlan* plan, const Problem& p, const DeviceLimits& device) {
  const uint32_t blocks = uint32_t(device.sm_count) * kApplyBlocksPerSm;
  if (p.inner == 1) {
    plan->apply_rows = rows_of(p, 32, blocks);
  } else {
    plan->flat = flat_of(p, device);
  }
}

inline LaunchPlan empty_plan(const Problem& p) {
  LaunchPlan plan{};
  plan.strategy = Strategy::kEmpty;
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.launches = 1;
  plan.why = "there are no values";
  return plan;
}

}  // namespace detail

// Whether unit numbers fit 32 bits, also of planes that share units: up to 2^34 values, 32 GiB of float16.
constexpr bool fits(const Problem& p) {
  const bool planes_fit = p.inner == 1 || p.outer * ((p.inner + 14) / detail::kUnitValues) < int64_t(1) << 32;
  return p.numel() <= int64_t(1) << 34 && p.channels < int64_t(1) << 31 && planes_fit;
}

inline LaunchPlan plan_train(const Problem& p, const Request& request, const DeviceLimits& device,
                             const Strategy* forced = nullptr) {
  if (p.numel() == 0) return detail::empty_plan(p);
  LaunchPlan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  detail::choose_reduce(&plan, p, request.mask, 1, device, true, forced);
  if (plan.strategy == Strategy::kStreaming) detail::choose_apply(&plan, p, device);
  const int64_t a = p.numel() * detail::size_of(p.dtype);
  plan.bytes_read = (2 + request.residual) * a - plan.residency.values * detail::size_of(p.dtype);
  plan.bytes_written = a + (request.mask ? (p.numel() + 7) / 8 : 0);
  return plan;
}

inline LaunchPlan plan_stats(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return detail::empty_plan(p);
  LaunchPlan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  detail::choose_reduce(&plan, p, false, 1, device, false, nullptr);
  plan.strategy = Strategy::kReduce;
  plan.launches = 1;
  plan.why = "only the sums are wanted";
  plan.bytes_read = p.numel() * detail::size_of(p.dtype);
  return plan;
}

constexpr Merge merge_of(int64_t parts, int64_t channels) {
  // Eight lanes of a block's columns at most.
  const auto lanes = std::clamp<int64_t>(parts, 1, detail::kThreads / detail::kMergeColumns);
  return {uint32_t(parts), uint32_t(channels) + 1, detail::kMergeColumns, uint32_t(lanes) * detail::kMergeColumns};
}

inline LaunchPlan plan_apply(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return detail::empty_plan(p);
  LaunchPlan plan{};
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

inline LaunchPlan plan_backward(const Problem& p, const BackwardRequest& request, const DeviceLimits& device,
                                const Strategy* forced = nullptr) {
  if (p.numel() == 0) return detail::empty_plan(p);
  LaunchPlan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  if (!request.sums()) {
    plan.strategy = Strategy::kApply;
    plan.launches = 1;
    plan.why = "nothing has to be summed";
    detail::choose_apply(&plan, p, device);
  } else {
    detail::choose_reduce(&plan, p, false, 2 + request.residual, device, request.waits(), forced);
    if (!request.waits()) {
      plan.strategy = Strategy::kReduce;
      plan.launches = 1;
      plan.why = "nothing that is written depends on the sums";
    } else if (plan.strategy == Strategy::kStreaming) {
      detail::choose_apply(&plan, p, device);
    }
  }
  if (plan.partials == 0) plan.tickets = 0;  // there is no batch to count
  const int64_t a = p.numel() * detail::size_of(p.dtype);
  const auto read = [&](int64_t values) {
    const int64_t units_of_mask = request.mask ? (values + detail::kUnitValues - 1) / detail::kUnitValues : 0;
    return (2 + request.residual) * values * detail::size_of(p.dtype) + units_of_mask;
  };
  plan.bytes_read = read(p.numel());
  const bool twice = plan.strategy != Strategy::kApply && plan.strategy != Strategy::kReduce;
  if (twice) plan.bytes_read += read(p.numel() - plan.residency.values);
  plan.bytes_written = (int(request.grad_x) + int(request.grad_residual)) * a;
  return plan;
}

}  // namespace bnfused
