// Backward: with g = grad_y * act'(z) and xhat = (x - mean) * invstd,
//
//   grad_bias = sum g    grad_weight = sum g * xhat    grad_residual = g
//   grad_x = weight * invstd * (g - mean(g) - xhat * mean(g * xhat))        training
//   grad_x = weight * invstd * g                                            statistics given
//
// with the traversals of the forward: planes and short planes sum a channel, or a group of channels, and write its
// gradients while x and grad_y are still in L2. Rows are read in two passes.
#include <vector>

#include "cpu/backend.h"
#include "cpu/rows.h"
#include "cpu/short_planes.h"

namespace bnfused::cpu {
namespace {

BackwardKind backward_kind(const BackwardArgs& args) {
  switch (args.epilogue.activation) {
    case Activation::kIdentity:
      return BackwardKind::kIdentity;
    case Activation::kReLU:
      return args.mask ? BackwardKind::kMaskedReLU : BackwardKind::kReLU;
    default:
      return BackwardKind::kOther;
  }
}

CpuRequest backward_request(const BackwardArgs& args) {
  CpuRequest request;
  request.residual = args.residual != nullptr;
  request.mask = args.mask != nullptr;
  request.aligned = on_lines({args.grad_x, args.grad_residual});
  return request;
}

bool needs_sums(const BackwardArgs& args) {
  return args.grad_weight || args.grad_bias || (args.training && args.grad_x && !args.sum_grad);
}

bool writes_tensors(const BackwardArgs& args) { return args.grad_x || args.grad_residual; }

void operator+=(Sums& a, const Sums& b) {
  a.first += b.first;
  a.second += b.second;
}

template <class A>
struct GradAffine {
  Affine<A> forward;
  A slope = 0, offset = 0;  // grad_x = g * scale + (x - mean) * slope + offset
};
// The leaves read it as an array, in the order of BackwardCoefficient.
static_assert(sizeof(GradAffine<float>) == kBackwardCoefficients * sizeof(float));

// The part of the float64 mean that is lost when it is rounded to A.
template <class A>
double rest_of_mean(const BackwardArgs& args, int64_t c) {
  return args.mean[c] - double(static_cast<A>(args.mean[c]));
}

// The next three functions take `count` channels, at most kChannelsAtOnce, and call set(channel, ...) for each.

// Computes slope and offset from the means of g and of g * xhat.
template <class A, class Set>
void center(const BackwardArgs& args, int64_t first, int count, const double* mean_grad, const double* mean_grad_xhat,
            Set set) {
  double weight[kChannelsAtOnce];
  read(args.weight, first, count, 1, weight);
  for (int i = 0; i < count; ++i) {
    const double invstd = args.invstd[first + i], scale = weight[i] * invstd;
    const double slope = -scale * invstd * mean_grad_xhat[i];
    const double offset = -scale * mean_grad[i] - rest_of_mean<A>(args, first + i) * slope;
    set(first + i, static_cast<A>(slope), static_cast<A>(offset));
  }
}

// Computes the coefficients of the forward; and those of the backward, if the sums are given.
template <class A, class SetForward, class SetBackward>
void recompute(const BackwardArgs& args, int64_t first, int count, SetForward set_forward, SetBackward set_backward) {
  double weight[kChannelsAtOnce], bias[kChannelsAtOnce];
  read(args.weight, first, count, 1, weight);
  read(args.bias, first, count, 0, bias);
  for (int i = 0; i < count; ++i) {
    set_forward(first + i, affine<A>(args.mean[first + i], args.invstd[first + i], weight[i], bias[i]));
  }
  if (!args.sum_grad) return;
  double mean_grad[kChannelsAtOnce], mean_grad_xhat[kChannelsAtOnce];
  read(args.sum_grad, first, count, 0, mean_grad);
  read(args.sum_grad_xhat, first, count, 0, mean_grad_xhat);
  const double per_value = 1 / std::max(*args.batch_count, 1.0);
  for (int i = 0; i < count; ++i) {
    mean_grad[i] *= per_value;
    mean_grad_xhat[i] *= per_value;
  }
  center<A>(args, first, count, mean_grad, mean_grad_xhat, set_backward);
}

// Computes everything that follows from the sums of g and of g * (x - the mean as rounded to A).
template <class A, class Set>
void finish(const BackwardArgs& args, double per_value, int64_t first, int count, const double* g, const double* g_d,
            Set set) {
  double g_xhat[kChannelsAtOnce];
  for (int i = 0; i < count; ++i) {
    g_xhat[i] = (g_d[i] - rest_of_mean<A>(args, first + i) * g[i]) * args.invstd[first + i];
  }
  write(args.grad_weight, first, count, g_xhat);
  write(args.grad_bias, first, count, g);
  if (!args.training || args.sum_grad) return;
  double mean_grad[kChannelsAtOnce];
  for (int i = 0; i < count; ++i) {
    mean_grad[i] = g[i] * per_value;
    g_xhat[i] *= per_value;
  }
  center<A>(args, first, count, mean_grad, g_xhat, set);
}

// `recompute` and `finish` for one channel.
template <class A>
GradAffine<A> recompute(const BackwardArgs& args, int64_t c) {
  GradAffine<A> a;
  const auto set_forward = [&](int64_t, const Affine<A>& forward) { a.forward = forward; };
  recompute<A>(args, c, 1, set_forward, [&](int64_t, A slope, A offset) {
    a.slope = slope;
    a.offset = offset;
  });
  return a;
}

template <class A>
void finish(const BackwardArgs& args, double per_value, int64_t c, const Sums& sums, GradAffine<A>* a) {
  finish<A>(args, per_value, c, 1, &sums.first, &sums.second, [&](int64_t, A slope, A offset) {
    a->slope = slope;
    a->offset = offset;
  });
}

template <class T>
GradLoop<T> grad_loop(const BackwardArgs& args, int64_t at, int64_t mask_at) {
  GradLoop<T> g{};
  g.grad_y = static_cast<const T*>(args.grad_y) + at;
  g.x = static_cast<const T*>(args.x) + at;
  g.residual = args.residual ? static_cast<const T*>(args.residual) + at : nullptr;
  g.mask = args.mask ? args.mask + mask_at : nullptr;
  g.grad_x = args.grad_x ? static_cast<T*>(args.grad_x) + at : nullptr;
  g.grad_residual = args.grad_residual ? static_cast<T*>(args.grad_residual) + at : nullptr;
  g.store_ahead = store_ahead();
  g.training = args.training;
  g.epilogue = args.epilogue;
  return g;
}

template <class T>
void backward_planes(const BackwardArgs& args, const CpuPlan& plan) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const Leaves<T>& leaves = best_leaves<T>();
  const double per_value = 1 / double(p.values_per_channel());
  const auto grad_sums = leaves.plane_grad_sums(backward_kind(args));
  const auto apply = leaves.grad_apply(Layout::kPlanes, plan.streamed, backward_kind(args));

