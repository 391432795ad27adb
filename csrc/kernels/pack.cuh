// A unit is 8 consecutive values of a tensor, the first of which is at a multiple of 8. One thread moves one unit at a
// time, by 16-byte accesses if the tensor is aligned for them, and value by value otherwise.
#pragma once
#include "kernels/platform.cuh"
#include "plan_shapes.h"

namespace bnfused {

// Blocks of kMaxThreads threads on an SM. Two leave each thread 128 registers, too few for the kernels of float64.
template <class T>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 1 : 2;

// The type in which values of T are computed.
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

// The float version is within 2 units in the last place, and needs no subroutine as an exact division does.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

template <class T>
struct alignas(16) Pack {
  T v[kUnit];
};

// Value k of a pack, in the type in which it is computed. k must be known at compile time.
template <class T>
__device__ __forceinline__ Accumulate<T> value_of(const Pack<T>& pack, int k) {
  return to_accumulate(pack.v[k]);
}
// A bfloat16 is the upper half of a float, so the second value of a word needs no shift.
__device__ __forceinline__ float value_of(const Pack<__nv_bfloat16>& pack, int k) {
  uint32_t words[kUnit / 2];
  memcpy(words, &pack, sizeof(pack));
  return __uint_as_float(k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000u);
}

template <class T>
__device__ __forceinline__ void set_value(Pack<T>& pack, int k, T value) {
  if constexpr (sizeof(T) == 2) {  // set in its word: otherwise the compiler uses a whole register for each value
    uint32_t word;
    uint16_t bits;
    unsigned char* const at = reinterpret_cast<unsigned char*>(&pack) + k / 2 * sizeof(word);
    memcpy(&word, at, sizeof(word));
    memcpy(&bits, &value, sizeof(bits));
    word = k % 2 == 0 ? (word & 0xffff0000u) | bits : (word & 0xffffu) | uint32_t(bits) << 16;
    memcpy(at, &word, sizeof(word));
  } else {
    pack.v[k] = value;
  }
}

// Copies words whose loads may still be on their way. A copy value by value would make the compiler split the words of
// 2-byte values right after each load, and so wait for that load before it starts the next.
template <class Loaded>
__device__ __forceinline__ void copy_words(Loaded& to, const Loaded& from) {
#pragma unroll
  for (unsigned at = 0; at < sizeof(Loaded); at += sizeof(uint32_t)) {
    uint32_t word;
    memcpy(&word, reinterpret_cast<const unsigned char*>(&from) + at, sizeof(word));
    memcpy(reinterpret_cast<unsigned char*>(&to) + at, &word, sizeof(word));
  }
}

// Rounds the values to T, two at a time if there are instructions for that.
template <class T>
__device__ __forceinline__ Pack<T> pack_of(const Accumulate<T> (&values)[kUnit]) {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < kUnit; ++k) pack.v[k] = from_accumulate<T>(values[k]);
  return pack;
}
template <>
__device__ __forceinline__ Pack<__nv_bfloat16> pack_of<__nv_bfloat16>(const float (&values)[kUnit]) {
  __nv_bfloat162 pairs[kUnit / 2];
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  Pack<__nv_bfloat16> pack;
  memcpy(&pack, pairs, sizeof(pack));
  return pack;
}
template <>
__device__ __forceinline__ Pack<__half> pack_of<__half>(const float (&values)[kUnit]) {
  __half2 pairs[kUnit / 2];
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  Pack<__half> pack;
  memcpy(&pack, pairs, sizeof(pack));
  return pack;
}

// Units that a thread loads before it uses the first. So 512 threads on an SM have 32 KiB on their way. 25 GB/s at a
// latency of 700 ns need 18 KiB. docs/performance.md has the bytes of each kernel.
template <class T>
constexpr int kLoadsAtOnce = 8 / int(sizeof(T));

// The values [begin, end) of a unit that the caller owns. At the edge of a plane or of the tensor, they may be fewer.
struct Span {
  int begin, end;

  __device__ __forceinline__ bool whole() const { return end - begin == kUnit; }
  __device__ __forceinline__ bool empty() const { return begin >= end; }
  __device__ __forceinline__ bool has(int k) const { return begin <= k && k < end; }
};

// `wide` says that the tensor starts at a multiple of 16 bytes. Values outside the span keep their content in `pack`.
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
      if (span.has(k)) set_value(pack, k, load_global(unit + k));
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
