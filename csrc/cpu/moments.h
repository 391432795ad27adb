// Mean and sum of squared deviations. Where a single float32 pass is not exact enough, the sums are done again.
//
// A block of a few thousand values is summed in the leaves' arithmetic relative to a shift, and blocks are merged in
// float64 by Chan's formula. The shift is the mean of the blocks before. Where a block's own mean turns out to lie
// further from it than kTrusted standard deviations, cancellation has eaten digits. The block, still in L1 or L2, is
// then summed again around its own mean. No shift rests on a single value. Source: Chan, Golub & LeVeque, "Algorithms
// for computing the sample variance", 1983.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <vector>

#include "cpu/rows.h"
#include "cpu/short_planes.h"

namespace bnfused::cpu {

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: sum of squared deviations from the mean

  void merge(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double total = count + other.count;
    const double delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * (other.count / total));
    count = total;
  }
};

inline void write(const PackedMoments& to, int64_t c, const Moments& m) {
  write(to.mean, c, m.mean);
  write(to.mean_rest, c, rest_of(m.mean));
  write(to.deviation, c, m.count > 0 ? std::sqrt(m.m2 / m.count) : 0);
}
inline void write_count(const PackedMoments& to, double count) {
  write(to.count, 0, count);
  write(to.count_rest, 0, rest_of(count));
}

// Each round shrinks the distance to the block's mean by the precision of A. More rounds than this never help.
constexpr int kRounds = 4;

// Sums whose squares left the range of A, upwards or downwards, say nothing about the values. Neither does a sum that
// is NaN: lanes that have overflowed to infinities of both signs add up to NaN.
template <class A>
bool in_range(const Sums& sums) {
  if (std::isnan(sums.second)) return true;  // some of the values are NaN
  return sums.second <= kHighestSquares<A> &&
         (sums.second >= kLowestSquares<A> || (sums.first == 0 && sums.second == 0));
}

inline bool trusted(const Sums& sums, double count) {
  const double offset = sums.first / count;
  const double m2 = sums.second - sums.first * offset;
  return !(sums.first * offset > kTrusted * kTrusted * m2);  // true for NaN, which another round would not mend
}

inline Moments around(double shift, const Sums& sums, double count) {
  const double offset = sums.first / count;
  const double m2 = sums.second - sums.first * offset;
  return {count, shift + offset, m2 < 0 ? 0 : m2};  // rounding must not make it negative, NaN must stay
}

