// The device as kernels see it when g++ compiles them: the names that csrc/kernels/platform.cuh defines for nvcc, and
// CUDA's own names. It has only declarations and short functions; machine.h lists the files that do the work.
//
// It leaves out __activemask, because the threads of a warp do not run in step here, and need not on a device. It also
// leaves out __shared__, because g++ cannot give every block its own object; BNFUSED_SHARED can.
#pragma once
#ifdef __CUDACC__
#error "emulated_device.h is for the host compiler"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>  // not <cmath>: exp(float) is a float in the global namespace, as in CUDA
#include <vector_functions.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#undef __shared__
#define __shared__ use_BNFUSED_SHARED_instead
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#define BNFUSED_SHARED(T, name, ...)                            \
  static ::bnfused::emulator::SharedObject name##_object_;      \
  auto& name = *static_cast<std::add_pointer_t<T __VA_ARGS__>>( \
      ::bnfused::emulator::shared_object(name##_object_, sizeof(T __VA_ARGS__), alignof(T)))
#define BNFUSED_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::bnfused::emulator::dynamic_shared())

namespace bnfused::emulator {

using Location = std::source_location;

enum class WarpOp : uint8_t { kSync, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor, kBallot, kAdd, kMin, kMax };
enum class BarrierOp : uint8_t { kSync, kCount, kAnd, kOr };

// A value that a lane passes to a warp intrinsic or gets from it.
struct alignas(32) LaneValue {
  unsigned char bytes[32];
};

struct SharedObject {
  int number = -1;  // assigned at the first use
};
void* shared_object(SharedObject& object, size_t bytes, size_t alignment);
void* dynamic_shared();

int block_barrier(BarrierOp op, int predicate, Location at);
void grid_barrier(Location at);
void cluster_barrier(unsigned blocks, Location at);
unsigned cluster_rank();
unsigned cluster_size();
void* shared_of_rank(const void* p, unsigned rank, Location at);

LaneValue warp(WarpOp op, unsigned mask, const LaneValue& value, int argument, int width, Location at);
void fence(Location at);
void yield();

// Counts an access to global memory. An access outside of buffers, or a misaligned one, ends the launch.
void access_global(const void* p, size_t bytes, bool write, Location at);
// Every atomic calls this first. Its `bytes` at p are in global or shared memory.
void before_atomic(const void* p, size_t bytes, Location at);
void after_atomic(bool changed);

void copy_async(void* shared, const void* global, size_t bytes, Location at);
void commit_copies();
void wait_for_copies(unsigned groups_left, Location at);

// How many of the launch's clusters the device has room for at once.
unsigned clusters_at_once(const LaunchConfig& config);

template <class T>
T warp(WarpOp op, unsigned mask, T value, int argument, int width, Location at) {
  static_assert(sizeof(T) <= sizeof(LaneValue) && std::is_trivially_copyable_v<T>);
  LaneValue lane{};
  std::memcpy(&lane, &value, sizeof(T));
  lane = warp(op, mask, lane, argument, width, at);
  std::memcpy(static_cast<void*>(&value), &lane, sizeof(T));
  return value;
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &value, sizeof(To));
  return to;
}

// One thread of the process runs all emulated threads, so only ThreadSanitizer needs these accesses to be atomic.
template <class T, class F>
T modify(T* p, F change, Location at) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  before_atomic(p, sizeof(T), at);
  auto* bits = reinterpret_cast<Bits*>(p);
  const Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  const Bits changed = bits_as<Bits>(static_cast<T>(change(bits_as<T>(old))));
  __atomic_store_n(bits, changed, __ATOMIC_RELAXED);
  after_atomic(changed != old);
  return bits_as<T>(old);
}

}  // namespace bnfused::emulator

// ------------------------------------------------------------------------------------------- CUDA's names

inline uint3 threadIdx{}, blockIdx{};  // they belong to the thread that runs
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define BNFUSED_AT bnfused::emulator::Location at = bnfused::emulator::Location::current()

inline void __syncthreads(BNFUSED_AT) { bnfused::emulator::block_barrier(bnfused::emulator::BarrierOp::kSync, 0, at); }
inline int __syncthreads_count(int p, BNFUSED_AT) {
  return bnfused::emulator::block_barrier(bnfused::emulator::BarrierOp::kCount, p, at);
}
inline int __syncthreads_and(int p, BNFUSED_AT) {
  return bnfused::emulator::block_barrier(bnfused::emulator::BarrierOp::kAnd, p, at);
}
inline int __syncthreads_or(int p, BNFUSED_AT) {
  return bnfused::emulator::block_barrier(bnfused::emulator::BarrierOp::kOr, p, at);
}

inline void __syncwarp(unsigned mask = ~0u, BNFUSED_AT) {
  bnfused::emulator::warp(bnfused::emulator::WarpOp::kSync, mask, 0, 0, 32, at);
}
inline unsigned __ballot_sync(unsigned mask, int p, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kBallot, mask, unsigned{p != 0}, 0, 32, at);
}
inline int __any_sync(unsigned mask, int p, BNFUSED_AT) { return __ballot_sync(mask, p, at) != 0; }
inline int __all_sync(unsigned mask, int p, BNFUSED_AT) { return __ballot_sync(mask, !p, at) == 0; }
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kShuffle, mask, v, source, width, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kShuffleUp, mask, v, static_cast<int>(delta), width, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kShuffleDown, mask, v, static_cast<int>(delta), width, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kShuffleXor, mask, v, lanes, width, at);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kAdd, mask, v, 0, 32, at);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kMin, mask, v, 0, 32, at);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v, BNFUSED_AT) {
  return bnfused::emulator::warp(bnfused::emulator::WarpOp::kMax, mask, v, 0, 32, at);
}

