// How a problem is cut into launches, blocks and threads: a pure function of the problem and the device's limits, so
// that it can be tested, and explained, without a GPU.
//
//   kSmall      one launch: a block has all values of its channels, sums them, and applies what follows from the sums,
//               reading again what it has just read (from the L1 or L2 cache)
//   kResident   one launch: the blocks that share a channel keep what they have read in shared memory, wait for one of
//               them to merge the partial sums in a fixed order, and apply; what does not fit they read again,
//               last-read first. What they keep of their next channel they read meanwhile. They exchange the sums
//               through memory, or, where they are a cluster, through their shared memory
//   kStreaming  two launches: the values of a channel are split over blocks, the last of which merges the partial sums
//               in a fixed order; the second launch applies, last-read first
//   kApply      one launch: nothing to sum (eval; the gradient of x under given statistics)
//   kReduce     one launch that only sums, or sums and writes what does not depend on the sums
//   kEmpty      no values: a launch that counts the batch and clears what it returns
#pragma once
#include <algorithm>

#include "plan_resident.h"
#include "plan_shapes.h"

namespace bnfused {
namespace planning {

// How the sums are taken. `waits`: something that is written waits for them; else one launch does, however it is cut.
inline void choose_reduce(LaunchPlan* plan, const Problem& p, bool mask, int tensors, const DeviceLimits& device,
                          bool waits, const Strategy* forced) {
  const bool rows = p.inner == 1;
  const Rows small_rows = rows ? cut_rows(p, 4, 1) : Rows{};
  const char* const obstacle = obstacle_to_small(p, small_rows, mask);
  const Choice choice = obstacle ? Choice{false, obstacle}
                        : forced ? Choice{*forced == Strategy::kSmall, "it was asked for"}
                                 : prefers_small(p, small_rows, device);
  const bool may_keep = waits && !obstacle_to_resident(p, rows ? resident_rows(p) : Rows{}, mask, device);
  if (may_keep && (forced ? *forced == Strategy::kResident : !choice.small || choice.cached)) {
    const LaunchPlan resident = resident_plan(*plan, p, tensors, device);
    if (forced || gains(resident, p, tensors)) {
      *plan = resident;
      return;
    }
  }
  plan->why = choice.why;
  if (choice.small && waits) {
    plan->strategy = Strategy::kSmall;
    plan->launches = 1;
    plan->tickets = 1;
    if (rows) {
      plan->reduce_rows = small_rows;
      plan->reduce_rows.parts = 1;
      plan->residency.teams = small_rows.tiles;
    } else {
      plan->planes = cut_planes(p, true, device);
      plan->residency.teams = plan->planes.channels;
    }
    plan->residency.cluster = 1;
    return;
  }
  plan->strategy = Strategy::kStreaming;
  plan->launches = 2;
  if (rows) {
    // 64 bytes at least of each row that a block reads: the narrower its tile, the more threads of the last block merge
    // the partial sums of a channel. Copies multiply those, so that fewer blocks write them.
    const uint32_t blocks = uint32_t(device.sm_count) * (small_rows.copies == 1 ? kReduceBlocksPerSm : 2);
    const Rows& r = plan->reduce_rows = cut_rows(p, 4, blocks);
    plan->partials = int64_t(r.parts) * r.columns * kUnit;
    plan->tickets = r.domains() + 1;
  } else {
    const Planes& s = plan->planes = cut_planes(p, false, device);
    plan->partials = int64_t(s.parts) * s.channels;
    plan->tickets = s.domains() + 1;
  }
}

inline void choose_apply(LaunchPlan* plan, const Problem& p, const DeviceLimits& device) {
  const uint32_t blocks = uint32_t(device.sm_count) * kApplyBlocksPerSm;
  if (p.inner == 1) {
    plan->apply_rows = cut_rows(p, 32, blocks);
  } else {
    plan->flat = cut_flat(p, device);
  }
}

inline LaunchPlan empty_plan(const Problem& p) {
  LaunchPlan plan{};
  plan.strategy = Strategy::kEmpty;
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.launches = 1;
  plan.why = "there are no values";
  return plan;
}

}  // namespace planning

// Whether unit numbers fit 32 bits, also of planes that share units: up to 2^34 values, 32 GiB of float16.
constexpr bool fits(const Problem& p) {
  const bool planes_fit = p.inner == 1 || p.outer * ((p.inner + 14) / kUnit) < int64_t(1) << 32;
  return p.numel() <= int64_t(1) << 34 && p.channels < int64_t(1) << 31 && planes_fit;
}

inline LaunchPlan plan_train(const Problem& p, const Request& request, const DeviceLimits& device,
                             const Strategy* forced = nullptr) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  planning::choose_reduce(&plan, p, request.mask, 1, device, true, forced);
  if (plan.strategy == Strategy::kStreaming) planning::choose_apply(&plan, p, device);
  const int64_t a = p.numel() * planning::size_of(p.dtype);
  plan.bytes_read = (2 + request.residual) * a - plan.residency.values * planning::size_of(p.dtype);
  plan.bytes_written = a + (request.mask ? (p.numel() + 7) / 8 : 0);
  return plan;
}