inline double widened(float x) { return x; }
inline double widened(double x) { return x; }
inline double widened(Float16 x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
inline double widened(BFloat16 x) { return c10::detail::f32_from_bits(x.bits); }

// Sums in float64, value by value, for values whose squares A cannot hold. The mean is corrected by the mean of the
// deviations from it, so that for a constant it is exactly that value.
template <class T>
Moments wide_moments(const T* x, Runs runs) {
  const double count = double(runs.count) * double(runs.length);
  const auto sum = [&](auto of) {
    double all = 0;
    for (int64_t run = 0; run < runs.count; ++run) {
      for (int64_t i = 0; i < runs.length; ++i) all += of(widened(x[run * runs.stride + i]));
    }
    return all;
  };
  double mean = sum([](double v) { return v; }) / count;
  mean += sum([&](double v) { return v - mean; }) / count;
  return {count, mean, sum([&](double v) { return (v - mean) * (v - mean); })};
}

// One block of one channel.
template <class T>
Moments block_moments(const Leaves<T>& leaves, const T* x, Runs runs, double shift) {
  using A = Accumulate<T>;
  const double count = double(runs.count) * double(runs.length);
  for (int round = 0;; ++round) {
    const A rounded = static_cast<A>(shift);
    const Sums sums = leaves.plane_moments(x, runs, rounded);
    if (!in_range<A>(sums)) return wide_moments(x, runs);
    const Moments block = around(rounded, sums, count);
    if (trusted(sums, count) || round + 1 == kRounds) return block;
    shift = block.mean;
  }
}

// Calls f(offset, block) for each block of `runs` that is summed around one shift, in order.
template <class F>
void for_each_block(Runs runs, F f) {
  if (runs.length >= kBlockValues) {
    for (int64_t run = 0; run < runs.count; ++run) {
      for (int64_t i = 0; i < runs.length; i += kBlockValues) {
        f(run * runs.stride + i, Runs{1, std::min(kBlockValues, runs.length - i), runs.stride, runs.mask_stride});
      }
    }
    return;
  }
  const int64_t block = std::max<int64_t>(1, kBlockValues / std::max<int64_t>(1, runs.length));
  for (int64_t run = 0; run < runs.count; run += block) {
    f(run * runs.stride, Runs{std::min(block, runs.count - run), runs.length, runs.stride, runs.mask_stride});
  }
}

template <class T>
Moments slab_moments(const Leaves<T>& leaves, const T* x, Runs runs) {
  Moments all;
  for_each_block(runs,
                 [&](int64_t offset, Runs block) { all.merge(block_moments(leaves, x + offset, block, all.mean)); });
  return all;
}

// The moments of each channel of a group (short_planes.h).
template <class T>
class GroupMoments {
  using A = Accumulate<T>;

 public:
  GroupMoments(int64_t group_channels, int64_t inner)
      : group_channels_(group_channels),
        inner_(inner),
        means_(new A[group_channels]),
        shift_(scratch<A>(group_channels * inner)),
        sums_(scratch<double>(group_channels * inner)),
        squares_(scratch<double>(group_channels * inner)),
        of_channel_(new Sums[group_channels]),
        all_(new Moments[group_channels]) {}

  const Moments& operator[](int64_t channel) const { return all_[channel]; }

  // Sums the runs of the group. The moments of the group before are gone then.
  void sum(const Leaves<T>& leaves, const T* x, Runs runs) {
    std::fill_n(all_.get(), group_channels_, Moments());
    const int64_t rows = std::max<int64_t>(1, kBlockValues / inner_);
    for (int64_t row = 0; row < runs.count; row += rows) {
      add_block(leaves, x + row * runs.stride, {std::min(rows, runs.count - row), runs.length, runs.stride, 0});
    }
  }

 private:
  void add_block(const Leaves<T>& leaves, const T* x, Runs runs) {
    const double count = double(runs.count * inner_);
    for (int64_t c = 0; c < group_channels_; ++c) means_[c] = static_cast<A>(all_[c].mean);
    leaves.spread(means_.get(), 1, group_channels_, inner_, shift_.get());
    leaves.row_moments(Source::kCache)(x, runs, shift_.get(), sums_.get(), squares_.get());
    leaves.fold(sums_.get(), squares_.get(), group_channels_, inner_, of_channel_.get());
    for (int64_t c = 0; c < group_channels_; ++c) {
      const Sums& sums = of_channel_[c];
      if (in_range<A>(sums) && trusted(sums, count)) {
        all_[c].merge(around(means_[c], sums, count));
      } else {
        all_[c].merge(block_moments(leaves, x + c * inner_, {runs.count, inner_, runs.stride, 0}, all_[c].mean));
      }
    }
  }

  int64_t group_channels_, inner_;
  std::unique_ptr<A[]> means_;
  Scratch<A> shift_;
  Scratch<double> sums_, squares_;
  std::unique_ptr<Sums[]> of_channel_;
  std::unique_ptr<Moments[]> all_;
};

// The moments of every column over one task's rows.
template <class T>
class ColumnMoments {
  using A = Accumulate<T>;

 public:
  ColumnMoments(int64_t columns, Source source)
      : source_(source),
        shift_(scratch<A>(columns)),
        sums_(scratch<double>(columns)),
        squares_(scratch<double>(columns)),
        mean_(scratch<double>(columns)),
        m2_(scratch<double>(columns)) {
    std::fill_n(mean_.get(), padded(columns), 0.0);
    std::fill_n(m2_.get(), padded(columns), 0.0);
  }

  // All columns have `rows_` values, and the first `tail_` of them one more.
  Moments operator[](int64_t column) const { return {double(rows_ + (column < tail_)), mean_[column], m2_[column]}; }

  // The same, of all columns, where no column has one more value.
  const double* mean() const { return mean_.get(); }
  const double* m2() const { return m2_.get(); }

  // Full rows come first. A short row comes last, in a call of its own.
  void add(const Leaves<T>& leaves, const T* x, Runs runs) {
    const bool is_tail = runs.length < runs.stride;
    for (int64_t row = 0; row < runs.count; row += kBlockRows) {
      const Runs block{std::min(kBlockRows, runs.count - row), runs.length, runs.stride, 0};
      add_block(leaves, x + row * runs.stride, block);
      is_tail ? tail_ = runs.length : rows_ += block.count;
    }
  }

 private:
  void add_block(const Leaves<T>& leaves, const T* x, Runs runs) {
    const int64_t width = runs.length;
    const double count = double(runs.count);
    for (int64_t i = 0; i < width; ++i) shift_[i] = static_cast<A>(mean_[i]);
    leaves.row_moments(source_)(x, runs, shift_.get(), sums_.get(), squares_.get());
    if (!leaves.all_trusted(sums_.get(), squares_.get(), count, width)) mend(leaves, x, runs);
    leaves.merge_columns(shift_.get(), sums_.get(), squares_.get(), count, double(rows_), mean_.get(), m2_.get(),
                         width);
  }

  // Sums again around better shifts; and in float64, if the squares are still out of range.
  void mend(const Leaves<T>& leaves, const T* x, Runs runs) {
    const double count = double(runs.count);
    bool again = true;
    for (int round = 1; again && round < kRounds; ++round) {
      again = false;
      for (int64_t i = 0; i < runs.length; ++i) {
        const Sums sums{sums_[i], squares_[i]};
        if (!in_range<A>(sums) || trusted(sums, count)) continue;
        shift_[i] = static_cast<A>(shift_[i] + sums.first / count);
        again = true;
      }
      if (again) leaves.row_moments(Source::kCache)(x, runs, shift_.get(), sums_.get(), squares_.get());
    }
    for (int64_t i = 0; i < runs.length; ++i) {
      if (in_range<A>({sums_[i], squares_[i]})) continue;
      const Moments wide = wide_moments(x + i, Runs{runs.count, 1, runs.stride, 0});
      shift_[i] = static_cast<A>(wide.mean);
      sums_[i] = (wide.mean - shift_[i]) * count;
      squares_[i] = wide.m2 + sums_[i] * (wide.mean - shift_[i]);
    }
  }

  Source source_;
  int64_t rows_ = 0, tail_ = 0;
  Scratch<A> shift_;
  Scratch<double> sums_, squares_, mean_, m2_;
};

// Calls f(channel, moments) for every channel of planes, each summed in the parts of the plan.
template <class T, class F>
void for_each_channel_of_planes(const CpuPlan& plan, const T* x, F f) {
  const Problem& p = plan.problem;
  const int64_t parts = plan.parts;
  const Leaves<T>& leaves = best_leaves<T>();
  const auto moments = std::make_unique<Moments[]>(p.channels * parts);
  parallel_for(0, p.channels * parts, plan.grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part part = part_of(p, i % parts, parts);
      moments[i] = slab_moments(leaves, x + part.first(p, i / parts), runs_of(p, part));
    }
  });
  for (int64_t c = 0; c < p.channels; ++c) {
    Moments m;
    for (int64_t i = 0; i < parts; ++i) m.merge(moments[c * parts + i]);
    f(c, m);
  }
}

