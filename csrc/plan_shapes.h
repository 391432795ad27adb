// The shapes into which a problem is cut. plan.h explains the words.
//
// Unit numbers fit 32 bits for all tensors that `fits` allows. Offsets of values are 64 bits wide everywhere.
#pragma once
#include <algorithm>
#include <optional>

#include "batch_norm.h"

namespace bnfused {

constexpr int kUnit = 8;  // values
// The largest number of threads in a block. Each can have 255 registers, and their sums fit 48 KiB of shared memory.
constexpr int kMaxThreads = 256;

struct DeviceLimits {
  int sm_count;
  int compute_capability;     // 90 for sm_90
  int64_t shared_per_sm = 0;  // bytes of shared memory; 0 means unknown, and then nothing is kept on chip
  bool cooperative = true;    // blocks of a launch may wait for each other
  bool clusters = true;       // clusters may be used, if the compute capability has them
};

enum class Strategy : int32_t { kEmpty, kSmall, kStreaming, kApply, kReduce, kResident };

// A divisor that the host knows, so that the GPU can multiply instead of dividing (kernels/layout.cuh).
struct Divisor {
  uint64_t value = 1, multiplier = ~uint64_t(0);  // floor((2^64 - 1) / value)
};
constexpr Divisor divisor_of(uint64_t value) { return {value, ~uint64_t(0) / value}; }

// Channels innermost: (N, C), channels_last. If C is not a multiple of 8, memory is read as rows of lcm(C, 8) values. So
// a thread has the same channels in every row.
struct Rows {
  uint32_t channels, copies;
  uint32_t columns;      // units in a row
  uint32_t rows;         // the last one may have fewer units
  uint32_t tile, tiles;  // columns in a tile, and the number of tiles
  uint32_t row_slots;    // rows that a block reads at once
  uint32_t parts;        // blocks that share a tile
  uint32_t threads;

  constexpr uint32_t blocks() const { return tiles * parts; }
  // One for each tile. If a row has copies of a channel, they may lie in several tiles, so all tiles are one domain.
  constexpr uint32_t domains() const { return copies > 1 ? 1 : tiles; }
};

// A channel is `outer` planes of `inner` values. A plane touches up to `units_per_plane` units, and may share its first
// and its last unit with its neighbours.
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

// A tensor of planes in memory order. A block has a run of units, which may belong to any planes.
struct Flat {
  uint64_t inner;
  uint32_t channels, units, units_per_block;
  uint32_t planes_per_block;  // the most that a block touches: the size of its table of constants
  Divisor by_inner, by_channels;
  uint32_t threads;

  constexpr uint32_t blocks() const { return (units + units_per_block - 1) / units_per_block; }
};

// What stays on chip between the two passes of kSmall and kResident, which are the same kernels. A team takes every
// teams-th tile or channel. Its blocks are neighbours in the grid, and Rows or Planes have their number as `parts`.
struct Residency {
  uint32_t teams;
  uint32_t cluster = 1;  // blocks of a cluster: all of a team, or 1 if its blocks exchange their sums through memory
  uint32_t steps;        // units that a thread keeps: the first that it reads, because caches have the last ones
  uint32_t ahead;        // how many of these slots are doubled, to fetch units of the next tile early
  uint32_t keeps_bytes;  // dynamic shared memory for all slots of a block
  int64_t values = 0;    // of each tensor, how many values are kept

  constexpr uint32_t blocks(uint32_t parts) const { return teams * parts; }
};

// How moments of parts of a batch are merged. A block has a run of columns, and its threads share the parts. This depends
// on no device, so the order of the merge, and every bit of its result, is the same on all.
struct Merge {
  uint32_t parts;
  uint32_t columns;  // the channels, and one more for the counts
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
  int64_t partials = 0;  // room for this many Moments or GradSums
  int64_t tickets = 0;   // tickets and gates; the last ticket of a forward is for counting the batch
  int64_t bytes_read = 0, bytes_written = 0;  // of tensors, not of per-channel values
  const char* why = "";
};

// What a plan depends on in addition to the problem. `forced` replaces the planner's choice of a strategy, in tests.
struct Request {
  bool wide = true;  // all tensors start at a multiple of 16 bytes
  bool residual = false, mask = false;
  std::optional<Strategy> forced = std::nullopt;
};
struct BackwardRequest {
  bool wide = true;
  bool residual = false;  // it is read to recompute the activation's argument
  bool mask = false, training = true;
  bool grad_x = true, grad_residual = false, grad_parameters = true;
  bool means = false;  // x is a part of a batch, and the means of g and of g * xhat over the batch are given
  std::optional<Strategy> forced = std::nullopt;

