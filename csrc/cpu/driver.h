// What the three drivers share: reading and writing per-channel values, cutting a tensor into work for the threads, and
// the choice of stores. The drivers own the order of things; the leaves own the loops.
#pragma once
#include <ATen/Parallel.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/leaves.h"

namespace bnfused::cpu {

template <class F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
  }
}

// Channels whose numbers are worked out together, for the compiler to do it in vectors: where a channel has few values,
// its square root and its divisions take longer than they do.
constexpr int kChannelsTogether = 32;

// Calls f(first, count) for the channels of [begin, end), kChannelsTogether at a time.
template <class F>
void for_channels(int64_t begin, int64_t end, F f) {
  for (int64_t first = begin; first < end; first += kChannelsTogether) {
    f(first, static_cast<int>(std::min<int64_t>(kChannelsTogether, end - first)));
  }
}

// The values of `count` channels. float32 in line: it is what nearly all parameters are.
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

// The weight of this batch in the running statistics, and the counter moved on.
template <class Args>
double count_batch(const Args& args) {
  const int64_t count = args.num_batches_tracked ? ++*args.num_batches_tracked : 0;
  return args.cumulative ? 1.0 / double(count) : args.momentum;
}
// `count` channels, at most kChannelsTogether.
inline void move(const PerChannel& running, int64_t first, int count, double momentum, const double* of_batch) {
  if (!running) return;
  double values[kChannelsTogether];
  read(running, first, count, 0, values);
  for (int i = 0; i < count; ++i) values[i] = (1 - momentum) * values[i] + momentum * of_batch[i];
  write(running, first, count, values);
}

// Fewer values than this are done on one thread: waking a second costs as much as they do.
constexpr int64_t kSerialValues = 32768;
// Values of one channel that are summed around one shift, and stay in L2 for a second look. Each block waits for the
// mean of those before it (28 x 28 planes, batch 8, forward: blocks of 4096 take 9 % longer in all).
constexpr int64_t kBlockValues = 32768;
// Rows of the rows layout likewise, which stay in L1: with two, four and eight places to a block, places are no
// multiple of 4 KiB apart for the usual widths, lest what the leaves read at once fall into the same sets of L1.
constexpr int64_t kBlockRows = 4 * 131;
// Rows are written back to front in pieces of this many bytes, so that what the first pass read last is still cached.
// Each start costs the hardware's prefetch its stride (26 MB, 1 KiB rows: 33 GB/s with 64 KiB, 43 with 256, 47 with
// 1024).
constexpr int64_t kPieceBytes = 1024 * 1024;
// Outputs from this size on bypass the caches. Measured with a producer before and a consumer after: at 12 MB bypassing
// wins 1.2 to 1.7 times on a Zen 5 core and is even on Sapphire Rapids; at 6.4 MB it is even on Zen 5, where the
// forward by itself (bfloat16, channels_last, add and ReLU) takes half the time; at 3 MB the consumer finds y in the
// last-level cache, and bypassing only moves the cost.
constexpr int64_t kStreamFromBytes = 6 * 1024 * 1024;

// The rows of a tensor of this size come from memory, of a smaller one mostly from the last-level cache.
constexpr int64_t kMemoryFromBytes = 8 * 1024 * 1024;
template <class T>
Source source_of(const Problem& p) {
  return p.numel() * int64_t(sizeof(T)) < kMemoryFromBytes ? Source::kCache : Source::kMemory;
}
// How far ahead of the stores x is fetched where both are streamed (25 MB, 1 KiB rows: 0.82 instead of 0.87 ms). In
// strips, where that lies in another one, it is the next row.
constexpr int64_t kStreamAheadBytes = 16384;

// A channel up to this size is fetched while the one before it is written; a larger one would push out what is needed.
constexpr int64_t kPrefetchUpToBytes = 512 * 1024;
// Channels for which one thread folds statistics into coefficients before a second is woken: a square root and two
// divisions each.
constexpr int64_t kChannelGrain = 512;

// Bytes ahead of a store to ask for its line in exclusive state, or 0. A core that waits for the line with each store
// gains by asking early (Sapphire Rapids: 10 becomes 16 to 22 GB/s); one that does so on its own has
// nothing to gain (Zen 5: within 6 % either way).
int64_t store_ahead();

// Room for `size` values, a vector more at least, and whole vectors, so that one may be read or written at any value
// and what follows is aligned again.
constexpr int64_t padded(int64_t size) { return (size + 2 * kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

struct FreeLines {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(kLineBytes)); }
};
template <class A>
using Scratch = std::unique_ptr<A[], FreeLines>;

