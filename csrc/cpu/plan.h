// How the CPU backend walks a tensor: a pure function of the problem, of what the call reads and writes, and of the
// number of threads. The drivers do what it says, bnfused.explain prints it, and tests check it for many problems.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>

#include "batch_norm.h"
#include "cpu/tuning.h"

namespace bnfused::cpu {

// kPlanes: a thread takes one channel at a time, which is `outer` runs of `inner` values. kShortPlanes: a thread takes
// a group of neighbouring channels at a time. Side by side their planes are one run, in which every value is a column.
// kRows: channels are innermost, and a thread takes a range of rows.
enum class Traversal { kPlanes, kShortPlanes, kRows };

// What a call reads and writes in addition to x and y, or to x and the gradients.
struct CpuRequest {
  bool residual = false;  // a residual is read
  bool mask = false;      // the mask is written by a forward, read by a backward
  bool aligned = true;    // every output starts on a cache line
};

// The rows layout is one run of values, seen as rows of `columns` values. Few channels, or channels that do not fill
// vectors, are taken several rows at a time: `columns` is a multiple of the channels, and column i belongs to channel
// i % channels. The last row may be short: it has `tail` values then, and 0 says that there is no short row.
struct RowView {
  int64_t columns = 0, full_rows = 0, tail = 0;
  int64_t tasks = 0;  // parts of nearly the same number of rows, one for each thread

  constexpr int64_t rows() const { return full_rows + (tail > 0); }
  constexpr int64_t begin(int64_t task) const { return rows() * task / tasks; }
  constexpr int64_t end(int64_t task) const { return begin(task + 1); }
};

// A part of one channel: planes [plane_begin, plane_end), and of each of them the values [begin, end).
struct Part {
  int64_t plane_begin, plane_end, begin, end;

  // Where the part's first or last plane starts, in values of the tensor and in bytes of the mask.
  constexpr int64_t first(const Problem& p, int64_t channel) const { return at(p, channel, plane_begin); }
  constexpr int64_t last(const Problem& p, int64_t channel) const { return at(p, channel, plane_end - 1); }
  constexpr int64_t first_mask(const Problem& p, int64_t channel) const { return mask_at(p, channel, plane_begin); }
  constexpr int64_t last_mask(const Problem& p, int64_t channel) const { return mask_at(p, channel, plane_end - 1); }

 private:
  constexpr int64_t at(const Problem& p, int64_t channel, int64_t plane) const {
    return (plane * p.channels + channel) * p.inner + begin;
  }
  constexpr int64_t mask_at(const Problem& p, int64_t channel, int64_t plane) const {
    return (plane * p.channels + channel) * ((p.inner + 7) / 8) + begin / 8;
  }
};

// Part `index` of `count`: whole planes where there are enough of them. Otherwise it is a stretch of every plane, cut
// where neither a line nor a byte of the mask is shared.
constexpr Part part_of(const Problem& p, int64_t index, int64_t count) {
  if (p.outer >= count) return {p.outer * index / count, p.outer * (index + 1) / count, 0, p.inner};
  constexpr int64_t kCut = 64;
  const auto cut = [&](int64_t i) { return i == count ? p.inner : p.inner * i / count / kCut * kCut; };
  return {0, p.outer, cut(index), cut(index + 1)};
}

struct CpuPlan {
  Traversal traversal = Traversal::kPlanes;
  Problem problem{};                // as the loops walk it: groups of short planes, and planes in apply, are channels
  int64_t group_channels = 1;       // channels of a group; 1 unless planes are short
  int64_t most_group_channels = 1;  // the same for any number of threads
  int64_t parts = 1;                // planes: parts that a channel of `problem` is cut into
  int64_t grain = 1;                // items that are worth a thread: channels of `problem`, their parts, or rows
  bool streamed = false;            // outputs bypass the caches
  int64_t prefetch = 0;             // values ahead of the stores that inputs are fetched; 0 for not at all
  RowView sum_rows;                 // rows: as the pass sees them that sums
  RowView rows;                     // rows: as the pass sees them that writes
  bool from_memory = false;         // rows: the sums read memory, not the last-level cache
  int64_t strip = 0;                // rows: columns that are written at a time
  int64_t piece = 0;                // rows: rows that are written in order, before the pass goes further back
  int passes = 1;                   // how often x comes from memory
  const char* why = "";
};

// ---- the rules

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      break;
  }
  return 8;
}

constexpr int64_t bytes_of(const Problem& p) { return p.numel() * size_of(p.dtype); }

// Items of `values_per_item` that are worth a thread.
constexpr int64_t grain_for(int64_t values_per_item) {
  return std::max<int64_t>(1, kSerialValues / std::max<int64_t>(1, values_per_item));
}

// Outputs are streamed where they are large and every run of them starts on a line.
constexpr bool streams(const Problem& p, int64_t run_length, bool aligned) {
  return bytes_of(p) >= kStreamFromBytes && run_length * size_of(p.dtype) % kLineBytes == 0 && aligned;
}

