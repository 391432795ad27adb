// The statistics of a batch, or of a part of a batch.
//
//   computes  moments of x for each channel; from them mean, invstd and the running statistics, or a PackedMoments
//   moves     reads x once; writes a Moments for each channel and part
//   blocks    Rows: a tile of columns x a part of the rows. Planes: a channel x a part of its units
//   needs     workspace for the partials; tickets that are 0 before and after
#pragma once
#include "kernels/accumulators.cuh"
#include "kernels/finish.cuh"
#include "kernels/layout.cuh"
#include "kernels/source.cuh"

namespace bnfused {

// The body of the first pass of the forward (source.cuh). Its only tensor is x.
template <class T>
struct StatsBody {
  using Value = T;
  using Loaded = Pack<T>;

  const T* x;
  bool wide;

  __device__ __forceinline__ void load(Pack<T>& pack, uint32_t unit, Span span) const {
    load_unit(pack, x + int64_t(unit) * kUnit, span, wide);
  }
  __device__ __forceinline__ void receive(Pack<T>& pack, const OnChip<T>& kept, uint32_t step,
                                          uint32_t /*unit*/) const {
    kept.get(step, 0, pack);
  }
  __device__ __forceinline__ void keep(const Pack<T>& pack, const OnChip<T>& kept, uint32_t step, bool fetched) const {
    if (!fetched) kept.put(step, 0, pack);
  }
};

// Hides the span from the optimizer, so that code which depends on it stays in its branch. Otherwise the compiler
// computes both sides of the branch and selects, where nearly all units take the shorter side. Or it selects between
// loads, and so waits for each.
__device__ __forceinline__ Span behind_branch(Span span) { return {int(recomputed(uint32_t(span.begin))), span.end}; }

// Moments of each of the 8 values of the thread's column, over its rows.
template <class T, class Source>
__device__ __forceinline__ void column_moments(const Source& source, int64_t numel, const Rows& s,
                                               const RowsThread& thread, Moments<Accumulate<T>> (&total)[kUnit]) {
  using A = Accumulate<T>;
  constexpr int kLoads = kLoadsAtOnce<T>;
  if (!thread.active) return;
  const uint32_t whole_units = uint32_t(numel / kUnit);
  // How many rows have a whole unit in this column.
  const uint32_t rows = (whole_units + s.columns - 1 - thread.column) / s.columns;
  const uint32_t part_end = part_begin(s.rows, thread.part + 1, s.parts);
  const uint32_t end = part_end < rows ? part_end : rows;
  const uint32_t begin = part_begin(s.rows, thread.part, s.parts);
  uint32_t row = begin + thread.row_slot, done = 0;  // units
  const Span whole = behind_branch({0, kUnit});
  A merged = 0;
  while (row < end) {
    Run<A, A> run[kUnit];
    A count = 0;
    A scale = 1;
    unsigned left = (1u << kUnit) - 1;  // a bit for each value whose run is not merged yet
    for (;;) {
      for (int step = 0; step < kStepsOfRun && row < end; ++step) {
        Pack<T> packs[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const uint32_t r = row + i * s.row_slots;
          if (r < end) source.load(packs[i], r * s.columns + thread.column, whole, done + i);
        }
        // All loads are started before the first unit is kept.
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          if (row + i * s.row_slots < end) source.keep(packs[i], {0, kUnit}, done + i);
        }
        if (step == 0) {
          // With `end` itself, the compiler would copy the first pack to where other packs are not loaded.
          const uint32_t beyond = recomputed(end);
#pragma unroll
          for (int k = 0; k < kUnit; ++k) {
            A values[kLoads];
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
              values[i] = value_of(packs[i], k);
              if (row + i * s.row_slots >= beyond) values[i] = values[0];
            }
            run[k].shift = mean_in_pairs(values) * scale;
          }
        } else if (step == kStepsToCenter) {
#pragma unroll
          for (int k = 0; k < kUnit; ++k) run[k].recenter(count);
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          if (row < end) {
#pragma unroll
            for (int k = 0; k < kUnit; ++k) run[k].add(value_of(packs[i], k), scale);
            count += 1;
            row += s.row_slots;
            ++done;
          }
        }
      }
      // Values whose squares overflowed are summed again, scaled down. The others may be too small for that scale.
      unsigned overflowed = 0;
#pragma unroll
      for (int k = 0; k < kUnit; ++k) overflowed |= unsigned(scale == 1 && run[k].overflowed()) << k;
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        Moments<A> with{total[k].mean, total[k].m2, merged};
        with.merge(run[k].moments(count, scale));
        if ((left & ~overflowed) >> k & 1) total[k] = with;
      }
      if (overflowed == 0) break;
      left = overflowed;
      scale = kShrink;
      row -= uint32_t(count) * s.row_slots;
      done -= uint32_t(count);
      count = 0;
#pragma unroll
      for (int k = 0; k < kUnit; ++k) run[k] = {};
    }
    merged += count;
  }
  // All eight counts are equal. With this assignment the compiler keeps one count in a register instead of eight.
#pragma unroll
  for (int k = 0; k < kUnit; ++k) total[k].count = merged;
  // If the last unit of the tensor is not whole, it is in the last row, and is added value by value.
  const Span rest = span_of(whole_units, numel);
  if (rest.end > 0 && thread.column == whole_units % s.columns && row == s.rows - 1 && thread.part == s.parts - 1) {
    Pack<T> pack;
    source.load(pack, whole_units, rest, done);
    source.keep(pack, rest, done);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (rest.has(k)) total[k].merge({double(value_of(pack, k)), 0, 1});
    }
  }
}

