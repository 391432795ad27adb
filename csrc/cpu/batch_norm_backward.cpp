// Backward: with g = grad_y * act'(z) and xhat = (x - mean) * invstd,
//
//   grad_bias = sum g    grad_weight = sum g * xhat    grad_residual = g
//   grad_x = weight * invstd * (g - mean(g) - xhat * mean(g * xhat))        training
//   grad_x = weight * invstd * g                                            statistics given
//
// in the same shapes as the forward: a channel at a time where it fits L2 (planes), or a group of channels (short
// planes); two passes otherwise.
#include "cpu/backend.h"
#include "cpu/driver.h"

namespace bnfused::cpu {
namespace {

BackwardKind kind_of(const BackwardArgs& args) {
  switch (args.epilogue.activation) {
    case Activation::kIdentity:
      return BackwardKind::kIdentity;
    case Activation::kReLU:
      return args.mask ? BackwardKind::kMaskedReLU : BackwardKind::kReLU;
    default:
      return BackwardKind::kOther;
  }
}

bool needs_sums(const BackwardArgs& args) {
  return args.grad_weight || args.grad_bias || (args.training && args.grad_x && !args.sum_grad);
}

void operator+=(Sums& a, const Sums& b) {
  a.first += b.first;
  a.second += b.second;
}

template <class A>
struct GradAffine {
  Affine<A> forward;
  A slope = 0, offset = 0;  // grad_x = g * scale + (x - mean) * slope + offset
};
// Read by the leaves as an array, in the order of BackwardCoefficient.
static_assert(sizeof(GradAffine<float>) == kBackwardCoefficients * sizeof(float));

// What of the mean A cannot hold.
template <class A>
double rest_of_mean(const BackwardArgs& args, int64_t c) {
  return args.mean[c] - double(static_cast<A>(args.mean[c]));
}

// These three take `count` channels, at most kChannelsTogether, and call set(channel, ...).

// slope and offset from the means of g and of g * xhat.
template <class A, class Set>
void center(const BackwardArgs& args, int64_t first, int count, const double* mean_grad, const double* mean_grad_xhat,
            Set set) {
  double weight[kChannelsTogether];
  read(args.weight, first, count, 1, weight);
  for (int i = 0; i < count; ++i) {
    const double invstd = args.invstd[first + i], scale = weight[i] * invstd;
    const double slope = -scale * invstd * mean_grad_xhat[i];
    const double offset = -scale * mean_grad[i] - rest_of_mean<A>(args, first + i) * slope;
    set(first + i, static_cast<A>(slope), static_cast<A>(offset));
  }
}

// The coefficients of the forward, and of the backward where the sums are given.
template <class A, class SetForward, class SetBackward>
void recompute(const BackwardArgs& args, int64_t first, int count, SetForward set_forward, SetBackward set_backward) {
  double weight[kChannelsTogether], bias[kChannelsTogether];
  read(args.weight, first, count, 1, weight);
  read(args.bias, first, count, 0, bias);
  for (int i = 0; i < count; ++i) {
    set_forward(first + i, affine<A>(args.mean[first + i], args.invstd[first + i], weight[i], bias[i]));
  }
  if (!args.sum_grad) return;
  double mean_grad[kChannelsTogether], mean_grad_xhat[kChannelsTogether];
  read(args.sum_grad, first, count, 0, mean_grad);
  read(args.sum_grad_xhat, first, count, 0, mean_grad_xhat);
  const double per_value = 1 / std::max(*args.batch_count, 1.0);
  for (int i = 0; i < count; ++i) {
    mean_grad[i] *= per_value;
    mean_grad_xhat[i] *= per_value;
  }
  center<A>(args, first, count, mean_grad, mean_grad_xhat, set_backward);
}

// Everything that follows from the sums of g and of g * (x - mean as the leaves know it).
template <class A, class Set>
void finish(const BackwardArgs& args, double per_row, int64_t first, int count, const double* g, const double* g_d,
            Set set) {
  double g_xhat[kChannelsTogether];
  for (int i = 0; i < count; ++i) {
    g_xhat[i] = (g_d[i] - rest_of_mean<A>(args, first + i) * g[i]) * args.invstd[first + i];
  }
  write(args.grad_weight, first, count, g_xhat);
  write(args.grad_bias, first, count, g);
  if (!args.training || args.sum_grad) return;
  double mean_grad[kChannelsTogether];
  for (int i = 0; i < count; ++i) {
    mean_grad[i] = g[i] * per_row;
    g_xhat[i] *= per_row;
  }
  center<A>(args, first, count, mean_grad, g_xhat, set);
}

// The same for one channel.
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
void finish(const BackwardArgs& args, double per_row, int64_t c, const Sums& sums, GradAffine<A>* a) {
  finish<A>(args, per_row, c, 1, &sums.first, &sums.second, [&](int64_t, A slope, A offset) {
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
void backward_planes(const BackwardArgs& args) {
  using A = Accumulate<T>;
  const Problem& p = args.problem;
  const Leaves<T>& leaf = best_leaves<T>();
  const int kind = int(kind_of(args));
  const double per_row = 1 / double(p.values_per_channel());
  const bool streaming = streams<T>(p, p.inner, {args.grad_x, args.grad_residual});
  const auto apply = leaf.grad_apply[int(Layout::kPlanes)][streaming][kind];
  const bool writes = args.grad_x || args.grad_residual;

  const auto sum_part = [&](int64_t c, const Part& part, const GradAffine<A>& coefficients) {
    GradLoop<T> g = grad_loop<T>(args, part.first(p, c), part.first_mask(p, c));
    g.runs = part.runs(p);
    g.coefficients = &coefficients.forward.mean;
    g.coefficient_stride = 1;
    return leaf.plane_grad_sums[kind](g);
  };
  const auto apply_part = [&](int64_t c, const Part& part, const GradAffine<A>& coefficients, int64_t prefetch) {
    GradLoop<T> g = grad_loop<T>(args, part.last(p, c), part.last_mask(p, c));
    g.runs = part.reversed(p);
    g.coefficients = &coefficients.forward.mean;
    g.coefficient_stride = 1;
    g.prefetch = prefetch;
    apply(g);
  };

  const int64_t parts = parts_per_channel(p);
  if (parts == 1) {
    const Part whole = part_of(p, 0, 1);
    const bool fits = 2 * p.values_per_channel() * int64_t(sizeof(T)) <= kPrefetchUpToBytes;
    parallel_for(0, p.channels, grain_for(p.values_per_channel()), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        GradAffine<A> coefficients = recompute<A>(args, c);
        if (needs_sums(args)) finish(args, per_row, c, sum_part(c, whole, coefficients), &coefficients);
        if (writes) apply_part(c, whole, coefficients, fits && c + 1 < end ? prefetch_ahead<T>(p) : 0);
      }
    });
    return;
  }
  const auto coefficients = std::make_unique<GradAffine<A>[]>(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) coefficients[c] = recompute<A>(args, c);
  if (needs_sums(args)) {
    const auto sums = std::make_unique<Sums[]>(p.channels * parts);
    parallel_for(0, p.channels * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sums[i] = sum_part(i / parts, part_of(p, i % parts, parts), coefficients[i / parts]);
      }
    });
    for (int64_t c = 0; c < p.channels; ++c) {
      Sums all{};
      for (int64_t i = 0; i < parts; ++i) all += sums[c * parts + i];
      finish(args, per_row, c, all, &coefficients[c]);
    }
  }
  if (!writes) return;
  parallel_for(0, p.channels * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      apply_part(i / parts, part_of(p, i % parts, parts), coefficients[i / parts], 0);
    }
  });
}

