// Runs the CUDA backend on the emulated device without torch, so that all code can be compiled with a sanitizer. One
// case is a forward and its backward.
//
//   run_launchers                   the names of the cases
//   run_launchers NAME [SITE]       runs one; drops barrier or fence SITE
//
// It prints one line for each schedule: "forward: " and a hash of everything written, or the emulator's report.
// Then it prints the sites that were met and the kernels that ran, one line each. The results must be the same
// under every schedule. Other tests check their values.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "emulator.h"
#include "sanitizers.h"
#include "schedules.h"

namespace {

using namespace bnfused;
using emulator::GuardedBuffer;

struct Case {
  const char* name;
  Problem problem;
  bool training = true;
  Activation activation = Activation::kReLU;
  bool residual = false;
  std::optional<Strategy> strategy = {};
  size_t phase = 0;  // the addresses of x, y and grad_x modulo 16
  bool parameters = true;
  bool grad_x = true;
  DeviceLimits device = {1, 90};  // one SM, so that there are few blocks
  bool in_parts = false;          // x is one part of a batch over processes
};

constexpr DType kFloat = DType::kFloat32, kHalf = DType::kFloat16, kBfloat = DType::kBFloat16,
                kDouble = DType::kFloat64;
constexpr Strategy kResident = Strategy::kResident;
constexpr Activation kIdentity = Activation::kIdentity, kReLU = Activation::kReLU, kSiLU = Activation::kSiLU;

// Devices whose SMs have this much shared memory. With less, more is read again; with more, fewer blocks are needed.
constexpr DeviceLimits device_of(int sm_count, int64_t shared_per_sm) { return {sm_count, 80, shared_per_sm}; }
// The same for a device that has clusters.
constexpr DeviceLimits cluster_device_of(int sm_count, int64_t shared_per_sm) { return {sm_count, 90, shared_per_sm}; }
constexpr int64_t kKiB = 1024;

// The cases run every kernel, with whole and partial units, tiles and blocks. They have few threads, because
// ThreadSanitizer takes up to a millisecond for each thread.
const Case kCases[] = {
    {"rows_streaming", {290, 64, 1, kFloat}, true, kReLU, false, Strategy::kStreaming},
    {"rows_streaming_copies", {2800, 6, 1, kFloat}, true, kSiLU, true, Strategy::kStreaming},
    {"rows_small", {21, 40, 1, kHalf}, true, kReLU, true, Strategy::kSmall},
    {"rows_small_copies", {19, 3, 1, kFloat}, true, kIdentity, false, Strategy::kSmall},
    {"rows_frozen", {270, 72, 1, kBfloat}, false, kReLU, true},
    {"rows_frozen_copies", {19, 3, 1, kFloat}, false},
    {"rows_frozen_grad_x", {37, 24, 1, kFloat}, false, kReLU, false, {}, 0, false},
    {"rows_parameters_only", {37, 24, 1, kFloat}, true, kIdentity, false, {}, 0, true, false},
    {"planes_streaming", {2, 1, 8800, kHalf}, true, kReLU, true, Strategy::kStreaming},
    {"planes_streaming_odd", {65, 2, 63, kHalf}, true, kSiLU, true, Strategy::kStreaming},
    // The plane touches fewer units than a plane with another begin, and its end is the end of the mask.
    {"planes_streaming_last_unit", {1, 1, 10, kHalf}, true, kReLU, true, Strategy::kStreaming},
    {"planes_small", {2, 3, 640, kFloat}, true, kReLU, true, Strategy::kSmall},
    {"planes_small_odd", {5, 3, 7, kDouble}, true, kSiLU, false, Strategy::kSmall},
    // Three blocks: the first two share a plane, and its channel has a second plane.
    {"planes_frozen", {2, 3, 901, kFloat}, false, kReLU, true},
    {"planes_frozen_grad_x", {2, 5, 13, kHalf}, false, kIdentity, true, {}, 0, false},
    {"planes_parameters_only", {2, 5, 13, kFloat}, true, kReLU, false, {}, 0, true, false},
    // Four tiles, one after the other: by three blocks that keep whole tiles, and by two that keep a part.
    {"rows_resident", {290, 64, 1, kFloat}, true, kReLU, true, kResident, 0, true, true, device_of(4, 38 * kKiB)},
    {"rows_resident_partly",
     {290, 64, 1, kFloat},
     true,
     kReLU,
     false,
     kResident,
     0,
     true,
     true,
     device_of(2, 38 * kKiB)},
    {"rows_resident_copies",
     {2800, 6, 1, kFloat},
     true,
     kSiLU,
     true,
     kResident,
     0,
     true,
     true,
     device_of(3, 60 * kKiB)},
    {"rows_resident_tiles_together",
     {201, 65, 1, kHalf},
     true,
     kIdentity,
     true,
     kResident,
     0,
     true,
     true,
     device_of(2, 99 * kKiB)},
    {"planes_resident", {2, 2, 8800, kHalf}, true, kReLU, true, kResident, 0, true, true, device_of(2, 40 * kKiB)},
    {"planes_resident_odd", {65, 2, 63, kHalf}, true, kSiLU, true, kResident, 0, true, true, device_of(2, 20 * kKiB)},
    {"planes_resident_double",
     {2, 3, 1100, kDouble},
     true,
     kReLU,
     false,
     kResident,
     8,
     true,
     true,
     device_of(4, 24 * kKiB)},
    // A part of the next tile or channel is fetched before the current one is finished: backward, forward.
    {"rows_resident_ahead",
     {260, 40, 1, kBfloat},
     true,
     kReLU,
     true,
     kResident,
     0,
     true,
     true,
     device_of(2, 58 * kKiB)},
    {"planes_resident_ahead",
     {3, 3, 45 * 51, kBfloat},
     true,
     kSiLU,
     true,
     kResident,
     0,
     true,
     true,
     device_of(2, 40 * kKiB)},
    // Clusters of two blocks next to each other, and clusters of four that go from tile to tile.
    {.name = "rows_clusters",
     .problem = {290, 48, 1, kFloat},
     .residual = true,
     .strategy = kResident,
     .device = cluster_device_of(4, 48 * kKiB)},
    {.name = "rows_clusters_copies",
     .problem = {1400, 6, 1, kHalf},
     .activation = kSiLU,
     .strategy = kResident,
     .device = cluster_device_of(4, 46 * kKiB)},
    {.name = "planes_clusters",
     .problem = {2, 3, 6600, kHalf},
     .residual = true,
     .strategy = kResident,
     .device = cluster_device_of(2, 40 * kKiB)},
    {.name = "planes_clusters_odd",
     .problem = {65, 3, 63, kFloat},
     .activation = kSiLU,
     .residual = true,
     .strategy = kResident,
     .device = cluster_device_of(4, 40 * kKiB)},
    {.name = "rows_in_parts", .problem = {37, 40, 1, kFloat}, .residual = true, .in_parts = true},
    {.name = "planes_in_parts", .problem = {2, 3, 13, kHalf}, .activation = kSiLU, .in_parts = true},
    {"misaligned", {9, 3, 17, kFloat}, true, kReLU, false, {}, 4},
    {"empty", {0, 5, 9, kFloat}},
    {"empty_frozen", {0, 5, 1, kFloat}, false},
    {.name = "empty_in_parts", .problem = {0, 5, 1, kFloat}, .in_parts = true},
};

// The state that a batch updates.
struct RunningArgs {
  PerChannel mean, var;
  int64_t* counter;
};

// The buffers of a case. Their values are the same in every run. hash_of_results() hashes what the launches write.
class Memory {
 public:
  void* numbers(const char* name, int64_t count, DType dtype, size_t phase = 0) {
    GuardedBuffer& buffer = add(name, count * planning::size_of(dtype), phase);
    for (int64_t i = 0; i < count; ++i) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      store(buffer, i, dtype, static_cast<double>(random_ >> 40) / (1 << 23) - 1);  // in [-1, 1)
    }
    return buffer.data();
  }
  PerChannel parameter(const char* name, int64_t channels, DType dtype) {
    return {numbers(name, channels, dtype), dtype};
  }

