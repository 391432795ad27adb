// The CUDA backend: plan and raw pointers in, kernels launched on a stream. No framework: csrc/ops/cuda.cpp calls it
// for torch, tests/emulator calls the same code on the CPU.
#pragma once
#include <cuda_runtime_api.h>

#include "batch_norm.h"
#include "plan.h"

namespace bnfused::cuda {

// Memory that a launch needs beside its arguments. `partials`: workspace_bytes(), of any content. `tickets`: as many as
// the plan says, 0 before and after, not shared with a launch on another stream.
struct Workspace {
  void* partials;
  unsigned* tickets;
};

Request request_of(const MomentsArgs&);
Request request_of(const TrainArgs&);
Request request_of(const ApplyArgs&);
BackwardRequest request_of(const BackwardArgs&);

int64_t workspace_bytes(const LaunchPlan&, const Problem&);

// What the launch returned; errors of the kernels themselves show up later, as always.
cudaError_t batch_norm_train(const TrainArgs&, const LaunchPlan&, Workspace, cudaStream_t);
cudaError_t batch_norm_apply(const ApplyArgs&, const LaunchPlan&, cudaStream_t);
cudaError_t batch_norm_stats(const MomentsArgs&, const LaunchPlan&, Workspace, cudaStream_t);
cudaError_t batch_norm_gather_stats(const GatherArgs&, unsigned* ticket, cudaStream_t);
cudaError_t batch_norm_backward(const BackwardArgs&, const LaunchPlan&, Workspace, cudaStream_t);

// Launches by the plan for `device`. One that others share may have less room than its limits say for blocks that wait
// for each other: then by the plan for one without clusters, and then for one where none wait.
template <class PlanFor, class Launch>
cudaError_t launch_planned(DeviceLimits device, PlanFor plan_for, Launch launch) {
  for (;;) {
    const LaunchPlan plan = plan_for(device);
    const cudaError_t status = launch(plan);
    if (status != cudaErrorCooperativeLaunchTooLarge || !device.cooperative) return status;
    (plan.residency.cluster > 1 ? device.clusters : device.cooperative) = false;
  }
}

}  // namespace bnfused::cuda
