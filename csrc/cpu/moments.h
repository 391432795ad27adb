// Mean and sum of squared deviations, exactly enough: what a single float32 pass gets wrong is done again.
//
// A block of a few thousand values is summed in the leaves' arithmetic relative to a shift, and blocks are merged in
// float64 by Chan's formula. The shift is the mean of what came before; where a block's own mean turns out to lie
// further from it than kTrusted standard deviations, cancellation has eaten digits and the block, still in L1 or L2, is
// summed again around its own mean. No shift rests on a single value. Source: Chan, Golub & LeVeque, "Algorithms for
// computing the sample variance", 1983.
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <limits>

#include "cpu/driver.h"

namespace bnfused::cpu {

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: sum of squared deviations from the mean

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count;
    const double delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * (other.count / total));
    count = total;
  }
};

constexpr double kTrusted = 2;
// Each round shrinks the distance to the block's mean by the precision of A; more never helps.
constexpr int kRounds = 4;

// Sums whose squares left the range of A, upwards or downwards, say nothing about the values.
template <class A>
bool in_range(const Sums& sums) {
  constexpr double kLow = std::numeric_limits<A>::min() * 1e8, kHigh = std::numeric_limits<A>::max() * 1e-1;
  if (std::isnan(sums.first)) return true;  // so are the values
  return sums.second <= kHigh && (sums.second >= kLow || (sums.first == 0 && sums.second == 0));
}

inline bool trusted(const Sums& sums, double count) {
  const double offset = sums.first / count;
  const double m2 = sums.second - sums.first * offset;
  return !(sums.first * offset > kTrusted * kTrusted * m2);  // NaN is as good as it gets
}

inline Moments around(double shift, const Sums& sums, double count) {
  const double offset = sums.first / count;
  return {count, shift + offset, std::max(0.0, sums.second - sums.first * offset)};
}

inline double widened(float x) { return x; }
inline double widened(double x) { return x; }
inline double widened(Float16 x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
inline double widened(BFloat16 x) { return c10::detail::f32_from_bits(x.bits); }

// Both passes in float64, value by value: for what A cannot square.
template <class T>
Moments wide_moments(const T* x, Runs runs) {
  const double count = double(runs.count) * double(runs.length);
  double sum = 0, m2 = 0;
  for (int64_t run = 0; run < runs.count; ++run) {
    for (int64_t i = 0; i < runs.length; ++i) sum += widened(x[run * runs.stride + i]);
  }
  const double mean = sum / count;
  for (int64_t run = 0; run < runs.count; ++run) {
    for (int64_t i = 0; i < runs.length; ++i) {
      const double d = widened(x[run * runs.stride + i]) - mean;
      m2 += d * d;
    }
  }
  return {count, mean, m2};
}

// One block of one channel.
template <class T>
Moments block_moments(const Leaves<T>& leaf, const T* x, Runs runs, double shift) {
  using A = Accumulate<T>;
  const double count = double(runs.count) * double(runs.length);
  for (int round = 0;; ++round) {
    const A rounded = static_cast<A>(shift);
    const Sums sums = leaf.plane_moments(x, runs, rounded);
    if (!in_range<A>(sums)) return wide_moments(x, runs);
    const Moments block = around(rounded, sums, count);
    if (trusted(sums, count) || round + 1 == kRounds) return block;
    shift = block.mean;
  }
}

template <class T>
Moments slab_moments(const Leaves<T>& leaf, const T* x, Runs runs) {
  Moments all;
  for_each_block(runs,
                 [&](int64_t offset, Runs block) { all.merge(block_moments(leaf, x + offset, block, all.mean)); });
  return all;
}

// The moments of every column over one task's rows.
template <class T>
class ColumnMoments {
  using A = Accumulate<T>;

 public:
  explicit ColumnMoments(int64_t columns)
      : columns_(columns),
        shift_(scratch<A>(columns)),
        sums_(scratch<A>(columns)),
        squares_(scratch<A>(columns)),
        moments_(new Moments[columns]) {}

  const Moments& operator[](int64_t column) const { return moments_[column]; }

  void add(const Leaves<T>& leaf, const T* x, Runs runs) {
    for (int64_t row = 0; row < runs.count; row += kBlockRows) {
      add_block(leaf, x + row * runs.stride, Runs{std::min(kBlockRows, runs.count - row), runs.length, runs.stride, 0});
    }
  }

 private:
  void add_block(const Leaves<T>& leaf, const T* x, Runs runs) {
    const int64_t width = runs.length;
    const double count = double(runs.count);
    for (int64_t i = 0; i < width; ++i) shift_[i] = static_cast<A>(moments_[i].mean);
    for (int round = 0; round < kRounds; ++round) {
      leaf.row_moments(x, runs, shift_.get(), sums_.get(), squares_.get());
      bool again = false;
      for (int64_t i = 0; i < width; ++i) again |= !trusted(sums_of(i), count);
      if (!again || round + 1 == kRounds) break;
      for (int64_t i = 0; i < width; ++i) {
        const Sums sums = sums_of(i);
        if (in_range<A>(sums) && !trusted(sums, count)) shift_[i] = static_cast<A>(shift_[i] + sums.first / count);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      const Sums sums = sums_of(i);
      moments_[i].merge(in_range<A>(sums) ? around(shift_[i], sums, count)
                                          : wide_moments(x + i, Runs{runs.count, 1, runs.stride, 0}));
    }
  }

  Sums sums_of(int64_t i) const { return {sums_[i], squares_[i]}; }

  int64_t columns_;
  std::unique_ptr<A[]> shift_, sums_, squares_;
  std::unique_ptr<Moments[]> moments_;
};

}  // namespace bnfused::cpu
