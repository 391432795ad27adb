// How kResident cuts a problem: what its blocks keep on chip, how many share a channel, and whether that is faster.
#pragma once
#include <algorithm>

#include "plan_shapes.h"

namespace bnfused::planning {

// Shared memory that a block of kSmall or kResident needs in addition to what it keeps: what the device reserves, the
// static objects for merging the threads' sums, and for rows a table for the columns of a tile, which has the merged
// sums and then the constants. The launchers check the size of the table, tests/cuda_build the other two.
constexpr int64_t kReservedShared = 1024;
constexpr int64_t kSharedOfColumn = 64;
constexpr int64_t static_shared(bool rows) { return (rows ? kUnit + 1 : 1) * (kMaxThreads / 2) * 24 + 64; }
inline int64_t table_bytes(const Rows& s) { return int64_t(s.tile) * kUnit * kSharedOfColumn; }

// How many blocks of kResident fit an SM by their registers. The launch bounds of the kernels promise it.
inline int resident_blocks_per_sm(DType t, bool rows) { return t == DType::kFloat64 || rows ? 1 : 2; }

// The tiles, or channels, that the blocks share.
struct Tiles {
  uint32_t count;
  uint64_t length;       // units of a column
  uint32_t at_once;      // units of a column that a block reads in one step
  uint32_t threads;      // of a block
  uint64_t most_parts;   // of a tile; with more, a part would have too little to do
  bool merge_all_tiles;  // no tile can be finished without the others
  int64_t unit_bytes;    // of one unit of all tensors that are kept
  int64_t other_shared;  // bytes

