// Moments of the batch: each channel's mean and sum of squared deviations, for statistics that are merged elsewhere.
#include "cpu/backend.h"
#include "cpu/moments.h"

namespace bnfused::cpu {

void batch_norm_stats(const MomentsArgs& args) {
  const Problem& p = args.problem;
  if (p.numel() == 0) {
    std::fill_n(args.mean, p.channels, 0.0);
    std::fill_n(args.m2, p.channels, 0.0);
    return;
  }
  with_dtype(p.dtype, [&](auto t) {
    const auto* x = static_cast<const decltype(t)*>(args.x);
    const auto write = [&](int64_t c, const Moments& m) {
      args.mean[c] = m.mean;
      args.m2[c] = m.m2;
    };
    if (has_short_planes(p)) {
      for_each_channel_of_groups(p, x, write);
    } else if (is_planes(p)) {
      for_each_channel_of_planes(p, x, parts_per_channel(p), write);
    } else {
      for_each_channel_of_rows(p, x, write);
    }
  });
}

}  // namespace bnfused::cpu
