// The pass over a tensor that applies. It visits every unit once, with the constants of its channels, and starts with
// those that were read last, which are probably still in the L2 cache. source.cuh explains Body and Source.
#pragma once
#include "kernels/source.cuh"

namespace bnfused {

// Calls f(i, loaded[i]) for each of the units that a thread has loaded. If the body is unrolled, each call has code of
// its own. Otherwise a loop moves the units to the front one by one, because registers cannot be indexed.
template <class Body, int kLoads, class F>
__device__ __forceinline__ void for_each_loaded(typename Body::Loaded (&loaded)[kLoads], F f) {
  if constexpr (Body::kUnrolled) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) f(i, loaded[i]);
  } else {
#pragma unroll 1
    for (int i = 0; i < kLoads; ++i) {
      typename Body::Loaded first;
      copy_words(first, loaded[0]);
      f(i, first);
#pragma unroll
      for (int k = 1; k < kLoads; ++k) copy_words(loaded[k - 1], loaded[k]);
    }
  }
}

// Applies to the units of the thread's column, in the rows of its part.
template <class Body, class Source, class ConstantsOf>
__device__ __forceinline__ void sweep_column(const Body& body, const Source& source, int64_t numel, const Rows& s,
                                             const RowsThread& thread, const ConstantsOf& constants_of) {
  constexpr int kLoads = Body::kLoads;
  if (!thread.active) return;
  const uint32_t units = uint32_t((numel + kUnit - 1) / kUnit);
  const uint32_t begin = part_begin(s.rows, thread.part, s.parts);
  const uint32_t end = part_begin(s.rows, thread.part + 1, s.parts);
  // How many rows this thread has. It takes the last one first.
  const uint32_t rows = (end - begin + s.row_slots - 1 - thread.row_slot) / s.row_slots;
  for (uint32_t done = 0; done < rows; done += kLoads) {
    typename Body::Loaded loaded[kLoads];
    const auto step_of = [&](int i) { return rows - 1 - done - i; };
    const auto unit_of = [&](int i) {
      return (begin + thread.row_slot + step_of(i) * s.row_slots) * s.columns + thread.column;
    };
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t unit = unit_of(i);
      if (done + i < rows && unit < units) source.load(loaded[i], unit, span_of(unit, numel), step_of(i));
    }
    for_each_loaded<Body>(loaded, [&](int i, const typename Body::Loaded& of_unit) {
      if (done + i >= rows) return;
      const uint32_t unit = unit_of(i);
      if (unit < units) body.store(of_unit, unit, span_of(unit, numel), constants_of);
      source.used(step_of(i));
    });
  }
}

// The constants of the 8 values of a thread's column, in registers, or in shared memory for float64 (80 registers).
template <class Constants>
class ColumnConstants {
 public:
  // All threads of the block compute the constants of its tile together, in `table`, which has room for kUnit * tile.
  template <class MakeConstants>
  __device__ __forceinline__ ColumnConstants(Constants* table, const Rows& s, const RowsThread& thread,
                                             MakeConstants constants)
      : shared_(table + thread.slot * kUnit) {
    const uint32_t first = thread.tile * s.tile * kUnit;
    for (uint32_t i = threadIdx.x; i < s.tile * kUnit && first + i < s.columns * kUnit; i += blockDim.x) {
      const uint32_t column = first + i;
      const bool owns = thread.part == 0 && column < s.channels;
      table[i] = constants(s.copies == 1 ? column : column % s.channels, owns);
    }
    __syncthreads();
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) own_[k] = shared_[k];
    }
  }

  __device__ __forceinline__ Constants operator()(int k) const {
    if constexpr (kInRegisters) {
      return own_[k];
    } else {
      return shared_[k];
    }
  }

 private:
  static constexpr bool kInRegisters = alignof(Constants) == alignof(float);
  const Constants* shared_;
  Constants own_[kInRegisters ? kUnit : 1];
};

template <class Body, class MakeConstants>
__device__ __forceinline__ void sweep_rows(const Body& body, int64_t numel, const Rows& s, MakeConstants constants) {
  using Constants = typename Body::Constants;
  BNFUSED_DYNAMIC_SHARED(Constants, table);
  const RowsThread thread(s);
  sweep_column(body, FromMemory<Body>{body}, numel, s, thread, ColumnConstants<Constants>(table, s, thread, constants));
}

