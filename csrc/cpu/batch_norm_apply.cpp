// Forward with statistics that are given: one pass over x, in memory order.
#include <cmath>

#include "cpu/backend.h"
#include "cpu/rows.h"
#include "cpu/short_planes.h"

namespace bnfused::cpu {
namespace {

// Writes the statistics of `count` channels, at most kChannelsAtOnce, and calls set(channel, coefficients) for each.
template <class A, class Set>
void finish(const ApplyArgs& args, int64_t first, int count, Set set) {
  double mean[kChannelsAtOnce], invstd[kChannelsAtOnce], weight[kChannelsAtOnce], bias[kChannelsAtOnce];
  read(args.running_mean, first, count, 0, mean);
  read(args.running_var, first, count, 1, invstd);
  read(args.weight, first, count, 1, weight);
  read(args.bias, first, count, 0, bias);
  for (int i = 0; i < count; ++i) invstd[i] = 1 / std::sqrt(invstd[i] + args.eps);
  if (args.mean) std::copy_n(mean, count, args.mean + first);
  if (args.invstd) std::copy_n(invstd, count, args.invstd + first);
  for (int i = 0; i < count; ++i) set(first + i, affine<A>(mean[i], invstd[i], weight[i], bias[i]));
}

template <class T>
void apply_planes(const ApplyArgs& args, const CpuPlan& plan) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;  // its channels are the planes
  const int64_t channels = args.problem.channels, parts = plan.parts;
  const auto apply = best_leaves<T>().apply(Layout::kPlanes, plan.streamed, forward_kind(args));
  // [kind][channel]: consecutive planes are consecutive channels.
  const auto coefficients = scratch<A>(kForwardCoefficients * channels);
  parallel_for(0, channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t first, int count) {
      finish<A>(args, first, count, [&](int64_t c, const Affine<A>& a) {
        coefficients[kMean * channels + c] = a.mean;
        coefficients[kScale * channels + c] = a.scale;
        coefficients[kShift * channels + c] = a.shift;
      });
    });
  });
  const auto apply_part = [&](int64_t plane, int64_t count, const Part& part) {
    ApplyLoop<T> a = apply_loop<T>(args, part.first(p, plane), part.first_mask(p, plane));
    a.runs = {count, part.end - part.begin, p.inner, (p.inner + 7) / 8};
    a.coefficients = coefficients.get() + plane % channels;
    a.coefficient_stride = channels;
    a.coefficient_step = 1;
    apply(a);
  };
  parallel_for(0, p.channels * parts, plan.grain, [&](int64_t begin, int64_t end) {
    if (parts > 1) {
      for (int64_t i = begin; i < end; ++i) apply_part(i / parts, 1, part_of(p, i % parts, parts));
      return;
    }
    for (int64_t plane = begin; plane < end;) {
      const int64_t count = std::min(end - plane, channels - plane % channels);
      apply_part(plane, count, part_of(p, 0, 1));
      plane += count;
    }
  });
}

template <class T>
void apply_short_planes(const ApplyArgs& args, const CpuPlan& plan) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const int64_t group_channels = plan.group_channels, inner = args.problem.inner;
  const Leaves<T>& leaves = best_leaves<T>();
  const auto apply = leaves.apply(Layout::kRows, plan.streamed, forward_kind(args));
  const Part whole = part_of(p, 0, 1);
  parallel_for(0, p.channels, plan.grain, [&](int64_t begin, int64_t end) {
    GroupCoefficients<T, Affine<A>> coefficients(group_channels, inner);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first_of_group = group * group_channels;
      for_channels(first_of_group, first_of_group + group_channels, [&](int64_t first, int count) {
        finish<A>(args, first, count, [&](int64_t c, const Affine<A>& a) { coefficients[c - first_of_group] = a; });
      });
      coefficients.spread(leaves, 0, kForwardCoefficients);
      ApplyLoop<T> a = apply_loop<T>(args, whole.first(p, group), whole.first_mask(p, group));
      a.runs = runs_of(p, whole);
      a.coefficients = coefficients.data();
      a.coefficient_stride = coefficients.stride();
      apply(a);
    }
  });
}

template <class T>
void apply_rows(const ApplyArgs& args, const CpuPlan& plan) {
  using A = Accumulate<T>;
  const int64_t channels = plan.problem.channels;
  ColumnCoefficients<A> coefficients(plan.rows, channels, kForwardCoefficients);
  parallel_for(0, channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t first, int count) {
      finish<A>(args, first, count, [&](int64_t c, const Affine<A>& a) { coefficients.set(c, a); });
      coefficients.repeat(first, count);
    });
  });
  parallel_for(0, plan.rows.rows(), plan.grain, [&](int64_t begin, int64_t end) {
    for_rows(plan.rows, begin, end,
             [&](Runs rows, int64_t first) { write_rows<T>(args, plan, coefficients, rows, first); });
  });
}

}  // namespace

void batch_norm_apply(const ApplyArgs& args) {
  const Problem& p = args.problem;
  const CpuPlan plan = plan_apply(p, forward_request(args), at::get_num_threads());
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.numel() == 0) {
      for_channels(0, p.channels, [&](int64_t first, int count) {
        finish<Accumulate<T>>(args, first, count, [](int64_t, const Affine<Accumulate<T>>&) {});
      });
      return;
    }
    switch (plan.traversal) {
      case Traversal::kPlanes:
        return apply_planes<T>(args, plan);
      case Traversal::kShortPlanes:
        return apply_short_planes<T>(args, plan);
      case Traversal::kRows:
        return apply_rows<T>(args, plan);
    }
  });
}

}  // namespace bnfused::cpu
