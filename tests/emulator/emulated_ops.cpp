// torch.ops.bnfused_emulated.*: the CUDA backend on CPU tensors. The checks of ops.h, the planner, the launchers and
// the kernels are the real ones; the device is the emulated one.
//
// Every tensor of a call is copied to device memory of its exact size and alignment, and back. So each call also tests
// bounds, and a value that a kernel did not write cannot be right by chance.
#include <deque>
#include <mutex>
#include <optional>
#include <string>

#include "cuda/launch.h"
#include "emulator.h"
#include "ops/ops.h"

namespace {

using namespace bnfused;
using emulator::GuardedBuffer;
using planning::bytes_of;

struct Settings {
  bool vary_schedule = true;  // each launch has another schedule, in turn
  int compute_capability = 90;
  std::optional<Strategy> strategy;  // used instead of the planner's choice
};
Settings settings;
std::string text;       // what the last query returned
std::mutex one_device;  // the emulator has only one device
uint64_t calls = 0;

// Device copies of the tensors of one call.
class DeviceMemory {
 public:
  // `p` is nullptr if the call has no such tensor.
  template <class T>
  T* input(const char* name, T* p, int64_t bytes) {
    return add(name, p, bytes, true, false);
  }
  template <class T>
  T* output(const char* name, T* p, int64_t bytes) {
    return add(name, p, bytes, false, true);
  }
  template <class T>
  T* updated(const char* name, T* p, int64_t bytes) {
    return add(name, p, bytes, true, true);
  }
  PerChannel input(const char* name, const PerChannel& t, int64_t channels) {
    return {input(name, t.data, channels * planning::size_of(t.dtype)), t.dtype};
  }
  PerChannel output(const char* name, const PerChannel& t, int64_t channels) {
    return {output(name, t.data, channels * planning::size_of(t.dtype)), t.dtype};
  }
  PackedMoments output(const PackedMoments& host, int64_t channels) {
    const PerChannel& first = host.mean;
    return packed_at(output("moments", first, packed_size(channels, first.dtype == DType::kFloat64)).data, channels,
                     first.dtype);
  }
  PerChannel updated(const char* name, const PerChannel& t, int64_t channels) {
    return {updated(name, t.data, channels * planning::size_of(t.dtype)), t.dtype};
  }

  void copy_back() {
    for (const Copy& copy : copies_) {
      if (copy.host) std::memcpy(copy.host, copy.device.data(), copy.device.bytes());
    }
  }

 private:
  struct Copy {
    Copy(const char* name, size_t bytes, size_t phase, void* host) : device(name, bytes, phase), host(host) {}

    GuardedBuffer device;
    void* host;  // where to copy it back to, or nullptr
  };

  template <class T>
  T* add(const char* name, T* p, int64_t bytes, bool copy_in, bool copy_out) {
    if (!p) return nullptr;
    void* host = const_cast<std::remove_const_t<T>*>(p);
    const auto size = static_cast<size_t>(bytes);
    Copy& copy = copies_.emplace_back(name, size, reinterpret_cast<uintptr_t>(p) % 16, copy_out ? host : nullptr);
    if (copy_in) std::memcpy(copy.device.data(), host, size);
    return copy.device.data<T>();
  }

  std::deque<Copy> copies_;  // its elements stay where they are
};

// The workspace of a launch. It checks that the launch leaves the tickets as it found them.
class DeviceWorkspace {
 public:
  DeviceWorkspace(const LaunchPlan& plan, const Problem& problem)
      : DeviceWorkspace(cuda::workspace_bytes(plan, problem), plan.tickets) {}
  DeviceWorkspace(int64_t bytes_of_partials, int64_t tickets)
      : partials_("partials", static_cast<size_t>(bytes_of_partials)),
        tickets_("tickets", static_cast<size_t>(tickets) * sizeof(unsigned)) {
    std::memset(tickets_.data(), 0, tickets_.bytes());
  }

  cuda::Workspace get() { return {partials_.data(), tickets_.data<unsigned>()}; }

  void check_tickets() const {
    for (size_t i = 0; i < tickets_.bytes() / sizeof(unsigned); ++i) {
      const unsigned ticket = tickets_.data<unsigned>()[i];
      TORCH_CHECK(ticket == 0, "emulated device: the launch left ticket ", i, " at ", ticket);
    }
  }