// Applies to a run of units in memory order, which may belong to any number of planes.
template <class Body, class MakeConstants>
__device__ __forceinline__ void sweep_flat(const Body& body, int64_t numel, const Flat& s, MakeConstants constants) {
  using Constants = typename Body::Constants;
  constexpr int kLoads = Body::kLoads;
  BNFUSED_DYNAMIC_SHARED(Constants, table);
  const uint32_t block = gridDim.x - 1 - blockIdx.x;  // first the end of the tensor, which was read last
  const uint32_t begin = block * s.units_per_block;
  const uint32_t end = s.units - begin < s.units_per_block ? s.units : begin + s.units_per_block;
  const uint64_t first_value = uint64_t(begin) * kUnit;
  const uint64_t first_plane = divide(first_value, s.by_inner);
  // The last unit may reach beyond the tensor. The planes that would lie there get channels like all others.
  const uint32_t planes = uint32_t(divide(uint64_t(end) * kUnit - 1, s.by_inner) - first_plane) + 1;
  for (uint32_t i = threadIdx.x; i < planes; i += blockDim.x) {
    const uint64_t plane = first_plane + i;
    const uint64_t channel = plane - divide(plane, s.by_channels) * s.channels;
    table[i] = constants(uint32_t(channel), plane < s.channels && plane * s.inner >= first_value);
  }
  __syncthreads();
  for (uint32_t unit = begin + threadIdx.x; unit < end; unit += kLoads * blockDim.x) {
    typename Body::Loaded loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t u = unit + i * blockDim.x;
      if (u < end) body.load(loaded[i], u, span_of(u, numel));
    }
    for_each_loaded<Body>(loaded, [&](int i, const typename Body::Loaded& loaded_unit) {
      const uint32_t u = unit + i * blockDim.x;
      if (u >= end) return;
      const Span span = span_of(u, numel);
      const uint64_t value = uint64_t(u) * kUnit;
      const uint64_t plane = divide(value, s.by_inner);
      const uint64_t place = value - plane * s.inner;  // of the value in its plane
      const Constants* of_unit = table + (plane - first_plane);
      if (place + kUnit <= s.inner) {
        const Constants one = *of_unit;
        body.store(loaded_unit, u, span, [&](int) { return one; });
      } else {
        const auto constants_of = [&](int k) {
          const uint64_t at = place + k;
          return of_unit[at < s.inner ? 0 : (at < 2 * s.inner ? 1 : uint32_t(at) / uint32_t(s.inner))];
        };
        body.store(loaded_unit, u, span, constants_of);
      }
    });
  }
}

// Applies to this block's units of one channel.
template <class Body, class Source>
__device__ __forceinline__ void sweep_channel(const Body& body, const Source& source, const Planes& s,
                                              const PlanesBlock& block, const typename Body::Constants& constants) {
  constexpr int kLoads = Body::kLoads;
  const uint32_t begin = block.begin + threadIdx.x;
  const auto constants_of = [&](int) { return constants; };
  // The thread takes its last unit first. It has fewer than 2^31, because a block has at least 32 threads.
  for (int left = int((block.end - begin + blockDim.x - 1) / blockDim.x); left > 0; left -= kLoads) {
    typename Body::Loaded loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i >= left) continue;
      const uint32_t step = uint32_t(left - 1 - i);
      const PlaneUnit at(s, block.channel, begin + step * blockDim.x);
      if (!at.span.empty()) source.load(loaded[i], at.unit, at.span, step);
    }
    for_each_loaded<Body>(loaded, [&](int i, const typename Body::Loaded& of_unit) {
      if (i >= left) return;
      const uint32_t step = uint32_t(left - 1 - i);
      const PlaneUnit at(s, block.channel, begin + step * blockDim.x);
      if (!at.span.empty()) body.store(of_unit, at.unit, at.span, constants_of);
      source.used(step);
    });
  }
}

}  // namespace bnfused
