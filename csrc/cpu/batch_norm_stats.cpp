// Moments of the batch: each channel's mean and sum of squared deviations, for statistics that are merged elsewhere.
#include "cpu/backend.h"
#include "cpu/moments.h"

namespace bnfused::cpu {
namespace {

template <class T>
void stats_planes(const MomentsArgs& args) {
  const Problem& p = args.problem;
  const Leaves<T>& leaf = best_leaves<T>();
  const T* x = static_cast<const T*>(args.x);
  const int64_t parts = parts_per_channel(p);
  const auto moments = std::make_unique<Moments[]>(p.channels * parts);
  const int64_t grain = parts == 1 ? grain_for(p.rows()) : 1;
  at::parallel_for(0, p.channels * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part part = part_of(p, i % parts, parts);
      moments[i] = slab_moments(leaf, x + part.first(p, i / parts), part.runs(p));
    }
  });
  for (int64_t c = 0; c < p.channels; ++c) {
    Moments m;
    for (int64_t i = 0; i < parts; ++i) m.merge(moments[c * parts + i]);
    args.mean[c] = m.mean;
    args.m2[c] = m.m2;
  }
}

template <class T>
void stats_rows(const MomentsArgs& args) {
  const Problem& p = args.problem;
  const Leaves<T>& leaf = best_leaves<T>();
  const RowView view = row_view(p, /*with_mask=*/false);
  const T* x = static_cast<const T*>(args.x);
  const int64_t tasks = row_tasks(p, view);
  const auto first_row = [&](int64_t task) { return view.rows() * task / tasks; };

  std::vector<ColumnMoments<T>> moments;
  moments.reserve(tasks);
  for (int64_t task = 0; task < tasks; ++task) moments.emplace_back(view.columns);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for_rows(view, first_row(task), first_row(task + 1),
               [&](Runs runs, int64_t at) { moments[task].add(leaf, x + at, runs); });
    }
  });
  at::parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      Moments m;
      for (const auto& of_task : moments) {
        for (int64_t column = c; column < view.columns; column += p.channels) m.merge(of_task[column]);
      }
      args.mean[c] = m.mean;
      args.m2[c] = m.m2;
    }
  });
}

}  // namespace

void batch_norm_stats(const MomentsArgs& args) {
  const Problem& p = args.problem;
  if (p.numel() == 0) {
    std::fill_n(args.mean, p.channels, 0.0);
    std::fill_n(args.m2, p.channels, 0.0);
    return;
  }
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    is_planes(p) ? stats_planes<T>(args) : stats_rows<T>(args);
  });
}

}  // namespace bnfused::cpu