 private:
  GuardedBuffer partials_, tickets_;
};

DeviceLimits limits() {
  const emulator::Options& o = emulator::options;
  return {static_cast<int>(o.sm_count), settings.compute_capability, static_cast<int64_t>(o.shared_per_sm)};
}

void choose_schedule() {
  ++calls;
  if (!settings.vary_schedule) return;
  constexpr emulator::Order kOrders[] = {emulator::Order::kForward, emulator::Order::kRandom, emulator::Order::kReverse,
                                         emulator::Order::kRandom};
  constexpr unsigned kResidentBlocks = 4;
  emulator::Options& o = emulator::options;
  o.order = kOrders[calls % 4];
  o.seed = calls / 2;  // odd and even seeds take turns
  o.resident_blocks = o.order == emulator::Order::kRandom ? kResidentBlocks : 1;
  o.early_copies = o.order == emulator::Order::kReverse;
}

void check(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, "emulated device: ", emulator::report()); }

template <class Args>
auto request_of(const Args& args) {
  auto request = cuda::request_of(args);
  request.forced = settings.strategy;
  return request;
}

// Plans and launches, with a workspace for each plan that is tried.
template <class Args, class Plan, class Launch>
void run(const Args& args, Plan plan_for, Launch launch) {
  const Problem& p = args.problem;
  TORCH_CHECK(fits(p), "emulated device: the tensor is too large");
  const auto plan_on = [&](const DeviceLimits& device) { return plan_for(p, request_of(args), device); };
  check(cuda::launch_planned(limits(), plan_on, [&](const LaunchPlan& plan) {
    DeviceWorkspace workspace(plan, p);
    choose_schedule();
    const cudaError_t status = launch(args, plan, workspace.get(), nullptr);
    if (status == cudaSuccess) workspace.check_tickets();
    return status;
  }));
}

struct Emulated {
  static at::Tensor empty_like(const at::Tensor& x) { return at::empty_like(x); }
  static void copy(const at::Tensor& from, const at::Tensor& to) { to.copy_(from); }

  static void batch_norm_stats(const MomentsArgs& host, c10::Device) {
    const std::lock_guard lock(one_device);
    const Problem& p = host.problem;
    DeviceMemory memory;
    MomentsArgs args = host;
    args.x = memory.input("x", host.x, bytes_of(p));
    args.moments = memory.output(host.moments, p.channels);

    run(args, plan_stats, cuda::batch_norm_stats);
    memory.copy_back();
  }

  static void batch_norm_gather_stats(const GatherArgs& host, c10::Device) {
    const std::lock_guard lock(one_device);
    const int64_t c = host.channels;
    constexpr auto kDouble = static_cast<int64_t>(sizeof(double));
    DeviceMemory memory;
    GatherArgs args = host;
    const PerChannel all = memory.input("moments", host.moments.mean, host.parts * host.stride);
    args.moments = packed_at(all.data, c, all.dtype);
    if (host.merged) args.merged = memory.output(host.merged, c);
    args.running_mean = memory.updated("running_mean", host.running_mean, c);
    args.running_var = memory.updated("running_var", host.running_var, c);
    args.num_batches_tracked = memory.updated("num_batches_tracked", host.num_batches_tracked, sizeof(int64_t));
    args.batch_mean = memory.output("batch_mean", host.batch_mean, c * kDouble);
    args.batch_var = memory.output("batch_var", host.batch_var, c * kDouble);
    args.batch_count = memory.output("batch_count", host.batch_count, kDouble);

    DeviceWorkspace workspace(0, 1);
    choose_schedule();
    check(cuda::batch_norm_gather_stats(args, workspace.get().tickets, nullptr));
    workspace.check_tickets();
    memory.copy_back();
  }

  static void batch_norm_train(const TrainArgs& host, c10::Device) {
    const std::lock_guard lock(one_device);
    const Problem& p = host.problem;
    const int64_t bytes = bytes_of(p), c = p.channels, doubles = c * static_cast<int64_t>(sizeof(double));
    DeviceMemory memory;
    TrainArgs args = host;
    args.x = memory.input("x", host.x, bytes);
    args.residual = memory.input("residual", host.residual, bytes);
    args.y = memory.output("y", host.y, bytes);
    args.mask = memory.output("mask", host.mask, mask_bytes(p));
    args.weight = memory.input("weight", host.weight, c);
    args.bias = memory.input("bias", host.bias, c);
    args.running_mean = memory.updated("running_mean", host.running_mean, c);
    args.running_var = memory.updated("running_var", host.running_var, c);
    args.num_batches_tracked = memory.updated("num_batches_tracked", host.num_batches_tracked, sizeof(int64_t));
    args.mean = memory.output("mean", host.mean, doubles);
    args.invstd = memory.output("invstd", host.invstd, doubles);

    run(args, plan_train, cuda::batch_norm_train);
    memory.copy_back();
  }

