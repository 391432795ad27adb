// The shared memory for units that a thread keeps until the second pass, or fetches early for the next tile.
#pragma once
#include "kernels/layout.cuh"

namespace bnfused {

// Holds the first `steps` units of the thread, with `tensors` packs of each, in slots that only this thread uses. So no
// barrier is needed. Neighbouring threads use neighbouring words of 16 bytes.
// Whole units of the next tile are fetched asynchronously into free slots. The first `ahead` steps have two slots each,
// which take turns: their next units are fetched while sums are exchanged, the others as soon as their slot is free.
template <class T>
class OnChip {
 public:
  __device__ __forceinline__ OnChip(uint4* shared, const Residency& r, uint32_t tensors)
      : own_(shared + threadIdx.x), steps_(r.steps), ahead_(r.ahead), tensors_(tensors) {}

  __device__ __forceinline__ bool has(uint32_t step) const { return step < steps_; }
  // Whether the unit was fetched while the previous tile was processed.
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

  // Starts the copy of a unit of the next tile.
  __device__ __forceinline__ void fetch(uint32_t step, uint32_t tensor, const T* unit) const {
    uint4* const slot = slot_of(step, !turn_, tensor);
#pragma unroll
    for (unsigned i = 0; i < kWords; ++i) {
      cp_async_16<(kWords > 1)>(slot + i * blockDim.x, reinterpret_cast<const uint4*>(unit) + i);
    }
  }

  // Swaps the slots. `fetched` says that units of the next tile were fetched. It is false on GPUs without asynchronous
  // copies, which have no groups to commit either.
  __device__ __forceinline__ void next_tile(bool fetched) {
    turn_ = !turn_;
    fetched_ = fetched;
    if (fetched) cp_async_commit();
  }
  // Waits until the fetched units have arrived.
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