// Depends on the problem alone: the bits of the mask are in another order then, and the number of threads may change
// between forward and backward.
constexpr bool has_short_planes(const Problem& p) {
  return p.inner > 1 && p.inner <= kShortPlane && p.channels >= kGroupedChannels && p.channels % 8 == 0;
}

constexpr Traversal traversal_of(const Problem& p) {
  if (has_short_planes(p)) return Traversal::kShortPlanes;
  return p.inner == 1 ? Traversal::kRows : Traversal::kPlanes;
}

// One part where there are channels enough to keep the threads busy.
constexpr int64_t parts_per_channel(const Problem& p, int64_t threads) {
  const bool enough = p.channels >= 4 * threads || p.channels % threads == 0;
  return enough || p.numel() < kSerialValues ? 1 : threads;
}

// A group of short planes has a multiple of 8 channels, so that its bits of the mask are whole bytes.
constexpr int64_t most_group_channels(const Problem& p) {
  return std::min(p.channels, std::max<int64_t>(8, kGroupColumns / p.inner / 8 * 8));
}

// The largest group that divides the channels and keeps the threads busy.
constexpr int64_t group_channels(const Problem& p, int64_t threads) {
  for (int64_t channels = kGroupColumns / p.inner / 8 * 8; channels > 8; channels -= 8) {
    const int64_t groups = p.channels / channels;
    if (p.channels % channels == 0 && (groups >= 4 * threads || groups % threads == 0)) return channels;
  }
  return 8;
}

// At least `at_least` columns where the channels are few. With a mask, every row of it starts on a byte.
constexpr RowView row_view(const Problem& p, int64_t at_least, bool mask, int64_t threads) {
  int64_t rows_at_once = 1;
  if (p.channels < kFewChannels) {
    rows_at_once = kMaxLanes / std::gcd(p.channels, kMaxLanes);
    while (rows_at_once * p.channels < at_least) rows_at_once *= 2;
  } else if (mask) {
    rows_at_once = 8 / std::gcd<int64_t>(p.channels, 8);
  }
  const int64_t columns = rows_at_once * p.channels;
  RowView view{columns, p.numel() / columns, p.numel() % columns};
  view.tasks = p.numel() < kSerialValues ? 1 : std::clamp<int64_t>(threads, 1, view.rows());
  return view;
}

// ---- the plans

// Coefficients of a channel (leaves.h): mean, scale and shift; the backward's slope and offset in addition.
constexpr int kApplyCoefficients = 3;
constexpr int kGradCoefficients = 5;

namespace planning {

// What is the same for every op. `tensors` of the size of x are kept in the cache between the sums and the stores.
constexpr CpuPlan start(const Problem& p, Traversal traversal, int64_t tensors, int64_t threads) {
  CpuPlan plan;
  plan.traversal = traversal;
  plan.problem = p;
  if (traversal == Traversal::kRows) {
    plan.passes = 2;
    plan.why = "every row has all channels: one pass for the sums, one to apply, the second backwards";
    return plan;
  }
  if (traversal == Traversal::kShortPlanes) {
    plan.group_channels = group_channels(p, threads);
    plan.most_group_channels = most_group_channels(p);
    plan.problem.channels = p.channels / plan.group_channels;
    plan.problem.inner = plan.group_channels * p.inner;
  }
  const int64_t kept = tensors * p.values_per_channel() * plan.most_group_channels * size_of(p.dtype);
  plan.passes = kept <= kCacheBytes ? 1 : 2;
  plan.why = plan.passes == 1 ? "its second pass finds it in the cache" : "larger than the cache, it is read twice";
  return plan;
}

// How rows are written that have `kinds` coefficients for every column.
constexpr void cut_rows(CpuPlan& plan, const RowView& rows, int kinds, const CpuRequest& request) {
  const Problem& p = plan.problem;
  const int64_t coefficient_size = p.dtype == DType::kFloat64 ? 8 : 4;
  plan.rows = rows;
  plan.streamed = streams(p, rows.columns, request.aligned);
  const bool fits = kinds * rows.columns * coefficient_size <= kCoefficientBytes;
  plan.strip = plan.streamed && !fits ? kStripBytes / size_of(p.dtype) : rows.columns;
}

constexpr int64_t piece_of(const RowView& rows, int64_t bytes_per_value) {
  return std::max<int64_t>(1, kPieceBytes / (rows.columns * bytes_per_value));
}

// The next row where rows go in strips: what lies a fixed number of bytes ahead is in another strip.
constexpr int64_t streamed_ahead(const CpuPlan& plan) {
  if (plan.strip < plan.rows.columns) return plan.rows.columns;
  return plan.streamed ? kStreamAheadBytes / size_of(plan.problem.dtype) : 0;
}

// Values from a channel's plane to those that are needed next: the next channel's plane, or, where planes are short,
// the one that is far enough ahead. `tensors` of the size of x are fetched, if a channel of them fits the cache.
constexpr int64_t next_channel(const Problem& p, int64_t tensors) {
  const bool fits = tensors * p.values_per_channel() * size_of(p.dtype) <= kPrefetchUpToBytes;
  return fits ? std::max(p.inner, kPrefetchAheadBytes / size_of(p.dtype)) : 0;
}

// Planes or groups of them that are summed and then written; `fetched` tensors are fetched ahead.
constexpr void cut_channels(CpuPlan& plan, int64_t fetched, const CpuRequest& request, int64_t threads) {
  const Problem& p = plan.problem;
  plan.streamed = streams(p, p.inner, request.aligned);
  if (plan.traversal == Traversal::kPlanes) {
    plan.parts = parts_per_channel(p, threads);
    if (plan.parts == 1) plan.prefetch = next_channel(p, fetched);
  }
  plan.grain = plan.parts == 1 ? grain_for(p.values_per_channel()) : 1;
}

}  // namespace planning

