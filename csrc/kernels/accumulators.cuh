// The accumulators of the reductions: the moments of x, and the two sums of the backward. Both are merged in a fixed
// order, so that results repeat bit by bit.
//
// Accuracy: values are added in float32 (float64 for float64) over short runs, as differences from a shift: the mean of
// the first values of a run. The runs are merged in float64 by Chan's formula. With n values, a shift that is off by d
// costs the variance n * d^2 * 2^-24. If an outlier among the first 8 values caused that, it adds (8 d)^2 to the variance
// by itself, so that the relative loss stays small.
// Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
#pragma once
#include <cfloat>

#include "kernels/pack.cuh"

namespace bnfused {

// Count, mean, and sum of squared differences from the mean (m2). The count is a float, except for float64 tensors: the
// ratio of two counts only weighs a difference of means, and 24 bits are enough for that.
template <class A>
struct Moments {
  double mean = 0, m2 = 0;
  A count = 0;

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const A total = count + other.count;
    const double ratio = quotient(other.count, total);
    const double delta = other.mean - mean;
    mean = count == 0 ? other.mean : mean + delta * ratio;  // the first is exact, even if it is infinite
    m2 = count == 0 ? other.m2 : m2 + (other.m2 + delta * delta * (count * ratio));
    count = total;
  }
};

// The sum of kValues values. kValues is a power of two.
template <class A, int kValues>
__device__ __forceinline__ A sum_in_pairs(A (&sums)[kValues]) {
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// If all values are equal, their mean is exactly that value. So a constant has variance 0, and becomes `bias`.
template <class A, int kValues>
__device__ __forceinline__ A mean_in_pairs(const A (&values)[kValues]) {
  A parts[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) parts[i] = values[i] * A(1.0 / kValues);
  return sum_in_pairs(parts);
}

// A run moves its shift after this many steps. An outlier D puts the mean of the first 2 values off by D / 2, and that
// of 8 values by D / 8 only. The error of the variance grows with the square of that distance.
constexpr int kStepsToCenter = 4;
// A run ends after this many steps. Each step has the loads that a thread starts together. Values of 2 bytes have 4 of
// them, so that their run has 64 values.
constexpr int kStepsOfRun = 16;

// Squares of float32 overflow from 2^64 on. If those of a run did, it is summed again with values times this factor.
// Then the sum of 64 squares stays below 2^120, and the largest square is above 2^-22.
constexpr float kShrink = 0x1p-72f;

// A short run of values. It sums their differences from its shift, and the squares of these, in the type Sum. Each
// difference is multiplied by the scale, which is 1 or kShrink.
template <class A, class Sum>
struct Run {
  A shift = 0;
  Sum sum = 0, squares = 0;

  // True for NaN too, which comes from an infinite shift or sum.
  __device__ __forceinline__ bool overflowed() const { return sizeof(A) < sizeof(double) && !(squares <= FLT_MAX); }

  // The fma scales without another rounding, and before the difference could overflow.
  __device__ __forceinline__ A difference(A value, A scale) const { return fma(value, scale, -shift); }

  __device__ __forceinline__ void add(A value, A scale) {
    const A d = difference(value, scale);
    sum += d;
    squares = fma(d, d, squares);
  }

  // Moves the shift to the mean of the `count` values that were added so far.
  __device__ __forceinline__ void recenter(A count) {
    const A target = shift + quotient(sum, count), moved = target - shift;
    const Sum rest = fma(-count, moved, sum);
    squares -= moved * (sum + rest);
    sum = rest;
    shift = target;
  }

  __device__ __forceinline__ Moments<A> moments(A count, A scale) const {
    const Sum offset = quotient(sum, Sum(count));
    const Sum m2 = squares - sum * offset;
    Moments<A> m{double(shift) + double(offset), double(m2 < 0 ? Sum(0) : m2), count};
    if (scale != 1) {
      m.mean *= 1.0 / kShrink;
      m.m2 *= 1.0 / kShrink / kShrink;
    }
    return m;
  }
};

// The sums of g and of g * (x - mean) over the values of a channel. g is the gradient before the activation.
struct GradSums {
  double g = 0, g_d = 0;

  __device__ __forceinline__ void add(double gradient, double d) {
    g += gradient;
    g_d = fma(gradient, d, g_d);
  }

  __device__ __forceinline__ void merge(const GradSums& other) {
    g += other.g;
    g_d += other.g_d;
  }
};

}  // namespace bnfused
