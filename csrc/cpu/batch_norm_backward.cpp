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

Backward kind_of(const BackwardArgs& args) {
  switch (args.epilogue.activation) {
    case Activation::kIdentity:
      return Backward::kIdentity;
    case Activation::kReLU:
      return args.mask ? Backward::kMaskedReLU : Backward::kReLU;
    default:
      return Backward::kOther;
  }
}

bool needs_sums(const BackwardArgs& args) {
  return args.grad_weight || args.grad_bias || (args.training && args.grad_x && !args.sum_grad);
}

// Sums of g and of g * (x - mean as the leaves know it).
struct GradSums {
  double g = 0, g_d = 0;

  void operator+=(const Sums& s) {
    g += s.first;
    g_d += s.second;
  }
};

template <class A>
struct GradAffine {
  Affine<A> forward;
  A slope = 0, offset = 0;  // grad_x = g * scale + (x - mean) * slope + offset
};
// Read by the leaves as an array, in the order of BackwardCoefficient.
static_assert(sizeof(GradAffine<float>) == kBackwardCoefficients * sizeof(float));

// What of the mean A cannot hold.
template <class A>
double rest_of_mean(const BackwardArgs& args, int64_t c, const GradAffine<A>& a) {
  return args.mean[c] - double(a.forward.mean);
}

// grad_x from the means of g and of g * xhat.
template <class A>
void center(const BackwardArgs& args, int64_t c, double mean_grad, double mean_grad_xhat, GradAffine<A>* a) {
  const double invstd = args.invstd[c];
  const double scale = read(args.weight, c, 1) * invstd;
  const double slope = -scale * invstd * mean_grad_xhat;
  a->slope = static_cast<A>(slope);
  a->offset = static_cast<A>(-scale * mean_grad - rest_of_mean(args, c, *a) * slope);
}

template <class A>
GradAffine<A> recompute(const BackwardArgs& args, int64_t c) {
  GradAffine<A> a{affine<A>(args.mean[c], args.invstd[c], read(args.weight, c, 1), read(args.bias, c, 0))};
  if (args.sum_grad) {
    const double per_value = 1 / std::max(*args.batch_count, 1.0);
    center(args, c, read(args.sum_grad, c, 0) * per_value, read(args.sum_grad_xhat, c, 0) * per_value, &a);
  }
  return a;
}

// Everything that follows from one channel's sums.
template <class A>
void finish(const BackwardArgs& args, double per_row, int64_t c, const GradSums& sums, GradAffine<A>* a) {
  const double g_xhat = (sums.g_d - rest_of_mean(args, c, *a) * sums.g) * args.invstd[c];
  write(args.grad_weight, c, g_xhat);
  write(args.grad_bias, c, sums.g);
  if (args.training && !args.sum_grad) center(args, c, sums.g * per_row, g_xhat * per_row, a);
}

