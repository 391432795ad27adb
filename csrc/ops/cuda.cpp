// The ops on CUDA tensors: device, stream, plan, workspace, status. It includes no header of torch's CUDA libraries, and
// uses c10's interface for any device. So the extension compiles, links and loads with a torch that lacks them.
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "ops/ops.h"

namespace {

using namespace bnfused;

void check(cudaError_t status, const char* op) {
  TORCH_CHECK(status == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(status), " (", cudaGetErrorName(status),
              ")");
}

// Each device is asked once, because an attribute takes a microsecond.
const DeviceLimits& limits_of(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "bnfused");
    return value;
  };
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  return known[device] = {attribute(cudaDevAttrMultiProcessorCount), capability,
                          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                          attribute(cudaDevAttrCooperativeLaunch) != 0, attribute(cudaDevAttrClusterLaunch) != 0};
}

// Where a call runs. As long as this object lives, the device of x is the current one.
struct Call {
  Call(const char* op_, c10::Device device_)
      : op(op_), device(device_), guard(device_), limits(limits_of(device_.index())) {
    const c10::impl::VirtualGuardImpl impl(device.type());
    stream = static_cast<cudaStream_t>(impl.getStream(device).native_handle());
  }

  const char* op;
  c10::Device device;
  c10::DeviceGuard guard;
  const DeviceLimits& limits;
  cudaStream_t stream;
};

struct Tickets {
  unsigned* data = nullptr;
  at::Tensor own;  // keeps the memory, if it belongs to this call alone
};

// The tickets that are kept for the stream, or nullptr if the device has no memory for them. Launches on one stream
// follow each other and share them. Launches on two streams may overlap and must not. They do not come from torch's
// allocator: it may use the pool of a graph or of torch.cuda.use_mem_pool now, and later calls must not depend on that.
unsigned* kept_tickets(const Call& call, int64_t count) {
  struct Kept {
    unsigned* data = nullptr;
    int64_t count = 0;
  };
  static std::mutex mutex;
  static auto& kept = *new std::map<std::pair<int, cudaStream_t>, Kept>;  // outlives the CUDA context on purpose
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& tickets = kept[{call.device.index(), call.stream}];
  if (tickets.count >= count) return tickets.data;
  constexpr int64_t kAtLeast = 4096;  // 16 KiB, which is enough for the layers of usual networks
  const Kept larger{nullptr, std::max(count, kAtLeast)};
  const size_t bytes = size_t(larger.count) * sizeof(unsigned);
  // Without relaxed mode, cudaMalloc would end the capture of a graph on another thread.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), call.op);
  void* data = nullptr;
  cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaSuccess) status = cudaMemsetAsync(data, 0, bytes, call.stream);
  check(cudaThreadExchangeStreamCaptureMode(&mode), call.op);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // clears the error, which a later call would report otherwise
    return nullptr;
  }
  check(status, call.op);
  // The smaller tickets are not freed, because launches may still use them.
  tickets = {static_cast<unsigned*>(data), larger.count};
  return tickets.data;
}

// Counters that are 0 between launches. A graph may be replayed on any stream, so a captured call gets counters of its
// own, and each replay clears them.
Tickets tickets_for(const Call& call, int64_t count) {
  if (count == 0) return {};
  cudaStreamCaptureStatus capture;
  check(cudaStreamIsCapturing(call.stream, &capture), call.op);
  if (capture == cudaStreamCaptureStatusNone) {
    if (unsigned* kept = kept_tickets(call, count)) return {kept, {}};
  }
  const at::Tensor own = at::zeros({count}, at::TensorOptions().dtype(at::kInt).device(call.device));
  return {static_cast<unsigned*>(own.mutable_data_ptr()), own};
}

void check_fits(const Problem& p, const char* op) {
  TORCH_CHECK(fits(p), op, ": expected at most 2^34 values, got ", p.outer, " x ", p.channels, " x ", p.inner);
}

// Plans and launches, with a workspace for each plan that is tried.
template <class Args, class Plan, class Launch>
void run(const char* op, const Args& args, c10::Device device, Plan plan_for, Launch launch) {
  const Call call(op, device);
  check_fits(args.problem, op);
  const auto plan_on = [&](const DeviceLimits& limits) {
    return plan_for(args.problem, cuda::request_of(args), limits);
  };
  const auto launch_plan = [&](const LaunchPlan& plan) {
    const auto bytes = at::TensorOptions().dtype(at::kByte).device(device);
    const at::Tensor partials = at::empty({cuda::workspace_bytes(plan, args.problem)}, bytes);
    const Tickets tickets = tickets_for(call, plan.tickets);
    const cudaError_t status = launch(args, plan, {partials.mutable_data_ptr(), tickets.data}, call.stream);
    if (status != cudaSuccess) cudaGetLastError();  // clears the error, which a later call would report otherwise
    return status;
  };
  check(cuda::launch_planned(call.limits, plan_on, launch_plan), op);
}

struct Cuda {
  static void batch_norm_stats(const MomentsArgs& args, c10::Device device) {
    run("bnfused::batch_norm_stats", args, device, plan_stats, cuda::batch_norm_stats);
  }
  static void batch_norm_gather_stats(const GatherArgs& args, c10::Device device) {
    const Call call("bnfused::batch_norm_gather_stats", device);
    const Tickets ticket = tickets_for(call, 1);
    check(cuda::batch_norm_gather_stats(args, ticket.data, call.stream), call.op);
  }
  static void batch_norm_train(const TrainArgs& args, c10::Device device) {
    run("bnfused::batch_norm_train", args, device, plan_train, cuda::batch_norm_train);
  }
  static void batch_norm_apply(const ApplyArgs& args, c10::Device device) {
    const Call call("bnfused::batch_norm_apply", device);
    check_fits(args.problem, call.op);
    const LaunchPlan plan = plan_apply(args.problem, cuda::request_of(args), call.limits);
    check(cuda::batch_norm_apply(args, plan, call.stream), call.op);
  }
  static void batch_norm_backward(const BackwardArgs& args, c10::Device device) {
    run("bnfused::batch_norm_backward", args, device, plan_backward, cuda::batch_norm_backward);
  }

  static at::Tensor empty_like(const at::Tensor& x) { return at::empty_like(x); }
  static void copy(const at::Tensor& from, const at::Tensor& to) { to.copy_(from); }
};

}  // namespace

TORCH_LIBRARY_IMPL(bnfused, CUDA, m) { bnfused::ops::implement<Cuda>(m); }