// Uninitialised, padded, and on a line: vectors of coefficients that straddle two lines take two loads each, for every
// row (the last pass of the backward, 6272 rows of 512: 1.0 instead of 0.48 ms).
template <class A>
Scratch<A> scratch(int64_t size) {
  return Scratch<A>(new (std::align_val_t(kLineBytes)) A[padded(size)]);
}

// at::parallel_for, after which every thread sees what was streamed past the caches.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F f) {
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    f(first, last);
#if defined(__x86_64__)
    _mm_sfence();
#endif
  });
}

inline int64_t grain_for(int64_t values_per_item) {
  return std::max<int64_t>(1, kSerialValues / std::max<int64_t>(1, values_per_item));
}

inline bool is_planes(const Problem& p) { return p.inner > 1; }

// Whether outputs of this problem are streamed: they are large, and every run of them starts on a line.
template <class T>
bool streams(const Problem& p, int64_t run_length, std::initializer_list<const void*> outputs) {
  if (p.numel() * int64_t(sizeof(T)) < kStreamFromBytes || run_length * int64_t(sizeof(T)) % kLineBytes != 0) {
    return false;
  }
  return std::all_of(outputs.begin(), outputs.end(),
                     [](const void* y) { return reinterpret_cast<uintptr_t>(y) % kLineBytes == 0; });
}

// Values from a channel's plane to what is needed next: the next channel's plane, or, where planes are short, the one
// that is far enough ahead to arrive in time (7 x 7 planes: 0.41 becomes 0.31 ms for the backward of 32x512).
template <class T>
int64_t prefetch_ahead(const Problem& p) {
  constexpr int64_t kBytes = 1024;
  return std::max(p.inner, kBytes / int64_t(sizeof(T)));
}

template <class Args>
ForwardKind forward_kind(const Args& args) {
  if (args.mask) return ForwardKind::kMaskedReLU;
  if (args.epilogue.activation == Activation::kIdentity) return ForwardKind::kIdentity;
  return args.epilogue.activation == Activation::kReLU ? ForwardKind::kReLU : ForwardKind::kOther;
}

// What the leaves of a forward take from TrainArgs or ApplyArgs, from the value (and byte of the mask) on that a part
// of the work starts at; runs and coefficients are the caller's.
template <class T, class Args>
ApplyLoop<T> apply_loop(const Args& args, int64_t at, int64_t mask_at) {
  ApplyLoop<T> a{};
  a.x = static_cast<const T*>(args.x) + at;
  a.residual = args.residual ? static_cast<const T*>(args.residual) + at : nullptr;
  a.y = static_cast<T*>(args.y) + at;
  a.mask = args.mask ? args.mask + mask_at : nullptr;
  a.store_ahead = store_ahead();
  a.epilogue = args.epilogue;
  return a;
}

// Where y = (x - mean) * scale + shift is computed in A: the mean in A, what A cannot hold of it folded into the shift.
template <class A>
struct Affine {
  A mean, scale, shift;
};

template <class A>
Affine<A> affine(double mean, double invstd, double weight, double bias) {
  const A rounded = static_cast<A>(mean);
  const double left = mean - double(rounded);
  const double rest = std::isinf(rounded) ? 0 : left;  // infinity - infinity is none
  const double scale = weight * invstd;
  return {rounded, static_cast<A>(scale), static_cast<A>(bias - rest * scale)};
}

// ---- planes: a channel is `outer` runs of `inner` values

// A part of one channel: planes [plane_begin, plane_end), values [begin, end) of each.
struct Part {
  int64_t plane_begin, plane_end, begin, end;

  Runs runs(const Problem& p) const {
    return {plane_end - plane_begin, end - begin, p.channels * p.inner, p.channels * ((p.inner + 7) / 8)};
  }
  // The same planes from the last to the first: what was read last is written first, out of the cache.
  Runs reversed(const Problem& p) const {
    const Runs r = runs(p);
    return {r.count, r.length, -r.stride, -r.mask_stride};
  }
  int64_t first(const Problem& p, int64_t channel) const { return at(p, channel, plane_begin); }
  int64_t last(const Problem& p, int64_t channel) const { return at(p, channel, plane_end - 1); }
  int64_t first_mask(const Problem& p, int64_t channel) const { return mask_at(p, channel, plane_begin); }
  int64_t last_mask(const Problem& p, int64_t channel) const { return mask_at(p, channel, plane_end - 1); }

 private:
  int64_t at(const Problem& p, int64_t channel, int64_t plane) const {
    return (plane * p.channels + channel) * p.inner + begin;
  }
  int64_t mask_at(const Problem& p, int64_t channel, int64_t plane) const {
    return (plane * p.channels + channel) * ((p.inner + 7) / 8) + begin / 8;
  }
};

