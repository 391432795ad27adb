// Which units of a tensor a block and its threads own, in each layout, and the merge of what the threads have summed.
#pragma once
#include "kernels/pack.cuh"
#include "plan.h"

namespace bnfused {

// Exact for all n: the multiplier is too small by less than one part in 2^64, and so the product by less than 1.
__device__ __forceinline__ uint64_t divide(uint64_t n, const Divisor& by) {
  const uint64_t quotient = __umul64hi(n, by.multiplier);
  return quotient + (n - quotient * by.value >= by.value);
}

// In 32 bits, for a divisor that fits them.
__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor& by) {
  const uint32_t quotient = uint32_t(__umul64hi(n, by.multiplier)), value = uint32_t(by.value);
  return quotient + (n - quotient * value >= value);
}

__device__ __forceinline__ uint32_t part_begin(uint32_t total, uint32_t part, uint32_t parts) {
  return uint32_t(uint64_t(total) * part / parts);
}

// The values of a unit of a tensor of numel values: the last unit may not be whole, and behind it they have none.
__device__ __forceinline__ Span span_of(uint32_t unit, int64_t numel) {
  const int64_t left = numel - int64_t(unit) * kUnit;
  return {0, left < kUnit ? int(left) : kUnit};
}

// A unit of memory, and the values of it that are asked for: none where there is no such unit.
struct UnitAt {
  uint32_t unit;
  Span span;
};

// One thread's place in the rows layout: a column that it keeps, and every row_slots-th row of its part.
struct RowsThread {
  uint32_t column, slot;  // of the tensor, of the tile
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

// The thread's unit in each of its rows, which are counted in steps.
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

// A unit of a plane, and the values of it that belong to the channel: none if the plane touches fewer units. It may
// then lie behind the tensor; of it nothing is loaded or stored but a byte of a mask.
struct PlaneUnit : UnitAt {
  __device__ __forceinline__ PlaneUnit(const Planes& s, uint32_t channel, uint32_t number) {
    const uint32_t plane = divide(number, s.by_units);
    if (s.inner % kUnit == 0) {  // as the rest would find out, with 20 instructions more
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

// The thread's units of a channel, counted in steps.
struct ChannelUnits {
  const Planes& s;
  PlanesBlock block;

  __device__ __forceinline__ UnitAt operator()(uint32_t step) const {
    const uint32_t number = block.begin + threadIdx.x + step * blockDim.x;
    return number < block.end ? PlaneUnit(s, block.channel, number) : UnitAt{0, {0, 0}};
  }
};

// Merges the sums of all row slots of a column into row slot 0, as a tree of fixed shape. All threads of the block call
// it. Thread `row_slot * columns + column` has the sums of that row slot. With kValues sums in each thread,
// columns * row_slots must not exceed kMaxThreads.
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
    if (row_slot + half < n) {  // what is not active gathers what nobody reads
#pragma unroll
      for (int k = 0; k < kValues; ++k) sums[k].merge(others[k][row_slot * columns + column]);
    }
    __syncthreads();  // the next round writes what this one reads
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

// Whether this block is the last of `blocks` to come here; if so, it sees what the others wrote before. The ticket is
// back at 0 then. Thread 0 alone fences, between barriers, as cooperative groups' grid barrier does it.
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

// Behind is_last_block: the others wait until the last of `blocks` comes here, and see what it wrote before. All of
// them have to run at once. The gate holds how many are still to pass: it is 0 before the first and after the last.
__device__ __forceinline__ void wait_for_last_block(unsigned* gate, bool last, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (last) {
      __threadfence();
      atomicExch(gate, blocks - 1);
    } else {
      while (load_again(gate) == 0) __nanosleep(64);
      atomicAdd(gate, ~0u);  // one less
      __threadfence();
    }
  }
  __syncthreads();
}

// A partial sum that another block has written.
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

// Partials that a thread loads before it merges the first: one after the other, each would wait for the L2 cache. Of a
// tile's channels a thread has many; of one channel 3 where a GPU has up to 192 SMs, which have 4 blocks each; of one
// in a cluster 1. More than it has would cost it registers: 6 each.
constexpr int kLoadsOfTile = 8, kLoadsOfChannel = 3;

// Merges the partial sums of `channels` channels and hands them to `finish(channel, sums)`. The threads of the block
// share out the channels, and where they are fewer, the `partials` of each. `load(channel, i)` is partial i.
template <class Sums, int kLoads, class Load, class Finish>
__device__ __forceinline__ void merge_partials(uint32_t channels, uint32_t partials, Load load, Finish finish) {
  const uint32_t at_once = channels < blockDim.x ? channels : blockDim.x;
  const uint32_t most = blockDim.x / at_once;
  const uint32_t row_slots = partials < most ? partials : most;
  const uint32_t row_slot = threadIdx.x / at_once;
  for (uint32_t base = 0; base < channels; base += at_once) {
    const uint32_t column = threadIdx.x % at_once;
    const bool active = base + column < channels;  // merge_row_slots leaves out the row_slots beyond `row_slots`
    Sums sums[1] = {};
    for (uint32_t first = row_slot; active && first < partials; first += kLoads * row_slots) {
      Sums batch[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * row_slots < partials) batch[i] = load(base + column, first + i * row_slots);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (first + i * row_slots < partials) sums[0].merge(batch[i]);  // else it merges nothing
      }
    }
    merge_row_slots(sums, row_slot, row_slots, column, at_once, active);
    if (active && row_slot == 0) finish(base + column, sums[0]);
  }
}

// Rows, a tile split over blocks: each has its sums in `partials`; the last of a domain hands the merged sums of each
// channel to `finish(channel, sums)`. Whether this block was that one.
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

// Rows, a tile in a cluster of s.parts blocks, or in one block: the same through `of_columns`, kUnit * tile sums in the
// shared memory of each. What `finish` wrote is there for all of them afterwards.
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
    const uint32_t first = thread.tile * s.tile * kUnit;  // copies of a channel are in one tile
    const uint32_t left = s.channels - first, most = s.tile * kUnit;
    const auto load = [&](uint32_t c, uint32_t i) {
      return *shared_of_block(of_columns + c + i % s.copies * s.channels, i / s.copies);
    };
    merge_partials<Sums, kLoadsOfTile>(left < most ? left : most, s.parts * s.copies, load,
                                       [&](uint32_t c, const Sums& all) { finish(first + c, all); });
  }
  cluster_barrier(s.parts);  // nobody writes its sums again, or exits, while they are read
  return merges;
}

// Planes, a channel split over blocks: as finish_rows; thread 0 has the block's sums.
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

// Planes, a channel in a cluster of s.parts blocks, or in one block: as finish_tile.
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
