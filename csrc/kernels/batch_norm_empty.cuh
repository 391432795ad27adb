// What the ops return for a batch without values. The batch is counted, and does not move the running statistics.
//
//   computes  training: mean = invstd = 0, and the counter. Parts, backward: zeros. Eval: what a backward needs
//   moves     per-channel values only
//   blocks    one thread for each channel; at least one block
#pragma once
#include "kernels/layout.cuh"
#include "kernels/pointwise.cuh"

namespace bnfused {

__device__ __forceinline__ void finish_empty(const TrainArgs& args, uint32_t c) {
  args.mean[c] = 0;
  args.invstd[c] = 0;
}

__device__ __forceinline__ void finish_empty(const MomentsArgs& args, uint32_t c) { pack(args.moments, c, 0, 0, 0); }

__device__ __forceinline__ void finish_empty(const ApplyArgs& args, uint32_t c) {
  if (args.mean == nullptr) return;
  args.mean[c] = read(args.running_mean, c, 0);
  args.invstd[c] = 1 / sqrt(read(args.running_var, c, 1) + args.eps);
}

__device__ __forceinline__ void finish_empty(const BackwardArgs& args, uint32_t c) {
  write(args.grad_weight, c, 0);
  write(args.grad_bias, c, 0);
}

// A batch with values but without channels has a count too.
__device__ __forceinline__ void count_empty(const MomentsArgs& args) {
  pack_count(args.moments, double(args.problem.values_per_channel()));
}
template <class Args>
__device__ __forceinline__ void count_empty(const Args&) {}

template <class Args>
__global__ void __launch_bounds__(kMaxThreads)
    batch_norm_empty(Args args, uint32_t channels, int64_t* num_batches_tracked) {
  const uint32_t c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < channels) finish_empty(args, c);
  if (c > 0) return;
  count_empty(args);
  if (num_batches_tracked != nullptr) ++*num_batches_tracked;
}

}  // namespace bnfused
