"""An op keeps its name from Python to the backend, so that a search for the name finds every stop on its way."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "bnfused", "tests/emulator")


def ops_of(root: Path) -> list[str]:
    """The ops in the table ``all_ops``."""
    return re.findall(r'Op\{"(\w+)"', (root / "csrc/ops/ops.h").read_text())


# An op that is here has no function of its own in a backend: this op's function computes it.
COMPUTED_BY = {
    "batch_norm_frozen": "batch_norm_apply",
    "batch_norm_eval": "batch_norm_apply",
    "batch_norm_backward_reduce": "batch_norm_backward",
    "batch_norm_backward_apply": "batch_norm_backward",
}
# Which files of the package call an op. autograd.py registers the gradients of the ops that parts.py does not call.
CALLED_BY = {
    "batch_norm_train": ("autograd", "functional"),
    "batch_norm_frozen": ("autograd",),
    "batch_norm_eval": ("functional",),
    "batch_norm_backward": ("autograd",),
    "batch_norm_stats": ("parts",),
    "batch_norm_gather_stats": ("parts",),
    "batch_norm_apply": ("parts",),
    "batch_norm_backward_reduce": ("parts",),
    "batch_norm_backward_apply": ("parts",),
}
# The kernels of an op begin with its name, and this is their file. The other ops share kernels with other names.
KERNELS_IN = {
    "batch_norm_stats": "batch_norm_stats",
    "batch_norm_gather_stats": "batch_norm_gather_stats",
    "batch_norm_apply": "batch_norm_apply",
    "batch_norm_backward_reduce": "batch_norm_backward",
    "batch_norm_backward_apply": "batch_norm_backward",
}
LAUNCHED_IN = {"batch_norm_gather_stats": "batch_norm_stats"}  # the others have a file of their own


def stops(op: str) -> list[tuple[str, str]]:
    """Each file on the op's way, with a pattern of the code that must have the op's name."""
    found = [
        ("csrc/ops/schema.cpp", rf'"{op}\('),
        ("csrc/ops/ops.h", rf'Op\{{"{op}", {op}<Backend>\}}'),
        ("csrc/ops/ops.h", rf"^(?:std::tuple<[\w, ]+>|Tensor) {op}\("),
        ("csrc/ops/ops.h", rf'"bnfused::{op}"'),
        ("bnfused/fake.py", rf'^    "{op}": '),
    ]
    for caller in CALLED_BY[op]:
        call = rf'^        return _op\("{op}"\)' if caller == "parts" else rf"\bops\.{op}\("
        found.append((f"bnfused/{caller}.py", call))
    if CALLED_BY[op] == ("parts",):
        found.append(("bnfused/parts.py", rf"^def {op}\("))
    else:
        found.append(("bnfused/autograd.py", rf'library\.impl\("{op}"'))
    if op not in COMPUTED_BY:
        found += [
            ("csrc/ops/ops.h", rf"^  static void {op}\("),
            ("csrc/ops/ops.h", rf"^  Backend::{op}\("),
            ("csrc/ops/cpu.cpp", rf"\bcpu::{op}\b"),
            ("csrc/ops/cpu.cpp", rf"^  static void {op}\("),
            ("csrc/cpu/backend.h", rf"^void {op}\("),
            (f"csrc/cpu/{op}.cpp", rf"^void {op}\("),
            ("csrc/ops/cuda.cpp", rf"\bcuda::{op}\b"),
            ("csrc/ops/cuda.cpp", rf"^  static void {op}\("),
            ("csrc/cuda/launch.h", rf"^cudaError_t {op}\("),
            (f"csrc/cuda/{LAUNCHED_IN.get(op, op)}.cu", rf"^cudaError_t {op}\("),
            ("tests/emulator/emulated_ops.cpp", rf"^  static void {op}\("),
        ]
    if op in KERNELS_IN:
        found.append((f"csrc/kernels/{KERNELS_IN[op]}.cuh", rf"__global__ void [^;{{]*\b{op}(?:_rows|_planes)?\("))
    return found


def missing(root: Path, op: str) -> list[str]:
    """The stops that do not have the op's name."""
    lost = []
    for path, pattern in stops(op):
        file = root / path
        if not file.is_file() or not re.search(pattern, file.read_text(), re.MULTILINE):
            lost.append(f"{op}: expected {pattern} in {path}")
    return lost


def test_every_op_keeps_its_name():
    """``git grep batch_norm_train`` finds each stop, as CONTRIBUTING.md says. So for every op of the table."""
    ops = ops_of(ROOT)
    assert len(ops) == len(set(ops)) == len(CALLED_BY)
    assert set(ops) == set(CALLED_BY), "expected each op of all_ops in CALLED_BY of this test"
    lost = [line for op in ops for line in missing(ROOT, op)]
    assert not lost, "\n".join(lost)


def test_an_op_has_the_kernels_that_the_test_looks_for():
    """Each kernel begins with the name of an op, or is one of those that serve several ops."""
    shared = {"batch_norm_resident", "batch_norm_backward_resident", "batch_norm_empty"}
    text = "".join(file.read_text() for file in sorted((ROOT / "csrc" / "kernels").glob("*.cuh")))
    kernels = set(re.findall(r"__global__ void (?:__launch_bounds__\(.*?\)\s)?\s*(\w+?)(?:_rows|_planes)?\(", text))
    assert kernels == set(KERNELS_IN) | shared


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the sources on the way of an op."""
    root = tmp_path_factory.mktemp("renamed")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return root


@pytest.mark.parametrize("op", ops_of(ROOT))
def test_a_name_that_changes_on_the_way_is_found(copy, op):
    """The check itself: the op gets another name at one stop after the other, and each is reported."""
    for path, pattern in stops(op):
        file = copy / path
        text = file.read_text()

        def renamed(match):
            return re.sub(rf"{op}(?=_rows\b|_planes\b|\b)", "normalize_batch", match[0])

        try:
            file.write_text(re.sub(pattern, renamed, text, flags=re.MULTILINE))
            assert f"{op}: expected {pattern} in {path}" in missing(copy, op)
        finally:
            file.write_text(text)
    assert not missing(copy, op)
