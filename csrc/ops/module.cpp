// bnfused._C: the ops as functions of Python, the plans, and the facts of the build. Importing it registers the ops.
// No tensor crosses pybind11, so it does not matter with which pybind11 torch was built.
#include <ATen/Config.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/leaves.h"
#include "cpu/plan.h"
#include "ops/python.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using namespace bnfused;
using namespace py::literals;

const char* name_of(Strategy strategy) {
  constexpr const char* kNames[] = {"empty", "small", "streaming", "apply", "reduce", "resident"};
  static_assert(std::size(kNames) == size_t(Strategy::kResident) + 1);
  return kNames[size_t(strategy)];
}

Strategy strategy_of(const std::string& name) {
  for (const Strategy s : {Strategy::kSmall, Strategy::kStreaming, Strategy::kResident}) {
    if (name == name_of(s)) return s;
  }
  throw std::invalid_argument("bnfused: expected strategy small, streaming or resident, got " + name);
}

py::dict describe(const Rows& s) {
  return py::dict("channels"_a = s.channels, "copies"_a = s.copies, "columns"_a = s.columns, "rows"_a = s.rows,
                  "tile"_a = s.tile, "tiles"_a = s.tiles, "row_slots"_a = s.row_slots, "parts"_a = s.parts,
                  "threads"_a = s.threads, "blocks"_a = s.blocks());
}

py::dict describe(const Planes& s) {
  return py::dict("channels"_a = s.channels, "outer"_a = s.outer, "inner"_a = s.inner,
                  "units_per_plane"_a = s.units_per_plane, "units_per_channel"_a = s.units_per_channel,
                  "parts"_a = s.parts, "threads"_a = s.threads, "blocks"_a = s.blocks());
}

py::dict describe(const Flat& s) {
  return py::dict("units"_a = s.units, "units_per_block"_a = s.units_per_block,
                  "planes_per_block"_a = s.planes_per_block, "threads"_a = s.threads, "blocks"_a = s.blocks());
}

py::dict describe(const Residency& r, const LaunchPlan& plan) {
  const bool planes = plan.layout == Layout::kPlanes;
  py::dict shape = planes ? describe(plan.planes) : describe(plan.reduce_rows);
  shape["blocks"] = r.blocks(planes ? plan.planes.parts : plan.reduce_rows.parts);
  shape["teams"] = r.teams;
  shape["cluster"] = r.cluster;
  shape["steps"] = r.steps;
  shape["ahead"] = r.ahead;
  shape["shared_bytes"] = r.keeps_bytes + (planes ? 0 : planning::table_bytes(plan.reduce_rows));
  return shape;
}

// The launches in their order: the kernel of each, and how the problem is cut.
py::list describe_launches(const LaunchPlan& plan) {
  py::list launches;
  const auto add = [&](const char* kernel, py::dict shape) {
    shape["kernel"] = kernel;
    launches.append(shape);
  };
  const Strategy s = plan.strategy;
  const bool planes = plan.layout == Layout::kPlanes;
  if (s == Strategy::kEmpty) add("empty", py::dict("blocks"_a = 1));
  if (s == Strategy::kSmall || s == Strategy::kResident) add(name_of(s), describe(plan.residency, plan));
  if (s == Strategy::kStreaming || s == Strategy::kReduce) {
    add("reduce", planes ? describe(plan.planes) : describe(plan.reduce_rows));
  }
  if (s == Strategy::kStreaming || s == Strategy::kApply) {
    add("apply", planes ? describe(plan.flat) : describe(plan.apply_rows));
  }
  return launches;
}

py::dict merge_as_dict(int64_t parts, int64_t channels) {
  const Merge s = merge_of(parts, channels);
  return py::dict("parts"_a = s.parts, "columns"_a = s.columns, "columns_per_block"_a = s.columns_per_block,
                  "threads"_a = s.threads, "blocks"_a = s.blocks());
}

// The plan of the CUDA backend for a device with these limits. It needs no such device.
py::dict plan_as_dict(const std::string& op, int64_t outer, int64_t channels, int64_t inner, int dtype, bool wide,
                      bool residual, bool mask, bool training, bool grad_x, bool grad_residual, bool grad_parameters,
                      bool means, int sm_count, int compute_capability, int64_t shared_per_sm, bool cooperative,
                      const std::optional<std::string>& strategy) {
  const Problem problem{outer, channels, inner, static_cast<DType>(dtype)};
  if (!fits(problem)) throw std::invalid_argument("bnfused: expected at most 2^34 values");
  const DeviceLimits device{sm_count, compute_capability, shared_per_sm, cooperative};
  const std::optional<Strategy> forced = strategy ? std::optional(strategy_of(*strategy)) : std::nullopt;
  LaunchPlan plan;
  if (op == "stats") {
    plan = plan_stats(problem, {wide}, device);
  } else if (op == "train") {
    plan = plan_train(problem, {wide, residual, mask, forced}, device);
  } else if (op == "eval") {
    plan = plan_apply(problem, {wide, residual, mask}, device);
  } else if (op == "backward") {
    const BackwardRequest request{wide,          residual,        mask,  training, grad_x,
                                  grad_residual, grad_parameters, means, forced};
    plan = plan_backward(problem, request, device);
  } else {
    throw std::invalid_argument("bnfused: expected op stats, train, eval or backward, got " + op);
  }
  return py::dict("strategy"_a = name_of(plan.strategy),
                  "layout"_a = plan.layout == Layout::kPlanes ? "planes" : "rows",
                  "launches"_a = describe_launches(plan), "partials"_a = plan.partials, "tickets"_a = plan.tickets,
                  "values_kept"_a = plan.residency.values, "bytes_read"_a = plan.bytes_read,
                  "bytes_written"_a = plan.bytes_written, "why"_a = plan.why);
}

