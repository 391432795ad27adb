// The emulator as its tests see it: how to schedule, what to leave out, what happened. Kernels see
// emulated_device.h instead.
//
// One thread of the process runs every emulated thread, as a fiber; it goes on until it waits for others. So a kernel
// runs the same way each time, and another schedule is another seed.
#pragma once
#include <cuda_runtime_api.h>  // cudaError_t and cudaStream_t; nothing of libcudart is called

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
  kForward,  // a block runs as far as it can, the first one first
  kReverse,  // likewise, the last one first
  kRandom,   // odd seeds: any thread of any block; even seeds: mostly one block at a time
};

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;
  unsigned resident_blocks = 1;  // alive at once, where the launch is not cooperative
  bool early_copies = false;     // asynchronous copies happen when they are issued, not when they are waited for;
                                 // in random order, either
  unsigned sm_count = 4;         // of the pretended device; bounds cooperative launches and clusters
  size_t shared_per_sm = 228 * 1024;
  unsigned sms_taken = 0;    // by others: cooperative launches and clusters have the rest
  bool hopes = false;        // these launches are like others: blocks are there or not, and alone
  std::string dropped_site;  // "file.cuh:12": the barrier, fence or wait there does nothing
};
extern Options options;

struct BufferTraffic {
  std::string buffer;
  Traffic read, written;
};

struct LaunchRecord {
  std::string kernel;  // its name without namespace and template arguments, where the linker has one for it
  LaunchConfig config;
  size_t static_shared_bytes = 0;
  uint64_t switches = 0;
  std::vector<BufferTraffic> buffers;  // those that load_global and store_global touched
};

// Every launch since the last clear_launches(), in order.
const std::vector<LaunchRecord>& launches();
void clear_launches();

// What was wrong with the last launch; "" if nothing was.
const std::string& report();

// The barriers, fences and waits met since the process started, as "file.cuh:12".
std::vector<std::string> sites();

// Runs body(arguments) once for each thread; `kernel` is the address that names it.
cudaError_t run(const LaunchConfig& config, const void* kernel, void (*body)(void*), void* arguments);

}  // namespace emulator
}  // namespace bnfused
