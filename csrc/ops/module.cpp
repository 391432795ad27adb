// bnfused._C: the ops as functions of Python, and what is no tensor. No tensor crosses pybind11, so that it does not
// matter which pybind11 torch was built with. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

const char* name_of(Strategy strategy) {
  switch (strategy) {
    case Strategy::kEmpty:
      return "empty";
    case Strategy::kSmall:
      return "small";
    case Strategy::kStreaming:
      return "streaming";
    case Strategy::kApply:
      return "apply";
    case Strategy::kReduce:
      return "reduce";
    case Strategy::kResident:
      return "resident";
  }
  return "";
}

Strategy strategy_of(const std::string& name) {
  if (name == "small") return Strategy::kSmall;
  if (name == "streaming") return Strategy::kStreaming;
  if (name == "resident") return Strategy::kResident;
  throw std::invalid_argument("bnfused: expected strategy small, streaming or resident, got " + name);
}

py::dict describe(const Rows& s) {
  return py::dict(py::arg("channels") = s.channels, py::arg("copies") = s.copies, py::arg("columns") = s.columns,
                  py::arg("rows") = s.rows, py::arg("tile") = s.tile, py::arg("tiles") = s.tiles,
                  py::arg("row_slots") = s.row_slots, py::arg("parts") = s.parts, py::arg("threads") = s.threads,
                  py::arg("blocks") = s.blocks());
}

py::dict describe(const Planes& s) {
  return py::dict(py::arg("channels") = s.channels, py::arg("outer") = s.outer, py::arg("inner") = s.inner,
                  py::arg("units_per_plane") = s.units_per_plane, py::arg("units_per_channel") = s.units_per_channel,
                  py::arg("parts") = s.parts, py::arg("threads") = s.threads, py::arg("blocks") = s.blocks());
}

py::dict describe(const Flat& s) {
  return py::dict(py::arg("units") = s.units, py::arg("units_per_block") = s.units_per_block,
                  py::arg("planes_per_block") = s.planes_per_block, py::arg("threads") = s.threads,
                  py::arg("blocks") = s.blocks());
}

// The launches in order: what each does, and how it is cut.
py::list describe_launches(const LaunchPlan& plan) {
  py::list launches;
  const auto add = [&](const char* kernel, py::dict shape) {
    shape["kernel"] = kernel;
    launches.append(shape);
  };
  const bool planes = plan.layout == Layout::kPlanes;
  if (plan.strategy == Strategy::kEmpty) add("empty", py::dict(py::arg("blocks") = 1));
  if (plan.strategy == Strategy::kSmall || plan.strategy == Strategy::kResident) {
    py::dict shape = planes ? describe(plan.planes) : describe(plan.reduce_rows);
    const Residency& r = plan.residency;
    shape["blocks"] = r.blocks(planes ? plan.planes.parts : plan.reduce_rows.parts);
    shape["teams"] = r.teams;
    shape["cluster"] = r.cluster;
    shape["steps"] = r.steps;
    shape["ahead"] = r.ahead;
    shape["shared_bytes"] = r.keeps_bytes + (planes ? 0 : planning::table_bytes(plan.reduce_rows));
    add(name_of(plan.strategy), shape);
  }
  if (plan.strategy == Strategy::kStreaming || plan.strategy == Strategy::kReduce) {
    add("reduce", planes ? describe(plan.planes) : describe(plan.reduce_rows));
  }
  if (plan.strategy == Strategy::kStreaming || plan.strategy == Strategy::kApply) {
    add("apply", planes ? describe(plan.flat) : describe(plan.apply_rows));
  }
  return launches;
}

py::dict describe(const Merge& s) {
  return py::dict(py::arg("parts") = s.parts, py::arg("columns") = s.columns,
                  py::arg("columns_per_block") = s.columns_per_block, py::arg("threads") = s.threads,
                  py::arg("blocks") = s.blocks());
}

