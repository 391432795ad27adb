// The training forward in one launch, and the backward in one launch. The first pass sums, and keeps what fits in
// shared memory. The second pass applies the result.
//
//   computes  the same as batch_norm_stats.cuh and batch_norm_apply.cuh, or as batch_norm_backward.cuh
//   moves     reads once the units that it keeps, and twice the others, the second time last-read first. Writes y and
//             the mask once, or grad_x and grad_residual. After the first pass of a tile, it fetches units of the next
//   blocks    teams, which go from tile to tile (Rows) or from channel to channel (Planes); a block has a part of each
//   needs     if a team has several blocks and is not a cluster: all blocks running at once, workspace for the partials,
//             and tickets and gates that are 0 before and after. Planes with a mask: planes of whole units, because a
//             byte of the mask must belong to one block
#pragma once
#include "kernels/batch_norm_apply.cuh"
#include "kernels/batch_norm_backward.cuh"
#include "kernels/batch_norm_stats.cuh"
#include "kernels/on_chip.cuh"
#include "kernels/source.cuh"

namespace bnfused {

// Merges the sums of a team. One block of the team calls `finish` with the merged sums of each channel, and gets true.
// All blocks see what `finish` wrote afterwards. `of_columns` has kUnit * tile sums in shared memory.
template <class Sums, class Finish>
__device__ __forceinline__ bool finish_for_team(const Sums (&sums)[kUnit], Sums* of_columns, Sums* partials,
                                                unsigned* tickets, const Rows& s, uint32_t cluster,
                                                const RowsThread& thread, Finish finish) {
  const bool one_domain = s.domains() == 1;
  const uint32_t blocks = s.blocks() / s.domains();
  if (blocks == cluster) return finish_tile(sums, of_columns, s, thread, finish);
  const bool last = finish_rows(sums, partials, tickets, s, thread, finish);
  wait_for_last_block(tickets + s.domains() + (one_domain ? 0 : thread.tile), last, blocks);
  return last;
}
template <class Sums, class Finish>
__device__ __forceinline__ bool finish_for_team(const Sums& sums, Sums* partials, unsigned* tickets, const Planes& s,
                                                uint32_t cluster, const PlanesBlock& block, Finish finish) {
  if (s.parts == cluster) return finish_channel_in_cluster(sums, s, block, finish);
  const bool last = finish_channel(sums, partials, tickets, s, block, finish);
  wait_for_last_block(tickets + s.domains() + block.channel, last, s.parts);
  return last;
}

// Fetches the thread's units of the team's next tile or channel. A team takes every teams-th of them.
template <class Body>
__device__ __forceinline__ Fetch<Body, ColumnUnits> fetch_of_next(const Body& body,
                                                                  const OnChip<typename Body::Value>& kept,
                                                                  const Rows& s, const RowsThread& thread,
                                                                  uint32_t teams, int64_t numel) {
  const uint32_t tile = thread.tile + teams;
  return {body, kept, {s, RowsThread(s, tile, thread.part), numel}, kHasCopiesAsync && body.wide && tile < s.tiles};
}
template <class Body>
__device__ __forceinline__ Fetch<Body, ChannelUnits> fetch_of_next(const Body& body,
                                                                   const OnChip<typename Body::Value>& kept,
                                                                   const Planes& s, const PlanesBlock& block,
                                                                   uint32_t teams) {
  const uint32_t channel = block.channel + teams;
  return {body, kept, {s, PlanesBlock(s, channel, block.part)}, kHasCopiesAsync && body.wide && channel < s.channels};
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, 1)
    batch_norm_resident_rows(StatsArgs<T> args, ForwardBody<T, Act> body, ForwardConstants constants, Rows s,
                             Residency residency) {
  using A = Accumulate<T>;
  using Body = ForwardBody<T, Act>;
  using Sums = Moments<A>;
  BNFUSED_DYNAMIC_SHARED(uint4, shared);
  const StatsBody<T> stats = args.body();
  OnChip<T> kept(shared, residency, 1);
  uint4* const table = shared + residency.keeps_bytes / sizeof(uint4);  // for the tile's sums, then for its constants
  for (uint32_t tile = blockIdx.x / s.parts; tile < s.tiles; tile += residency.teams) {
    const RowsThread thread(s, tile, blockIdx.x % s.parts);
    const auto next = fetch_of_next(body, kept, s, thread, residency.teams, args.numel);
    kept.await();
    Sums sums[kUnit];
    column_moments<T>(ToKeep<StatsBody<T>>{stats, kept}, args.numel, s, thread, sums);
    next.ahead();
    merge_row_slots(sums, thread.row_slot, s.row_slots, thread.slot, s.tile, thread.active);
    const bool last =
        finish_for_team(sums, reinterpret_cast<Sums*>(table), args.partials, args.tickets, s, residency.cluster, thread,
                        [&](uint32_t c, const Sums& all) { args.finish(c, all); });
    const ColumnConstants<Affine<A>> of_column(reinterpret_cast<Affine<A>*>(table), s, thread,
                                               [&](uint32_t c, bool) { return constants.get<A>(c, false); });
    sweep_column(body, Recalled<Body, ColumnUnits>{body, kept, next}, args.numel, s, thread, of_column);
    kept.next_tile(next.wanted);
    if (last) args.finish.count_batch(args.batch_ticket, s.domains());
  }
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_resident_planes(StatsArgs<T> args, ForwardBody<T, Act> body, ForwardConstants constants, Planes s,
                               Residency residency) {
  using A = Accumulate<T>;
  using Body = ForwardBody<T, Act>;
  using Sums = Moments<A>;
  BNFUSED_DYNAMIC_SHARED(uint4, shared);
  const StatsBody<T> stats = args.body();
  OnChip<T> kept(shared, residency, 1);
  for (uint32_t channel = blockIdx.x / s.parts; channel < s.channels; channel += residency.teams) {
    const PlanesBlock block(s, channel, recomputed(blockIdx.x) % s.parts);
    const auto next = fetch_of_next(body, kept, s, block, residency.teams);
    kept.await();
    Sums sums = plane_moments<T>(ToKeep<StatsBody<T>>{stats, kept}, s, block);
    next.ahead();
    merge_block(sums);
    const bool last = finish_for_team(sums, args.partials, args.tickets, s, residency.cluster, block,
                                      [&](uint32_t c, const Sums& all) { args.finish(c, all); });
    if (last) args.finish.count_batch(args.batch_ticket, s.domains());
    sweep_channel(body, Recalled<Body, ChannelUnits>{body, kept, next}, s, block, constants.get<A>(channel, false));
    kept.next_tile(next.wanted);
  }
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, 1)
    batch_norm_backward_resident_rows(GradArgs<T, Act> args, Rows s, Residency residency) {
  using A = Accumulate<T>;
  using Body = BackwardBody<T, Act>;
  BNFUSED_DYNAMIC_SHARED(uint4, shared);
  OnChip<T> kept(shared, residency, args.body.tensors());
  uint4* const table = shared + residency.keeps_bytes / sizeof(uint4);
  Affine<A>* const forward_table = reinterpret_cast<Affine<A>*>(table);
  for (uint32_t tile = blockIdx.x / s.parts; tile < s.tiles; tile += residency.teams) {
    const RowsThread thread(s, tile, blockIdx.x % s.parts);
    const ColumnConstants<Affine<A>> forward(forward_table, s, thread,
                                             [&](uint32_t c, bool) { return args.constants.template forward<A>(c); });
    const auto next = fetch_of_next(args.body, kept, s, thread, residency.teams, args.numel);
    kept.await();
    GradSums sums[kUnit];
    column_grad_sums(args.body, ToKeep<Body>{args.body, kept}, args.numel, s, thread, forward, false, sums);
    next.ahead();
    merge_row_slots(sums, thread.row_slot, s.row_slots, thread.slot, s.tile, thread.active);
    finish_for_team(sums, reinterpret_cast<GradSums*>(forward_table + kUnit * s.tile), args.partials, args.tickets, s,
                    residency.cluster, thread,
                    [&](uint32_t c, const GradSums& all) { args.constants.template finish<A>(c, all); });
    const ColumnConstants<GradAffine<A>> of_column(reinterpret_cast<GradAffine<A>*>(table), s, thread,
                                                   [&](uint32_t c, bool) { return args.constants.template get<A>(c); });
    sweep_column(args.body, Recalled<Body, ColumnUnits>{args.body, kept, next}, args.numel, s, thread, of_column);
    kept.next_tile(next.wanted);
    __syncthreads();  // the next tile overwrites the table
  }
}

template <class T, class Act>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>)
    batch_norm_backward_resident_planes(GradArgs<T, Act> args, Planes s, Residency residency) {
  using A = Accumulate<T>;
  using Body = BackwardBody<T, Act>;
  BNFUSED_DYNAMIC_SHARED(uint4, shared);
  OnChip<T> kept(shared, residency, args.body.tensors());
  for (uint32_t channel = blockIdx.x / s.parts; channel < s.channels; channel += residency.teams) {
    const PlanesBlock block(s, channel, recomputed(blockIdx.x) % s.parts);
    const Affine<A> forward = args.constants.template forward<A>(channel);
    const auto next = fetch_of_next(args.body, kept, s, block, residency.teams);
    kept.await();
    GradSums sums = plane_grad_sums(args.body, ToKeep<Body>{args.body, kept}, s, block, forward, false);
    next.ahead();
    merge_block(sums);
    finish_for_team(sums, args.partials, args.tickets, s, residency.cluster, block,
                    [&](uint32_t c, const GradSums& all) { args.constants.template finish<A>(c, all); });
    sweep_channel(args.body, Recalled<Body, ChannelUnits>{args.body, kept, next}, s, block,
                  args.constants.template get<A>(channel));
    kept.next_tile(next.wanted);
  }
}

}  // namespace bnfused
