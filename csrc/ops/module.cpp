// bnfused._C: what is no tensor. The only file with pybind11; no tensor crosses it, so that it does not matter which
// pybind11 torch was built with. Importing it registers the ops.
#include <pybind11/pybind11.h>

#include "cpu/leaves.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of bnfused; use the Python package, not this module.";
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
    info["cuda"] = py::none();
    info["cuda_archs"] = py::tuple();
    return info;
  });
}
