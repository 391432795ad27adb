// The second half of the training forward and all of eval: the same kernels, compiled once, in batch_norm_eval.cu.
#pragma once
#include "cuda/launch.h"
#include "kernels/batch_norm_apply.cuh"

namespace bnfused::cuda {

struct ApplyArgs {
  Problem problem;
  const void *x, *residual;
  void* y;
  uint8_t* mask;
  ForwardConstants constants;
  Epilogue epilogue;
};

cudaError_t apply(const ApplyArgs&, const Plan&, cudaStream_t);

}  // namespace bnfused::cuda