// The plan of the CUDA backend, on a device of which nothing more is known than its limits.
py::dict plan_as_dict(const std::string& op, int64_t outer, int64_t channels, int64_t inner, int dtype, bool wide,
                      bool residual, bool mask, bool training, bool grad_x, bool grad_residual, bool grad_parameters,
                      bool means, int sm_count, int compute_capability, int64_t shared_per_sm, bool cooperative,
                      const std::optional<std::string>& strategy) {
  const Problem problem{outer, channels, inner, static_cast<DType>(dtype)};
  if (!fits(problem)) throw std::invalid_argument("bnfused: expected at most 2^34 values");
  const DeviceLimits device{sm_count, compute_capability, shared_per_sm, cooperative};
  const std::optional<Strategy> forced = strategy ? std::optional(strategy_of(*strategy)) : std::nullopt;
  const Strategy* asked = forced ? &*forced : nullptr;
  LaunchPlan plan;
  if (op == "stats") {
    plan = plan_stats(problem, {wide}, device);
  } else if (op == "train") {
    plan = plan_train(problem, {wide, residual, mask}, device, asked);
  } else if (op == "eval") {
    plan = plan_apply(problem, {wide, residual, mask}, device);
  } else if (op == "backward") {
    const BackwardRequest request{wide, residual, mask, training, grad_x, grad_residual, grad_parameters, means};
    plan = plan_backward(problem, request, device, asked);
  } else {
    throw std::invalid_argument("bnfused: expected op stats, train, eval or backward, got " + op);
  }
  return py::dict(py::arg("strategy") = name_of(plan.strategy),
                  py::arg("layout") = plan.layout == Layout::kPlanes ? "planes" : "rows",
                  py::arg("launches") = describe_launches(plan), py::arg("partials") = plan.partials,
                  py::arg("tickets") = plan.tickets, py::arg("values_kept") = plan.residency.values,
                  py::arg("bytes_read") = plan.bytes_read, py::arg("bytes_written") = plan.bytes_written,
                  py::arg("why") = plan.why);
}

const char* name_of(cpu::Traversal traversal) {
  switch (traversal) {
    case cpu::Traversal::kPlanes:
      return "planes";
    case cpu::Traversal::kShortPlanes:
      return "short planes";
    case cpu::Traversal::kRows:
      return "rows";
  }
  return "";
}

py::dict describe(const cpu::RowView& view) {
  py::list tasks;
  for (int64_t task = 0; task < view.tasks; ++task) tasks.append(py::make_tuple(view.begin(task), view.end(task)));
  return py::dict(py::arg("columns") = view.columns, py::arg("full_rows") = view.full_rows, py::arg("tail") = view.tail,
                  py::arg("tasks") = tasks);
}

// Of each part: the planes from begin to end, and the values of each of them from begin to end.
py::list describe_parts(const cpu::CpuPlan& plan) {
  py::list parts;
  for (int64_t i = 0; i < plan.parts; ++i) {
    const cpu::Part part = cpu::part_of(plan.problem, i, plan.parts);
    parts.append(py::make_tuple(part.plane_begin, part.plane_end, part.begin, part.end));
  }
  return parts;
}

// The plan of the CPU backend.
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
  return py::dict(
      py::arg("traversal") = name_of(plan.traversal), py::arg("outer") = plan.problem.outer,
      py::arg("channels") = plan.problem.channels, py::arg("inner") = plan.problem.inner,
      py::arg("group_channels") = plan.group_channels, py::arg("most_group_channels") = plan.most_group_channels,
      py::arg("parts") = describe_parts(plan), py::arg("grain") = plan.grain, py::arg("streamed") = plan.streamed,
      py::arg("prefetch") = plan.prefetch, py::arg("sum_rows") = describe(plan.sum_rows),
      py::arg("rows") = describe(plan.rows), py::arg("from_memory") = plan.from_memory, py::arg("strip") = plan.strip,
      py::arg("piece") = plan.piece, py::arg("passes") = plan.passes, py::arg("why") = plan.why);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of bnfused; use the Python package, not this module.";
  bnfused::ops::add_functions(m.ptr());
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = BNFUSED_TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["cpu_capability"] = bnfused::cpu::capability_name();
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#ifdef BNFUSED_CUDA_VERSION
    info["cuda"] = BNFUSED_CUDA_VERSION;
    info["cuda_archs"] = py::tuple(py::str(BNFUSED_CUDA_ARCHS).attr("split")(","));
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = py::tuple();
#endif
    return info;
  });
  m.def("plan", plan_as_dict, py::kw_only(), py::arg("op"), py::arg("outer"), py::arg("channels"), py::arg("inner"),
        py::arg("dtype"), py::arg("wide") = true, py::arg("residual") = false, py::arg("mask") = false,
        py::arg("training") = true, py::arg("grad_x") = true, py::arg("grad_residual") = false,
        py::arg("grad_parameters") = true, py::arg("means") = false, py::arg("sm_count"), py::arg("compute_capability"),
        py::arg("shared_per_sm") = 0, py::arg("cooperative") = true, py::arg("strategy") = py::none());
  m.def("cpu_plan", cpu_plan_as_dict, py::kw_only(), py::arg("op"), py::arg("outer"), py::arg("channels"),
        py::arg("inner"), py::arg("dtype"), py::arg("threads"), py::arg("residual") = false, py::arg("mask") = false,
        py::arg("aligned") = true);
  m.def(
      "merge_plan", [](int64_t parts, int64_t channels) { return describe(merge_of(parts, channels)); }, py::kw_only(),
      py::arg("parts"), py::arg("channels"));
}
