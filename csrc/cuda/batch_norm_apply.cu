// The forward with given statistics, and the apply of the training forward: one launch.
#include "cuda/apply.h"
#include "cuda/dispatch.h"

namespace bnfused::cuda {

cudaError_t apply(const ApplyLaunch& args, const LaunchPlan& plan, cudaStream_t stream) {
  return with_dtype(args.problem.dtype, [&](auto t) {
    using T = decltype(t);
    return with_activation(args.epilogue, [&](auto activation) {
      using Act = decltype(activation);
      using Body = ForwardBody<T, Act>;
      const Body body{static_cast<const T*>(args.x),
                      static_cast<const T*>(args.residual),
                      static_cast<T*>(args.y),
                      args.mask,
                      plan.wide,
                      activation};
      const int64_t numel = args.problem.numel();
      if (plan.layout == Layout::kPlanes) {
        const Flat& s = plan.flat;
        return launch(config(s.blocks(), s.threads, table_bytes<typename Body::Constants>(s), stream),
                      batch_norm_apply_planes<T, Act>, body, args.constants, numel, s);
      }
      const Rows& s = plan.apply_rows;
      return launch(config(s.blocks(), s.threads, table_bytes<typename Body::Constants>(s), stream),
                    batch_norm_apply_rows<T, Act>, body, args.constants, numel, s);
    });
  });
}

Request request_of(const ApplyArgs& args) {
  return {is_wide({args.x, args.residual, args.y}), args.residual != nullptr, args.mask != nullptr};
}

cudaError_t batch_norm_apply(const ApplyArgs& args, const LaunchPlan& plan, cudaStream_t stream) {
  if (plan.strategy == Strategy::kEmpty) return launch_empty(args, nullptr, stream);
  const ForwardConstants constants{args.weight,      args.bias, nullptr,     nullptr, args.running_mean,
                                   args.running_var, args.mean, args.invstd, args.eps};
  return apply({args.problem, args.x, args.residual, args.y, args.mask, constants, args.epilogue}, plan, stream);
}

}  // namespace bnfused::cuda
