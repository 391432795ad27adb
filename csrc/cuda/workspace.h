// What lies where in the workspace of a launch: first a slope and an offset for each channel, then the partial sums. A
// forward has only partial sums, and starts with them.
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