  const auto sum_part = [&](int64_t c, const Part& part, const GradAffine<A>& coefficients) {
    GradLoop<T> g = grad_loop<T>(args, part.first(p, c), part.first_mask(p, c));
    g.runs = runs_of(p, part);
    g.coefficients = &coefficients.forward.mean;
    g.coefficient_stride = 1;
    return grad_sums(g);
  };
  const auto apply_part = [&](int64_t c, const Part& part, const GradAffine<A>& coefficients, int64_t prefetch) {
    GradLoop<T> g = grad_loop<T>(args, part.last(p, c), part.last_mask(p, c));
    g.runs = reversed_runs_of(p, part);
    g.coefficients = &coefficients.forward.mean;
    g.coefficient_stride = 1;
    g.prefetch = prefetch;
    apply(g);
  };

  const int64_t parts = plan.parts;
  if (parts == 1) {
    const Part whole = part_of(p, 0, 1);
    parallel_for(0, p.channels, plan.grain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        GradAffine<A> coefficients = recompute<A>(args, c);
        if (needs_sums(args)) finish(args, per_value, c, sum_part(c, whole, coefficients), &coefficients);
        if (writes_tensors(args)) apply_part(c, whole, coefficients, c + 1 < end ? plan.prefetch : 0);
      }
    });
    return;
  }
  const auto coefficients = std::make_unique<GradAffine<A>[]>(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) coefficients[c] = recompute<A>(args, c);
  if (needs_sums(args)) {
    const auto sums = std::make_unique<Sums[]>(p.channels * parts);
    parallel_for(0, p.channels * parts, plan.grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sums[i] = sum_part(i / parts, part_of(p, i % parts, parts), coefficients[i / parts]);
      }
    });
    for (int64_t c = 0; c < p.channels; ++c) {
      Sums all{};
      for (int64_t i = 0; i < parts; ++i) all += sums[c * parts + i];
      finish(args, per_value, c, all, &coefficients[c]);
    }
  }
  if (!writes_tensors(args)) return;
  parallel_for(0, p.channels * parts, plan.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      apply_part(i / parts, part_of(p, i % parts, parts), coefficients[i / parts], 0);
    }
  });
}

