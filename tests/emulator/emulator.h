// The emulator as its tests see it: how to schedule threads, which barrier to drop, and what happened. Kernels see
// emulated_device.h instead.
//
// One thread of the process runs every emulated thread as a fiber, until it waits for other threads. So a kernel runs
// in the same way each time, and another seed gives another schedule.
#pragma once
#include <cuda_runtime_api.h>  // for cudaError_t and cudaStream_t; no function of libcudart is called

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "guarded_buffer.h"

namespace bnfused {

struct LaunchConfig {
  unsigned grid = 1, block = 1;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;
  unsigned cluster = 1;
};

namespace emulator {

enum class Order {
  kForward,  // a block runs as far as it can, and the first block goes first
  kReverse,  // the same, but the last block goes first
  kRandom,   // odd seeds: any thread of any block; even seeds: mostly one block at a time
};

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;
  unsigned resident_blocks = 1;  // how many are on the device at once, if the launch is not cooperative
  bool early_copies = false;     // asynchronous copies happen when they are issued, not when a thread waits for them;
                                 // in random order each copy happens at either time
  unsigned sm_count = 4;         // SMs of the device; they bound cooperative launches and clusters
  size_t shared_per_sm = 228 * 1024;
  unsigned sms_taken = 0;    // SMs that others use; cooperative launches and clusters have the rest
  bool hopes = false;        // launch blocks that wait for each other like all others, without clusters
  std::string dropped_site;  // "file.cuh:12": the barrier, fence or wait there does nothing
};
extern Options options;

struct BufferTraffic {
  std::string buffer;
  Traffic read, written;
};

struct LaunchRecord {
  std::string kernel;  // its name without namespace and template arguments, if the linker has one
  LaunchConfig config;
  size_t static_shared_bytes = 0;
  uint64_t switches = 0;
  std::vector<BufferTraffic> buffers;  // the buffers that load_global and store_global accessed
};

// Every launch since the last clear_launches(), in order.
const std::vector<LaunchRecord>& launches();
void clear_launches();

// The fault of the last launch; "" if it had none.
const std::string& report();

// The barriers, fences and waits met since the process started, as "file.cuh:12".
std::vector<std::string> sites();

// Runs body(arguments) once for each thread. The address `kernel` gives the kernel's name.
cudaError_t run(const LaunchConfig& config, const void* kernel, void (*body)(void*), void* arguments);

}  // namespace emulator
}  // namespace bnfused
