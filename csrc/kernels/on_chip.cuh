// What a thread keeps in shared memory from one pass over its units to the next.
#pragma once
#include "kernels/pack.cuh"

namespace bnfused {

// The first `steps` units of the thread, `tensors` packs of each. A thread finds there what it has put there itself, so
// that nobody waits for it; neighbours lie side by side, 16 bytes each.
template <class T>
class OnChip {
 public:
  __device__ __forceinline__ OnChip(uint4* shared, uint32_t steps, uint32_t tensors)
      : own_(shared + threadIdx.x), steps_(steps), tensors_(tensors) {}

  __device__ __forceinline__ bool has(uint32_t step) const { return step < steps_; }

  __device__ __forceinline__ void put(uint32_t step, uint32_t tensor, const Pack<T>& pack) const {
    uint4 words[kWords];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (unsigned i = 0; i < kWords; ++i) own_[place(step, tensor) + i * blockDim.x] = words[i];
  }

  __device__ __forceinline__ void get(uint32_t step, uint32_t tensor, Pack<T>& pack) const {
    uint4 words[kWords];
#pragma unroll
    for (unsigned i = 0; i < kWords; ++i) words[i] = own_[place(step, tensor) + i * blockDim.x];
    memcpy(&pack, words, sizeof(pack));
  }

 private:
  static constexpr unsigned kWords = sizeof(Pack<T>) / sizeof(uint4);

  __device__ __forceinline__ uint32_t place(uint32_t step, uint32_t tensor) const {
    return (step * tensors_ + tensor) * kWords * blockDim.x;
  }

  uint4* own_;
  uint32_t steps_, tensors_;
};

// The tensors as the first pass reads them: from memory, to be kept.
template <class Body>
struct ToKeep {
  const Body& body;
  const OnChip<typename Body::Value>& kept;

  __device__ __forceinline__ void load(typename Body::Loaded& loaded, uint32_t unit, Span span,
                                       uint32_t /*step*/) const {
    body.load(loaded, unit, span);
  }
  __device__ __forceinline__ void keep(const typename Body::Loaded& loaded, uint32_t step) const {
    if (kept.has(step)) body.keep(loaded, kept, step);
  }
};

// As the second does: from where they were kept, or from memory again.
template <class Body>
struct Recalled {
  const Body& body;
  const OnChip<typename Body::Value>& kept;

  __device__ __forceinline__ void load(typename Body::Loaded& loaded, uint32_t unit, Span span, uint32_t step) const {
    if (kept.has(step)) {
      body.recall(loaded, kept, step, unit, span);
    } else {
      body.load(loaded, unit, span);
    }
  }
};

}  // namespace bnfused
