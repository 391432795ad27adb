// The CUDA backend: takes a plan and raw pointers, and launches kernels on a stream. It includes no framework.
// csrc/ops/cuda.cpp calls it for torch, and tests/emulator calls the same code on the CPU.
#pragma once
#include <cuda_runtime_api.h>

#include "batch_norm.h"
#include "plan.h"

namespace bnfused::cuda {

// Memory that a launch needs: workspace_bytes() of any content, and the plan's tickets. They are 0 before and after the
// launch, and no launch on another stream may share them.
struct Workspace {
  void* partials;
  unsigned* tickets;
};

Request request_of(const MomentsArgs&);
Request request_of(const TrainArgs&);
Request request_of(const ApplyArgs&);
BackwardRequest request_of(const BackwardArgs&);

int64_t workspace_bytes(const LaunchPlan&, const Problem&);

// These return the error of the launch. An error inside a kernel is reported by a later CUDA call.
cudaError_t batch_norm_train(const TrainArgs&, const LaunchPlan&, Workspace, cudaStream_t);
cudaError_t batch_norm_apply(const ApplyArgs&, const LaunchPlan&, cudaStream_t);
cudaError_t batch_norm_stats(const MomentsArgs&, const LaunchPlan&, Workspace, cudaStream_t);
cudaError_t batch_norm_gather_stats(const GatherArgs&, unsigned* ticket, cudaStream_t);
cudaError_t batch_norm_backward(const BackwardArgs&, const LaunchPlan&, Workspace, cudaStream_t);

// Launches by the plan for `device`. If other work leaves too little room for blocks that wait, this takes the plan for
// a device without clusters. If that does not fit either, it takes the plan for a device whose blocks cannot wait.
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
