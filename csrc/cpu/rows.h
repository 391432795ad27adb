// The rows traversal: channels are innermost, and the tensor is seen as rows (RowView, in plan.h).
#pragma once
#include "cpu/driver.h"

namespace bnfused::cpu {

static_assert(kApplyCoefficients == int(kForwardCoefficients) && kGradCoefficients == int(kBackwardCoefficients));

// Calls f(runs, first value) for rows [begin, end) of the view: the full rows in one call, then the short one.
template <class F>
void for_rows(const RowView& view, int64_t begin, int64_t end, F f) {
  const int64_t full_end = std::min(end, view.full_rows);
  const int64_t mask_stride = view.columns / 8;
  if (begin < full_end) f(Runs{full_end - begin, view.columns, view.columns, mask_stride}, begin * view.columns);
  if (end > view.full_rows) f(Runs{1, view.tail, view.columns, mask_stride}, view.full_rows * view.columns);
}

// The same for the rows that the plan writes, in its pieces, from the last piece to the first.
template <class F>
void for_rows_backwards(const CpuPlan& plan, int64_t begin, int64_t end, F f) {
  for (int64_t last = end; last > begin; last = std::max(begin, last - plan.piece)) {
    for_rows(plan.rows, std::max(begin, last - plan.piece), last, f);
  }
}

// Calls f(runs, first column) for each strip of the rows.
template <class F>
void for_strips(Runs rows, int64_t strip, F f) {
  for (int64_t column = 0; column < rows.length; column += strip) {
    f(Runs{rows.count, std::min(strip, rows.length - column), rows.stride, rows.mask_stride}, column);
  }
}

inline Source source_of(const CpuPlan& plan) { return plan.from_memory ? Source::kMemory : Source::kCache; }

// The coefficients of every column, `kinds` of them.
template <class A>
class ColumnCoefficients {
 public:
  ColumnCoefficients(const RowView& view, int64_t channels, int kinds)
      : kinds_(kinds),
        stride_(padded(view.columns)),
        channels_(channels),
        columns_(view.columns),
        values_(scratch<A>(kinds * stride_)) {}

  // Sets the first column of a channel; `repeat` sets its other columns.
  void set(int kind, int64_t channel, A value) { values_[kind * stride_ + channel] = value; }
  void set(int64_t channel, const Affine<A>& a) {
    set(kMean, channel, a.mean);
    set(kScale, channel, a.scale);
    set(kShift, channel, a.shift);
  }
  // Copies the coefficients of `count` channels to all of their columns.
  void repeat(int64_t first, int count) {
    for (int64_t row = 0; channels_ < columns_ && row < kinds_ * stride_; row += stride_) {
      const A* from = values_.get() + row + first;
      for (int64_t column = channels_; column < columns_; column += channels_) {
        std::copy_n(from, count, values_.get() + row + column + first);
      }
    }
  }
  const A* data() const { return values_.get(); }
  int64_t stride() const { return stride_; }

 private:
  int kinds_;
  int64_t stride_, channels_, columns_;
  Scratch<A> values_;
};

// Writes y of some rows, which start at value `first`.
template <class T, class Args>
void write_rows(const Args& args, const CpuPlan& plan, const ColumnCoefficients<Accumulate<T>>& coefficients, Runs rows,
                int64_t first) {
  const auto apply = best_leaves<T>().apply(Layout::kRows, plan.streamed, forward_kind(args));
  for_strips(rows, plan.strip, [&](Runs runs, int64_t column) {
    const int64_t at = first + column;
    ApplyLoop<T> a = apply_loop<T>(args, at, at / 8);
    a.runs = runs;
    a.prefetch = plan.prefetch;
    a.coefficients = coefficients.data() + column;
    a.coefficient_stride = coefficients.stride();
    apply(a);
  });
}

}  // namespace bnfused::cpu
