// Launches of the statistics: of a batch, of a part of a batch, and of a batch from the moments of its parts.
#include "cuda/dispatch.h"
#include "cuda/stats.h"
#include "kernels/batch_norm_gather_stats.cuh"

namespace bnfused::cuda {
namespace {

template <class Args>
cudaError_t stats_of(const Args& args, const LaunchPlan& plan, Workspace workspace, cudaStream_t stream) {
  return with_dtype(args.problem.dtype, [&](auto t) {
    using T = decltype(t);
    const auto stats = stats_args<T>(args, plan, workspace);
    if (plan.layout == Layout::kPlanes) {
      const Planes& s = plan.planes;
      return launch(config(s.blocks(), s.threads, 0, stream), batch_norm_stats_planes<T>, stats, s);
    }
    const Rows& s = plan.reduce_rows;
    return launch(config(s.blocks(), s.threads, 0, stream), batch_norm_stats_rows<T>, stats, s);
  });
}

}  // namespace

cudaError_t stats(const TrainArgs& args, const LaunchPlan& plan, Workspace workspace, cudaStream_t stream) {
  return stats_of(args, plan, workspace, stream);
}

Request request_of(const MomentsArgs& args) { return {is_wide({args.x})}; }

cudaError_t batch_norm_stats(const MomentsArgs& args, const LaunchPlan& plan, Workspace workspace,
                             cudaStream_t stream) {
  if (plan.strategy == Strategy::kEmpty) return launch_empty(args, nullptr, stream);
  return stats_of(args, plan, workspace, stream);
}

cudaError_t batch_norm_gather_stats(const GatherArgs& args, unsigned* ticket, cudaStream_t stream) {
  const Merge s = merge_of(args.parts, args.channels);
  return launch(config(s.blocks(), s.threads, 0, stream), ::bnfused::batch_norm_gather_stats, args, RunningStats(args),
                ticket, s);
}

}  // namespace bnfused::cuda
