// How large a workspace is.
#include "cuda/workspace.h"

namespace bnfused::cuda {

// Every launch gets a workspace of this size. A forward does not use the room for the slopes.
int64_t workspace_bytes(const LaunchPlan& plan, const Problem& p) {
  static_assert(sizeof(GradSums) <= sizeof(Moments<double>) && sizeof(Moments<float>) == sizeof(Moments<double>));
  return p.channels * int64_t(sizeof(Slope)) + plan.partials * int64_t(sizeof(Moments<double>));
}

}  // namespace bnfused::cuda
