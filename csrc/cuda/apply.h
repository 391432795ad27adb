// The launch that batch_norm_apply is, and that the training forward ends with. Its kernels are compiled once, in
// batch_norm_apply.cu.
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
