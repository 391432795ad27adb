// Training forward in one launch, where a block can have all values of its channels.
//
//   computes  what batch_norm_stats.cuh and batch_norm_apply.cuh compute
//   moves     reads x twice, the second time from cache, last-read first; the residual once; writes y once, and the
//   mask blocks    Rows: a tile of columns. Planes: a channel needs     one ticket that is 0, and is 0 again
//   afterwards; Rows: all copies of a channel in one tile. Planes with a
//             mask: whole units, for a byte of the mask belongs to one block
#pragma once
#include "kernels/batch_norm_apply.cuh"
#include "kernels/batch_norm_stats.cuh"

namespace bnfused {

template <class T, class Activation>
__global__ void __launch_bounds__(kMaxThreads, 1)
    batch_norm_small_rows(StatsArgs<T> args, ForwardBody<T, Activation> body, ForwardConstants constants, Rows s) {
  using Sums = Moments<Accumulate<T>>;
  BNFUSED_DYNAMIC_SHARED(Sums, of_columns);  // tile * kUnit
  const RowsThread thread(s);
  Sums sums[kUnit];
  column_moments(args.x, args.numel, args.wide, s, thread, sums);
  merge_lanes(sums, thread.lane, s.lanes, thread.slot, s.tile, thread.active);
  finish_tile(sums, of_columns, s, thread, [&](uint32_t c, const Sums& all) { args.finish(c, all); });
  sweep_rows(body, args.numel, s, [&](uint32_t c, bool owns) { return constants.get<Accumulate<T>>(c, owns); });
  args.finish.count_batch(args.tickets, s.tiles);
}

template <class T, class Activation>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_small_planes(StatsArgs<T> args, ForwardBody<T, Activation> body, ForwardConstants constants, Planes s) {
  using Sums = Moments<Accumulate<T>>;
  const PlanesBlock block(s);
  Sums sums = plane_moments(args.x, args.wide, s, block);
  merge_block(sums);
  if (threadIdx.x == 0) args.finish(block.channel, sums);
  __syncthreads();  // mean and invstd of the channel are written
  sweep_channel(body, s, block, constants.get<Accumulate<T>>(block.channel, false));
  args.finish.count_batch(args.tickets, s.channels);
}

}  // namespace bnfused
