// The protocol of a kernel's body and of the source of its units.
//
// A kernel passes over a tensor once or twice. Its *body* says what a unit is and what is done with it. Its *source*
// says where a thread's unit of a step comes from, and whether it is kept on chip for the second pass. `span` says
// which values of a unit belong to the thread.
//
// What a pass calls, in this order, for each step of a thread:
//
//   source.load(loaded, unit, span, step)   both passes: gets the unit's values, from wherever they are
//   source.keep(loaded, span, step)         first pass: the values were loaded, and may be needed again
//   source.used(step)                       second pass: the values are not needed any more
//
// What a source calls. Each body has `Value`, the type of a value, and `Loaded`, a unit's values of all tensors as a
// thread has loaded them. In the forward, StatsBody sums and ForwardBody applies. BackwardBody serves both passes.
//
//   body.load(loaded, unit, span)                  both passes: loads the unit from global memory
//   body.receive(loaded, kept, step, unit)         first pass: takes the fetched tensors, and loads the others
//   body.keep(loaded, kept, step, fetched)         first pass: puts into shared memory what was not fetched into it
//   body.recall(loaded, kept, step, unit, span)    second pass: takes the kept tensors, and loads the others
//   body.fetch(kept, step, unit)                   starts the copies of a unit of the next tile into shared memory
//
// What the second pass calls (sweep.cuh):
//
//   Constants                                      what the body needs to know of a channel
//   kLoads                                         units that a thread loads before it uses the first
//   kUnrolled                                      whether each of these has code of its own, or a loop takes them
//   body.store(loaded, unit, span, constants_of)   constants_of(k) returns the Constants of value k
//
// A kernel gives the second pass a function `constants(channel, owns)`, which makes the Constants. `owns` is true in one
// block for each channel. That block may write what belongs to the channel.
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

// Source of the first pass where units are kept. They come from memory, or were fetched during the previous tile.
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
  Units unit_of;  // the unit of a step
  bool wanted;    // there is a next tile, the device has asynchronous copies, and the tensors are aligned for them

  // Fetches into slots that are free while this tile is kept.
  __device__ __forceinline__ void ahead() const {
    for (uint32_t step = 0; wanted && step < kept.ahead(); ++step) fetch(step);
  }
  // Fetches into the slot of a unit of this tile that is not needed any more.
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