template <class T>
void backward_short_planes(const BackwardArgs& args) {
  using A = Accumulate<T>;
  const Problem p = grouped(args.problem);
  const int64_t inner = args.problem.inner, together = p.inner / inner;
  const Leaves<T>& leaf = best_leaves<T>();
  const int kind = int(kind_of(args));
  const double per_row = 1 / double(args.problem.values_per_channel());
  const bool streaming = streams<T>(p, p.inner, {args.grad_x, args.grad_residual});
  const auto apply = leaf.grad_apply[int(Layout::kRows)][streaming][kind];
  const bool writes = args.grad_x || args.grad_residual;
  const Part whole = part_of(p, 0, 1);
  parallel_for(0, p.channels, grain_for(p.values_per_channel()), [&](int64_t begin, int64_t end) {
    GroupCoefficients<T, GradAffine<A>> coefficients(together, inner);
    const auto g_sums = scratch<double>(p.inner), products = scratch<double>(p.inner);
    const auto sums = std::make_unique<Sums[]>(together);
    const auto args_at = [&](int64_t at, int64_t mask_at, Runs runs) {
      GradLoop<T> g = grad_loop<T>(args, at, mask_at);
      g.runs = runs;
      g.coefficients = coefficients.data();
      g.coefficient_stride = coefficients.stride();
      return g;
    };
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first_of_group = group * together;
      const auto set_forward = [&](int64_t c, const Affine<A>& a) { coefficients[c - first_of_group].forward = a; };
      const auto set_backward = [&](int64_t c, A slope, A offset) {
        coefficients[c - first_of_group].slope = slope;
        coefficients[c - first_of_group].offset = offset;
      };
      for_channels(first_of_group, first_of_group + together,
                   [&](int64_t first, int count) { recompute<A>(args, first, count, set_forward, set_backward); });
      coefficients.spread(leaf, 0, kForwardCoefficients);
      if (needs_sums(args)) {
        const GradLoop<T> all = args_at(whole.first(p, group), whole.first_mask(p, group), whole.runs(p));
        leaf.row_grad_sums[int(Source::kCache)][kind](all, g_sums.get(), products.get());
        leaf.fold(g_sums.get(), products.get(), together, inner, sums.get());
        for_channels(0, together, [&](int64_t first, int count) {
          double g[kChannelsTogether], g_d[kChannelsTogether];
          for (int i = 0; i < count; ++i) {
            g[i] = sums[first + i].first;
            g_d[i] = sums[first + i].second;
          }
          finish<A>(args, per_row, first_of_group + first, count, g, g_d, set_backward);
        });
      }
      coefficients.spread(leaf, kForwardCoefficients, kBackwardCoefficients);
      if (writes) apply(args_at(whole.last(p, group), whole.last_mask(p, group), whole.reversed(p)));
    }
  });
}

