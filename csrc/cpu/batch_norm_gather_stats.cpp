// Merges the moments of a batch's parts, in their order, into the statistics of the whole batch, and moves the running
// statistics.
#include "cpu/backend.h"
#include "cpu/moments.h"

namespace bnfused::cpu {

void batch_norm_gather_stats(const GatherArgs& args) {
  const PackedMoments& packed = args.moments;
  const auto count_of = [&](int64_t part) {
    return read(packed.count, part * args.stride, 0) + read(packed.count_rest, part * args.stride, 0);
  };
  const auto moments_of = [&](int64_t part, int64_t c) -> Moments {
    const int64_t at = part * args.stride + c;
    const double count = count_of(part), deviation = read(packed.deviation, at, 0);
    return {count, read(packed.mean, at, 0) + read(packed.mean_rest, at, 0), deviation * deviation * count};
  };
  const double momentum = count_batch(args);
  double count = 0;
  for (int64_t part = 0; part < args.parts; ++part) count += count_of(part);
  *args.batch_count = count;
  write_count(args.merged, count);
  parallel_for(0, args.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments all;
      for (int64_t part = 0; part < args.parts; ++part) {
        all.merge(moments_of(part, c));
      }
      write(args.merged, c, all);
      args.batch_mean[c] = all.mean;
      args.batch_var[c] = count > 1 ? all.m2 / count : all.m2;
      if (count > 1) {
        const double free_var = all.m2 / (count - 1);
        move(args.running_mean, c, 1, momentum, &all.mean);
        move(args.running_var, c, 1, momentum, &free_var);
      }
    }
  });
}

}  // namespace bnfused::cpu
