// The training forward: everything in one launch, or one for the statistics and one that applies them.
#include "cuda/apply.h"
#include "cuda/dispatch.h"
#include "cuda/stats.h"
#include "kernels/batch_norm_resident.cuh"

namespace bnfused::cuda {
namespace {

template <class T, class Act>
ForwardBody<T, Act> body_of(const TrainArgs& args, const LaunchPlan& plan, Act activation) {
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

// Statistics and apply in one launch.
template <class T>
cudaError_t resident(const TrainArgs& args, const LaunchPlan& plan, Workspace workspace, cudaStream_t stream) {
  return with_activation(args.epilogue, [&](auto activation) {
    using Act = decltype(activation);
    static_assert(std::max(sizeof(Moments<Accumulate<T>>), sizeof(Affine<Accumulate<T>>)) <= planning::kSharedOfColumn);
    const auto stats = stats_args<T>(args, plan, workspace);
    const auto body = body_of<T>(args, plan, activation);
    const auto constants = constants_of(args);
    if (plan.layout == Layout::kPlanes) {
      return launch_resident(plan, plan.planes, stream, batch_norm_resident_planes<T, Act>, stats, body, constants);
    }
    return launch_resident(plan, plan.reduce_rows, stream, batch_norm_resident_rows<T, Act>, stats, body, constants);
  });
}

}  // namespace

Request request_of(const TrainArgs& args) {
  return {is_wide({args.x, args.residual, args.y}), args.residual != nullptr, args.mask != nullptr};
}

cudaError_t batch_norm_train(const TrainArgs& args, const LaunchPlan& plan, Workspace workspace, cudaStream_t stream) {
  if (plan.strategy == Strategy::kEmpty) return launch_empty(args, args.num_batches_tracked, stream);
  if (plan.strategy == Strategy::kSmall || plan.strategy == Strategy::kResident) {
    return with_dtype(args.problem.dtype, [&](auto t) { return resident<decltype(t)>(args, plan, workspace, stream); });
  }
  const cudaError_t status = stats(args, plan, workspace, stream);
  if (status != cudaSuccess) return status;
  return apply({args.problem, args.x, args.residual, args.y, args.mask, constants_of(args), args.epilogue}, plan,
               stream);
}

}  // namespace bnfused::cuda
