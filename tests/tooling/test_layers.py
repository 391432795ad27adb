"""The arrows between the layers point one way: #include and import lines are read, and one that points back fails."""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each module of the package: what else of the package it may import. Lower ones know nothing of higher ones.
_GRADIENTS = {"activations", "checks", "ops", "reference"}
_CALLS = {"_extension", "activations", "checks", "ops", "reference", "autograd", "fake", "without_cuda"}
PYTHON = {
    "activations": set(),
    "_extension": {"fake"},
    "ops": {"_extension"},
    "checks": set(),
    "reference": {"activations", "checks"},
    "fake": {"activations"},
    "without_cuda": {"_extension", "fake"},
    "autograd": _GRADIENTS,
    "functional": _CALLS,
    "modules": {"functional"},
    "conversion": {"conversion.model", "conversion.forwards", "conversion.report"},
    "conversion.facts": {"modules", "sync"},
    "conversion.source": set(),
    "conversion.trees": set(),
    "conversion.rewriting": {"conversion.source", "conversion.trees"},
    "conversion.pending": {"conversion.facts"},
    "conversion.preview": {"conversion.facts", "conversion.pending", "conversion.rewriting"},
    "conversion.forwards": {
        *("conversion.facts", "conversion.pending", "conversion.rewriting", "conversion.source"),
        *("modules", "sync"),
    },
    "conversion.model": {"conversion.forwards", "conversion.pending", "modules", "sync"},
    "conversion.report": {
        *("conversion.model", "conversion.facts", "conversion.forwards", "conversion.pending"),
        "conversion.preview",
    },
    "parts": {"_extension", "activations", "checks", "fake", "ops", "reference"},
    "sync": {"activations", "checks", "modules", "parts", "sync.autograd", "sync.collectives"},
    "sync.autograd": {"activations", "autograd", "parts", "reference", "sync.collectives"},
    "sync.collectives": {"checks"},
    "explanation": {"_extension", "activations", "checks", "fake"},
    "diagnostics": set(),
    # The command line is a user of the package.
    "__main__": {"__init__", "_extension", "activations", "explanation"},
    # The names that users see.
    "__init__": {
        "_extension",
        "activations",
        "autograd",
        "conversion",
        "diagnostics",
        "explanation",
        "functional",
        "modules",
        "parts",
        "reference",
        "sync",
    },
}

# Each part of csrc: which others it may include, and which outside headers.
STANDARD = r"[a-z_]+|c[a-z]+|emmintrin\.h|immintrin\.h|sys/[a-z]+\.h|unistd\.h"
CPP = {
    "bridge": ({"bridge"}, STANDARD),  # batch_norm.h and plan*.h: every compiler may include them
    "kernels": ({"kernels", "platform", "bridge"}, STANDARD),
    "platform": ({"emulator"}, STANDARD + r"|cuda[a-z_0-9]*\.h|cooperative_groups.*|emulated_device\.h"),
    "cuda": ({"cuda", "kernels", "platform", "bridge"}, STANDARD),
    "cpu plan": ({"cpu plan", "bridge"}, STANDARD),  # a pure function: no torch, no threads
    "cpu loops": ({"cpu loops", "bridge"}, STANDARD + r"|c10/util/Half\.h"),  # nothing of threads or of the drivers
    "cpu": ({"cpu", "cpu plan", "cpu loops", "bridge"}, STANDARD + r"|(ATen|c10)/.*"),
    "ops": (
        {"ops", "bridge", "cpu", "cpu plan", "cpu loops", "cuda"},
        STANDARD + r"|(ATen|c10)/.*|torch/(library|csrc/.*)\.h",
    ),
}
PYBIND = "csrc/ops/module.cpp"
PYTHON_API = ("csrc/ops/python.h", "csrc/ops/python.cpp")
# What a stream and a status are, where the launchers are called.
CUDA_RUNTIME = ("csrc/cuda/launch.h", "csrc/ops/cuda.cpp")
# The launchers and the CPU backend are called through one header each; nothing else of them is the ops' business.
ENTRANCES = re.compile(r"csrc/(cpu|cuda)/(backend|launch|leaves|dispatch|plan)\.h")
CPU_PLAN = ("csrc/cpu/plan.h", "csrc/cpu/tuning.h")
CPU_LOOPS = re.compile(r"csrc/cpu/(leaves(_[a-z0-9_]+)?\.h|leaves_[a-z0-9_]+\.cpp|vec\.h|epilogue\.h)")


def part_of(path: str) -> str | None:
    """Which part of the design a file of the repository belongs to."""
    p = PurePosixPath(path)
    if p.parts[:2] == ("tests", "emulator"):
        return "emulator"
    if not p.parts or p.parts[0] != "csrc":
        return None
    if len(p.parts) == 2:
        return "bridge" if p.name in ("batch_norm.h", "plan.h", "plan_resident.h", "plan_shapes.h") else None
    if p.name == "platform.cuh":
        return "platform"
    if path in CPU_PLAN:
        return "cpu plan"
    if CPU_LOOPS.fullmatch(path):
        return "cpu loops"
    return p.parts[1] if p.parts[1] in CPP else None


