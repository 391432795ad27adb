// Which units of a tensor a block and its threads own in each layout, and how the sums of threads and blocks are
// merged. plan.h explains the words.
#pragma once
#include "kernels/pack.cuh"
#include "plan.h"

namespace bnfused {

// n / by.value, exact for all n. The multiplier is too small by less than one part in 2^64. So the product is too small
// by less than 1, and one comparison corrects it.
__device__ __forceinline__ uint64_t divide(uint64_t n, const Divisor& by) {
  const uint64_t quotient = __umul64hi(n, by.multiplier);
  return quotient + (n - quotient * by.value >= by.value);
}

// The same in 32 bits, for a divisor that fits 32 bits.
__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor& by) {
  const uint32_t quotient = uint32_t(__umul64hi(n, by.multiplier)), value = uint32_t(by.value);
  return quotient + (n - quotient * value >= value);
}

__device__ __forceinline__ uint32_t part_begin(uint32_t total, uint32_t part, uint32_t parts) {
  return uint32_t(uint64_t(total) * part / parts);
}

// Which values of a unit lie in a tensor of numel values. The last unit may not be whole. Units behind it are empty.
__device__ __forceinline__ Span span_of(uint32_t unit, int64_t numel) {
  const int64_t left = numel - int64_t(unit) * kUnit;
  return {0, left < kUnit ? int(left) : kUnit};
}

// The number of a unit in the tensor, and its values that are wanted. If there is no such unit, the span is empty.
struct UnitAt {
  uint32_t unit;
  Span span;
};

// One thread's place in the layout of rows. A thread keeps its column, and takes every row_slots-th row of its part.
struct RowsThread {
  uint32_t column, slot;  // its number in the tensor, and in the tile
  uint32_t row_slot, tile, part;
  bool active;

  __device__ __forceinline__ explicit RowsThread(const Rows& s)
      : RowsThread(s, blockIdx.x % s.tiles, blockIdx.x / s.tiles) {}
  __device__ __forceinline__ RowsThread(const Rows& s, uint32_t tile_, uint32_t part_) : tile(tile_), part(part_) {
    row_slot = threadIdx.x / s.tile;
    slot = threadIdx.x % s.tile;
    column = tile * s.tile + slot;
    active = row_slot < s.row_slots && column < s.columns;
  }
};

// The thread's units of its column, one in each of its rows. Steps count them.
struct ColumnUnits {
  const Rows& s;
  RowsThread thread;
  int64_t numel;

  __device__ __forceinline__ UnitAt operator()(uint32_t step) const {
    const uint32_t row = part_begin(s.rows, thread.part, s.parts) + thread.row_slot + step * s.row_slots;
    const uint32_t unit = row * s.columns + thread.column;
    const bool has_row = thread.active && row < part_begin(s.rows, thread.part + 1, s.parts);
    return {unit, has_row ? span_of(unit, numel) : Span{0, 0}};
  }
};

// One thread's place among the planes of one channel.
struct PlanesBlock {
  uint32_t channel, part;
  uint32_t begin, end;  // units of the channel

  __device__ __forceinline__ explicit PlanesBlock(const Planes& s)
      : PlanesBlock(s, blockIdx.x % s.channels, blockIdx.x / s.channels) {}
  __device__ __forceinline__ PlanesBlock(const Planes& s, uint32_t channel_, uint32_t part_)
      : channel(channel_), part(part_) {
    begin = part_begin(s.units_per_channel, part, s.parts);
    end = part_begin(s.units_per_channel, part + 1, s.parts);
  }
};

// Unit `number` of a channel, and its values that belong to the channel. If planes are not whole units, a plane may
// touch fewer units than units_per_plane. The span of the unit in excess is empty, and it may lie behind the tensor.
struct PlaneUnit : UnitAt {
  __device__ __forceinline__ PlaneUnit(const Planes& s, uint32_t channel, uint32_t number) {
    const uint32_t plane = divide(number, s.by_units);
    if (s.inner % kUnit == 0) {  // the code below gives the same, with 20 instructions more
      unit = (plane * s.channels + channel) * s.units_per_plane + (number - plane * s.units_per_plane);
      span = {0, kUnit};
      return;
    }
    const uint64_t first_value = (uint64_t(plane) * s.channels + channel) * s.inner;
    unit = uint32_t(first_value / kUnit) + (number - plane * s.units_per_plane);
    const int64_t begin = int64_t(first_value) - int64_t(unit) * kUnit;
    const int64_t end = begin + int64_t(s.inner);
    span = {begin > 0 ? int(begin) : 0, end < kUnit ? int(end) : kUnit};
  }
};

