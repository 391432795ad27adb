// Eval forward: the statistics are given, so it is one pass over x, in memory order.
#include <cmath>

#include "cpu/backend.h"
#include "cpu/driver.h"

namespace bnfused::cpu {
namespace {

// What is kept of `count` channels, at most kChannelsTogether; calls set(channel, coefficients).
template <class A, class Set>
void finish(const ApplyArgs& args, int64_t first, int count, Set set) {
  double mean[kChannelsTogether], invstd[kChannelsTogether], weight[kChannelsTogether], bias[kChannelsTogether];
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
void eval_planes(const ApplyArgs& args) {
  using A = Accumulate<T>;
  const Problem& p = args.problem;
  const auto apply =
      best_leaves<T>().apply[int(Layout::kPlanes)][streams<T>(p, p.inner, {args.y})][int(forward_kind(args))];
  // [kind][channel]: consecutive planes are consecutive channels.
  const auto coefficients = scratch<A>(kForwardCoefficients * p.channels);
  parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t first, int count) {
      finish<A>(args, first, count, [&](int64_t c, const Affine<A>& a) {
        coefficients[kMean * p.channels + c] = a.mean;
        coefficients[kScale * p.channels + c] = a.scale;
        coefficients[kShift * p.channels + c] = a.shift;
      });
    });
  });
  const int64_t mask_plane = (p.inner + 7) / 8;
  const auto apply_planes = [&](int64_t plane, int64_t count, int64_t begin, int64_t length) {
    ApplyLoop<T> a = apply_loop<T>(args, plane * p.inner + begin, plane * mask_plane + begin / 8);
    a.runs = {count, length, p.inner, mask_plane};
    a.coefficients = coefficients.get() + plane % p.channels;
    a.coefficient_stride = p.channels;
    a.coefficient_step = 1;
    apply(a);
  };
  const int64_t planes = p.outer * p.channels;
  if (planes < at::get_num_threads() && p.numel() >= kSerialValues) {
    const int64_t parts = at::get_num_threads();
    parallel_for(0, planes * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Part part = part_of({1, 1, p.inner, p.dtype}, i % parts, parts);
        apply_planes(i / parts, 1, part.begin, part.end - part.begin);
      }
    });
    return;
  }
  parallel_for(0, planes, grain_for(p.inner), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end;) {
      const int64_t count = std::min(end - plane, p.channels - plane % p.channels);
      apply_planes(plane, count, 0, p.inner);
      plane += count;
    }
  });
}

// In groups, a sample is not read in one go. float32 in the cache loses more by that than it gains (8 x 2048 x 7 x 7:
// 95 instead of 70 us); 16-bit values, where vectors cost the most, do not (94 instead of 118), nor does what is
// streamed.
template <class T>
bool gains_in_groups(const ApplyArgs& args) {
  const Problem p = grouped(args.problem);
  return args.mask || sizeof(T) == 2 || streams<T>(p, p.inner, {args.y});
}

template <class T>
void eval_short_planes(const ApplyArgs& args) {
  using A = Accumulate<T>;
  const Problem p = grouped(args.problem);
  const int64_t inner = args.problem.inner, together = p.inner / inner;
  const Leaves<T>& leaf = best_leaves<T>();
  const auto apply = leaf.apply[int(Layout::kRows)][streams<T>(p, p.inner, {args.y})][int(forward_kind(args))];
  const Part whole = part_of(p, 0, 1);
  parallel_for(0, p.channels, grain_for(p.values_per_channel()), [&](int64_t begin, int64_t end) {
    GroupCoefficients<T, Affine<A>> coefficients(together, inner);
    for (int64_t group = begin; group < end; ++group) {
      for_channels(group * together, (group + 1) * together, [&](int64_t first, int count) {
        finish<A>(args, first, count, [&](int64_t c, const Affine<A>& a) { coefficients[c - group * together] = a; });
      });
      coefficients.spread(leaf, 0, kForwardCoefficients);
      ApplyLoop<T> a = apply_loop<T>(args, whole.first(p, group), whole.first_mask(p, group));
      a.runs = whole.runs(p);
      a.coefficients = coefficients.data();
      a.coefficient_stride = coefficients.stride();
      apply(a);
    }
  });
}

template <class T>
void eval_rows(const ApplyArgs& args) {
  using A = Accumulate<T>;
  const Problem& p = args.problem;
  const RowView view = row_view(p, kColumns, args.mask != nullptr);
  ColumnCoefficients<A> coefficients(view, p.channels, kForwardCoefficients);
  parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t first, int count) {
      finish<A>(args, first, count, [&](int64_t c, const Affine<A>& a) { coefficients.set(c, a); });
      coefficients.repeat(first, count);
    });
  });
  parallel_for(0, view.rows(), grain_for(view.columns), [&](int64_t begin, int64_t end) {
    for_rows(view, begin, end, [&](Runs rows, int64_t first) { apply_rows<T>(args, view, coefficients, rows, first); });
  });
}

}  // namespace

void batch_norm_apply(const ApplyArgs& args) {
  const Problem& p = args.problem;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.numel() == 0) {
      for_channels(0, p.channels, [&](int64_t first, int count) {
        finish<Accumulate<T>>(args, first, count, [](int64_t, const Affine<Accumulate<T>>&) {});
      });
    } else if (has_short_planes(p) && gains_in_groups<T>(args)) {
      eval_short_planes<T>(args);
    } else {
      is_planes(p) ? eval_planes<T>(args) : eval_rows<T>(args);
    }
  });
}

}  // namespace bnfused::cpu
