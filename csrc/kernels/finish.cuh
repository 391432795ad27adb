// What follows from the moments of one channel: mean and invstd, the running statistics, and the moments of a part.
#pragma once
#include "kernels/accumulators.cuh"
#include "kernels/layout.cuh"
#include "kernels/pointwise.cuh"

namespace bnfused {

// The state that a batch changes: the running statistics and the counter of batches. Each of them may be absent.
struct RunningStats {
  PerChannel running_mean, running_var;
  int64_t* num_batches_tracked = nullptr;
  double momentum = 0;
  bool cumulative = false;

  RunningStats() = default;
  template <class Args>
  explicit RunningStats(const Args& args)
      : running_mean(args.running_mean),
        running_var(args.running_var),
        num_batches_tracked(args.num_batches_tracked),
        momentum(args.momentum),
        cumulative(args.cumulative) {}

  __device__ __forceinline__ void move(int64_t c, double mean, double unbiased_var) const {
    const double weight = cumulative ? 1 / double(*num_batches_tracked + 1) : momentum;
    write(running_mean, c, (1 - weight) * read(running_mean, c, 0) + weight * mean);
    write(running_var, c, (1 - weight) * read(running_var, c, 0) + weight * unbiased_var);
  }

  // The last of `blocks` blocks to come here counts this batch. All blocks have read the counter by then.
  __device__ __forceinline__ void count_batch(unsigned* ticket, unsigned blocks) const {
    if (num_batches_tracked == nullptr) return;
    if (is_last_block(ticket, blocks) && threadIdx.x == 0) ++*num_batches_tracked;
  }
};

// Computes and writes everything that follows from the moments of one channel.
struct FinishStats : RunningStats {
  PackedMoments packed;  // out, if x is a part of a batch; then nothing else is written
  double count;          // values of a channel
  double *mean, *invstd;
  double eps;
  double per_value, per_free_value;  // 1 / n and 1 / (n - 1), where n is `count`

  explicit FinishStats(const TrainArgs& args)
      : RunningStats(args),
        count(double(args.problem.values_per_channel())),
        mean(args.mean),
        invstd(args.invstd),
        eps(args.eps),
        per_value(1 / double(args.problem.values_per_channel())),
        per_free_value(1 / (double(args.problem.values_per_channel()) - 1)) {}

  explicit FinishStats(const MomentsArgs& args)
      : packed(args.moments),
        count(double(args.problem.values_per_channel())),
        mean(nullptr),
        invstd(nullptr),
        eps(0),
        per_value(0),
        per_free_value(0) {}

  template <class A>
  __device__ __forceinline__ void operator()(int64_t c, const Moments<A>& m) const {
    if (packed) {
      pack(packed, c, m.mean, m.m2, count);
      if (c == 0) pack_count(packed, count);
      return;
    }
    mean[c] = m.mean;
    invstd[c] = 1 / sqrt(m.m2 * per_value + eps);
    move(c, m.mean, m.m2 * per_free_value);
  }
};

}  // namespace bnfused