// Sums over one task's rows, for every column.
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

  // `at` makes the arguments for the rows from a row of this call on.
  template <class ArgsAt>
  void add(const Leaves<T>& leaf, Source source, int kind, Runs runs, ArgsAt at) {
    for (int64_t row = 0; row < runs.count; row += kBlockRows) {
      GradLoop<T> g = at(row);
      g.runs = {std::min(kBlockRows, runs.count - row), runs.length, runs.stride, runs.mask_stride};
      leaf.row_grad_sums[int(source)][kind](g, of_block_[0].get(), of_block_[1].get());
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
void backward_rows(const BackwardArgs& args) {
  using A = Accumulate<T>;
  const Problem& p = args.problem;
  const Leaves<T>& leaf = best_leaves<T>();
  const int kind = int(kind_of(args));
  const double per_row = 1 / double(p.values_per_channel());
  const RowView sum_view = row_view(p, kColumns, args.mask != nullptr);
  const RowView view = row_view(p, kGradApplyColumns, args.mask != nullptr);
  const bool streaming = streams<T>(p, view.columns, {args.grad_x, args.grad_residual});
  const auto apply = leaf.grad_apply[int(Layout::kRows)][streaming][kind];

  ColumnCoefficients<A> coefficients(view, p.channels, kBackwardCoefficients);
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
    const RowTasks sum_tasks(p, sum_view);
    std::vector<ColumnSums<T>> sums;
    sums.reserve(sum_tasks.count());
    for (int64_t task = 0; task < sum_tasks.count(); ++task) sums.emplace_back(sum_view.columns);
    parallel_for(0, sum_tasks.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        for_rows(sum_view, sum_tasks.begin(task), sum_tasks.end(task), [&](Runs runs, int64_t at) {
          sums[task].add(leaf, source_of<T>(p), kind, runs,
                         [&](int64_t row) { return args_at(at + row * sum_view.columns); });
        });
      }
    });
    parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
      for_channels(begin, end, [&](int64_t first, int count) {
        double g[kChannelsTogether] = {}, g_d[kChannelsTogether] = {};
        for (const auto& of_task : sums) {
          for (int64_t column = first; column < sum_view.columns; column += p.channels) {
            for (int i = 0; i < count; ++i) {
              g[i] += of_task.g()[column + i];
              g_d[i] += of_task.g_d()[column + i];
            }
          }
        }
        finish<A>(args, per_row, first, count, g, g_d, set_backward);
        coefficients.repeat(first, count);
      });
    });
  }
  if (!args.grad_x && !args.grad_residual) return;
  const RowTasks tasks(p, view);
  const int64_t strip = strip_columns<T>(view, kBackwardCoefficients, streaming);
  parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for_rows_backwards(view, tasks.begin(task), tasks.end(task), 2 * sizeof(T), [&](Runs rows, int64_t first) {
        for_strips(rows, strip, [&](Runs runs, int64_t column) {
          GradLoop<T> g = args_at(first + column);
          g.runs = runs;
          g.coefficients += column;
          g.prefetch = strip < view.columns ? view.columns : 0;
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
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (has_short_planes(p)) {
      backward_short_planes<T>(args);
    } else {
      is_planes(p) ? backward_planes<T>(args) : backward_rows<T>(args);
    }
  });
}

}  // namespace bnfused::cpu
