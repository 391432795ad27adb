// The one seam between the kernels and where they run: nvcc and a GPU, or g++ and the host device of tests/emulator.
// The only #ifdef on the compiler and, when there is any, the only asm.
//
// Tensor values go through load_global and store_global, so that the host device can count the bytes, check the
// alignment and see who is out of bounds. A GPU does these things by itself.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

// An object that the threads of a block share: BNFUSED_SHARED(float, sums, [32]). A macro, because the host device has
// to give every block its own, which a declaration with __shared__ cannot express to g++.
#define BNFUSED_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// The dynamic shared memory of the launch, as an array of T.
#define BNFUSED_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char bnfused_dynamic_[]; \
  T* name = reinterpret_cast<T*>(bnfused_dynamic_)

namespace bnfused {

struct LaunchConfig {
  unsigned grid = 1, block = 1;  // blocks and threads; kernels decode both themselves
  size_t shared_bytes = 0;       // dynamic
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t c{};
  c.gridDim = dim3(config.grid);
  c.blockDim = dim3(config.block);
  c.dynamicSmemBytes = config.shared_bytes;
  c.stream = config.stream;
  return cudaLaunchKernelEx(&c, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...);
}

// sizeof(T) is a power of two up to 16, and p a multiple of it.
template <class T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T value) {
  *p = value;
}

// What another block of this launch wrote before its fence: past the L1 cache, which is not coherent.
template <class T>
__device__ __forceinline__ T load_from_other_block(const T* p) {
  return __ldcg(p);
}

// v of the lane whose number differs in the bits of `lanes`; all 32 lanes call it. One word at a time.
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int lanes) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &v, sizeof(T));
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) words[i] = __shfl_xor_sync(~0u, words[i], lanes);
  memcpy(&v, words, sizeof(T));
  return v;
}

}  // namespace bnfused

#else
#include "emulated_device.h"  // defines the same names; only the build of tests/emulator finds it
#endif