  // How many units a thread can keep, if an SM has `on_sm` blocks.
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
  uint64_t most_steps = 0;  // how many units a thread could keep
  double busy = 0;          // the share of the possible blocks that has work, over all rounds
};

inline Cut cut_of(const Tiles& t, uint64_t blocks, uint64_t most_steps) {
  const uint64_t tiles = t.count, length = t.length, capacity = most_steps * t.at_once;
  const uint64_t needed = capacity * blocks < length ? blocks : std::max<uint64_t>(1, ceil_div(length, capacity));
  const uint64_t most = std::min(std::max(t.most_parts, needed), ceil_div(length, t.at_once));
  uint64_t teams = tiles;
  const auto parts_of = [&](uint64_t n) { return std::clamp<uint64_t>(blocks / n, 1, most); };
  if (!t.merge_all_tiles) {
    // Takes the fewest rounds, of up to 16, that keep nearly as many blocks busy as the best: within an eighth.
    const uint64_t fewest = ceil_div(tiles, std::min(tiles, blocks / needed));
    uint64_t busy_best = 0, rounds_best = 1;  // busy: blocks, summed over all rounds
    for (uint64_t rounds = fewest; rounds <= std::clamp<uint64_t>(16, fewest, tiles); ++rounds) {
      const uint64_t n = ceil_div(tiles, rounds), busy = tiles * parts_of(n);
      if (8 * busy * rounds_best <= 9 * busy_best * rounds) continue;
      busy_best = busy;
      rounds_best = rounds;
      teams = n;
    }
  }
  Cut c{};
  c.most_steps = most_steps;
  c.parts = uint32_t(parts_of(teams));
  c.busy = double(tiles * c.parts) / double(ceil_div(tiles, teams) * blocks);
  c.residency.teams = uint32_t(c.parts == 1 ? tiles : teams);  // teams of one block need not run at the same time
  c.residency.steps = uint32_t(std::min(most_steps, ceil_div(ceil_div(length, c.parts), t.at_once)));
  const uint64_t kept = uint64_t(c.residency.steps) * t.at_once, longer = length % c.parts, shorter = length / c.parts;
  c.kept = longer * std::min(kept, shorter + 1) + (c.parts - longer) * std::min(kept, shorter);
  return c;
}

// The best cut for as many blocks on an SM as can keep everything. If none can, the cut for one block, which keeps most.
inline Cut best_cut(const Tiles& t, const DeviceLimits& device, int blocks_per_sm) {
  for (int on_sm = blocks_per_sm;; --on_sm) {
    const Cut cut = cut_of(t, uint64_t(device.sm_count) * on_sm, t.steps(device, on_sm));
    if (cut.kept == t.length || on_sm == 1) return cut;
  }
}

// The largest cluster, in blocks. Every GPU with clusters allows 8, and the GPUs for data centers allow 16.
inline uint32_t largest_cluster(const DeviceLimits& device) {
  if (!device.clusters || device.compute_capability < 90) return 1;
  return device.compute_capability < 110 ? 16 : 8;
}

// The blocks of a cluster run on the SMs of one GPC, which has at least this many. If the size of the cluster is a power
// of two, few SMs stay without work. launch_resident asks the device how many clusters run at once.
constexpr uint32_t kSmsOfGpc = 16;

// The cut into teams that are clusters and keep whole tiles. It prefers more blocks on an SM, then fewer blocks in a
// cluster, as long as few blocks stay without work, as in cut_of. If there is no such cluster, `busy` is 0.
inline Cut cut_in_clusters(const Tiles& t, const DeviceLimits& device, int blocks_per_sm) {
  Cut best{};
  if (t.merge_all_tiles) return best;
  const uint64_t sms = device.sm_count;
  for (int on_sm = blocks_per_sm; on_sm >= 1; --on_sm) {
    const uint64_t steps = t.steps(device, on_sm), capacity = steps * t.at_once;
    const uint64_t places = (sms < kSmsOfGpc ? sms : sms / kSmsOfGpc * kSmsOfGpc) * on_sm;
    for (uint32_t cluster = 2; cluster <= std::min<uint64_t>(largest_cluster(device), places); cluster *= 2) {
      const bool half_would_do = capacity * (cluster / 2) >= t.length && cluster / 2 >= t.most_parts;
      if (capacity * cluster < t.length || half_would_do) continue;
      const uint64_t rounds = ceil_div(t.count, places / cluster);
      const double busy = double(uint64_t(t.count) * cluster) / double(rounds * sms * on_sm);
      if (8 * busy <= 9 * best.busy) continue;
      const auto teams = uint32_t(ceil_div(t.count, rounds));
      const auto steps_used = uint32_t(ceil_div(ceil_div(t.length, cluster), t.at_once));
      best = {{teams, cluster, steps_used, 0, 0}, cluster, t.length, steps, busy};
    }
  }
  return best;
}

// Why a block cannot have all values of its channels, or nullptr if it can.
inline const char* obstacle_to_small(const Problem& p, const Rows& rows, bool mask) {
  if (p.inner == 1) return rows.domains() == rows.tiles ? nullptr : "copies of a channel lie in several blocks";
  if (mask && p.inner % kUnit != 0) return "bytes of the mask are shared between channels";
  return nullptr;
}

// Why blocks cannot wait for each other and keep what they have read, or nullptr if they can.
inline const char* obstacle_to_resident(const Problem& p, const Rows& rows, bool mask, const DeviceLimits& device) {
  if (!device.cooperative) return "blocks of this device cannot wait for each other";
  if (p.inner > 1) return obstacle_to_small(p, rows, mask);
  if (rows.domains() == rows.tiles || rows.tiles <= uint32_t(device.sm_count)) return nullptr;
  return "copies of a channel lie in more blocks than can wait for each other";
}

struct Choice {
  bool small;
  const char* why;
  bool cached = false;  // small is only the faster way as long as the cache keeps a channel
};

// Whether one launch, with a block for each channel or tile, should be the faster way.
inline Choice prefers_small(const Problem& p, const Rows& rows, const DeviceLimits& device) {
  if (p.inner == 1) {
    const bool few = int64_t(rows.rows) * rows.tile * kUnit * size_of(p.dtype) <= 2 * kSmallBytes;
    return {few, few ? "the rows of a channel tile are few" : "the rows of a channel tile are too many for one block"};
  }
  const int64_t bytes = p.values_per_channel() * size_of(p.dtype);
  if (bytes <= kSmallBytes) return {true, "a channel is small"};
  if (bytes <= kCachedBytes && p.channels >= 2 * int64_t(device.sm_count)) {
    return {true, "a channel fits the cache, and the channels fill the device", true};
  }
  return {false, "a channel is too large for one block"};
}

// A block reads 64 bytes of each row, because more rows of a narrow tile stay on chip.
inline Rows resident_rows(const Problem& p) {
  return cut_rows(p, std::max(1u, 64u / uint32_t(kUnit * size_of(p.dtype))), 1);
}

// Whether the blocks that clusters leave idle cost less than a wait through memory. An eighth of the blocks is not
// missed, because the memory is the limit. A call moves `bytes`.
inline bool prefers_clusters(const Cut& clusters, const Cut& others, int64_t bytes) {
  const double missing = others.busy * 7 / 8 - clusters.busy;
  return clusters.busy > 0 && double(bytes) * missing <= double(kWaitBytes) * clusters.busy;
}

// `tensors` is how many tensors a call reads again after the sums are known. These may be kept.
inline LaunchPlan resident_plan(LaunchPlan plan, const Problem& p, int tensors, const DeviceLimits& device) {
  plan.strategy = Strategy::kResident;
  const bool rows = p.inner == 1;
  Tiles t{};
  t.unit_bytes = tensors * kUnit * size_of(p.dtype);
  t.other_shared = static_shared(rows);
  if (rows) {
    const Rows& s = plan.reduce_rows = resident_rows(p);
    t.count = s.tiles;
    t.length = s.rows;
    t.at_once = s.row_slots;
    t.threads = s.threads;
    t.merge_all_tiles = s.domains() != s.tiles;
    t.other_shared += table_bytes(s);
  } else {
    Planes& s = plan.planes = cut_planes(p, true, device);
    s.threads = uint32_t(std::min<uint64_t>(ceil_div(s.units_per_channel, 32) * 32, kMaxThreads));
    t.count = s.channels;
    t.length = s.units_per_channel;
    t.at_once = t.threads = s.threads;
  }
  t.most_parts = ceil_div(t.length, uint64_t(t.at_once) * kRowsPerThread);

  const int blocks_per_sm = resident_blocks_per_sm(p.dtype, rows);
  Cut cut = best_cut(t, device, blocks_per_sm);
  if (cut.parts > 1) {
    const Cut in_clusters = cut_in_clusters(t, device, blocks_per_sm);
    if (prefers_clusters(in_clusters, cut, (tensors + 1) * bytes_of(p))) cut = in_clusters;
  }
  Residency& r = plan.residency = cut.residency;
  // Units of the next tile can be fetched before this one is finished, if the kernels have kHasCopiesAsync.
  const bool fetches = plan.wide && device.compute_capability >= 80;
  r.ahead = fetches && r.teams < t.count ? std::min(r.steps, uint32_t(cut.most_steps) - r.steps) : 0;
  r.keeps_bytes = uint32_t((r.steps + r.ahead) * t.threads * t.unit_bytes);
  // If planes share units, this is not exact: it counts the same number of values for each unit of a channel.
  r.values = cut.kept == t.length ? p.numel() : p.numel() / int64_t(t.length) * int64_t(cut.kept);
  (rows ? plan.reduce_rows.parts : plan.planes.parts) = cut.parts;
  const int64_t columns = rows ? int64_t(plan.reduce_rows.columns) * kUnit : plan.planes.channels;
  const int64_t domains = rows ? plan.reduce_rows.domains() : plan.planes.channels;
  const bool through_memory = cut.parts > r.cluster || t.merge_all_tiles;
  plan.partials = through_memory ? cut.parts * columns : 0;
  plan.tickets = through_memory ? 2 * domains + 1 : 1;
  plan.why = r.cluster > 1 ? "what is needed twice stays on chip, and the blocks that share a channel are a cluster"
             : cut.kept == t.length ? "what is needed twice stays on chip"
             : cut.kept > 0         ? "a part of what is needed twice stays on chip"
                                    : "nothing of what is needed twice fits on the chip";
  return plan;
}

// Whether keeping saves more than the waits cost. It does if everything fits: then another team has room, and runs while
// this one waits. Otherwise a single tile takes the whole chip, and each tile has a wait of its own.
inline bool gains(const LaunchPlan& plan, const Problem& p, int tensors) {
  if (plan.residency.values == p.numel()) return true;
  const int64_t rounds = p.inner == 1 ? plan.reduce_rows.domains() : plan.planes.channels;
  return plan.residency.values * tensors * size_of(p.dtype) > (rounds - 1) * kWaitBytes;
}

}  // namespace bnfused::planning
