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

#include <map>
#include <mutex>
#include <tuple>
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

// What one kernel was allowed on one device, and how much of it has room there. The limit of shared memory belongs to
// the kernel and not to a launch: lowered again for one, it would fail another thread's. Each question takes a
// microsecond.
struct KernelOnDevice {
  size_t shared_bytes = kSharedUnasked;  // dynamic
  bool any_cluster = false;
  std::map<std::tuple<unsigned, size_t, unsigned>, unsigned> room;  // by threads, dynamic shared memory and cluster
};

struct KnownKernels {
  std::mutex mutex;
  std::map<std::pair<int, const void*>, KernelOnDevice> known;
};

inline KnownKernels& known_kernels() {
  static auto& all = *new KnownKernels;
  return all;
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

// Lets the kernel have what the launch needs, and says in `room`, if not nullptr, of how many of its clusters (blocks,
// where it has none) the device has room at once.
inline cudaError_t prepare(const LaunchConfig& config, const void* kernel, unsigned* room) {
  if (config.shared_bytes <= kSharedUnasked && config.cluster <= kClusterUnasked && !room) return cudaSuccess;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(known_kernels().mutex);
  KernelOnDevice& known = known_kernels().known[{device, kernel}];
  if (config.shared_bytes > known.shared_bytes) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.shared_bytes));
    if (status != cudaSuccess) return status;
    known.shared_bytes = config.shared_bytes;
  }
  if (config.cluster > kClusterUnasked && !known.any_cluster) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
    known.any_cluster = true;
  }
  if (!room) return cudaSuccess;
  const auto shape = std::make_tuple(config.block, config.shared_bytes, config.cluster);
  const auto found = known.room.find(shape);
  if (found != known.room.end()) {
    *room = found->second;
    return cudaSuccess;
  }
  int count = 0, sms = 1;
  if (config.cluster > 1) {
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t c = launch_config(config, attributes);
    status = cudaOccupancyMaxActiveClusters(&count, kernel, &c);
    if (status == cudaErrorInvalidClusterSize) {
      status = cudaSuccess;
      cudaGetLastError();  // or a later call would find it
    }
  } else {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(&count, kernel, int(config.block),
                                                                    config.shared_bytes, cudaOccupancyDefault);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) *room = known.room[shape] = unsigned(count) * unsigned(sms);
  return status;
}

// How many of the launch's clusters the device has room for at once.
template <class... Parameters>
cudaError_t clusters_at_once(const LaunchConfig& config, void (*kernel)(Parameters...), unsigned* clusters) {
  return prepare(config, reinterpret_cast<const void*>(kernel), clusters);
}

// cudaErrorCooperativeLaunchTooLarge, where the device has no room for blocks that wait for each other, comes from here
// and not from the launch: there it would end the capture of a graph.
template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  unsigned blocks = 0;
  const cudaError_t status =
      prepare(config, reinterpret_cast<const void*>(kernel), config.cooperative ? &blocks : nullptr);
  if (status != cudaSuccess) return status;
  if (config.cooperative && config.grid > blocks) return cudaErrorCooperativeLaunchTooLarge;
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