// Into how many parts a channel is cut: one where there are channels enough to keep the threads busy.
inline int64_t parts_per_channel(const Problem& p) {
  const int64_t threads = at::get_num_threads();
  const bool enough = p.channels >= 4 * threads || p.channels % threads == 0;
  return enough || p.numel() < kSerialValues ? 1 : threads;
}

// Part `index` of `count`: whole planes where there are enough of them, else a stretch of every plane, cut where
// neither a line nor a byte of the mask is shared.
inline Part part_of(const Problem& p, int64_t index, int64_t count) {
  if (p.outer >= count) return {p.outer * index / count, p.outer * (index + 1) / count, 0, p.inner};
  constexpr int64_t kCut = 64;
  const auto cut = [&](int64_t i) { return i == count ? p.inner : p.inner * i / count / kCut * kCut; };
  return {0, p.outer, cut(index), cut(index + 1)};
}

// ---- short planes: those of neighbouring channels, side by side, are one run, in which every value is a column

// Planes of up to this many values cost more at their ends than between them (batch 8, forward: 7 x 7 1.7 to 2 times as
// fast in groups, 10 x 10 1.2 to 1.5, 14 x 14 as fast).
constexpr int64_t kShortPlane = 128;
// Fewer channels are too few for the threads once they are grouped.
constexpr int64_t kGroupedChannels = 64;
// Columns of a group, at most: their coefficients share L1 with what is read.
constexpr int64_t kGroupColumns = 1600;

// Depends on the problem alone: the bits of the mask are in another order then, and the number of threads may change
// between forward and backward. bnfused/explanation.py has the same rule, and that of the groups.
inline bool has_short_planes(const Problem& p) {
  return p.inner > 1 && p.inner <= kShortPlane && p.channels >= kGroupedChannels && p.channels % 8 == 0;
}

// Channels of a group: a multiple of 8, so that its bits of the mask are whole bytes.
inline int64_t channels_together(const Problem& p) {
  const int64_t threads = at::get_num_threads();
  for (int64_t together = kGroupColumns / p.inner / 8 * 8; together > 8; together -= 8) {
    const int64_t groups = p.channels / together;
    if (p.channels % together == 0 && (groups >= 4 * threads || groups % threads == 0)) return together;
  }
  return 8;
}

// The problem whose channels are the groups.
inline Problem grouped(const Problem& p) {
  const int64_t together = channels_together(p);
  return {p.outer, p.channels / together, together * p.inner, p.dtype};
}

// Coefficients of the channels of one group, for each of which OfChannel is `kKinds` of A, and of its columns.
template <class T, class OfChannel>
class GroupCoefficients {
  using A = Accumulate<T>;

 public:
  static constexpr int kKinds = sizeof(OfChannel) / sizeof(A);

  GroupCoefficients(int64_t together, int64_t inner)
      : together_(together),
        inner_(inner),
        stride_(padded(together * inner)),
        of_channel_(new OfChannel[together]),
        of_column_(scratch<A>(kKinds * stride_)) {}

  OfChannel& operator[](int64_t channel) { return of_channel_[channel]; }

  // From channels to columns: kinds [first, end).
  void spread(const Leaves<T>& leaf, int first, int end) {
    const A* of_channel = reinterpret_cast<const A*>(of_channel_.get());
    for (int kind = first; kind < end; ++kind) {
      leaf.spread(of_channel + kind, kKinds, together_, inner_, of_column_.get() + kind * stride_);
    }
  }
  const A* data() const { return of_column_.get(); }
  int64_t stride() const { return stride_; }

 private:
  int64_t together_, inner_, stride_;
  std::unique_ptr<OfChannel[]> of_channel_;
  Scratch<A> of_column_;
};

// ---- rows: channels innermost. The tensor is one run of values, seen as rows of `columns`

// Few channels, or channels that do not fill vectors, are taken several rows at a time: `columns` is a multiple of
// `channels`, and column i belongs to channel i % channels. The last row may be short.
struct RowView {
  int64_t columns, full_rows, tail;  // tail: values of the short last row, 0 if there is none

  int64_t rows() const { return full_rows + (tail > 0); }
};

// At least `at_least` columns where the channels are fewer than that; with_mask, every row of the mask starts on a
// byte.
RowView row_view(const Problem& p, int64_t at_least, bool with_mask);

// Four vectors of AVX-512: what sums can keep in registers.
constexpr int64_t kColumns = 64;
// So that a row is worth its loop (C = 64: the last pass of the backward at 46 instead of 34 GB/s).
constexpr int64_t kGradApplyColumns = 256;