def wrong_includes(path: str, text: str, exists) -> list[str]:
    """The #include lines of a file that its part may not have."""
    part = part_of(path)
    if part is None:
        return [f"{path}: in no part of the design that tests/tooling/test_layers.py knows"]
    if part == "emulator":
        return []
    parts, outside = CPP[part]
    wrong = []
    for kind, name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        beside = str(PurePosixPath(path).parent / name)
        target = next((t for t in (f"csrc/{name}", beside, f"tests/{name}") if exists(t)), None)
        if kind == "<" or target is None:
            allowed = (
                re.fullmatch(outside, name)
                or (path == PYBIND and name.startswith("pybind11/"))
                or (path in PYTHON_API and name == "Python.h")
                or (path in CUDA_RUNTIME and name == "cuda_runtime_api.h")
            )
            if name == "torch/extension.h":
                allowed = None  # half a minute of compile time a file, and pybind11 in all of them
        else:
            into = part_of(target)
            allowed = into in parts
            if part == "ops" and into in ("cpu", "cpu plan", "cpu loops", "cuda"):
                allowed = ENTRANCES.fullmatch(target)
        if not allowed:
            wrong.append(f"{path}: may not include {name}")
    return wrong


def module_of(file: Path) -> str:
    """The name of a file as ``PYTHON`` has it: ``sync.collectives``, or ``sync`` for the ``__init__.py`` of it."""
    name = ".".join(file.relative_to(ROOT / "bnfused").with_suffix("").parts)
    return name.removesuffix(".__init__")


def wrong_imports(module: str, text: str) -> list[str]:
    """The imports of a module of the package that its layer may not have; nothing may import tests."""
    if module not in PYTHON:
        return [f"bnfused.{module}: a module that tests/tooling/test_layers.py does not know"]
    imported: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"bnfused.{base}".rstrip(".")
            imported |= {f"{base}.{alias.name}" for alias in node.names}
    allowed = PYTHON[module] | {"_C"} if module == "_extension" else PYTHON[module]
    wrong = []
    for name in sorted(imported):
        first, _, rest = name.partition(".")
        inside = rest or "__init__"
        while inside not in PYTHON and "." in inside:  # a name in a module
            inside = inside.rpartition(".")[0]
        if first in ("tests", "benchmarks", "examples") or (first == "bnfused" and inside not in allowed):
            wrong.append(f"bnfused/{module}.py: may not import {name}")
    return wrong


