// What a thread keeps in shared memory from one pass over its units to the next, and what is on its way there.
#pragma once
#include "kernels/layout.cuh"

namespace bnfused {

// The first `steps` units of the thread, `tensors` packs of each, in slots of its own: it finds there what it has put
// or fetched there itself, so that nobody waits for it. Neighbours lie side by side, 16 bytes each.
//
// Whole units of the next tile are fetched into slots as those come free, without waiting. Slots of the first `ahead`
// steps come in pairs that take turns: theirs are fetched while the sums of this tile are exchanged, the others while
// it is finished, each as soon as the unit in its slot has been used.
template <class T>
class OnChip {
 public:
  __device__ __forceinline__ OnChip(uint4* shared, const Residency& r, uint32_t tensors)
      : own_(shared + threadIdx.x), steps_(r.steps), ahead_(r.ahead), tensors_(tensors) {}

  __device__ __forceinline__ bool has(uint32_t step) const { return step < steps_; }
  // Whether the unit was fetched while the tile before was finished.
  __device__ __forceinline__ bool has_fetched(uint32_t step, Span span) const {
    return fetched_ && has(step) && span.whole();
  }
  __device__ __forceinline__ uint32_t ahead() const { return ahead_; }

  __device__ __forceinline__ void put(uint32_t step, uint32_t tensor, const Pack<T>& pack) const {
    uint4 words[kWords];
    memcpy(words, &pack, sizeof(pack));
    uint4* const slot = slot_of(step, turn_, tensor);
#pragma unroll
    for (unsigned i = 0; i < kWords; ++i) slot[i * blockDim.x] = words[i];
  }

  __device__ __forceinline__ void get(uint32_t step, uint32_t tensor, Pack<T>& pack) const {
    uint4 words[kWords];
    const uint4* const slot = slot_of(step, turn_, tensor);
#pragma unroll
    for (unsigned i = 0; i < kWords; ++i) words[i] = slot[i * blockDim.x];
    memcpy(&pack, words, sizeof(pack));
  }

  // A unit of the next tile.
  __device__ __forceinline__ void fetch(uint32_t step, uint32_t tensor, const T* unit) const {
    uint4* const slot = slot_of(step, !turn_, tensor);
#pragma unroll
    for (unsigned i = 0; i < kWords; ++i) {
      cp_async_16<(kWords > 1)>(slot + i * blockDim.x, reinterpret_cast<const uint4*>(unit) + i);
    }
  }

  // `fetched`: what there is room for has been. Nothing is where a GPU has no such copies, and so no groups of them.
  __device__ __forceinline__ void next_tile(bool fetched) {
    turn_ = !turn_;
    fetched_ = fetched;
    if (fetched) cp_async_commit();
  }
  // Until what was fetched is there.
  __device__ __forceinline__ void await() const {
    if (fetched_) cp_async_wait<0>();
  }

 private:
  static constexpr unsigned kWords = sizeof(Pack<T>) / sizeof(uint4);

  __device__ __forceinline__ uint4* slot_of(uint32_t step, bool turn, uint32_t tensor) const {
    const uint32_t slot = turn && step < ahead_ ? steps_ + step : step;
    return own_ + (slot * tensors_ + tensor) * kWords * blockDim.x;
  }

  uint4* own_;
  uint32_t steps_, ahead_, tensors_;
  bool turn_ = false, fetched_ = false;
};

}  // namespace bnfused