constexpr CpuPlan plan_stats(const Problem& p, int64_t threads) {
  CpuPlan plan = planning::start(p, traversal_of(p), 1, threads);
  plan.passes = 1;
  plan.why = "sums alone: one pass";
  if (p.numel() == 0) return plan;
  if (plan.traversal == Traversal::kRows) {
    plan.sum_rows = row_view(p, kColumns, /*mask=*/false, threads);
    plan.from_memory = bytes_of(p) >= kMemoryFromBytes;
  } else {
    planning::cut_channels(plan, 0, {}, threads);
    plan.streamed = false;
    plan.prefetch = 0;
  }
  return plan;
}

constexpr CpuPlan plan_train(const Problem& p, const CpuRequest& request, int64_t threads) {
  CpuPlan plan = planning::start(p, traversal_of(p), 1, threads);
  if (p.numel() == 0) return plan;
  if (plan.traversal == Traversal::kRows) {
    plan.sum_rows = row_view(p, kColumns, /*mask=*/false, threads);
    plan.from_memory = bytes_of(p) >= kMemoryFromBytes;
    planning::cut_rows(plan, row_view(p, kColumns, request.mask, threads), kApplyCoefficients, request);
    plan.prefetch = planning::streamed_ahead(plan);
    plan.piece = planning::piece_of(plan.rows, size_of(p.dtype));
  } else {
    planning::cut_channels(plan, request.residual ? 2 : 1, request, threads);
  }
  return plan;
}

// One pass in memory order. In groups of short planes a sample is not read in one go. float32 in the cache loses more
// by that than it gains (8 x 2048 x 7 x 7: 95 instead of 70 us). 16-bit values, where vectors cost the most, do not
// lose (94 instead of 118 us), and neither does what is streamed. A mask has its bits in the order of the groups.
constexpr CpuPlan plan_apply(const Problem& p, const CpuRequest& request, int64_t threads) {
  CpuPlan plan = planning::start(p, traversal_of(p), 1, threads);
  const auto one_pass = [&] {
    plan.passes = 1;
    plan.why = "the statistics are given: one pass";
  };
  one_pass();
  if (plan.traversal == Traversal::kShortPlanes && !request.mask && size_of(p.dtype) != 2 &&
      !streams(plan.problem, plan.problem.inner, request.aligned)) {
    plan = planning::start(p, Traversal::kPlanes, 1, threads);
    one_pass();
  }
  if (p.numel() == 0) return plan;
  switch (plan.traversal) {
    case Traversal::kPlanes: {
      plan.problem = {1, p.outer * p.channels, p.inner, p.dtype};
      const bool few = plan.problem.channels < threads && p.numel() >= kSerialValues;
      plan.parts = few ? threads : 1;
      plan.grain = few ? 1 : grain_for(p.inner);
      plan.streamed = streams(p, p.inner, request.aligned);
      break;
    }
    case Traversal::kShortPlanes:
      planning::cut_channels(plan, 0, request, threads);
      break;
    case Traversal::kRows:
      planning::cut_rows(plan, row_view(p, kColumns, request.mask, threads), kApplyCoefficients, request);
      plan.prefetch = planning::streamed_ahead(plan);
      plan.grain = grain_for(plan.rows.columns);
      break;
  }
  return plan;
}

constexpr CpuPlan plan_backward(const Problem& p, const CpuRequest& request, int64_t threads) {
  CpuPlan plan = planning::start(p, traversal_of(p), 2, threads);
  if (p.numel() == 0) return plan;
  if (plan.traversal == Traversal::kRows) {
    plan.sum_rows = row_view(p, kColumns, request.mask, threads);
    plan.from_memory = bytes_of(p) >= kMemoryFromBytes;
    planning::cut_rows(plan, row_view(p, kGradApplyColumns, request.mask, threads), kGradCoefficients, request);
    if (plan.strip < plan.rows.columns) plan.prefetch = plan.rows.columns;
    plan.piece = planning::piece_of(plan.rows, 2 * size_of(p.dtype));
  } else {
    planning::cut_channels(plan, 2, request, threads);
  }
  return plan;
}

}  // namespace bnfused::cpu
