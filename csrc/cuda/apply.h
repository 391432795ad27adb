// The launch of the apply kernels: all of batch_norm_apply, and the second half of a training forward in two launches.
#pragma once
#include "cuda/launch.h"
#include "kernels/batch_norm_apply.cuh"

namespace bnfused::cuda {

struct ApplyLaunch {
  Problem problem;
  const void *x, *residual;
  void* y;
  uint8_t* mask;
  ForwardConstants constants;
  Epilogue epilogue;
};

cudaError_t apply(const ApplyLaunch&, const LaunchPlan&, cudaStream_t);

}  // namespace bnfused::cuda