  void* result(const char* name, int64_t bytes, size_t phase = 0) {
    results_.push_back(&add(name, bytes, phase));
    return results_.back()->data();
  }
  PerChannel result(const char* name, int64_t channels, DType dtype) {
    return {result(name, channels * planning::size_of(dtype)), dtype};
  }
  // Values that the launch updates; they are not negative.
  PerChannel updated(const char* name, int64_t channels, DType dtype) {
    void* p = result(name, channels * planning::size_of(dtype));
    std::memset(p, 0, results_.back()->bytes());
    return {p, dtype};
  }

  cuda::Workspace workspace(const LaunchPlan& plan, const Problem& problem) {
    void* partials = add("partials", cuda::workspace_bytes(plan, problem), 0).data();
    return {partials, tickets(plan.tickets)};
  }
  unsigned* tickets(int64_t count) {
    auto* tickets = static_cast<unsigned*>(result("tickets", count * static_cast<int64_t>(sizeof(unsigned))));
    std::fill_n(tickets, count, 0u);
    return tickets;
  }

  uint64_t hash_of_results() const {  // FNV-1a
    uint64_t hash = 0xcbf29ce484222325u;
    for (const GuardedBuffer* buffer : results_) {
      for (size_t i = 0; i < buffer->bytes(); ++i) hash = (hash ^ buffer->data<unsigned char>()[i]) * 0x100000001b3u;
    }
    return hash;
  }

