// How a problem is cut into launches, blocks and threads. This is a pure function of the problem and the device's limits,
// so it can be tested and explained without a GPU. It has these strategies:
//
//   kSmall      one launch: a block has all values of its channels. It sums them, then reads them again from a cache
//   kResident   one launch: blocks that share a channel exchange their sums, in memory or in a cluster. They keep what
//               they read in shared memory, and read again only what did not fit
//   kStreaming  two launches: the first sums, with a channel split over blocks, and the second applies
//   kApply      one launch: nothing is summed (eval; the gradient of x if the statistics are given)
//   kReduce     one launch: it only sums, and writes what does not depend on the sums
//   kEmpty      one launch for a batch without values: it counts the batch and clears the results
//
// Sums are merged in a fixed order. A second read starts with what was read last. The words of the plan and the kernels:
//
//   unit      8 consecutive values, which one thread loads or stores at once (kernels/pack.cuh)
//   column    in the rows layout: a unit's place in a row; it has the same channels in every row
//   copy      in a row of lcm(channels, 8) values, each channel occurs `copies` times
//   tile      neighbouring columns that a block reads together
//   row slot  one of the rows of a tile that a block reads at once; its threads are neighbours
//   part      the share of one block in a tile's rows or in a channel's units
//   team      the blocks that have all parts of a tile or of a channel
//   domain    a channel, or the tiles, for which one block merges the partial sums
//   ticket    a counter of the blocks that are done with a domain; it is 0 before and after a launch
//   gate      a counter of the blocks that still wait once the last one has come; it is 0 before and after a launch
//   step      the number of a unit among those of one thread, in the order in which the thread first reads them
//   ahead     steps that have two slots in shared memory, so that the next tile's units can be fetched early
#pragma once
#include <algorithm>
#include <optional>

#include "plan_resident.h"
#include "plan_shapes.h"

namespace bnfused {
namespace planning {

inline LaunchPlan new_plan(const Problem& p, Strategy strategy, bool wide, const char* why) {
  LaunchPlan plan{};
  plan.strategy = strategy;
  plan.layout = p.inner == 1 ? Layout::kRows : Layout::kPlanes;
  plan.wide = wide;
  plan.why = why;
  return plan;
}

inline LaunchPlan empty_plan(const Problem& p) { return new_plan(p, Strategy::kEmpty, false, "there are no values"); }

// Chooses how the sums are taken. `waits` says that something that is written depends on them. Otherwise one launch is
// enough, whatever the cut is.
inline void choose_reduce(LaunchPlan* plan, const Problem& p, bool mask, int tensors, const DeviceLimits& device,
                          bool waits, std::optional<Strategy> forced) {
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
    plan->tickets = 1;
    if (rows) {
      plan->reduce_rows = small_rows;
      plan->residency.teams = small_rows.tiles;
    } else {
      plan->planes = cut_planes(p, true, device);
      plan->residency.teams = plan->planes.channels;
    }
    return;
  }
  plan->strategy = Strategy::kStreaming;
  if (rows) {
    // A block reads at least 64 bytes of each row. With a narrower tile, more threads of the last block merge the
    // partial sums of a channel. Copies multiply the partial sums, so fewer blocks write them.
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
  if (p.inner == 1) {
    plan->apply_rows = cut_rows(p, 32, uint32_t(device.sm_count) * kApplyBlocksPerSm);
  } else {
    plan->flat = cut_flat(p, device);
  }
}

}  // namespace planning

// Whether unit numbers fit 32 bits, also if planes share units. The limit is 2^34 values: 32 GiB of float16.
constexpr bool fits(const Problem& p) {
  const bool planes_fit = p.inner == 1 || p.outer * ((p.inner + 14) / kUnit) < int64_t(1) << 32;
  return p.numel() <= int64_t(1) << 34 && p.channels < int64_t(1) << 31 && planes_fit;
}

inline LaunchPlan plan_train(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan = planning::new_plan(p, {}, request.wide, "");
  planning::choose_reduce(&plan, p, request.mask, 1, device, true, request.forced);
  if (plan.strategy == Strategy::kStreaming) planning::choose_apply(&plan, p, device);
  const int64_t bytes = planning::bytes_of(p);
  plan.bytes_read = (2 + request.residual) * bytes - plan.residency.values * planning::size_of(p.dtype);
  plan.bytes_written = bytes + (request.mask ? (p.numel() + 7) / 8 : 0);
  return plan;
}

inline LaunchPlan plan_stats(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan = planning::new_plan(p, {}, request.wide, "");
  planning::choose_reduce(&plan, p, false, 1, device, false, std::nullopt);
  plan.strategy = Strategy::kReduce;
  plan.why = "only the sums are wanted";
  plan.bytes_read = planning::bytes_of(p);
  return plan;
}

constexpr Merge merge_of(int64_t parts, int64_t channels) {
  constexpr uint32_t kColumns = planning::kMergeColumns;
  const auto row_slots = uint32_t(std::clamp<int64_t>(parts, 1, kMaxThreads / kColumns));
  return {uint32_t(parts), uint32_t(channels) + 1, kColumns, row_slots * kColumns};
}

inline LaunchPlan plan_apply(const Problem& p, const Request& request, const DeviceLimits& device) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan = planning::new_plan(p, Strategy::kApply, request.wide, "the statistics are given");
  planning::choose_apply(&plan, p, device);
  plan.bytes_read = (1 + request.residual) * planning::bytes_of(p);
  plan.bytes_written = planning::bytes_of(p) + (request.mask ? (p.numel() + 7) / 8 : 0);
  return plan;
}

inline LaunchPlan plan_backward(const Problem& p, const BackwardRequest& request, const DeviceLimits& device) {
  if (p.numel() == 0) return planning::empty_plan(p);
  LaunchPlan plan = planning::new_plan(p, Strategy::kApply, request.wide, "nothing has to be summed");
  if (request.sums()) {
    planning::choose_reduce(&plan, p, false, 2 + request.residual, device, request.waits(), request.forced);
    if (!request.waits()) {
      plan.strategy = Strategy::kReduce;
      plan.why = "nothing that is written depends on the sums";
    }
  }
  if (plan.strategy == Strategy::kApply || plan.strategy == Strategy::kStreaming) {
    planning::choose_apply(&plan, p, device);
  }
  if (plan.partials == 0) plan.tickets = 0;  // a backward counts no batch
  const auto read = [&](int64_t values) {
    const int64_t units_of_mask = request.mask ? (values + kUnit - 1) / kUnit : 0;
    return (2 + request.residual) * values * planning::size_of(p.dtype) + units_of_mask;
  };
  plan.bytes_read = read(p.numel());
  const bool twice = plan.strategy != Strategy::kApply && plan.strategy != Strategy::kReduce;
  if (twice) plan.bytes_read += read(p.numel() - plan.residency.values);
  plan.bytes_written = (int(request.grad_x) + int(request.grad_residual)) * planning::bytes_of(p);
  return plan;
}

}  // namespace bnfused
