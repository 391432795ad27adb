// Merges the moments of the parts of a batch into the statistics of the whole, and moves the running statistics.
//
//   computes  mean, var and the count over all parts; running_mean, running_var, counter
//   moves     reads a mean, a deviation and a count for each channel and part
//   blocks    runs of columns: one for each channel, and one more that merges the counts, even without channels
//   needs     one ticket that is 0 before and after
#pragma once
#include "kernels/accumulators.cuh"
#include "kernels/finish.cuh"
#include "kernels/layout.cuh"

namespace bnfused {

// Value i, with the rest that its float32 lacks, as a double.
__device__ __forceinline__ double unpack(const PerChannel& t, const PerChannel& rest, int64_t i) {
  if (t.dtype == DType::kFloat64) return load_global(static_cast<const double*>(t.data) + i);
  const double value = load_global(static_cast<const float*>(t.data) + i);
  return rest.data == nullptr ? value : value + double(load_global(static_cast<const float*>(rest.data) + i));
}

__global__ void __launch_bounds__(kMaxThreads, 2)
    batch_norm_gather_stats(GatherArgs args, RunningStats running, unsigned* ticket, Merge s) {
  using Sums = Moments<double>;
  const PackedMoments& packed = args.moments;
  const uint32_t first = blockIdx.x * s.columns_per_block;
  const uint32_t left = s.columns - first;
  const auto load = [&](uint32_t slot, uint32_t part) -> Sums {
    const int64_t at = part * args.stride;
    const double count = unpack(packed.count, packed.count_rest, at);
    const uint32_t c = first + slot;
    if (c == args.channels) return {0, 0, count};
    const double deviation = unpack(packed.deviation, {}, at + c);
    return {unpack(packed.mean, packed.mean_rest, at + c), deviation * deviation * count, count};
  };
  const auto finish = [&](uint32_t slot, const Sums& all) {
    const uint32_t c = first + slot;
    if (c == args.channels) {
      *args.batch_count = all.count;
      pack_count(args.merged, all.count);
      return;
    }
    pack(args.merged, c, all.mean, all.m2, all.count);
    args.batch_mean[c] = all.mean;
    args.batch_var[c] = all.count > 1 ? all.m2 / all.count : all.m2;
    if (all.count > 1) running.move(c, all.mean, all.m2 / (all.count - 1));
  };
  merge_partials<Sums, kLoadsOfTile>(left < s.columns_per_block ? left : s.columns_per_block, s.parts, load, finish);
  running.count_batch(ticket, s.blocks());
}

}  // namespace bnfused
