// What lies where in the workspace of a launch.
//
// A slope and an offset for each channel come first, and then the partial sums. The forward has partial sums alone and
// starts with them: it leaves the room for the slopes unused.
#pragma once
#include "cuda/launch.h"
#include "kernels/batch_norm_backward.cuh"

namespace bnfused::cuda {

inline Slope* slopes_in(Workspace workspace) { return static_cast<Slope*>(workspace.partials); }

inline GradSums* grad_sums_in(Workspace workspace, const Problem& p) {
  return reinterpret_cast<GradSums*>(slopes_in(workspace) + p.channels);
}

template <class A>
Moments<A>* moments_in(Workspace workspace) {
  return static_cast<Moments<A>*>(workspace.partials);
}

}  // namespace bnfused::cuda