template <class T>
void backward_short_planes(const BackwardArgs& args, const CpuPlan& plan) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const int64_t group_channels = plan.group_channels, inner = args.problem.inner;
  const Leaves<T>& leaves = best_leaves<T>();
  const double per_value = 1 / double(args.problem.values_per_channel());
  const auto grad_sums = leaves.row_grad_sums(Source::kCache, backward_kind(args));
  const auto apply = leaves.grad_apply(Layout::kRows, plan.streamed, backward_kind(args));
  const Part whole = part_of(p, 0, 1);
  parallel_for(0, p.channels, plan.grain, [&](int64_t begin, int64_t end) {
    GroupCoefficients<T, GradAffine<A>> coefficients(group_channels, inner);
    const auto g_sums = scratch<double>(p.inner), products = scratch<double>(p.inner);
    const auto sums = std::make_unique<Sums[]>(group_channels);
    const auto args_at = [&](int64_t at, int64_t mask_at, Runs runs) {
      GradLoop<T> g = grad_loop<T>(args, at, mask_at);
      g.runs = runs;
      g.coefficients = coefficients.data();
      g.coefficient_stride = coefficients.stride();
      return g;
    };
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first_of_group = group * group_channels;
      const auto set_forward = [&](int64_t c, const Affine<A>& a) { coefficients[c - first_of_group].forward = a; };
      const auto set_backward = [&](int64_t c, A slope, A offset) {
        coefficients[c - first_of_group].slope = slope;
        coefficients[c - first_of_group].offset = offset;
      };
      for_channels(first_of_group, first_of_group + group_channels,
                   [&](int64_t first, int count) { recompute<A>(args, first, count, set_forward, set_backward); });
      coefficients.spread(leaves, 0, kForwardCoefficients);
      if (needs_sums(args)) {
        const GradLoop<T> all = args_at(whole.first(p, group), whole.first_mask(p, group), runs_of(p, whole));
        grad_sums(all, g_sums.get(), products.get());
        leaves.fold(g_sums.get(), products.get(), group_channels, inner, sums.get());
        for_channels(0, group_channels, [&](int64_t first, int count) {
          double g[kChannelsAtOnce], g_d[kChannelsAtOnce];
          for (int i = 0; i < count; ++i) {
            g[i] = sums[first + i].first;
            g_d[i] = sums[first + i].second;
          }
          finish<A>(args, per_value, first_of_group + first, count, g, g_d, set_backward);
        });
      }
      coefficients.spread(leaves, kForwardCoefficients, kBackwardCoefficients);
      if (!writes_tensors(args)) continue;
      apply(args_at(whole.last(p, group), whole.last_mask(p, group), reversed_runs_of(p, whole)));
    }
  });
}

// The sums of every column over the rows of one task.
template <class T>
class ColumnSums {
 public:
  explicit ColumnSums(int64_t columns)
      : of_block_{scratch<double>(columns), scratch<double>(columns)},
        all_{scratch<double>(columns), scratch<double>(columns)} {
    for (auto& sums : all_) std::fill_n(sums.get(), columns, 0.0);
  }

  // Of g, and of g * (x - mean).
  const double* g() const { return all_[0].get(); }
  const double* g_d() const { return all_[1].get(); }