inline void __threadfence(BNFUSED_AT) { bnfused::emulator::fence(at); }
inline void __threadfence_block(BNFUSED_AT) { bnfused::emulator::fence(at); }
inline void __nanosleep(unsigned) { bnfused::emulator::yield(); }  // loops that poll have to call it

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](T old) { return old + v; }, at);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](T old) { return old < v ? v : old; }, at);
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](T old) { return v < old ? v : old; }, at);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](T old) { return old | v; }, at);
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](T old) { return old & v; }, at);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](T) { return v; }, at);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](T old) { return old == expected ? v : old; }, at);
}
inline unsigned atomicInc(unsigned* p, unsigned last, BNFUSED_AT) {
  return bnfused::emulator::modify(p, [&](unsigned old) { return old >= last ? 0 : old + 1; }, at);
}

template <class T>
T __ldg(const T* p, BNFUSED_AT) {
  bnfused::emulator::access_global(p, sizeof(T), false, at);
  return *p;
}
template <class T>
T __ldcg(const T* p, BNFUSED_AT) {
  bnfused::emulator::access_global(p, sizeof(T), false, at);
  return *p;
}
template <class T>
T __ldcs(const T* p, BNFUSED_AT) {
  bnfused::emulator::access_global(p, sizeof(T), false, at);
  return *p;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  bnfused::emulator::access_global(p, sizeof(T), true, at);
  *p = v;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v, BNFUSED_AT) {
  bnfused::emulator::access_global(p, sizeof(T), true, at);
  *p = v;
}

namespace bnfused::emulator {
inline float rsqrt_of(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt_of(double x) { return 1.0 / std::sqrt(x); }
}  // namespace bnfused::emulator
#define rsqrtf(x) bnfused::emulator::rsqrt_of(static_cast<float>(x))  // a macro: newer C libraries have a function
#define rsqrt(x) bnfused::emulator::rsqrt_of(x)
inline float __frcp_rn(float x) { return 1.0f / x; }
// As far from the quotient as CUDA allows (2 units in the last place), so that no code relies on a / a being 1.
inline float __fdividef(float a, float b) { return a / b * (1 - 0x1p-23f); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline unsigned __float_as_uint(float x) { return bnfused::emulator::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bnfused::emulator::bits_as<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
using std::max;
using std::min;

// --------------------------------------------------------------------------------- platform.cuh's names

namespace bnfused {

template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  constexpr size_t kMaxParameterBytes = 4096;
  static_assert((sizeof(Parameters) + ... + 0) <= kMaxParameterBytes);
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {static_cast<Parameters>(std::forward<Arguments>(arguments))...}};
  const auto body = [](void* p) {
    auto& c = *static_cast<Call*>(p);
    std::apply(c.kernel, c.arguments);  // every thread gets copies, as on a device
  };
  return emulator::run(config, reinterpret_cast<const void*>(kernel), body, &call);
}

template <class... Parameters>
cudaError_t clusters_at_once(const LaunchConfig& config, void (*)(Parameters...), unsigned* clusters) {
  *clusters = emulator::clusters_at_once(config);
  return cudaSuccess;
}

inline void cluster_barrier(unsigned blocks, BNFUSED_AT) {
  if (blocks == 1) return __syncthreads(at);
  emulator::cluster_barrier(blocks, at);
}
template <class T>
const T* shared_of_block(const T* p, unsigned rank, BNFUSED_AT) {
  return static_cast<const T*>(emulator::shared_of_rank(p, rank, at));
}

template <class T>
T load_global(const T* p, BNFUSED_AT) {
  emulator::access_global(p, sizeof(T), false, at);
  return *p;
}
template <class T>
void store_global(T* p, std::type_identity_t<T> value, BNFUSED_AT) {
  emulator::access_global(p, sizeof(T), true, at);
  *p = value;
}
template <class T>
T load_from_other_block(const T* p, BNFUSED_AT) {
  emulator::access_global(p, sizeof(T), false, at);
  return *p;
}

inline uint32_t recomputed(uint32_t value) { return value; }

inline unsigned load_again(const unsigned* p, BNFUSED_AT) {
  return emulator::modify(const_cast<unsigned*>(p), [](unsigned value) { return value; }, at);
}

// One call for all steps, because switches between fibers take most of the time.
template <class T>
T shuffle_xor(T v, int lanes, BNFUSED_AT) {
  return __shfl_xor_sync(~0u, v, lanes, 32, at);
}

constexpr bool kHasCopiesAsync = true;
template <bool kThroughL1>
void cp_async_16(void* shared, const void* global, BNFUSED_AT) {
  emulator::copy_async(shared, global, 16, at);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kGroupsLeft>
void cp_async_wait(BNFUSED_AT) {
  emulator::wait_for_copies(kGroupsLeft, at);
}

}  // namespace bnfused