  // Whether something that is written depends on sums over x.
  constexpr bool waits() const { return training && grad_x && !means; }
  constexpr bool sums() const { return grad_parameters || waits(); }
};

namespace planning {

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
constexpr uint64_t gcd(uint64_t a, uint64_t b) { return b == 0 ? a : gcd(b, a % b); }

// At most 40 KiB of constants, for float64. Every GPU gives a block that much.
constexpr uint32_t kTablePlanes = 1024;

// Thresholds from a model, not yet measured on a GPU. A second launch takes 2 to 3 us. In that time one SM moves about 64
// KiB. A channel of up to 256 KiB is still in a cache when its block reads it again.
constexpr int64_t kSmallBytes = 64 * 1024;
constexpr int64_t kCachedBytes = 256 * 1024;
// Blocks for each SM. Two blocks of 256 threads with 128 bytes in flight each hide the latency of the memory. With more
// blocks, the SMs finish at about the same time.
constexpr uint32_t kReduceBlocksPerSm = 4;
constexpr uint32_t kApplyBlocksPerSm = 16;
constexpr uint32_t kMergeColumns = 32;  // of a block, so that a warp reads 256 consecutive bytes of a part
constexpr uint32_t kRowsPerThread = 8;  // at least, so that setting up the constants of 8 channels pays off

// Waiting through memory for the last block of a team takes about as long as a second launch. Each further wait in which
// nothing else can run must save what a GPU's memory moves in 3 us. The model counts the barrier of a cluster as free.
constexpr int64_t kWaitBytes = 8 * 1024 * 1024;

inline int64_t size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }
inline int64_t bytes_of(const Problem& p) { return p.numel() * size_of(p.dtype); }

// `blocks` is how many blocks are wanted for all tiles together.
inline Rows cut_rows(const Problem& p, uint32_t widest_tile, uint32_t blocks) {
  Rows r{};
  const uint64_t units = ceil_div(p.numel(), kUnit);
  r.channels = uint32_t(p.channels);
  r.copies = uint32_t(kUnit / gcd(p.channels, kUnit));
  r.columns = uint32_t(uint64_t(p.channels) * r.copies / kUnit);
  r.rows = uint32_t(ceil_div(units, r.columns));
  // Copies of a channel are best merged within a block. With more than 64 columns, a block would have too few rows.
  const uint32_t wanted = r.copies > 1 ? std::max(widest_tile, std::min(r.columns, 64u)) : widest_tile;
  r.tiles = uint32_t(ceil_div(r.columns, wanted));
  r.tile = uint32_t(ceil_div(r.columns, r.tiles));
  r.tiles = uint32_t(ceil_div(r.columns, r.tile));
  r.row_slots = uint32_t(std::min<uint64_t>(kMaxThreads / r.tile, r.rows));
  const uint64_t most = ceil_div(r.rows, uint64_t(r.row_slots) * kRowsPerThread);
  r.parts = uint32_t(std::clamp<uint64_t>(ceil_div(blocks, r.tiles), 1, most));
  r.threads = uint32_t(ceil_div(uint64_t(r.tile) * r.row_slots, 32) * 32);
  return r;
}

inline Planes cut_planes(const Problem& p, bool one_part, const DeviceLimits& device) {
  Planes s{};
  s.channels = uint32_t(p.channels);
  s.outer = uint32_t(p.outer);
  s.inner = uint64_t(p.inner);
  s.units_per_plane = uint32_t(p.inner % kUnit == 0 ? p.inner / kUnit : (p.inner + 14) / kUnit);
  s.units_per_channel = s.units_per_plane * s.outer;
  s.by_units = divisor_of(s.units_per_plane);
  const uint64_t wanted = ceil_div(uint64_t(device.sm_count) * kReduceBlocksPerSm, s.channels);
  const uint64_t most = ceil_div(s.units_per_channel, uint64_t(kMaxThreads) * kRowsPerThread);
  s.parts = one_part ? 1 : uint32_t(std::clamp<uint64_t>(wanted, 1, most));
  const uint64_t threads = ceil_div(ceil_div(s.units_per_channel, s.parts), 4);  // 4 units each, if there are few
  s.threads = uint32_t(std::clamp<uint64_t>(ceil_div(threads, 32) * 32, 32, kMaxThreads));
  return s;
}

inline Flat cut_flat(const Problem& p, const DeviceLimits& device) {
  Flat f{};
  f.inner = uint64_t(p.inner);
  f.channels = uint32_t(p.channels);
  f.units = uint32_t(ceil_div(p.numel(), kUnit));
  f.threads = kMaxThreads;
  const uint64_t fair = ceil_div(f.units, uint64_t(device.sm_count) * kApplyBlocksPerSm);
  const uint64_t by_table = std::max<uint64_t>(1, (kTablePlanes - 2) * f.inner / kUnit);
  const uint64_t steps = std::clamp<uint64_t>(ceil_div(fair, kMaxThreads), 1, 8);
  f.units_per_block = uint32_t(std::min<uint64_t>(by_table, steps * kMaxThreads));
  f.planes_per_block = uint32_t((uint64_t(f.units_per_block) * kUnit + f.inner - 2) / f.inner + 1);
  f.by_inner = divisor_of(f.inner);
  f.by_channels = divisor_of(f.channels);
  return f;
}

}  // namespace planning

}  // namespace bnfused
