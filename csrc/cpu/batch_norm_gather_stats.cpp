// The statistics of a whole batch from the moments of its parts, merged in their order; the running statistics moved.
#include "cpu/backend.h"
#include "cpu/moments.h"

namespace bnfused::cpu {

void batch_norm_gather_stats(const GatherArgs& args) {
  const double momentum = count_batch(args);
  double count = 0;
  for (int64_t part = 0; part < args.parts; ++part) count += args.count[part * args.count_stride];
  *args.batch_count = count;
  at::parallel_for(0, args.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments all;
      for (int64_t part = 0; part < args.parts; ++part) {
        all.merge({args.count[part * args.count_stride], args.mean[part * args.mean_stride + c],
                   args.m2[part * args.m2_stride + c]});
      }
      args.batch_mean[c] = all.mean;
      args.batch_var[c] = count > 1 ? all.m2 / count : all.m2;
      if (count > 1) {
        move(args.running_mean, c, momentum, all.mean);
        move(args.running_var, c, momentum, all.m2 / (count - 1));
      }
    }
  });
}

}  // namespace bnfused::cpu
