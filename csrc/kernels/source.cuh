// The protocol of a kernel's body and of the source of its units.
//
// A kernel passes over a tensor once or twice. Its *body* says what a unit is and what is done with it. Its *source*
// says where a thread's unit of a step comes from, and whether it is kept on chip for the second pass. A thread counts
// its units in steps, from the first that it reads; `span` says which values of a unit are its own.
//
// What a pass calls, in this order, for each step of a thread:
//
//   source.load(loaded, unit, span, step)   in both passes: the unit's values, from wherever they are
//   source.keep(loaded, span, step)         in the first pass: they have been loaded, and may be needed again
//   source.used(step)                       in the second pass: they are not needed any more
//
// What a source calls. A body of the first pass has the first three, one of the second pass the others as well:
//
//   Value, Loaded                           the type of a value; what a thread has of a unit, of all tensors
//   body.load(loaded, unit, span)           from global memory
//   body.receive(loaded, kept, step, unit)  from shared memory, where the unit was fetched ahead; the rest from memory
//   body.keep(loaded, kept, step, fetched)  into shared memory; `fetched`: it lies there already
//   body.recall(loaded, kept, step, unit, span)  from shared memory, in the second pass
//   body.fetch(kept, step, unit)            starts copies of a unit of the next tile into shared memory
//   body.tensors()                          how many packs of a unit are kept
//
// What the second pass calls (sweep.cuh):
//
//   Constants                               what it needs to know of a channel
//   kLoads                                  units that a thread loads before it uses the first
//   kUnrolled                               each of them has code of its own; otherwise they take turns
//   body.store(loaded, unit, span, constants_of)  constants_of(k) are the Constants of value k
//
// and `constants(channel, owns)` makes the Constants. `owns` is true in one block for each channel, which may then
// write what belongs to the channel.
#pragma once
#include "kernels/layout.cuh"
#include "kernels/on_chip.cuh"

namespace bnfused {

// Source of a pass that keeps nothing: every unit comes from memory.
template <class Body>
struct FromMemory {
  const Body& body;

  __device__ __forceinline__ void load(typename Body::Loaded& loaded, uint32_t unit, Span span,
                                       uint32_t /*step*/) const {
    body.load(loaded, unit, span);
  }
  __device__ __forceinline__ void keep(const typename Body::Loaded&, Span, uint32_t /*step*/) const {}
  __device__ __forceinline__ void used(uint32_t /*step*/) const {}
};

// Source of the first pass where units are kept: from memory, but for those that were fetched while the tile before was
// finished.
template <class Body>
struct ToKeep {
  const Body& body;
  const OnChip<typename Body::Value>& kept;

  __device__ __forceinline__ void load(typename Body::Loaded& loaded, uint32_t unit, Span span, uint32_t step) const {
    if (kept.has_fetched(step, span)) {
      body.receive(loaded, kept, step, unit);
    } else {
      body.load(loaded, unit, span);
    }
  }
  __device__ __forceinline__ void keep(const typename Body::Loaded& loaded, Span span, uint32_t step) const {
    if (kept.has(step)) body.keep(loaded, kept, step, kept.has_fetched(step, span));
  }
};

// Fetches the thread's units of the next tile.
template <class Body, class Units>
struct Fetch {
  const Body& body;
  const OnChip<typename Body::Value>& kept;
  Units unit_of;  // by its step
  bool wanted;    // there is a next tile, and the device and the addresses let it be fetched

  // Into slots that are free while this tile is kept.
  __device__ __forceinline__ void ahead() const {
    for (uint32_t step = 0; wanted && step < kept.ahead(); ++step) fetch(step);
  }
  // Into the slot of a unit of this tile that is not needed any more.
  __device__ __forceinline__ void in_place_of(uint32_t step) const {
    if (wanted && step >= kept.ahead() && kept.has(step)) fetch(step);
  }

 private:
  __device__ __forceinline__ void fetch(uint32_t step) const {
    const UnitAt at = unit_of(step);
    if (at.span.whole()) body.fetch(kept, step, at.unit);
  }
};

// Source of the second pass: kept units from shared memory, the rest from global memory.
template <class Body, class Units>
struct Recalled {
  const Body& body;
  const OnChip<typename Body::Value>& kept;
  const Fetch<Body, Units>& next;

  __device__ __forceinline__ void load(typename Body::Loaded& loaded, uint32_t unit, Span span, uint32_t step) const {
    if (kept.has(step)) {
      body.recall(loaded, kept, step, unit, span);
    } else {
      body.load(loaded, unit, span);
    }
  }
  __device__ __forceinline__ void used(uint32_t step) const { next.in_place_of(step); }
};

}  // namespace bnfused
