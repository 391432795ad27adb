// The backward, in one launch or two: sums, then the gradients that depend on them.
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/workspace.h"
#include "kernels/batch_norm_backward.cuh"
#include "kernels/batch_norm_resident.cuh"

namespace bnfused::cuda {
namespace {

template <class T, class Act>
GradArgs<T, Act> grad_args(const BackwardArgs& args, const LaunchPlan& plan, Workspace workspace, Act activation) {
  GradArgs<T, Act> g{{static_cast<const T*>(args.grad_y), static_cast<const T*>(args.x),
                      static_cast<const T*>(args.residual), args.mask, static_cast<T*>(args.grad_x),
                      static_cast<T*>(args.grad_residual), args.training, plan.wide, activation},
                     {},
                     args.problem.numel(),
                     nullptr,
                     workspace.tickets};
  Slope* slopes = slopes_in(workspace);
  g.constants = {args.weight,
                 args.bias,
                 args.mean,
                 args.invstd,
                 args.grad_weight,
                 args.grad_bias,
                 request_of(args).waits() ? slopes : nullptr,
                 1 / double(args.problem.values_per_channel()),
                 args.sum_grad,
                 args.sum_grad_xhat,
                 args.batch_count};
  g.partials = grad_sums_in(workspace, args.problem);
  return g;
}

// Sums and gradients in one launch.
template <class T, class Act>
cudaError_t resident(const GradArgs<T, Act>& args, const LaunchPlan& plan, cudaStream_t stream) {
  static_assert(std::max(sizeof(Affine<Accumulate<T>>) + sizeof(GradSums), sizeof(GradAffine<Accumulate<T>>)) <=
                planning::kSharedOfColumn);
  if (plan.layout == Layout::kPlanes) {
    return launch_resident(plan, plan.planes, stream, batch_norm_backward_resident_planes<T, Act>, args);
  }
  return launch_resident(plan, plan.reduce_rows, stream, batch_norm_backward_resident_rows<T, Act>, args);
}

// `write_gradients` says that the gradients of the tensors do not depend on the sums, so that this pass stores them.
template <class T, class Act>
cudaError_t reduce(const GradArgs<T, Act>& args, const LaunchPlan& plan, bool write_gradients, cudaStream_t stream) {
  if (plan.layout == Layout::kPlanes) {
    const Planes& s = plan.planes;
    return launch(config(s.blocks(), s.threads, 0, stream), batch_norm_backward_reduce_planes<T, Act>, args,
                  write_gradients, s);
  }
  const Rows& s = plan.reduce_rows;
  return launch(config(s.blocks(), s.threads, table_bytes<Affine<Accumulate<T>>>(s), stream),
                batch_norm_backward_reduce_rows<T, Act>, args, write_gradients, s);
}

template <class T, class Act>
cudaError_t apply(const GradArgs<T, Act>& args, const LaunchPlan& plan, cudaStream_t stream) {
  if (plan.layout == Layout::kPlanes) {
    const Flat& s = plan.flat;
    return launch(config(s.blocks(), s.threads, table_bytes<GradAffine<Accumulate<T>>>(s), stream),
                  batch_norm_backward_apply_planes<T, Act>, args.body, args.constants, args.numel, s);
  }
  const Rows& s = plan.apply_rows;
  return launch(config(s.blocks(), s.threads, table_bytes<GradAffine<Accumulate<T>>>(s), stream),
                batch_norm_backward_apply_rows<T, Act>, args.body, args.constants, args.numel, s);
}

}  // namespace

BackwardRequest request_of(const BackwardArgs& args) {
  return {is_wide({args.grad_y, args.x, args.residual, args.grad_x, args.grad_residual}),
          args.residual != nullptr,
          args.mask != nullptr,
          args.training,
          args.grad_x != nullptr,
          args.grad_residual != nullptr,
          args.grad_weight || args.grad_bias,
          bool(args.sum_grad)};
}

cudaError_t batch_norm_backward(const BackwardArgs& args, const LaunchPlan& plan, Workspace workspace,
                                cudaStream_t stream) {
  if (plan.strategy == Strategy::kEmpty) return launch_empty(args, nullptr, stream);
  return with_dtype(args.problem.dtype, [&](auto t) {
    using T = decltype(t);
    return with_gradient(args.epilogue, args.mask != nullptr, [&](auto activation) {
      const auto grads = grad_args<T>(args, plan, workspace, activation);
      switch (plan.strategy) {
        case Strategy::kSmall:
        case Strategy::kResident:
          return resident(grads, plan, stream);
        case Strategy::kReduce:
          return reduce(grads, plan, true, stream);
        case Strategy::kApply:
          return apply(grads, plan, stream);
        default: {
          const cudaError_t status = reduce(grads, plan, false, stream);
          return status == cudaSuccess ? apply(grads, plan, stream) : status;
        }
      }
    });
  });
}

}  // namespace bnfused::cuda
