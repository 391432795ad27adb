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
  bool cooperative = false;  // all blocks are resident at once, and may wait for each other
  unsigned cluster = 1;      // blocks that reach each other's shared memory, from sm_90 on
};

// Dynamic shared memory that a kernel gets unasked: a block has 48 KiB, and the objects of kernels take up to 28 KiB.
constexpr size_t kSharedUnasked = 16 * 1024;
// Blocks of a cluster that every GPU which has clusters lets a kernel have.
constexpr unsigned kClusterUnasked = 8;

// What this device lets a kernel have only where it asks for it.
template <class... Parameters>
cudaError_t ask_for(const LaunchConfig& config, void (*kernel)(Parameters...)) {
  cudaError_t status = cudaSuccess;
  if (config.shared_bytes > kSharedUnasked) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.shared_bytes));
  }
  if (status == cudaSuccess && config.cluster > kClusterUnasked) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return status;
}

// A configuration in CUDA's words; `attributes` has room for two.
inline cudaLaunchConfig_t launch_config(const LaunchConfig& config, cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t c{};
  c.gridDim = dim3(config.grid);
  c.blockDim = dim3(config.block);
  c.dynamicSmemBytes = config.shared_bytes;
  c.stream = config.stream;
  c.attrs = attributes;
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[c.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[c.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return c;
}

// Whether the device has room for all blocks at once. A cooperative launch finds that out too, but as an error that
// ends the capture of a graph.
template <class... Parameters>
cudaError_t check_resident(const LaunchConfig& config, void (*kernel)(Parameters...)) {
  int device = 0, sms = 0, blocks_per_sm = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) {
    status =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, int(config.block), config.shared_bytes);
  }
  if (status != cudaSuccess) return status;
  return config.grid <= unsigned(sms) * unsigned(blocks_per_sm) ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

// How many of the launch's clusters the device has room for at once.
template <class... Parameters>
cudaError_t clusters_at_once(const LaunchConfig& config, void (*kernel)(Parameters...), unsigned* clusters) {
  cudaError_t status = ask_for(config, kernel);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t c = launch_config(config, attributes);
  int count = 0;
  status = cudaOccupancyMaxActiveClusters(&count, kernel, &c);
  *clusters = unsigned(count);
  if (status != cudaErrorInvalidClusterSize) return status;
  cudaGetLastError();  // or a later call would find it
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaError_t status = ask_for(config, kernel);
  if (status == cudaSuccess && config.cooperative) status = check_resident(config, kernel);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t c = launch_config(config, attributes);
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

// A word that another block of this launch is about to change, for a thread that waits for it. Orders nothing else.
__device__ __forceinline__ unsigned load_again(const unsigned* p) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// All threads of the `blocks` blocks of a cluster wait for each other, and see what the others wrote before: to memory,
// and to their shared memory. One block is a cluster wherever it runs; before sm_90 there are no others.
__device__ __forceinline__ void cluster_barrier(unsigned blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks > 1) {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n\t"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
    return;
  }
#endif
  __syncthreads();
}

// The object of block `rank` of the cluster that has the place of *p, an object in this block's shared memory.
template <class T>
__device__ __forceinline__ const T* shared_of_block(const T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(p) : "l"(p), "r"(rank));
#endif
  return p;
}

// `value`, unknown to the compiler: in a loop, what follows from it is computed in every round, not kept in registers.
__device__ __forceinline__ uint32_t recomputed(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
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

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Whether the device has copies from global to shared memory that the thread does not wait for, which are below.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasCopiesAsync = false;
#else
constexpr bool kHasCopiesAsync = true;
#endif

// A copy of 16 bytes. Copies form groups, which end in order: cp_async_wait<n> waits until at most the last n groups of
// this thread are under way. `kThroughL1`: the thread copies the other half of the 32 bytes as well, which past the L1
// cache the L2 cache would be asked for twice.
template <bool kThroughL1>
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  if constexpr (kThroughL1) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

}  // namespace bnfused

#else
#include "emulated_device.h"  // defines the same names; only the build of tests/emulator finds it
#endif
