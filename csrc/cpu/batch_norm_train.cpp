// Training forward: statistics of the batch, running statistics, y.
//
//   planes        A thread owns channels. It sums a channel and normalises it while it is still in L2, so that x is
//                 read from memory once. With fewer channels than threads a channel is cut into parts, and all
//                 parts are summed first.
//   short planes  The same with a group of channels, whose planes side by side are rows.
//   rows          Threads own ranges of rows. Every channel is in every row, so x is read twice, the second time
//                 backwards.
#include "cpu/backend.h"
#include "cpu/moments.h"

namespace bnfused::cpu {
namespace {

// Everything that follows from the moments of channels. Quotients that all channels share are computed once.
class Finish {
 public:
  Finish(const TrainArgs& args, double momentum)
      : args_(args),
        momentum_(momentum),
        per_value_(1 / double(args.problem.values_per_channel())),
        per_free_value_(1 / (double(args.problem.values_per_channel()) - 1)) {}

  // Takes `count` channels, at most kChannelsAtOnce, and calls set(channel, coefficients) for each.
  template <class A, class Set>
  void channels(int64_t first, int count, const double* mean, const double* m2, Set set) const {
    double invstd[kChannelsAtOnce], free_var[kChannelsAtOnce], weight[kChannelsAtOnce], bias[kChannelsAtOnce];
    for (int i = 0; i < count; ++i) {
      invstd[i] = 1 / std::sqrt(m2[i] * per_value_ + args_.eps);
      free_var[i] = m2[i] * per_free_value_;
    }
    std::copy_n(mean, count, args_.mean + first);
    std::copy_n(invstd, count, args_.invstd + first);
    move(args_.running_mean, first, count, momentum_, mean);
    move(args_.running_var, first, count, momentum_, free_var);
    read(args_.weight, first, count, 1, weight);
    read(args_.bias, first, count, 0, bias);
    for (int i = 0; i < count; ++i) set(first + i, affine<A>(mean[i], invstd[i], weight[i], bias[i]));
  }

  template <class A>
  Affine<A> channel(int64_t c, const Moments& m) const {
    Affine<A> coefficients;
    channels<A>(c, 1, &m.mean, &m.m2, [&](int64_t, const Affine<A>& a) { coefficients = a; });
    return coefficients;
  }

 private:
  const TrainArgs& args_;
  double momentum_, per_value_, per_free_value_;  // 1 / n, 1 / (n - 1), for n values per channel
};

template <class T>
void train_planes(const TrainArgs& args, const CpuPlan& plan, const Finish& finish) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const Leaves<T>& leaves = best_leaves<T>();
  const auto apply = leaves.apply(Layout::kPlanes, plan.streamed, forward_kind(args));
  const T* x = static_cast<const T*>(args.x);

  const auto apply_part = [&](int64_t c, const Part& part, const Affine<A>& coefficients, int64_t prefetch) {
    ApplyLoop<T> a = apply_loop<T>(args, part.last(p, c), part.last_mask(p, c));
    a.runs = reversed_runs_of(p, part);
    a.coefficients = &coefficients.mean;
    a.coefficient_stride = 1;
    a.prefetch = prefetch;
    apply(a);
  };

  const int64_t parts = plan.parts;
  if (parts == 1) {
    const Part whole = part_of(p, 0, 1);
    parallel_for(0, p.channels, plan.grain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Moments m = slab_moments(leaves, x + whole.first(p, c), runs_of(p, whole));
        // While one channel is written, the next one is fetched: reads and writes then share the way to memory.
        apply_part(c, whole, finish.template channel<A>(c, m), c + 1 < end ? plan.prefetch : 0);
      }
    });
    return;
  }
  const auto coefficients = std::make_unique<Affine<A>[]>(p.channels);
  for_each_channel_of_planes(plan, x,
                             [&](int64_t c, const Moments& m) { coefficients[c] = finish.template channel<A>(c, m); });
  parallel_for(0, p.channels * parts, plan.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      apply_part(i / parts, part_of(p, i % parts, parts), coefficients[i / parts], 0);
    }
  });
}

template <class T>
void train_short_planes(const TrainArgs& args, const CpuPlan& plan, const Finish& finish) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const int64_t group_channels = plan.group_channels, inner = args.problem.inner;
  const Leaves<T>& leaves = best_leaves<T>();
  const auto apply = leaves.apply(Layout::kRows, plan.streamed, forward_kind(args));
  const Part whole = part_of(p, 0, 1);
  parallel_for(0, p.channels, plan.grain, [&](int64_t begin, int64_t end) {
    GroupMoments<T> moments(group_channels, inner);
    GroupCoefficients<T, Affine<A>> coefficients(group_channels, inner);
    for (int64_t group = begin; group < end; ++group) {
      moments.sum(leaves, static_cast<const T*>(args.x) + whole.first(p, group), runs_of(p, whole));
      const int64_t first_of_group = group * group_channels;
      for_channels(0, group_channels, [&](int64_t first, int count) {
        double mean[kChannelsAtOnce], m2[kChannelsAtOnce];
        for (int i = 0; i < count; ++i) {
          mean[i] = moments[first + i].mean;
          m2[i] = moments[first + i].m2;
        }
        finish.template channels<A>(first_of_group + first, count, mean, m2,
                                    [&](int64_t c, const Affine<A>& a) { coefficients[c - first_of_group] = a; });
      });
      coefficients.spread(leaves, 0, kForwardCoefficients);
      ApplyLoop<T> a = apply_loop<T>(args, whole.last(p, group), whole.last_mask(p, group));
      a.runs = reversed_runs_of(p, whole);
      a.coefficients = coefficients.data();
      a.coefficient_stride = coefficients.stride();
      apply(a);
    }
  });
}

template <class T>
void train_rows(const TrainArgs& args, const CpuPlan& plan, const Finish& finish) {
  using A = Accumulate<T>;
  ColumnCoefficients<A> coefficients(plan.rows, plan.problem.channels, kForwardCoefficients);
  const auto set = [&](int64_t c, const Affine<A>& a) { coefficients.set(c, a); };
  for_each_channel_of_rows(plan, static_cast<const T*>(args.x),
                           [&](int64_t first, int count, const double* mean, const double* m2) {
                             finish.template channels<A>(first, count, mean, m2, set);
                             coefficients.repeat(first, count);
                           });
  parallel_for(0, plan.rows.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for_rows_backwards(plan, plan.rows.begin(task), plan.rows.end(task),
                         [&](Runs rows, int64_t first) { write_rows<T>(args, plan, coefficients, rows, first); });
    }
  });
}

}  // namespace

void batch_norm_train(const TrainArgs& args) {
  const double momentum = count_batch(args);
  const Problem& p = args.problem;
  if (p.numel() == 0) {  // the batch counts, but no statistics follow from it
    std::fill_n(args.mean, p.channels, 0.0);
    std::fill_n(args.invstd, p.channels, 0.0);
    return;
  }
  const Finish finish(args, momentum);
  const CpuPlan plan = plan_train(p, forward_request(args), at::get_num_threads());
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (plan.traversal) {
      case Traversal::kPlanes:
        return train_planes<T>(args, plan, finish);
      case Traversal::kShortPlanes:
        return train_short_planes<T>(args, plan, finish);
      case Traversal::kRows:
        return train_rows<T>(args, plan, finish);
    }
  });
}

}  // namespace bnfused::cpu
