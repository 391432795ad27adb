// Moments of the batch: each channel's mean and sum of squared deviations, for statistics that are merged elsewhere.
#include "cpu/backend.h"
#include "cpu/moments.h"

namespace bnfused::cpu {

void batch_norm_stats(const MomentsArgs& args) {
  const Problem& p = args.problem;
  write_count(args.moments, double(p.values_per_channel()));
  if (p.numel() == 0) {
    for (int64_t c = 0; c < p.channels; ++c) write(args.moments, c, Moments{});
    return;
  }
  const CpuPlan plan = plan_stats(p, at::get_num_threads());
  with_dtype(p.dtype, [&](auto t) {
    const auto* x = static_cast<const decltype(t)*>(args.x);
    const auto keep = [&](int64_t c, const Moments& m) { write(args.moments, c, m); };
    switch (plan.traversal) {
      case Traversal::kPlanes:
        return for_each_channel_of_planes(plan, x, keep);
      case Traversal::kShortPlanes:
        return for_each_channel_of_groups(plan, x, keep);
      case Traversal::kRows:
        return for_each_channel_of_rows(plan, x, [&](int64_t first, int count, const double* mean, const double* m2) {
          for (int i = 0; i < count; ++i) keep(first + i, {double(p.values_per_channel()), mean[i], m2[i]});
        });
    }
  });
}

}  // namespace bnfused::cpu