// The same for short planes. One thread sums a group and calls f for its channels.
template <class T, class F>
void for_each_channel_of_groups(const CpuPlan& plan, const T* x, F f) {
  const Problem& p = plan.problem;
  const int64_t group_channels = plan.group_channels, inner = p.inner / group_channels;
  const Leaves<T>& leaves = best_leaves<T>();
  const Part whole = part_of(p, 0, 1);
  parallel_for(0, p.channels, plan.grain, [&](int64_t begin, int64_t end) {
    GroupMoments<T> moments(group_channels, inner);
    for (int64_t group = begin; group < end; ++group) {
      moments.sum(leaves, x + whole.first(p, group), runs_of(p, whole));
      for (int64_t c = 0; c < group_channels; ++c) f(group * group_channels + c, moments[c]);
    }
  });
}

// The same for rows, where f(first, count, means, sums of squared deviations) gets several channels at once. It is
// called on several threads, once for each channel.
template <class T, class F>
void for_each_channel_of_rows(const CpuPlan& plan, const T* x, F f) {
  const Problem& p = plan.problem;
  const RowView& view = plan.sum_rows;
  std::vector<ColumnMoments<T>> moments;
  moments.reserve(view.tasks);
  for (int64_t task = 0; task < view.tasks; ++task) moments.emplace_back(view.columns, source_of(plan));
  parallel_for(0, view.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for_rows(view, view.begin(task), view.end(task),
               [&](Runs runs, int64_t at) { moments[task].add(best_leaves<T>(), x + at, runs); });
    }
  });
  const bool one_each = view.tasks == 1 && view.columns == p.channels;
  parallel_for(0, p.channels, kChannelGrain, [&](int64_t begin, int64_t end) {
    for_channels(begin, end, [&](int64_t first, int count) {
      if (one_each) {
        f(first, count, moments[0].mean() + first, moments[0].m2() + first);
        return;
      }
      double mean[kChannelsAtOnce], m2[kChannelsAtOnce];
      for (int i = 0; i < count; ++i) {
        Moments m;
        for (const auto& of_task : moments) {
          for (int64_t column = first + i; column < view.columns; column += p.channels) m.merge(of_task[column]);
        }
        mean[i] = m.mean;
        m2[i] = m.m2;
      }
      f(first, count, mean, m2);
    });
  });
}

}  // namespace bnfused::cpu