inline LaunchPlan plan_stats(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  planning::choose_reduce(&plan, p, false, 1, device, false, nullptr);
  plan.strategy = Strategy::kReduce;
  plan.launches = 1;
  plan.why = "only the sums are wanted";
  plan.bytes_read = p.numel() * planning::size_of(p.dtype);
  return plan;
}

constexpr Merge merge_of(int64_t parts, int64_t channels) {
  // Eight row_slots of a block's columns at most.
  const auto row_slots = std::clamp<int64_t>(parts, 1, kMaxThreads / planning::kMergeColumns);
  return {uint32_t(parts), uint32_t(channels) + 1, planning::kMergeColumns,
          uint32_t(row_slots) * planning::kMergeColumns};
}

inline LaunchPlan plan_apply(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan{};
  plan.strategy = Strategy::kApply;
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  plan.launches = 1;
  plan.why = "the statistics are given";
  planning::choose_apply(&plan, p, device);
  const int64_t a = p.numel() * planning::size_of(p.dtype);
  plan.bytes_read = (1 + request.residual) * a;
  plan.bytes_written = a + (request.mask ? (p.numel() + 7) / 8 : 0);
  return plan;
}

inline LaunchPlan plan_backward(const Problem& p, const BackwardRequest& request, const DeviceLimits& device,
                                const Strategy* forced = nullptr) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan{};
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = request.wide;
  if (!request.sums()) {
    plan.strategy = Strategy::kApply;
    plan.launches = 1;
    plan.why = "nothing has to be summed";
    planning::choose_apply(&plan, p, device);
  } else {
    planning::choose_reduce(&plan, p, false, 2 + request.residual, device, request.waits(), forced);
    if (!request.waits()) {
      plan.strategy = Strategy::kReduce;
      plan.launches = 1;
      plan.why = "nothing that is written depends on the sums";
    } else if (plan.strategy == Strategy::kStreaming) {
      planning::choose_apply(&plan, p, device);
    }
  }
  if (plan.partials == 0) plan.tickets = 0;  // there is no batch to count
  const int64_t a = p.numel() * planning::size_of(p.dtype);
  const auto read = [&](int64_t values) {
    const int64_t units_of_mask = request.mask ? (values + kUnit - 1) / kUnit : 0;
    return (2 + request.residual) * values * planning::size_of(p.dtype) + units_of_mask;
  };
  plan.bytes_read = read(p.numel());
  const bool twice = plan.strategy != Strategy::kApply && plan.strategy != Strategy::kReduce;
  if (twice) plan.bytes_read += read(p.numel() - plan.residency.values);
  plan.bytes_written = (int(request.grad_x) + int(request.grad_residual)) * a;
  return plan;
}

}  // namespace bnfused