def _sources(folder: str, *suffixes: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def test_includes_point_down():
    """Kernels know no framework, launchers no torch, backends no ops; pybind11 is in one file."""
    files = _sources("csrc", ".h", ".cpp", ".cuh", ".cu")
    assert len(files) > 5, "csrc was not found"
    wrong = []
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        wrong += wrong_includes(path, file.read_text(), lambda target: (ROOT / target).is_file())
    assert not wrong, "\n".join(wrong)


def test_no_namespace_of_ours_is_called_detail():
    """Torch has a global one since 2.14: ``detail::f`` is ambiguous in each file that says ``using namespace``."""
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "tests").rglob("*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".h", ".cpp", ".cu", ".cuh")}
    assert texts
    assert [path for path, text in texts.items() if re.search(r"\bnamespace ([\w:]*::)?detail\b", text)] == []


def test_imports_point_down():
    """modules -> functional -> ops; the reference knows nothing of the kernels."""
    files = _sources("bnfused", ".py")
    assert len(files) > 5
    wrong = [line for file in files for line in wrong_imports(module_of(file), file.read_text())]
    assert not wrong, "\n".join(wrong)


def test_launches_only_in_platform():
    """``<<<`` is a language of nvcc: one launch() in platform.cuh has it, so that the rest compiles with g++."""
    for file in _sources("csrc", ".cuh", ".cu", ".h", ".cpp"):
        code = re.sub(r"//.*", "", file.read_text())
        assert "<<<" not in code or file.name == "platform.cuh", file


def instructions(text: str) -> list[str]:
    """Of the asm in a file; one without any only hides a value from the compiler."""
    code = re.sub(r"//.*", "", text)
    return [name for name in re.findall(r'\b(?:asm|__asm|__asm__)\b[^"]*"([^"]*)"', code) if name.strip()]


def test_instructions_only_in_platform():
    """What one machine alone can run is in one file, which the CPU's build of the kernels replaces."""
    files = {file.name for file in _sources("csrc", ".cuh", ".cu", ".h", ".cpp") if instructions(file.read_text())}
    assert files == {"platform.cuh"}
    assert instructions('  __asm__ volatile("mov %0, 1;" : "=r"(x));') == ["mov %0, 1;"]


@pytest.mark.parametrize(
    "path, line",
    [
        ("csrc/cpu/batch_norm_train.cpp", '#include "ops/ops.h"'),
        ("csrc/cpu/batch_norm_train.cpp", "#include <torch/library.h>"),
        ("csrc/cpu/driver.h", '#include "cuda/dispatch.h"'),
        ("csrc/cpu/plan.h", '#include "cpu/driver.h"'),
        ("csrc/cpu/plan.h", '#include "cpu/leaves.h"'),
        ("csrc/cpu/plan.h", "#include <ATen/Parallel.h>"),
        ("csrc/cpu/leaves_sums.h", '#include "cpu/plan.h"'),
        ("csrc/cpu/leaves.h", "#include <ATen/Parallel.h>"),
        ("csrc/ops/cpu.cpp", '#include "cpu/tuning.h"'),
        ("csrc/batch_norm.h", '#include "cpu/driver.h"'),
        ("csrc/batch_norm.h", "#include <ATen/core/Tensor.h>"),
        ("csrc/kernels/layout.cuh", '#include "cuda/dispatch.h"'),
        ("csrc/kernels/layout.cuh", "#include <cuda_fp16.h>"),
        ("csrc/kernels/layout.cuh", "  #  include <c10/util/Half.h>"),
        ("csrc/kernels/layout.cuh", "#include <cuda_runtime_api.h>"),
        ("csrc/ops/cpu.cpp", "#include <cuda_runtime_api.h>"),
        ("csrc/cuda/batch_norm_train.cu", "#include <ATen/ATen.h>"),
        ("csrc/cuda/batch_norm_train.cu", '#include "../ops/ops.h"'),
        ("csrc/ops/cpu.cpp", "#include <torch/extension.h>"),
        ("csrc/ops/cpu.cpp", "#include <pybind11/pybind11.h>"),
        ("csrc/ops/cpu.cpp", '#include "cpu/moments.h"'),
        ("csrc/helpers.h", "#include <cstdint>"),
    ],
)
def test_a_back_include_is_found(path, line):
    """The checker itself: a planted arrow that points back is reported."""
    planted = {
        "csrc/ops/ops.h",
        "csrc/cuda/dispatch.h",
        "csrc/cpu/driver.h",
        "csrc/cpu/leaves.h",
        "csrc/cpu/moments.h",
        "csrc/cpu/plan.h",
        "csrc/cpu/tuning.h",
        "csrc/batch_norm.h",
    }
    assert wrong_includes(path, f"// comment\n{line}\n", planted.__contains__)


@pytest.mark.parametrize(
    "module, line",
    [
        ("reference", "from bnfused import functional"),
        ("reference", "import bnfused.autograd"),
        ("functional", "from bnfused.modules import BatchNorm2d"),
        ("functional", "from .modules import BatchNorm2d"),
        ("activations", "from bnfused import reference"),
        ("autograd", "def f():\n    from bnfused import functional"),
        ("functional", "from bnfused import _C"),
        ("modules", "from tests import cases"),
        ("modules", "import bnfused"),
        ("autograd", "from bnfused.sync.collectives import gather"),
        ("sync.collectives", "from bnfused import sync"),
        ("sync.collectives", "from bnfused.sync import autograd"),
        ("helpers", "import torch"),
    ],
)
def test_a_back_import_is_found(module, line):
    """The same for Python, in functions too."""
    assert wrong_imports(module, line)


@pytest.mark.parametrize(
    "path, line",
    [
        ("csrc/cpu/driver.h", '#include "batch_norm.h"'),
        ("csrc/cpu/driver.h", "#include <ATen/Parallel.h>"),
        ("csrc/cpu/driver.h", '#include "cpu/plan.h"'),
        ("csrc/cpu/plan.h", '#include "cpu/tuning.h"'),
        ("csrc/cpu/plan.h", '#include "batch_norm.h"'),
        ("csrc/cpu/leaves_baseline.cpp", "#include <c10/util/Half.h>"),
        ("csrc/ops/module.cpp", '#include "cpu/plan.h"'),
        ("csrc/ops/cpu.cpp", '#include "ops/ops.h"'),
        ("csrc/ops/module.cpp", "#include <pybind11/pybind11.h>"),
        ("csrc/ops/python.h", "#include <Python.h>"),
        ("csrc/kernels/layout.cuh", '#include "platform.cuh"'),
        ("csrc/kernels/layout.cuh", '#include "batch_norm.h"'),
        ("csrc/ops/cuda.cpp", "#include <cuda_runtime_api.h>"),
    ],
)
def test_a_right_include_is_not(path, line):
    """Nor does it cry wolf."""
    planted = {
        "csrc/ops/ops.h",
        "csrc/batch_norm.h",
        "csrc/cpu/plan.h",
        "csrc/cpu/tuning.h",
        "csrc/kernels/platform.cuh",
    }
    assert not wrong_includes(path, line, planted.__contains__)
