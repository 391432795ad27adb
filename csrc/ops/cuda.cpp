// The ops on CUDA tensors: device, stream, plan, workspace, status. Only what c10 says of any device: no header of
// torch's CUDA libraries, so that the extension compiles, links and loads beside a torch without them.
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

// Asked once for each device: an attribute costs a microsecond.
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

// Where a call runs. The current device is that of x for as long as this lives.
struct Call {
  explicit Call(const char* op_, c10::Device device_)
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
  at::Tensor own;  // of this call alone
};

// Kept for every stream: launches on one follow each other and share them; launches on two may overlap and must not.
// Not from torch's allocator: which of its pools (of a graph, of torch.cuda.use_mem_pool) is in use at this call must
// not matter to later ones. nullptr where there is no memory.
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
  constexpr int64_t kAtLeast = 4096;  // 16 KiB: no network's layer asks for more
  const Kept larger{nullptr, std::max(count, kAtLeast)};
  const size_t bytes = size_t(larger.count) * sizeof(unsigned);
  // Else to allocate would end the capture of a graph on another thread.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), call.op);
  void* data = nullptr;
  cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaSuccess) status = cudaMemsetAsync(data, 0, bytes, call.stream);
  check(cudaThreadExchangeStreamCaptureMode(&mode), call.op);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // or a later call would find it
    return nullptr;
  }
  check(status, call.op);
  // The smaller ones stay: launches that use them may be under way.
  tickets = {static_cast<unsigned*>(data), larger.count};
  return tickets.data;
}

// Counters that are 0 between launches. While a graph is captured they are the graph's own, cleared whenever it is
// replayed: it may be replayed on any stream.
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

// Every argument struct has x's problem and lies on x's device, which ops.h has checked; `x` says which.
struct Workspaces {
  Workspaces(const Call& call, const LaunchPlan& plan, const Problem& p) {
    partials = at::empty({cuda::workspace_bytes(plan, p)}, at::TensorOptions().dtype(at::kByte).device(call.device));
    tickets = tickets_for(call, plan.tickets);
  }

  cuda::Workspace get() const { return {partials.mutable_data_ptr(), tickets.data}; }

  at::Tensor partials;
  Tickets tickets;
};

// With a workspace for each plan that is tried.
template <class PlanFor, class Launch>
void run(const Call& call, const Problem& p, PlanFor plan_for, Launch launch) {
  const cudaError_t status = cuda::launch_planned(call.limits, plan_for, [&](const LaunchPlan& plan) {
    const Workspaces workspaces(call, plan, p);
    const cudaError_t of_launch = launch(plan, workspaces.get());
    if (of_launch != cudaSuccess) cudaGetLastError();  // or a later call would find it
    return of_launch;
  });
  check(status, call.op);
}

struct Cuda {
  static void batch_norm_stats(const MomentsArgs& args, c10::Device device) {
    const Call call("bnfused::batch_norm_stats", device);
    check_fits(args.problem, call.op);
    const LaunchPlan plan = plan_stats(args.problem, cuda::request_of(args), call.limits);
    const Workspaces workspaces(call, plan, args.problem);
    check(cuda::batch_norm_stats(args, plan, workspaces.get(), call.stream), call.op);
  }

  static void batch_norm_gather_stats(const GatherArgs& args, c10::Device device) {
    const Call call("bnfused::batch_norm_gather_stats", device);
    const Tickets ticket = tickets_for(call, 1);
    check(cuda::batch_norm_gather_stats(args, ticket.data, call.stream), call.op);
  }

  static void batch_norm_train(const TrainArgs& args, c10::Device device) {
    const Call call("bnfused::batch_norm_train", device);
    check_fits(args.problem, call.op);
    run(
        call, args.problem,
        [&](const DeviceLimits& device) { return plan_train(args.problem, cuda::request_of(args), device); },
        [&](const LaunchPlan& plan, cuda::Workspace workspace) {
          return cuda::batch_norm_train(args, plan, workspace, call.stream);
        });
  }

  static void batch_norm_apply(const ApplyArgs& args, c10::Device device) {
    const Call call("bnfused::batch_norm_apply", device);
    check_fits(args.problem, call.op);
    const LaunchPlan plan = plan_apply(args.problem, cuda::request_of(args), call.limits);
    check(cuda::batch_norm_apply(args, plan, call.stream), call.op);
  }

  static void batch_norm_backward(const BackwardArgs& args, c10::Device device) {
    const Call call("bnfused::batch_norm_backward", device);
    check_fits(args.problem, call.op);
    run(
        call, args.problem,
        [&](const DeviceLimits& device) { return plan_backward(args.problem, cuda::request_of(args), device); },
        [&](const LaunchPlan& plan, cuda::Workspace workspace) {
          return cuda::batch_norm_backward(args, plan, workspace, call.stream);
        });
  }

  static at::Tensor empty_like(const at::Tensor& x) { return at::empty_like(x); }
  static void copy(const at::Tensor& from, const at::Tensor& to) { to.copy_(from); }
};

}  // namespace

TORCH_LIBRARY_IMPL(bnfused, CUDA, m) { bnfused::ops::implement<Cuda>(m); }