  // at(row) is the arguments for the rows from `row` on, which counts from the first of `runs`.
  template <class ArgsAt>
  void add(typename Leaves<T>::RowGradSums grad_sums, Runs runs, ArgsAt at) {
    for (int64_t row = 0; row < runs.count; row += kBlockRows) {
      GradLoop<T> g = at(row);
      g.runs = {std::min(kBlockRows, runs.count - row), runs.length, runs.stride, runs.mask_stride};
      grad_sums(g, of_block_[0].get(), of_block_[1].get());
      for (int k = 0; k < 2; ++k) {
        double* all = all_[k].get();
        const double* more = of_block_[k].get();
        for (int64_t i = 0; i < runs.length; ++i) all[i] += more[i];
      }
    }
  }

 private:
  Scratch<double> of_block_[2], all_[2];
};

template <class T>
void backward_rows(const BackwardArgs& args, const CpuPlan& plan) {
  using A = Accumulate<T>;
  const Problem& p = plan.problem;
  const RowView &sum_rows = plan.sum_rows, &rows = plan.rows;
  const Leaves<T>& leaves = best_leaves<T>();
  const double per_value = 1 / double(p.values_per_channel());
  const auto grad_sums = leaves.row_grad_sums(source_of(plan), backward_kind(args));
  const auto apply = leaves.grad_apply(Layout::kRows, plan.streamed, backward_kind(args));

  ColumnCoefficients<A> coefficients(rows, p.channels, kBackwardCoefficients);
  const auto set_forward = [&](int64_t c, const Affine<A>& forward) { coefficients.set(c, forward); };
  const auto set_backward = [&](int64_t c, A slope, A offset) {
    coefficients.set(kSlope, c, slope);
    coefficients.set(kOffset, c, offset);
  };
  parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t first, int count) {
      recompute<A>(args, first, count, set_forward, set_backward);
      coefficients.repeat(first, count);
    });
  });
  const auto args_at = [&](int64_t at) {
    GradLoop<T> g = grad_loop<T>(args, at, at / 8);
    g.coefficients = coefficients.data();
    g.coefficient_stride = coefficients.stride();
    return g;
  };

  if (needs_sums(args)) {
    std::vector<ColumnSums<T>> sums;
    sums.reserve(sum_rows.tasks);
    for (int64_t task = 0; task < sum_rows.tasks; ++task) sums.emplace_back(sum_rows.columns);
    parallel_for(0, sum_rows.tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        for_rows(sum_rows, sum_rows.begin(task), sum_rows.end(task), [&](Runs runs, int64_t at) {
          sums[task].add(grad_sums, runs, [&](int64_t row) { return args_at(at + row * sum_rows.columns); });
        });
      }
    });
    parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
      for_channels(begin, end, [&](int64_t first, int count) {
        double g[kChannelsAtOnce] = {}, g_d[kChannelsAtOnce] = {};
        for (const auto& of_task : sums) {
          for (int64_t column = first; column < sum_rows.columns; column += p.channels) {
            for (int i = 0; i < count; ++i) {
              g[i] += of_task.g()[column + i];
              g_d[i] += of_task.g_d()[column + i];
            }
          }
        }
        finish<A>(args, per_value, first, count, g, g_d, set_backward);
        coefficients.repeat(first, count);
      });
    });
  }
  if (!writes_tensors(args)) return;
  parallel_for(0, rows.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for_rows_backwards(plan, rows.begin(task), rows.end(task), [&](Runs piece, int64_t first) {
        for_strips(piece, plan.strip, [&](Runs runs, int64_t column) {
          GradLoop<T> g = args_at(first + column);
          g.runs = runs;
          g.coefficients += column;
          g.prefetch = plan.prefetch;
          apply(g);
        });
      });
    }
  });
}

}  // namespace

void batch_norm_backward(const BackwardArgs& args) {
  const Problem& p = args.problem;
  if (p.numel() == 0) {
    for (int64_t c = 0; c < p.channels; ++c) {
      write(args.grad_weight, c, 0);
      write(args.grad_bias, c, 0);
    }
    return;
  }
  const CpuPlan plan = plan_backward(p, backward_request(args), at::get_num_threads());
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (plan.traversal) {
      case Traversal::kPlanes:
        return backward_planes<T>(args, plan);
      case Traversal::kShortPlanes:
        return backward_short_planes<T>(args, plan);
      case Traversal::kRows:
        return backward_rows<T>(args, plan);
    }
  });
}

}  // namespace bnfused::cpu