// The mean of a unit for a run's shift. Each value outside the span is replaced by the nearest value in it.
template <class T>
__device__ __forceinline__ Accumulate<T> mean_of_owned(const Pack<T>& pack, Span span) {
  Accumulate<T> values[kUnit];
#pragma unroll
  for (int k = 0; k < kUnit; ++k) values[k] = value_of(pack, k);
  if (!span.whole()) {  // otherwise this changes nothing
#pragma unroll
    for (int k = 1; k < kUnit; ++k) values[k] = k < span.end ? values[k] : values[k - 1];
#pragma unroll
    for (int k = kUnit - 2; k >= 0; --k) values[k] = k < span.begin ? values[k + 1] : values[k];
  }
  return mean_in_pairs(values);
}

// Moments of a channel over the thread's units of its planes.
template <class T, class Source>
__device__ __forceinline__ Moments<Accumulate<T>> plane_moments(const Source& source, const Planes& s,
                                                                const PlanesBlock& block) {
  using A = Accumulate<T>;
  constexpr int kLoads = kLoadsAtOnce<T>;
  Moments<A> total;
  const auto number_of = [&](uint32_t step) { return block.begin + threadIdx.x + step * blockDim.x; };
  for (uint32_t step = 0; number_of(step) < block.end; step += kLoads) {
    Pack<T> packs[kLoads];
    Span spans[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t number = number_of(step + i);
      if (number < block.end) {
        const PlaneUnit at(s, block.channel, number);
        spans[i] = at.span;
        if (!at.span.empty()) source.load(packs[i], at.unit, at.span, step + i);
      }
    }
    // A unit is summed in A, and units are added in double: an outlier must not round away the squares of other units.
    Run<A, double> run;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (spans[i].empty()) continue;
      source.keep(packs[i], spans[i], step + i);
      if (count == 0) run.shift = mean_of_owned(packs[i], behind_branch(spans[i]));
      count += spans[i].end - spans[i].begin;
    }
    if (count == 0) continue;
    A scale = 1;
    // The first pass finds the mean. The second sums the differences from it, and their squares. A third does the same,
    // scaled, if squares overflowed. With three unrolled copies, registers would not allow two blocks on an SM.
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
      if (pass == 1) {
        const A moved = quotient(A(run.sum), A(count));
        // If `moved` is not finite, the squares overflow as well, or a value is infinite or NaN.
        if (moved - moved == 0) run.shift += moved;
      }
      if (pass == 2) {
        if (!run.overflowed()) break;
        scale = kShrink;
        run.shift *= scale;
      }
      run = {run.shift};
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        A differences[kUnit];
#pragma unroll
        for (int k = 0; k < kUnit; ++k) differences[k] = run.difference(value_of(packs[i], k), scale);
        if (!spans[i].whole()) {  // otherwise this changes nothing
          const Span span = behind_branch(spans[i]);
#pragma unroll
          for (int k = 0; k < kUnit; ++k) differences[k] = span.has(k) ? differences[k] : A(0);
        }
        if (pass > 0) {  // the first pass needs no squares
          A squares[kUnit];
#pragma unroll
          for (int k = 0; k < kUnit; ++k) squares[k] = differences[k] * differences[k];
          run.squares += sum_in_pairs(squares);
        }
        run.sum += sum_in_pairs(differences);
      }
    }
    total.merge(run.moments(A(count), scale));
  }
  return total;
}

template <class T>
struct StatsArgs {
  const T* x;
  int64_t numel;
  bool wide;
  Moments<Accumulate<T>>* partials;
  unsigned* tickets;       // one for each domain of the layout, then a gate for each, if blocks wait for each other
  unsigned* batch_ticket;  // for RunningStats::count_batch
  FinishStats finish;

  __device__ __forceinline__ StatsBody<T> body() const { return {x, wide}; }
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>) batch_norm_stats_rows(StatsArgs<T> args, Rows s) {
  using Sums = Moments<Accumulate<T>>;
  const RowsThread thread(s);
  Sums sums[kUnit];
  column_moments<T>(FromMemory<StatsBody<T>>{args.body()}, args.numel, s, thread, sums);
  merge_row_slots(sums, thread.row_slot, s.row_slots, thread.slot, s.tile, thread.active);
  const bool last = finish_rows(sums, args.partials, args.tickets, s, thread,
                                [&](uint32_t c, const Sums& all) { args.finish(c, all); });
  if (last) args.finish.count_batch(args.batch_ticket, s.domains());
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm<T>) batch_norm_stats_planes(StatsArgs<T> args, Planes s) {
  using Sums = Moments<Accumulate<T>>;
  const PlanesBlock block(s);
  Sums sums = plane_moments<T>(FromMemory<StatsBody<T>>{args.body()}, s, block);
  merge_block(sums);
  const bool last = finish_channel(sums, args.partials, args.tickets, s, block,
                                   [&](uint32_t c, const Sums& all) { args.finish(c, all); });
  if (last) args.finish.count_batch(args.batch_ticket, s.domains());
}

}  // namespace bnfused