// A view's rows, cut for the threads.
class RowTasks {
 public:
  RowTasks(const Problem& p, const RowView& view)
      : rows_(view.rows()),
        count_(p.numel() < kSerialValues ? 1 : std::clamp<int64_t>(at::get_num_threads(), 1, rows_)) {}

  int64_t count() const { return count_; }
  int64_t begin(int64_t task) const { return rows_ * task / count_; }
  int64_t end(int64_t task) const { return begin(task + 1); }

 private:
  int64_t rows_, count_;
};

// Calls f(runs, first value) for rows [begin, end) of the view: the full ones together, then the short one.
template <class F>
void for_rows(const RowView& view, int64_t begin, int64_t end, F f) {
  const int64_t full_end = std::min(end, view.full_rows);
  const int64_t mask_stride = view.columns / 8;
  if (begin < full_end) f(Runs{full_end - begin, view.columns, view.columns, mask_stride}, begin * view.columns);
  if (end > view.full_rows) f(Runs{1, view.tail, view.columns, mask_stride}, view.full_rows * view.columns);
}

// The same, in pieces from the last to the first.
template <class F>
void for_rows_backwards(const RowView& view, int64_t begin, int64_t end, int64_t bytes_per_value, F f) {
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / (view.columns * bytes_per_value));
  for (int64_t last = end; last > begin; last = std::max(begin, last - piece)) {
    for_rows(view, std::max(begin, last - piece), last, f);
  }
}

// Coefficients of more bytes than this leave L1 between one row and the next: streamed rows, which go one by one, are
// then written a strip of columns at a time. What an op gains by that, on one thread of a Zen 5, 6 to 32 MB: nothing
// where they are 24 to 40 KiB; from 48 KiB on nothing (float32 in 16 MB and more, backward or with a residual) to 1.8
// times (bfloat16, eval with residual and ReLU), most often 1.2.
constexpr int64_t kCoefficientBytes = 40 * 1024;
constexpr int64_t kStripBytes = 4096;

// Columns of a strip: all of them where one is enough.
template <class T>
int64_t strip_columns(const RowView& view, int kinds, bool streaming) {
  const bool fits = kinds * view.columns * int64_t(sizeof(Accumulate<T>)) <= kCoefficientBytes;
  return streaming && !fits ? kStripBytes / int64_t(sizeof(T)) : view.columns;
}

// Calls f(runs, first column) for each strip of the rows.
template <class F>
void for_strips(Runs rows, int64_t strip, F f) {
  for (int64_t column = 0; column < rows.length; column += strip) {
    f(Runs{rows.count, std::min(strip, rows.length - column), rows.stride, rows.mask_stride}, column);
  }
}

// Coefficients of the rows layout, one of each kind for every column.
template <class A>
class ColumnCoefficients {
 public:
  ColumnCoefficients(const RowView& view, int64_t channels, int kinds)
      : kinds_(kinds),
        stride_(padded(view.columns)),
        channels_(channels),
        columns_(view.columns),
        values_(scratch<A>(kinds * stride_)) {}

  // Of a channel's first column; `repeat` has the others.
  void set(int kind, int64_t channel, A value) { values_[kind * stride_ + channel] = value; }
  void set(int64_t channel, const Affine<A>& a) {
    set(kMean, channel, a.mean);
    set(kScale, channel, a.scale);
    set(kShift, channel, a.shift);
  }
  // What was set of `count` channels, in all of their columns.
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

// y of some of the view's rows, which start at value `first`.
template <class T, class Args>
void apply_rows(const Args& args, const RowView& view, const ColumnCoefficients<Accumulate<T>>& coefficients, Runs rows,
                int64_t first) {
  const bool streaming = streams<T>(args.problem, view.columns, {args.y});
  const auto apply = best_leaves<T>().apply[int(Layout::kRows)][streaming][int(forward_kind(args))];
  const int64_t strip = strip_columns<T>(view, kForwardCoefficients, streaming);
  const int64_t ahead = strip < view.columns ? view.columns : kStreamAheadBytes / int64_t(sizeof(T));
  for_strips(rows, strip, [&](Runs runs, int64_t column) {
    const int64_t at = first + column;
    ApplyLoop<T> a = apply_loop<T>(args, at, at / 8);
    a.runs = runs;
    a.prefetch = streaming ? ahead : 0;
    a.coefficients = coefficients.data() + column;
    a.coefficient_stride = coefficients.stride();
    apply(a);
  });
}

}  // namespace bnfused::cpu
