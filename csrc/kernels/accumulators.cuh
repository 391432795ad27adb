// What the reductions add up: the moments of x, and the two sums of the backward. Both are merged in a fixed order, so
// that results repeat bit by bit.
//
// Accuracy: values are added in float32 (float64 for float64) over a short run only, as differences from a value near
// their mean, and the runs are merged in float64 by Chan's formula. A run's shift is the mean of its first values,
// never one sample: with n values about a shift that is off by d, the variance loses n * d^2 * 2^-24, and an outlier
// among the first 8 that puts the shift off by d adds (8 d)^2 to the variance itself. Source: Chan, Golub, LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
#pragma once
#include <cfloat>

#include "kernels/pack.cuh"

namespace bnfused {

// Count, mean and sum of squared differences from the mean. A counts in float: the ratio of two counts weighs a
// difference of means, which 24 bits suffice for. float64 tensors count in double.
template <class A>
struct Moments {
  double mean = 0, m2 = 0;
  A count = 0;

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const A total = count + other.count;
    const double ratio = quotient(other.count, total);
    const double delta = other.mean - mean;
    mean = count == 0 ? other.mean : mean + delta * ratio;  // exact for the first, also where 0 * infinity comes in
    m2 = count == 0 ? other.m2 : m2 + (other.m2 + delta * delta * (count * ratio));
    count = total;
  }
};

// Of a power of two of values.
template <class A, int kValues>
__device__ __forceinline__ A sum_in_pairs(A (&sums)[kValues]) {
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// For equal values it is that value exactly, so that the variance of a constant is exactly 0 and its normalized value
// exactly `bias`.
template <class A, int kValues>
__device__ __forceinline__ A mean_in_pairs(const A (&values)[kValues]) {
  A parts[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) parts[i] = values[i] * A(1.0 / kValues);
  return sum_in_pairs(parts);
}

// A run is centered again after this many of its steps: an outlier D among the first 2 values puts their mean, the
// shift, off by D / 2, and the roundings of the sum, which grow with that, enter the variance with it once more. The
// mean of 8 leaves D / 8 of it.
constexpr int kStepsToCenter = 4;
// A run ends after this many times the loads that a thread starts together: 64 values of 2 bytes.
constexpr int kStepsOfRun = 16;

// Squares of float32 overflow from 2^64 on. A run whose squares did is added up again with its values times this: the
// squares of 64 differences, which are below 2^129, then stay below 2^120, and the largest, from 2^61 on, above 2^-22.
constexpr float kShrink = 0x1p-72f;

// A short run of values, as differences from its shift, added up in Sum; all of it times the scale, which is 1 or
// kShrink.
template <class A, class Sum>
struct Run {
  A shift = 0;
  Sum sum = 0, squares = 0;

  // Also where the squares are NaN, of an infinite shift or sum.
  __device__ __forceinline__ bool overflowed() const { return sizeof(A) < sizeof(double) && !(squares <= FLT_MAX); }

  // Scaled without another rounding, and before a difference could overflow.
  __device__ __forceinline__ A difference(A value, A scale) const { return fma(value, scale, -shift); }

  __device__ __forceinline__ void add(A value, A scale) {
    const A d = difference(value, scale);
    sum += d;
    squares = fma(d, d, squares);
  }

  // Moves the shift to the mean of the `count` values so far.
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

// Sums over the values of a channel of g and of g * (x - mean), where g is the gradient before the activation.
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