 private:
  GuardedBuffer& add(const char* name, int64_t bytes, size_t phase) {
    return buffers_.emplace_back(name, static_cast<size_t>(bytes), phase);
  }

  static void store(GuardedBuffer& buffer, int64_t i, DType dtype, double value) {
    switch (dtype) {
      case DType::kFloat16:
        buffer.data<__half>()[i] = __float2half(static_cast<float>(value));
        break;
      case DType::kBFloat16:
        buffer.data<__nv_bfloat16>()[i] = __float2bfloat16(static_cast<float>(value));
        break;
      case DType::kFloat32:
        buffer.data<float>()[i] = static_cast<float>(value);
        break;
      default:
        buffer.data<double>()[i] = value;
    }
  }

  std::deque<GuardedBuffer> buffers_;  // its elements stay where they are
  std::vector<const GuardedBuffer*> results_;
  uint64_t random_ = 1;
};

// Computes the statistics of x as a part of a batch, and those of the whole batch from three parts; the first is empty.
cudaError_t gather(const Case& c, const void* x, const RunningArgs& running, double* mean, double* var,
                   Memory& memory) {
  const Problem& p = c.problem;
  const DType packed = p.dtype == kDouble ? kDouble : kFloat;
  const int64_t size = packed_size(p.channels, packed == kDouble);
  const MomentsArgs args{p, x, packed_at(memory.result("part", size, packed).data, p.channels, packed)};
  const LaunchPlan plan = plan_stats(p, cuda::request_of(args), c.device);
  const cudaError_t status = cuda::batch_norm_stats(args, plan, memory.workspace(plan, p), nullptr);
  if (status != cudaSuccess) return status;

  constexpr int64_t kParts = 3;
  GatherArgs all{};
  all.parts = kParts;
  all.channels = p.channels;
  all.moments = packed_at(memory.numbers("gathered", kParts * size, packed), p.channels, packed);
  all.stride = size;
  for (int64_t part = 0; part < kParts; ++part) {
    const auto set_count = [&](auto* count, auto* rest) {
      count[part * size] = 5 * part;
      if (rest != nullptr) rest[part * size] = 0;
    };
    if (packed == kDouble) {
      set_count(static_cast<double*>(all.moments.count.data), static_cast<double*>(nullptr));
    } else {
      set_count(static_cast<float*>(all.moments.count.data), static_cast<float*>(all.moments.count_rest.data));
    }
  }
  all.merged = packed_at(memory.result("merged", size, packed).data, p.channels, packed);
  all.running_mean = running.mean;
  all.running_var = running.var;
  all.num_batches_tracked = running.counter;
  all.batch_mean = mean;
  all.batch_var = var;
  all.batch_count = static_cast<double*>(memory.result("batch_count", sizeof(double)));
  all.cumulative = true;
  return cuda::batch_norm_gather_stats(all, memory.tickets(1), nullptr);
}

