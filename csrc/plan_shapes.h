// The words of the plan and of the kernels, and the shapes into which a problem is cut.
//
//   unit     8 consecutive values, one thread's share of one step (kernels/pack.cuh)
//   column   in the rows layout: a unit's place in a row, which has the same channels in every row
//   copy     a channel occurs `copies` times in a row of lcm(channels, 8) values
//   tile     columns side by side that a block reads together
//   row slot one of the rows of a tile that a block reads at once; its threads stand next to each other
//   part     the share of a tile's rows, or of a channel's units, that one block has
//   team     the blocks that have all parts of a tile or of a channel
//   domain   the tiles, or the channel, whose partial sums the last of their blocks merges
//   ticket   a counter of the blocks that are done with a domain, 0 before and after a launch
//   gate     a counter of the blocks that still have to pass the last one, 0 before and after
//   step     a thread's units, counted from the first that it reads
//   ahead    steps whose slots in shared memory come in pairs, so that units of the next tile have room early
//
// Unit numbers fit 32 bits for all tensors that `fits` allows. Offsets of values are 64 bits wide everywhere.
#pragma once
#include <algorithm>

#include "batch_norm.h"

namespace bnfused {

constexpr int kUnit = 8;  // values
// Threads of a block, at most: each can have 255 registers, and the merge of their sums fits 48 KiB of shared memory.
constexpr int kMaxThreads = 256;

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
  uint32_t row_slots;  // rows that a block reads at once
  uint32_t parts;      // blocks that share a tile
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

namespace planning {

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
constexpr uint64_t gcd(uint64_t a, uint64_t b) { return b == 0 ? a : gcd(b, a % b); }

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
inline Rows cut_rows(const Problem& p, uint32_t widest_tile, uint32_t blocks) {
  Rows r{};
  const uint64_t units = ceil_div(p.numel(), kUnit);
  r.channels = uint32_t(p.channels);
  r.copies = uint32_t(kUnit / gcd(p.channels, kUnit));
  r.columns = uint32_t(uint64_t(p.channels) * r.copies / kUnit);
  r.rows = uint32_t(ceil_div(units, r.columns));
  // Copies of a channel are best merged within a block; beyond 64 columns that would leave too few rows to a block.
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
  const uint64_t threads = ceil_div(ceil_div(s.units_per_channel, s.parts), 4);  // 4 units each, where there are few
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
