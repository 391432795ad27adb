// The launch of the statistics kernels, for the training forward and for a part of a batch.
#pragma once
#include "cuda/launch.h"
#include "cuda/workspace.h"
#include "kernels/batch_norm_stats.cuh"

namespace bnfused::cuda {

template <class T, class Args>
StatsArgs<T> stats_args(const Args& args, const LaunchPlan& plan, Workspace workspace) {
  return {static_cast<const T*>(args.x),
          args.problem.numel(),
          plan.wide,
          moments_in<Accumulate<T>>(workspace),
          workspace.tickets,
          workspace.tickets + plan.tickets - 1,
          FinishStats(args)};
}

cudaError_t stats(const TrainArgs&, const LaunchPlan&, Workspace, cudaStream_t);

}  // namespace bnfused::cuda