// Runs the forward and its backward. `memory` then has everything that they wrote.
cudaError_t run(const Case& c, Memory& memory) {
  const Problem& p = c.problem;
  const int64_t n = p.numel(), bytes = n * planning::size_of(p.dtype);
  const auto doubles = p.channels * static_cast<int64_t>(sizeof(double));
  const bool masked = c.residual && c.activation == kReLU;
  const DType parameters = p.dtype == kDouble ? kDouble : kFloat;
  const Epilogue epilogue{c.activation, 0};

  const void* x = memory.numbers("x", n, p.dtype, c.phase);
  const void* residual = c.residual ? memory.numbers("residual", n, p.dtype) : nullptr;
  void* y = memory.result("y", bytes, c.phase);
  auto* mask = masked ? static_cast<uint8_t*>(memory.result("mask", mask_bytes(p))) : nullptr;
  const PerChannel weight = memory.parameter("weight", p.channels, parameters);
  const PerChannel bias = memory.parameter("bias", p.channels, p.dtype);
  const PerChannel running_mean = memory.updated("running_mean", p.channels, parameters);
  const PerChannel running_var = memory.updated("running_var", p.channels, p.dtype);
  auto* counter = static_cast<int64_t*>(memory.updated("num_batches_tracked", 1, kDouble).data);
  auto* mean = static_cast<double*>(memory.result("mean", doubles));
  auto* invstd = static_cast<double*>(memory.result("invstd", doubles));

  cudaError_t status;
  constexpr double kEps = 1e-5;
  if (c.in_parts) {
    auto* whole_mean = static_cast<double*>(memory.result("whole_mean", doubles));
    auto* whole_var = static_cast<double*>(memory.result("whole_var", doubles));
    status = gather(c, x, {running_mean, running_var, counter}, whole_mean, whole_var, memory);
    if (status != cudaSuccess) return status;
    const ApplyArgs args{
        p,    x,      residual, y,       mask, weight, bias, {whole_mean, kDouble}, {whole_var, kDouble},
        mean, invstd, kEps,     epilogue};
    status = cuda::batch_norm_apply(args, plan_apply(p, cuda::request_of(args), c.device), nullptr);
  } else if (c.training) {
    const TrainArgs args{p,           x,       residual, y,      mask, weight, bias, running_mean,
                         running_var, counter, mean,     invstd, kEps, 0,      true, epilogue};
    Request request = cuda::request_of(args);
    request.forced = c.strategy;
    const LaunchPlan plan = plan_train(p, request, c.device);
    status = cuda::batch_norm_train(args, plan, memory.workspace(plan, p), nullptr);
  } else {
    const ApplyArgs args{p,           x,    residual, y,    mask,    weight, bias, running_mean,
                         running_var, mean, invstd,   kEps, epilogue};
    status = cuda::batch_norm_apply(args, plan_apply(p, cuda::request_of(args), c.device), nullptr);
  }
  if (status != cudaSuccess) return status;

  const void* grad_y = memory.numbers("grad_y", n, p.dtype);
  BackwardArgs args{};
  args.problem = p;
  args.grad_y = grad_y;
  args.x = x;
  args.residual = masked ? nullptr : residual;
  args.mask = mask;
  args.weight = weight;
  args.bias = bias;
  args.mean = mean;
  args.invstd = invstd;
  args.training = c.training;
  args.grad_x = c.grad_x ? memory.result("grad_x", bytes, c.phase) : nullptr;
  args.grad_residual = c.residual ? memory.result("grad_residual", bytes) : nullptr;
  if (c.parameters) {
    args.grad_weight = memory.result("grad_weight", p.channels, parameters);
    args.grad_bias = memory.result("grad_bias", p.channels, p.dtype);
  }
  args.epilogue = epilogue;
  if (c.in_parts) {
    BackwardArgs sums = args;
    sums.training = false;
    sums.grad_x = sums.grad_residual = nullptr;
    const LaunchPlan plan = plan_backward(p, cuda::request_of(sums), c.device);
    status = cuda::batch_norm_backward(sums, plan, memory.workspace(plan, p), nullptr);
    if (status != cudaSuccess) return status;
    args.sum_grad = memory.parameter("sum_grad", p.channels, kDouble);
    args.sum_grad_xhat = memory.parameter("sum_grad_xhat", p.channels, kDouble);
    args.batch_count = static_cast<double*>(memory.numbers("batch_count", 1, kDouble));
    args.grad_weight = args.grad_bias = {};
  }
  BackwardRequest request = cuda::request_of(args);
  request.forced = c.strategy;
  const LaunchPlan plan = plan_backward(p, request, c.device);
  return cuda::batch_norm_backward(args, plan, memory.workspace(plan, p), nullptr);
}

void run_under_every_schedule(const Case& c) {
  for (const emulator::Schedule& schedule : emulator::kSchedules) {
    schedule.choose();
    Memory memory;
    const cudaError_t status = run(c, memory);
    if (status == cudaSuccess) {
      std::printf("%s: %016llx\n", schedule.name, static_cast<unsigned long long>(memory.hash_of_results()));
    } else {
      std::printf("%s: %s\n", schedule.name, emulator::report().c_str());
    }
    if (emulator::under_tsan()) break;  // one schedule is enough: ThreadSanitizer sees a race in any of them
  }
  for (const std::string& site : emulator::sites()) std::printf("site %s\n", site.c_str());
  std::set<std::string> kernels;
  for (const emulator::LaunchRecord& launch : emulator::launches()) kernels.insert(launch.kernel);
  for (const std::string& kernel : kernels) std::printf("kernel %s\n", kernel.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) emulator::options.dropped_site = arguments[2];
  for (const Case& c : kCases) {
    if (count < 2) {
      std::printf("%s\n", c.name);
    } else if (std::string(c.name) == arguments[1]) {
      run_under_every_schedule(c);
      return 0;
    }
  }
  return count < 2 ? 0 : 2;
}