template <class T>
GradArgs<T> grad_args(const BackwardArgs& args, int64_t at, int64_t mask_at) {
  GradArgs<T> g{};
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
  const double per_row = 1 / double(p.rows());
  const bool streaming = streams<T>(p, p.inner, {args.grad_x, args.grad_residual});
  const auto apply = leaf.grad_apply[int(Layout::kPlanes)][streaming][kind];
  const bool writes = args.grad_x || args.grad_residual;
  const int64_t mask_plane = (p.inner + 7) / 8;

  const auto sum_part = [&](int64_t c, const Part& part, const GradAffine<A>& coefficients) {
    GradSums sums;
    for_each_block(part.runs(p), [&](int64_t offset, Runs block) {
      const int64_t at = part.first(p, c) + offset;
      const int64_t mask_at = args.mask ? at / p.inner * mask_plane + at % p.inner / 8 : 0;
      GradArgs<T> g = grad_args<T>(args, at, mask_at);
      g.runs = block;
      g.coefficients = &coefficients.forward.mean;
      g.coefficient_stride = 1;
      sums += leaf.plane_grad_sums[kind](g);
    });
    return sums;
  };
  const auto apply_part = [&](int64_t c, const Part& part, const GradAffine<A>& coefficients, int64_t prefetch) {
    GradArgs<T> g = grad_args<T>(args, part.last(p, c), part.last_mask(p, c));
    g.runs = part.reversed(p);
    g.coefficients = &coefficients.forward.mean;
    g.coefficient_stride = 1;
    g.prefetch = prefetch;
    apply(g);
  };

  const int64_t parts = parts_per_channel(p);
  if (parts == 1) {
    const Part whole = part_of(p, 0, 1);
    const bool fits = 2 * p.rows() * int64_t(sizeof(T)) <= kPrefetchUpToBytes;
    at::parallel_for(0, p.channels, grain_for(p.rows()), [&](int64_t begin, int64_t end) {
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
    const auto sums = std::make_unique<GradSums[]>(p.channels * parts);
    at::parallel_for(0, p.channels * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sums[i] = sum_part(i / parts, part_of(p, i % parts, parts), coefficients[i / parts]);
      }
    });
    for (int64_t c = 0; c < p.channels; ++c) {
      GradSums all;
      for (int64_t i = 0; i < parts; ++i) all += {sums[c * parts + i].g, sums[c * parts + i].g_d};
      finish(args, per_row, c, all, &coefficients[c]);
    }
  }
  if (!writes) return;
  at::parallel_for(0, p.channels * parts, 1, [&](int64_t begin, int64_t end) {
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
  const double per_row = 1 / double(args.problem.rows());
  const bool streaming = streams<T>(p, p.inner, {args.grad_x, args.grad_residual});
  const auto apply = leaf.grad_apply[int(Layout::kRows)][streaming][kind];
  const bool writes = args.grad_x || args.grad_residual;
  const Part whole = part_of(p, 0, 1);
  at::parallel_for(0, p.channels, grain_for(p.rows()), [&](int64_t begin, int64_t end) {
    GroupCoefficients<T, GradAffine<A>> coefficients(together, inner);
    const auto g_sums = scratch<double>(p.inner), products = scratch<double>(p.inner);
    const auto sums = std::make_unique<Sums[]>(together);
    const auto args_at = [&](int64_t at, int64_t mask_at, Runs runs) {
      GradArgs<T> g = grad_args<T>(args, at, mask_at);
      g.runs = runs;
      g.coefficients = coefficients.data();
      g.coefficient_stride = coefficients.stride();
      return g;
    };
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * together;
      for (int64_t c = 0; c < together; ++c) coefficients[c] = recompute<A>(args, first + c);
      coefficients.spread(leaf, 0, kForwardCoefficients);
      if (needs_sums(args)) {
        const GradArgs<T> g = args_at(whole.first(p, group), whole.first_mask(p, group), whole.runs(p));
        leaf.row_grad_sums[int(Source::kCache)][kind](g, g_sums.get(), products.get());
        leaf.fold(g_sums.get(), products.get(), together, inner, sums.get());
        for (int64_t c = 0; c < together; ++c) {
          finish(args, per_row, first + c, {sums[c].first, sums[c].second}, &coefficients[c]);
        }
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
      : sums_(scratch<double>(columns)), products_(scratch<double>(columns)), all_(new GradSums[columns]) {}

  const GradSums& operator[](int64_t column) const { return all_[column]; }

  // `at` makes the arguments for the rows from a row of this call on.
  template <class ArgsAt>
  void add(const Leaves<T>& leaf, Source source, int kind, Runs runs, ArgsAt at) {
    for (int64_t row = 0; row < runs.count; row += kBlockRows) {
      GradArgs<T> g = at(row);
      g.runs = {std::min(kBlockRows, runs.count - row), runs.length, runs.stride, runs.mask_stride};
      leaf.row_grad_sums[int(source)][kind](g, sums_.get(), products_.get());
      for (int64_t i = 0; i < runs.length; ++i) all_[i] += {sums_[i], products_[i]};
    }
  }

 private:
  Scratch<double> sums_, products_;
  std::unique_ptr<GradSums[]> all_;
};

template <class T>
void backward_rows(const BackwardArgs& args) {
  using A = Accumulate<T>;
  const Problem& p = args.problem;
  const Leaves<T>& leaf = best_leaves<T>();
  const int kind = int(kind_of(args));
  const double per_row = 1 / double(p.rows());
  const RowView sum_view = row_view(p, kColumns, args.mask != nullptr);
  const RowView view = row_view(p, kGradApplyColumns, args.mask != nullptr);
  const bool streaming = streams<T>(p, view.columns, {args.grad_x, args.grad_residual});
  const auto apply = leaf.grad_apply[int(Layout::kRows)][streaming][kind];

  ColumnCoefficients<A> coefficients(view, p.channels, kBackwardCoefficients);
  at::parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const GradAffine<A> a = recompute<A>(args, c);
      coefficients.set(c, a.forward);
      coefficients.set(kSlope, c, a.slope);
      coefficients.set(kOffset, c, a.offset);
    }
  });
  const auto args_at = [&](int64_t at) {
    GradArgs<T> g = grad_args<T>(args, at, at / 8);
    g.coefficients = coefficients.data();
    g.coefficient_stride = coefficients.stride();
    return g;
  };

  if (needs_sums(args)) {
    const RowTasks sum_tasks(p, sum_view);
    std::vector<ColumnSums<T>> sums;
    sums.reserve(sum_tasks.count());
    for (int64_t task = 0; task < sum_tasks.count(); ++task) sums.emplace_back(sum_view.columns);
    at::parallel_for(0, sum_tasks.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        for_rows(sum_view, sum_tasks.begin(task), sum_tasks.end(task), [&](Runs runs, int64_t at) {
          sums[task].add(leaf, source_of<T>(p), kind, runs,
                         [&](int64_t row) { return args_at(at + row * sum_view.columns); });
        });
      }
    });
    at::parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        GradSums all;
        for (const auto& of_task : sums) {
          for (int64_t column = c; column < sum_view.columns; column += p.channels) {
            all += {of_task[column].g, of_task[column].g_d};
          }
        }
        GradAffine<A> a = recompute<A>(args, c);
        finish(args, per_row, c, all, &a);
        coefficients.set(kSlope, c, a.slope);
        coefficients.set(kOffset, c, a.offset);
      }
    });
  }
  if (!args.grad_x && !args.grad_residual) return;
  const RowTasks tasks(p, view);
  at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for_rows_backwards(view, tasks.begin(task), tasks.end(task), 2 * sizeof(T), [&](Runs runs, int64_t at) {
        GradArgs<T> g = args_at(at);
        g.runs = runs;
        apply(g);
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
