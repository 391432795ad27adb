// Values per channel: read and written in any dtype, the running statistics, and the coefficients of a forward.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "batch_norm.h"
#include "cpu/tuning.h"

namespace bnfused::cpu {

// Calls f(first, count) for the channels of [begin, end), kChannelsAtOnce at a time.
template <class F>
void for_channels(int64_t begin, int64_t end, F f) {
  for (int64_t first = begin; first < end; first += kChannelsAtOnce) {
    f(first, static_cast<int>(std::min<int64_t>(kChannelsAtOnce, end - first)));
  }
}

// The values of `count` channels. float32 is inline, because nearly all parameters are float32.
double read_other(const PerChannel& values, int64_t channel);
inline void read(const PerChannel& values, int64_t first, int count, double if_absent, double* to) {
  if (!values) {
    std::fill_n(to, count, if_absent);
  } else if (values.dtype == DType::kFloat32) {
    std::copy_n(static_cast<const float*>(values.data) + first, count, to);
  } else {
    for (int i = 0; i < count; ++i) to[i] = read_other(values, first + i);
  }
}
inline double read(const PerChannel& values, int64_t channel, double if_absent) {
  double value;
  read(values, channel, 1, if_absent, &value);
  return value;
}
void write_other(const PerChannel& values, int64_t channel, double value);
inline void write(const PerChannel& values, int64_t first, int count, const double* from) {
  if (!values) return;
  if (values.dtype == DType::kFloat32) {
    float* to = static_cast<float*>(values.data) + first;
    for (int i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  } else {
    for (int i = 0; i < count; ++i) write_other(values, first + i, from[i]);
  }
}
inline void write(const PerChannel& values, int64_t channel, double value) { write(values, channel, 1, &value); }

// Counts this batch. Returns its weight in the running statistics.
template <class Args>
double count_batch(const Args& args) {
  const int64_t count = args.num_batches_tracked ? ++*args.num_batches_tracked : 0;
  return args.cumulative ? 1.0 / double(count) : args.momentum;
}
// Moves the running statistics of `count` channels, at most kChannelsAtOnce, towards those of the batch.
inline void move(const PerChannel& running, int64_t first, int count, double momentum, const double* of_batch) {
  if (!running) return;
  double values[kChannelsAtOnce];
  read(running, first, count, 0, values);
  for (int i = 0; i < count; ++i) values[i] = (1 - momentum) * values[i] + momentum * of_batch[i];
  write(running, first, count, values);
}

// y = (x - mean) * scale + shift is computed in A. The mean is rounded to A, and the part of it that is lost by that
// is folded into the shift.
template <class A>
struct Affine {
  A mean, scale, shift;
};

template <class A>
Affine<A> affine(double mean, double invstd, double weight, double bias) {
  const A rounded = static_cast<A>(mean);
  const double left = mean - double(rounded);
  const double rest = std::isinf(rounded) ? 0 : left;  // infinity - infinity would be NaN
  const double scale = weight * invstd;
  return {rounded, static_cast<A>(scale), static_cast<A>(bias - rest * scale)};
}

}  // namespace bnfused::cpu