// The thread's units of a channel. Steps count them.
struct ChannelUnits {
  const Planes& s;
  PlanesBlock block;

  __device__ __forceinline__ UnitAt operator()(uint32_t step) const {
    const uint32_t number = block.begin + threadIdx.x + step * blockDim.x;
    return number < block.end ? PlaneUnit(s, block.channel, number) : UnitAt{0, {0, 0}};
  }
};

// Merges the sums of all row slots of a column into row slot 0, as a tree of fixed shape. All threads of the block call
// it. Thread `row_slot * columns + column` has the sums of that row slot. A block has at most kMaxThreads such threads.
template <class Sums, int kValues>
__device__ __forceinline__ void merge_row_slots(Sums (&sums)[kValues], uint32_t row_slot, uint32_t row_slots,
                                                uint32_t column, uint32_t columns, bool active) {
  BNFUSED_SHARED(Sums, others, [kValues][kMaxThreads / 2]);
  for (uint32_t n = row_slots; n > 1;) {
    const uint32_t half = (n + 1) / 2;
    if (active && row_slot >= half && row_slot < n) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) others[k][(row_slot - half) * columns + column] = sums[k];
    }
    __syncthreads();
    if (row_slot + half < n) {  // inactive threads merge too, but nobody reads their sums
#pragma unroll
      for (int k = 0; k < kValues; ++k) sums[k].merge(others[k][row_slot * columns + column]);
    }
    __syncthreads();  // the next round overwrites what this round reads
    n = half;
  }
}

// Merges one sum of each thread of the block into thread 0.
template <class Sums>
__device__ __forceinline__ void merge_block(Sums& sums) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sums.merge(shuffle_xor(sums, lanes));
  Sums of_warp[1] = {sums};
  const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
  merge_row_slots(of_warp, warp, warps, 0, 1, threadIdx.x % 32 == 0);
  sums = of_warp[0];
}

// Whether this block is the last of `blocks` blocks to come here. The last block sees what the others wrote before, and
// leaves the ticket at 0. Only thread 0 fences, between two barriers, as the grid barrier of cooperative groups does.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  BNFUSED_SHARED(bool, last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Called after is_last_block. The other blocks wait for the last one, and see what it wrote before. All `blocks` blocks
// must run at the same time. The last block opens the gate: it then counts the blocks that have not passed yet. It is 0
// before, and 0 again after all have passed.
__device__ __forceinline__ void wait_for_last_block(unsigned* gate, bool last, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (last) {
      __threadfence();
      atomicExch(gate, blocks - 1);
    } else {
      while (load_again(gate) == 0) __nanosleep(64);
      atomicAdd(gate, ~0u);  // subtracts 1
      __threadfence();
    }
  }
  __syncthreads();
}

// Loads a partial sum that another block has written.
template <class Sums>
__device__ __forceinline__ Sums load_partial(const Sums* p) {
  static_assert(sizeof(Sums) % sizeof(unsigned long long) == 0);
  unsigned long long words[sizeof(Sums) / sizeof(unsigned long long)];
#pragma unroll
  for (unsigned i = 0; i < sizeof(Sums) / sizeof(unsigned long long); ++i) {
    words[i] = load_from_other_block(reinterpret_cast<const unsigned long long*>(p) + i);
  }
  Sums sums;
  memcpy(&sums, words, sizeof(Sums));
  return sums;
}

// Partials that a thread loads before it merges the first, so that it waits once. One channel has at most 3 for each
// thread (192 SMs x 4 blocks / 256 threads), and in a cluster 1. An entry that is not used costs 6 registers.
constexpr int kLoadsOfTile = 8, kLoadsOfChannel = 3;

// Merges the partial sums of `channels` channels, and calls `finish(channel, sums)` for each. The threads of the block
// share the channels, or the `partials` of each if there are few channels. `load(channel, i)` returns partial i.
template <class Sums, int kLoads, class Load, class Finish>
__device__ __forceinline__ void merge_partials(uint32_t channels, uint32_t partials, Load load, Finish finish) {
  const uint32_t at_once = channels < blockDim.x ? channels : blockDim.x;
  const uint32_t most = blockDim.x / at_once;
  const uint32_t row_slots = partials < most ? partials : most;
  const uint32_t row_slot = threadIdx.x / at_once;
  for (uint32_t base = 0; base < channels; base += at_once) {
    const uint32_t column = threadIdx.x % at_once;
    const bool active = base + column < channels;  // merge_row_slots ignores threads beyond `row_slots`
    Sums sums[1] = {};
    for (uint32_t first = row_slot; active && first < partials; first += kLoads * row_slots) {
      Sums batch[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * row_slots < partials) batch[i] = load(base + column, first + i * row_slots);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * row_slots < partials) sums[0].merge(batch[i]);
      }
    }
    merge_row_slots(sums, row_slot, row_slots, column, at_once, active);
    if (active && row_slot == 0) finish(base + column, sums[0]);
  }
}

