// Turns a dtype and an activation, which are values, into template parameters. Also has what all launches share.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "batch_norm.h"
#include "kernels/batch_norm_empty.cuh"
#include "kernels/layout.cuh"
#include "kernels/pointwise.cuh"
#include "plan.h"

namespace bnfused::cuda {

template <class F>
cudaError_t with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(__half());
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    case DType::kFloat32:
      return f(float());
    default:
      return f(double());
  }
}

template <class F>
cudaError_t with_activation(const Epilogue& epilogue, F f) {
  switch (epilogue.activation) {
    case Activation::kIdentity:
      return f(Identity(epilogue));
    case Activation::kReLU:
      return f(ReLU(epilogue));
    default:
      return f(AnyActivation(epilogue));
  }
}

template <class F>
cudaError_t with_gradient(const Epilogue& epilogue, bool masked, F f) {
  return masked ? f(MaskedReLU(epilogue)) : with_activation(epilogue, f);
}

inline bool is_wide(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

inline LaunchConfig config(uint32_t blocks, uint32_t threads, size_t shared_bytes, cudaStream_t stream) {
  LaunchConfig c;
  c.grid = blocks;
  c.block = threads;
  c.shared_bytes = shared_bytes;
  c.stream = stream;
  return c;
}

template <class Args>
cudaError_t launch_empty(const Args& args, int64_t* num_batches_tracked, cudaStream_t stream) {
  const int64_t channels = args.problem.channels;
  const int64_t blocks = std::max<int64_t>(1, (channels + kMaxThreads - 1) / kMaxThreads);
  return launch(config(uint32_t(blocks), kMaxThreads, 0, stream), batch_norm_empty<Args>, args, uint32_t(channels),
                num_batches_tracked);
}

// Launches a kernel of kSmall or kResident. Blocks that wait for each other must run at the same time: those of a
// cluster do, and a cooperative launch runs all of its blocks at once or fails.
template <class Shape, class... Parameters, class... Arguments>
cudaError_t launch_resident(const LaunchPlan& plan, const Shape& s, cudaStream_t stream, void (*kernel)(Parameters...),
                            const Arguments&... arguments) {
  Residency residency = plan.residency;
  LaunchConfig c = config(residency.blocks(s.parts), s.threads, residency.keeps_bytes, stream);
  if constexpr (std::is_same_v<Shape, Rows>) c.shared_bytes += size_t(planning::table_bytes(s));
  c.cluster = residency.cluster;
  c.cooperative = s.blocks() > s.domains() * residency.cluster;
  if (c.cluster > 1) {
    unsigned at_once = 0;
    const cudaError_t status = clusters_at_once(c, kernel, &at_once);
    if (status != cudaSuccess) return status;
    // Teams take their tiles in rounds. If fewer teams fit than planned, there are more rounds, and most of the device
    // is idle in the last one. More than an eighth more rounds is refused.
    const auto rounds = [&](unsigned teams) { return (s.domains() + teams - 1) / teams; };
    if (at_once == 0 || (at_once < residency.teams && 8 * rounds(at_once) > 9 * rounds(residency.teams))) {
      return cudaErrorCooperativeLaunchTooLarge;
    }
    residency.teams = std::min(residency.teams, at_once);
    c.grid = residency.blocks(s.parts);
  }
  return launch(c, kernel, arguments..., s, residency);
}

template <class Constants>
size_t table_bytes(const Rows& s) {
  return sizeof(Constants) * s.tile * kUnit;
}
template <class Constants>
size_t table_bytes(const Flat& s) {
  return sizeof(Constants) * s.planes_per_block;
}

}  // namespace bnfused::cuda