  static void batch_norm_apply(const ApplyArgs& host, c10::Device) {
    const std::lock_guard lock(one_device);
    const Problem& p = host.problem;
    const int64_t bytes = bytes_of(p), c = p.channels, doubles = c * static_cast<int64_t>(sizeof(double));
    DeviceMemory memory;
    ApplyArgs args = host;
    args.x = memory.input("x", host.x, bytes);
    args.residual = memory.input("residual", host.residual, bytes);
    args.y = memory.output("y", host.y, bytes);
    args.mask = memory.output("mask", host.mask, mask_bytes(p));
    args.weight = memory.input("weight", host.weight, c);
    args.bias = memory.input("bias", host.bias, c);
    args.running_mean = memory.input("running_mean", host.running_mean, c);
    args.running_var = memory.input("running_var", host.running_var, c);
    args.mean = memory.output("mean", host.mean, doubles);
    args.invstd = memory.output("invstd", host.invstd, doubles);

    TORCH_CHECK(fits(p), "emulated device: the tensor is too large");
    const LaunchPlan plan = plan_apply(p, cuda::request_of(args), limits());
    choose_schedule();
    check(cuda::batch_norm_apply(args, plan, nullptr));
    memory.copy_back();
  }

  static void batch_norm_backward(const BackwardArgs& host, c10::Device) {
    const std::lock_guard lock(one_device);
    const Problem& p = host.problem;
    const int64_t bytes = bytes_of(p), c = p.channels, doubles = c * static_cast<int64_t>(sizeof(double));
    DeviceMemory memory;
    BackwardArgs args = host;
    args.grad_y = memory.input("grad_y", host.grad_y, bytes);
    args.x = memory.input("x", host.x, bytes);
    args.residual = memory.input("residual", host.residual, bytes);
    args.mask = memory.input("mask", host.mask, mask_bytes(p));
    args.weight = memory.input("weight", host.weight, c);
    args.bias = memory.input("bias", host.bias, c);
    args.mean = memory.input("mean", host.mean, doubles);
    args.invstd = memory.input("invstd", host.invstd, doubles);
    args.sum_grad = memory.input("sum_grad", host.sum_grad, c);
    args.sum_grad_xhat = memory.input("sum_grad_xhat", host.sum_grad_xhat, c);
    args.batch_count = memory.input("batch_count", host.batch_count, sizeof(double));
    args.grad_x = memory.output("grad_x", host.grad_x, bytes);
    args.grad_residual = memory.output("grad_residual", host.grad_residual, bytes);
    args.grad_weight = memory.output("grad_weight", host.grad_weight, c);
    args.grad_bias = memory.output("grad_bias", host.grad_bias, c);

    run(args, plan_backward, cuda::batch_norm_backward);
    memory.copy_back();
  }
};

}  // namespace

TORCH_LIBRARY(bnfused_emulated, m) { bnfused::ops::define(m); }

TORCH_LIBRARY_IMPL(bnfused_emulated, CPU, m) { bnfused::ops::implement<Emulated>(m); }

// The functions that tests/emulator/emulated.py calls.
extern "C" {

void bnfused_emulated_vary_schedule() { settings.vary_schedule = true; }

void bnfused_emulated_fix_schedule(int order, uint64_t seed, unsigned resident_blocks) {
  settings.vary_schedule = false;
  emulator::Options& o = emulator::options;
  o.order = static_cast<emulator::Order>(order);
  o.seed = seed;
  o.resident_blocks = resident_blocks;
  o.early_copies = o.order == emulator::Order::kReverse;
}

void bnfused_emulated_device(unsigned sm_count, int compute_capability, unsigned shared_per_sm, unsigned sms_taken,
                             int hopes) {
  emulator::options.sms_taken = sms_taken;
  emulator::options.sm_count = sm_count;
  emulator::options.shared_per_sm = shared_per_sm;
  emulator::options.hopes = hopes != 0;
  settings.compute_capability = compute_capability;
}

// -1 means the planner's choice.
void bnfused_emulated_strategy(int strategy) {
  settings.strategy = strategy < 0 ? std::nullopt : std::optional(static_cast<Strategy>(strategy));
}

// Returns the record as lines, a launch and then its buffers, and empties it.
//   launch KERNEL GRID BLOCK DYNAMIC_SHARED STATIC_SHARED CLUSTER
//   buffer NAME READ_WIDE READ_NARROW WRITTEN_WIDE WRITTEN_NARROW
const char* bnfused_emulated_take_launches() {
  text.clear();
  for (const auto& launch : emulator::launches()) {
    const LaunchConfig& c = launch.config;
    text += "launch " + launch.kernel;
    const size_t shape[] = {c.grid, c.block, c.shared_bytes, launch.static_shared_bytes, c.cluster};
    for (const size_t n : shape) text += " " + std::to_string(n);
    text += "\n";
    for (const auto& b : launch.buffers) {
      text += "buffer " + b.buffer;
      for (const uint64_t n : {b.read.wide, b.read.narrow, b.written.wide, b.written.narrow}) {
        text += " " + std::to_string(n);
      }
      text += "\n";
    }
  }
  emulator::clear_launches();
  return text.c_str();
}
}