const char* name_of(cpu::Traversal traversal) {
  constexpr const char* kNames[] = {"planes", "short planes", "rows"};
  static_assert(std::size(kNames) == size_t(cpu::Traversal::kRows) + 1);
  return kNames[size_t(traversal)];
}

py::dict describe(const cpu::RowView& view) {
  py::list tasks;
  for (int64_t task = 0; task < view.tasks; ++task) tasks.append(py::make_tuple(view.begin(task), view.end(task)));
  return py::dict("columns"_a = view.columns, "full_rows"_a = view.full_rows, "tail"_a = view.tail, "tasks"_a = tasks);
}

// Each part as (plane_begin, plane_end, begin, end): its planes, and which values of each of them.
py::list describe_parts(const cpu::CpuPlan& plan) {
  py::list parts;
  for (int64_t i = 0; i < plan.parts; ++i) {
    const cpu::Part part = cpu::part_of(plan.problem, i, plan.parts);
    parts.append(py::make_tuple(part.plane_begin, part.plane_end, part.begin, part.end));
  }
  return parts;
}

py::dict cpu_plan_as_dict(const std::string& op, int64_t outer, int64_t channels, int64_t inner, int dtype,
                          int64_t threads, bool residual, bool mask, bool aligned) {
  const Problem problem{outer, channels, inner, static_cast<DType>(dtype)};
  const cpu::CpuRequest request{residual, mask, aligned};
  cpu::CpuPlan plan;
  if (op == "stats") {
    plan = cpu::plan_stats(problem, threads);
  } else if (op == "train") {
    plan = cpu::plan_train(problem, request, threads);
  } else if (op == "apply") {
    plan = cpu::plan_apply(problem, request, threads);
  } else if (op == "backward") {
    plan = cpu::plan_backward(problem, request, threads);
  } else {
    throw std::invalid_argument("bnfused: expected op stats, train, apply or backward, got " + op);
  }
  return py::dict("traversal"_a = name_of(plan.traversal), "outer"_a = plan.problem.outer,
                  "channels"_a = plan.problem.channels, "inner"_a = plan.problem.inner,
                  "group_channels"_a = plan.group_channels, "most_group_channels"_a = plan.most_group_channels,
                  "parts"_a = describe_parts(plan), "grain"_a = plan.grain, "streamed"_a = plan.streamed,
                  "prefetch"_a = plan.prefetch, "sum_rows"_a = describe(plan.sum_rows), "rows"_a = describe(plan.rows),
                  "from_memory"_a = plan.from_memory, "strip"_a = plan.strip, "piece"_a = plan.piece,
                  "passes"_a = plan.passes, "why"_a = plan.why);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of bnfused; use the Python package, not this module.";
  bnfused::ops::add_functions(m.ptr());
  m.def("build_info", [] {
    py::dict info("torch"_a = BNFUSED_TORCH_VERSION, "compiler"_a = __VERSION__,
                  "cpu_capability"_a = bnfused::cpu::capability_name());
    info["openmp"] = AT_PARALLEL_OPENMP != 0;
#ifdef BNFUSED_CUDA_VERSION
    info["cuda"] = BNFUSED_CUDA_VERSION;
    info["cuda_archs"] = py::tuple(py::str(BNFUSED_CUDA_ARCHS).attr("split")(","));
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = py::tuple();
#endif
    return info;
  });
  m.def("plan", plan_as_dict, py::kw_only(), "op"_a, "outer"_a, "channels"_a, "inner"_a, "dtype"_a, "wide"_a = true,
        "residual"_a = false, "mask"_a = false, "training"_a = true, "grad_x"_a = true, "grad_residual"_a = false,
        "grad_parameters"_a = true, "means"_a = false, "sm_count"_a, "compute_capability"_a, "shared_per_sm"_a = 0,
        "cooperative"_a = true, "strategy"_a = py::none());
  m.def("cpu_plan", cpu_plan_as_dict, py::kw_only(), "op"_a, "outer"_a, "channels"_a, "inner"_a, "dtype"_a, "threads"_a,
        "residual"_a = false, "mask"_a = false, "aligned"_a = true);
  m.def("merge_plan", merge_as_dict, py::kw_only(), "parts"_a, "channels"_a);
}