// Rows, with a tile split over blocks. Each block writes its sums to `partials`. The last block of a domain merges
// them, calls `finish(channel, sums)` for each channel, and gets true.
template <class Sums, class Finish>
__device__ __forceinline__ bool finish_rows(const Sums (&sums)[kUnit], Sums* partials, unsigned* tickets, const Rows& s,
                                            const RowsThread& thread, Finish finish) {
  const int64_t columns = int64_t(s.columns) * kUnit;
  if (thread.active && thread.row_slot == 0) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) partials[thread.part * columns + thread.column * kUnit + k] = sums[k];
  }
  const bool one_domain = s.domains() == 1;
  if (!is_last_block(tickets + (one_domain ? 0 : thread.tile), s.blocks() / s.domains())) return false;
  const uint32_t first = one_domain ? 0 : thread.tile * s.tile * kUnit;
  const uint32_t left = s.channels - first, most = one_domain ? left : s.tile * kUnit;
  const auto load = [&](uint32_t c, uint32_t i) {
    return load_partial(partials + i / s.copies * columns + first + c + i % s.copies * s.channels);
  };
  merge_partials<Sums, kLoadsOfTile>(left < most ? left : most, s.parts * s.copies, load,
                                     [&](uint32_t c, const Sums& all) { finish(first + c, all); });
  return true;
}

// Rows, with a tile in a cluster of s.parts blocks, or in one block. `of_columns` has kUnit * tile sums in the shared
// memory of each. The block of part 0 merges them and gets true. All blocks see afterwards what `finish` wrote.
template <class Sums, class Finish>
__device__ __forceinline__ bool finish_tile(const Sums (&sums)[kUnit], Sums* of_columns, const Rows& s,
                                            const RowsThread& thread, Finish finish) {
  if (thread.row_slot == 0) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) of_columns[thread.slot * kUnit + k] = sums[k];
  }
  cluster_barrier(s.parts);
  const bool merges = thread.part == 0;
  if (merges) {
    const uint32_t first = thread.tile * s.tile * kUnit;  // all copies of a channel are in this tile
    const uint32_t left = s.channels - first, most = s.tile * kUnit;
    const auto load = [&](uint32_t c, uint32_t i) {
      return *shared_of_block(of_columns + c + i % s.copies * s.channels, i / s.copies);
    };
    merge_partials<Sums, kLoadsOfTile>(left < most ? left : most, s.parts * s.copies, load,
                                       [&](uint32_t c, const Sums& all) { finish(first + c, all); });
  }
  cluster_barrier(s.parts);  // no block overwrites its sums, or exits, while they are read
  return merges;
}

// Planes, with a channel split over blocks. Works like finish_rows. Thread 0 has the sums of the block.
template <class Sums, class Finish>
__device__ __forceinline__ bool finish_channel(const Sums& sums, Sums* partials, unsigned* tickets, const Planes& s,
                                               const PlanesBlock& block, Finish finish) {
  if (threadIdx.x == 0) partials[int64_t(block.part) * s.channels + block.channel] = sums;
  if (!is_last_block(tickets + block.channel, s.parts)) return false;
  const auto load = [&](uint32_t, uint32_t i) {
    return load_partial(partials + int64_t(i) * s.channels + block.channel);
  };
  merge_partials<Sums, kLoadsOfChannel>(1, s.parts, load,
                                        [&](uint32_t, const Sums& all) { finish(block.channel, all); });
  return true;
}

// Planes, with a channel in a cluster of s.parts blocks, or in one block. Works like finish_tile.
template <class Sums, class Finish>
__device__ __forceinline__ bool finish_channel_in_cluster(const Sums& sums, const Planes& s, const PlanesBlock& block,
                                                          Finish finish) {
  BNFUSED_SHARED(Sums, of_block);
  if (threadIdx.x == 0) of_block = sums;
  cluster_barrier(s.parts);
  const bool merges = block.part == 0;
  if (merges) {
    const auto load = [&](uint32_t, uint32_t i) { return *shared_of_block(&of_block, i); };
    merge_partials<Sums, 1>(1, s.parts, load, [&](uint32_t, const Sums& all) { finish(block.channel, all); });
  }
  cluster_barrier(s.parts);
  return merges;
}

}  // namespace bnfused
