// Training forward: one launch, or statistics, then apply.
#include "cuda/apply.h"
#include "cuda/dispatch.h"
#include "kernels/batch_norm_resident.cuh"

namespace bnfused::cuda {
namespace {

template <class T>
StatsArgs<T> stats_args(const TrainArgs& args, const Plan& plan, Workspace workspace) {
  return {static_cast<const T*>(args.x),
          args.problem.numel(),
          plan.wide,
          static_cast<Moments<Accumulate<T>>*>(workspace.partials),
          workspace.tickets,
          workspace.tickets + plan.tickets - 1,
          FinishStats(args)};
}

template <class T, class Activation>
ForwardBody<T, Activation> body_of(const TrainArgs& args, const Plan& plan, Activation activation) {
  return {static_cast<const T*>(args.x),
          static_cast<const T*>(args.residual),
          static_cast<T*>(args.y),
          args.mask,
          plan.wide,
          activation};
}

ForwardConstants constants_of(const TrainArgs& args) {
  return {args.weight, args.bias, args.mean, args.invstd, {}, {}, nullptr, nullptr, args.eps};
}

// In one launch.
template <class T>
cudaError_t resident(const TrainArgs& args, const Plan& plan, Workspace workspace, cudaStream_t stream) {
  return with_activation(args.epilogue, [&](auto activation) {
    using Act = decltype(activation);
    static_assert(std::max(sizeof(Moments<Accumulate<T>>), sizeof(Affine<Accumulate<T>>)) <= detail::kSharedOfColumn);
    const auto stats = stats_args<T>(args, plan, workspace);
    const auto body = body_of<T>(args, plan, activation);
    const auto constants = constants_of(args);
    if (plan.layout == Layout::kPlanes) {
      return launch_resident(plan, plan.planes, stream, batch_norm_resident_planes<T, Act>, stats, body, constants);
    }
    return launch_resident(plan, plan.reduce_rows, stream, batch_norm_resident_rows<T, Act>, stats, body, constants);
  });
}

template <class T>
cudaError_t stats(const TrainArgs& args, const Plan& plan, Workspace workspace, cudaStream_t stream) {
  const auto stats = stats_args<T>(args, plan, workspace);
  if (plan.layout == Layout::kPlanes) {
    const Planes& s = plan.planes;
    return launch(config(s.blocks(), s.threads, 0, stream), batch_norm_stats_planes<T>, stats, s);
  }
  const Rows& s = plan.reduce_rows;
  return launch(config(s.blocks(), s.threads, 0, stream), batch_norm_stats_rows<T>, stats, s);
}

}  // namespace

Request request_of(const TrainArgs& args) {
  return {is_wide({args.x, args.residual, args.y}), args.residual != nullptr, args.mask != nullptr};
}

cudaError_t batch_norm_train(const TrainArgs& args, const Plan& plan, Workspace workspace, cudaStream_t stream) {
  if (plan.strategy == Strategy::kEmpty) return launch_empty(args, args.num_batches_tracked, stream);
  return with_dtype(args.problem.dtype, [&](auto t) {
    using T = decltype(t);
    if (plan.strategy == Strategy::kSmall || plan.strategy == Strategy::kResident) {
      return resident<T>(args, plan, workspace, stream);
    }
    const cudaError_t status = stats<T>(args, plan, workspace, stream);
    if (status != cudaSuccess) return status;
    return apply({args.problem, args.x, args.residual, args.y, args.mask, constants_of(args), args.epilogue}, plan,
                 stream);
  });
}

}  // namespace bnfused::cuda
