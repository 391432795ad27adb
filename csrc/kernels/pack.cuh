// A unit: 8 consecutive values of a tensor, the first at a multiple of 8. One thread moves one unit at a time, as
// 16-byte accesses where the tensor allows it, else value by value.
#pragma once
#include "kernels/platform.cuh"

namespace bnfused {

constexpr int kUnit = 8;  // values

// Blocks of kMaxThreads threads that fit an SM at once: 128 registers for each thread. Twice as wide values take more.
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 1 : 2;

// What values of T are computed in.
template <class T>
struct AccumulateOf {
  using Type = float;
};
template <>
struct AccumulateOf<double> {
  using Type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::Type;

__device__ __forceinline__ float to_accumulate(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_accumulate(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_accumulate(float v) { return v; }
__device__ __forceinline__ double to_accumulate(double v) { return v; }

template <class T>
__device__ __forceinline__ T from_accumulate(Accumulate<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_accumulate<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_accumulate<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Within 2 units in the last place, without the subroutine of an exact division.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

template <class T>
struct alignas(16) Pack {
  T v[kUnit];
};

// Units that a thread loads before it uses the first. With 512 threads on an SM, 32 KiB are on their way: 25 GB/s for
// each SM take 18 KiB at a latency of 700 ns.
template <class T>
constexpr int kLoadsAtOnce = 8 / int(sizeof(T));

// The values [begin, end) of a unit that the caller owns; a unit at the edge of a plane or of the tensor is not whole.
struct Span {
  int begin, end;

  __device__ __forceinline__ bool whole() const { return end - begin == kUnit; }
  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool has(int k) const { return begin <= k && k < end; }
};

// `wide`: the tensor starts at a multiple of 16 bytes. What the span does not have stays as it was in `pack`.
template <class T>
__device__ __forceinline__ void load_unit(Pack<T>& pack, const T* unit, Span span, bool wide) {
  if (wide && span.whole()) {
    uint4 words[sizeof(Pack<T>) / 16];
#pragma unroll
    for (unsigned i = 0; i < sizeof(Pack<T>) / 16; ++i) {
      words[i] = load_global(reinterpret_cast<const uint4*>(unit) + i);
    }
    memcpy(&pack, words, sizeof(pack));
  } else {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (span.has(k)) pack.v[k] = load_global(unit + k);
    }
  }
}

template <class T>
__device__ __forceinline__ void store_unit(T* unit, const Pack<T>& pack, Span span, bool wide) {
  if (wide && span.whole()) {
    uint4 words[sizeof(Pack<T>) / 16];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (unsigned i = 0; i < sizeof(Pack<T>) / 16; ++i) store_global(reinterpret_cast<uint4*>(unit) + i, words[i]);
  } else {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (span.has(k)) store_global(unit + k, pack.v[k]);
    }
  }
}

}  // namespace bnfused
