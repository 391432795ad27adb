// Training forward: statistics of the batch, running statistics, y.
//
//   planes        a thread owns channels: it sums a channel and normalises it while it is still in L2, so that x
//                 is read from memory once. With fewer channels than threads a channel is cut into parts, and all
//                 parts are summed first.
//   short planes  the same with a group of channels, whose planes side by side are rows.
//   rows          threads own ranges of rows: every channel is in every row, so x is read twice, the second time
//                 backwards.
#include "cpu/backend.h"
#include "cpu/moments.h"

namespace bnfused::cpu {
namespace {

// Everything that follows from the moments of channels. What all of them share is divided once.
class Finish {
 public:
  Finish(const TrainArgs& args, double momentum)
      : args_(args),
        momentum_(momentum),
        per_row_(1 / double(args.problem.values_per_channel())),
        per_free_row_(1 / (double(args.problem.values_per_channel()) - 1)) {}

  // `count` channels, at most kChannelsTogether: calls set(channel, coefficients).
  template <class A, class Set>
  void channels(int64_t first, int count, const double* mean, const double* m2, Set set) const {
    double invstd[kChannelsTogether], free_var[kChannelsTogether], weight[kChannelsTogether], bias[kChannelsTogether];
    for (int i = 0; i < count; ++i) {
      invstd[i] = 1 / std::sqrt(m2[i] * per_row_ + args_.eps);
      free_var[i] = m2[i] * per_free_row_;
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
  double momentum_, per_row_, per_free_row_;  // 1 / rows, 1 / (rows - 1)
};

template <class T>
void train_planes(const TrainArgs& args, const Finish& finish) {
  using A = Accumulate<T>;
  const Problem& p = args.problem;
  const Leaves<T>& leaf = best_leaves<T>();
  const auto apply = leaf.apply[int(Layout::kPlanes)][streams<T>(p, p.inner, {args.y})][int(forward_kind(args))];
  const T* x = static_cast<const T*>(args.x);

  const auto apply_part = [&](int64_t c, const Part& part, const Affine<A>& coefficients, int64_t prefetch) {
    ApplyLoop<T> a = apply_loop<T>(args, part.last(p, c), part.last_mask(p, c));
    a.runs = part.reversed(p);
    a.coefficients = &coefficients.mean;
    a.coefficient_stride = 1;
    a.prefetch = prefetch;
    apply(a);
  };

  const int64_t parts = parts_per_channel(p);
  if (parts == 1) {
    const Part whole = part_of(p, 0, 1);
    // While one channel is written, the next one is fetched: reads and writes then share the way to memory.
    const int64_t fetched = args.residual ? 2 : 1;
    const bool fits = fetched * p.values_per_channel() * int64_t(sizeof(T)) <= kPrefetchUpToBytes;
    parallel_for(0, p.channels, grain_for(p.values_per_channel()), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Moments m = slab_moments(leaf, x + whole.first(p, c), whole.runs(p));
        apply_part(c, whole, finish.template channel<A>(c, m), fits && c + 1 < end ? prefetch_ahead<T>(p) : 0);
      }
    });
    return;
  }
  const auto coefficients = std::make_unique<Affine<A>[]>(p.channels);
  for_each_channel_of_planes(p, x, parts,
                             [&](int64_t c, const Moments& m) { coefficients[c] = finish.template channel<A>(c, m); });
  parallel_for(0, p.channels * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      apply_part(i / parts, part_of(p, i % parts, parts), coefficients[i / parts], 0);
    }
  });
}

template <class T>
void train_short_planes(const TrainArgs& args, const Finish& finish) {
  using A = Accumulate<T>;
  const Problem p = grouped(args.problem);
  const int64_t inner = args.problem.inner, together = p.inner / inner;
  const Leaves<T>& leaf = best_leaves<T>();
  const auto apply = leaf.apply[int(Layout::kRows)][streams<T>(p, p.inner, {args.y})][int(forward_kind(args))];
  const Part whole = part_of(p, 0, 1);
  parallel_for(0, p.channels, grain_for(p.values_per_channel()), [&](int64_t begin, int64_t end) {
    GroupMoments<T> moments(together, inner);
    GroupCoefficients<T, Affine<A>> coefficients(together, inner);
    for (int64_t group = begin; group < end; ++group) {
      moments.sum(leaf, static_cast<const T*>(args.x) + whole.first(p, group), whole.runs(p));
      const int64_t first_of_group = group * together;
      for_channels(0, together, [&](int64_t first, int count) {
        double mean[kChannelsTogether], m2[kChannelsTogether];
        for (int i = 0; i < count; ++i) {
          mean[i] = moments[first + i].mean;
          m2[i] = moments[first + i].m2;
        }
        finish.template channels<A>(first_of_group + first, count, mean, m2,
                                    [&](int64_t c, const Affine<A>& a) { coefficients[c - first_of_group] = a; });
      });
      coefficients.spread(leaf, 0, kForwardCoefficients);
      ApplyLoop<T> a = apply_loop<T>(args, whole.last(p, group), whole.last_mask(p, group));
      a.runs = whole.reversed(p);
      a.coefficients = coefficients.data();
      a.coefficient_stride = coefficients.stride();
      apply(a);
    }
  });
}

template <class T>
void train_rows(const TrainArgs& args, const Finish& finish) {
  using A = Accumulate<T>;
  const Problem& p = args.problem;
  const RowView view = row_view(p, kColumns, args.mask != nullptr);
  ColumnCoefficients<A> coefficients(view, p.channels, kForwardCoefficients);
  const auto set = [&](int64_t c, const Affine<A>& a) { coefficients.set(c, a); };
  for_each_channel_of_rows(p, static_cast<const T*>(args.x),
                           [&](int64_t first, int count, const double* mean, const double* m2) {
                             finish.template channels<A>(first, count, mean, m2, set);
                             coefficients.repeat(first, count);
                           });

  const RowTasks tasks(p, view);
  parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for_rows_backwards(view, tasks.begin(task), tasks.end(task), sizeof(T),
                         [&](Runs rows, int64_t first) { apply_rows<T>(args, view, coefficients, rows, first); });
    }
  });
}

}  // namespace

void batch_norm_train(const TrainArgs& args) {
  const double momentum = count_batch(args);
  const Problem& p = args.problem;
  if (p.numel() == 0) {  // counted; nothing to learn from
    std::fill_n(args.mean, p.channels, 0.0);
    std::fill_n(args.invstd, p.channels, 0.0);
    return;
  }
  const Finish finish(args, momentum);
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (has_short_planes(p)) {
      train_short_planes<T>(args, finish);
    } else {
      is_planes(p) ? train_planes<T>(args, finish) : train_rows<T>(args, finish);
    }
  });
}

}  // namespace bnfused::cpu
