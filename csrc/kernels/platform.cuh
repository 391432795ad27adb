// The only file that knows where the kernels run: with nvcc on a GPU, or with g++ on the emulated device of
// tests/emulator. Only here are an #ifdef on the compiler, and asm. Tensor values go through load_global and
// store_global, so that the emulated device can check the accesses. On a GPU they are a plain load and a plain store.
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

// An object that the threads of a block share: BNFUSED_SHARED(float, sums, [32]). It is a macro because g++ cannot give
// each block an object of its own for a declaration with __shared__.
#define BNFUSED_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// The dynamic shared memory of the launch, as an array of T.
#define BNFUSED_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char bnfused_dynamic_[]; \
  T* name = reinterpret_cast<T*>(bnfused_dynamic_)

namespace bnfused {

struct LaunchConfig {
  unsigned grid = 1, block = 1;  // blocks, and threads of a block; both have one dimension
  size_t shared_bytes = 0;       // dynamic
  cudaStream_t stream = nullptr;
  bool cooperative = false;  // all blocks are resident at once, and may wait for each other
  unsigned cluster = 1;      // blocks that reach each other's shared memory, from sm_90 on
};

// Dynamic shared memory without an attribute. A block has 48 KiB, and static objects take up to 28 KiB of them.
constexpr size_t kSharedUnasked = 16 * 1024;
// The largest cluster, in blocks, that needs no attribute on any GPU with clusters.
constexpr unsigned kClusterUnasked = 8;

// The attributes that were set for one kernel on one device, and how many of its blocks fit there. They are remembered,
// because each query takes a microsecond. The limit of shared memory belongs to the kernel, not to a launch. It is never
// lowered, because that could fail a launch of another thread.
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

// The configuration as CUDA's struct. `attributes` must have room for two.
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

// Sets the attributes that the launch needs. If `room` is not nullptr, it gets the number of clusters that fit on the
// device at once, or of blocks if the launch has no clusters.
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
      cudaGetLastError();  // clears the error, which a later call would report otherwise
    }
  } else {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(&count, kernel, int(config.block),
                                                                    config.shared_bytes, cudaOccupancyDefault);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) *room = known.room[shape] = unsigned(count) * unsigned(sms);
  return status;
}

// How many of the launch's clusters fit on the device at once.
template <class... Parameters>
cudaError_t clusters_at_once(const LaunchConfig& config, void (*kernel)(Parameters...), unsigned* clusters) {
  return prepare(config, reinterpret_cast<const void*>(kernel), clusters);
}

// Launches the kernel. If the blocks of a cooperative launch do not all fit on the device, it is not launched: the error
// cudaErrorCooperativeLaunchTooLarge is returned here, because the same error from CUDA would end a graph's capture.
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

// sizeof(T) is a power of two up to 16, and p is aligned to it.
template <class T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T value) {
  *p = value;
}

// Loads what another block of this launch wrote before its fence. It bypasses the L1 cache, which is not coherent.
template <class T>
__device__ __forceinline__ T load_from_other_block(const T* p) {
  return __ldcg(p);
}

// Loads a word that another block of this launch will change, to wait for that. It orders no other access.
__device__ __forceinline__ unsigned load_again(const unsigned* p) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// All threads of a cluster of `blocks` blocks wait for each other. Afterwards they see what the others wrote before, in
// global memory and in their shared memory. A cluster of one block works on every GPU; larger ones need sm_90.
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

// p points to an object in this block's shared memory. Returns the same object of block `rank` of the cluster.
template <class T>
__device__ __forceinline__ const T* shared_of_block(const T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(p) : "l"(p), "r"(rank));
#endif
  return p;
}

// Returns `value`, but hides that from the compiler. So code in a loop that depends on it is computed in every round,
// and does not occupy registers between rounds.
__device__ __forceinline__ uint32_t recomputed(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Returns v of lane (own lane ^ lanes), one word of 4 bytes at a time. All 32 lanes of the warp call it.
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

// Whether the device has asynchronous copies from global to shared memory (cp.async).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasCopiesAsync = false;
#else
constexpr bool kHasCopiesAsync = true;
#endif

// Copies 16 bytes asynchronously. Copies form groups, which end in order: cp_async_wait<n> waits until at most the last
// n groups of this thread are unfinished. `kThroughL1` is for a thread that also copies the other half of the 32 bytes:
// without the L1 cache, the L2 cache would serve the same 32 bytes twice.
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
