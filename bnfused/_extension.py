"""Loads the compiled extension, or remembers why it could not be loaded.

The package imports either way: without the extension ``bnfused.functional`` runs the reference.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bnfused import fake

# An installed package is in site-packages, without its sources.
REBUILD = "pip install --no-build-isolation " + (
    "-e ."
    if Path(__file__).parents[1].joinpath("setup.py").exists()
    else "--no-deps --force-reinstall <folder, archive or URL of bnfused's sources>"
)

# Every op that the package calls. An extension that was built from older sources may lack some.
OPS = tuple(fake.KERNELS)

# Written by setup.py beside the extension: readable even where the extension itself does not load.
_STAMP = Path(__file__).with_name("_build_info.txt")


def _release(version: str) -> tuple[str, ...]:
    """``2.13`` of ``2.13.0+cpu``: the part of a torch version within which its C++ ABI holds."""
    return tuple(version.split("+")[0].split(".")[:2])


def _other_torch(built_for: str) -> str | None:
    if _release(built_for) == _release(torch.__version__):
        return None
    return (
        f"the extension was built for torch {built_for}, but torch {torch.__version__} is installed; "
        f"rebuild it with: {REBUILD}"
    )


def _stamped_torch() -> str | None:
    """The torch version that the build wrote down, or None where nothing was built by this checkout's setup.py."""
    if not _STAMP.exists():
        return None
    try:
        return str(json.loads(_STAMP.read_text())["torch"])
    except (ValueError, KeyError, OSError):
        return None


def _load() -> tuple[Any, str | None]:
    stamped = _stamped_torch()
    if stamped is not None and (reason := _other_torch(stamped)):
        return None, reason
    try:
        module = importlib.import_module("bnfused._C")
    except ImportError as error:
        return None, f"the extension could not be imported ({error}); build it with: {REBUILD}"
    if reason := _other_torch(module.build_info()["torch"]):
        return None, reason
    for op in OPS:
        if not hasattr(module, op):
            return None, f"the extension was built from older sources, without {op}; rebuild it with: {REBUILD}"
    return module, None


_module, _reason = _load()
_warned: set[str] = set()


def is_available() -> bool:
    """Whether the compiled extension is loaded."""
    return _module is not None


def why_unavailable() -> str | None:
    """Why the compiled extension is not loaded, with the command that mends it; None if it is loaded."""
    return _reason


def op(name: str) -> Any:
    """One of ``OPS`` as the extension has it, or None without the extension."""
    return getattr(_module, name, None)


def build_info() -> dict[str, Any]:
    """What the extension was built with: torch, compiler, CPU capability, CUDA. Empty without the extension."""
    return {} if _module is None else dict(_module.build_info())


def plan(**problem: Any) -> dict[str, Any]:
    """How the CUDA backend would cut a problem: ``csrc/plan.h``, with the arguments of ``csrc/ops/module.cpp``."""
    assert _module is not None
    return dict(_module.plan(**problem))


def cpu_plan(**problem: Any) -> dict[str, Any]:
    """How the CPU backend would walk a problem: ``csrc/cpu/plan.h``, with the arguments of ``csrc/ops/module.cpp``."""
    assert _module is not None
    return dict(_module.cpu_plan(**problem))


def merge_plan(*, parts: int, channels: int) -> dict[str, int]:
    """How the CUDA backend would cut the merge of statistics: ``merge_of`` in ``csrc/plan.h``."""
    assert _module is not None
    return dict(_module.merge_plan(parts=parts, channels=channels))


# What to do where CUDA tensors come and no kernels for them were built.
BUILD_CUDA = (
    "to build them, install nvcc and a torch that is built for its major version of CUDA, then: "
    f"BNFUSED_CUDA=1 {REBUILD}"
)


_has_cuda = build_info().get("cuda") is not None


def has_cuda() -> bool:
    """Whether the extension is loaded and was built with the CUDA kernels."""
    return _has_cuda


def has_kernels_for(x: Tensor, compiling: bool) -> bool:
    """Whether the ops run on the device of ``x``, as on meta tensors they do; warns the first time that they do not.

    Raises:
        RuntimeError: a GPU that the extension was not built for.
    """
    if _module is None:
        warn_once(f"bnfused runs its slow reference path: {_reason}")
        return False
    if x.is_cpu or x.is_meta:
        return True
    if not (_has_cuda and x.is_cuda):
        how = f"; {BUILD_CUDA}" if x.is_cuda else ""
        warn_once(
            f"bnfused has no kernels for {x.device.type} tensors in this build and runs its slow reference path{how}"
        )
        return False
    if not compiling:  # Dynamo cannot ask a device
        check_gpu(x.device.index)
    return True


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for ``archs``, as ``build_info()["cuda_archs"]`` has them, runs on a GPU.

    Machine code runs on GPUs of its major version with the same minor or a higher one, PTX on every newer GPU. Both
    are bound to one GPU by ``a`` and to its family, which is its major version, by ``f``. Source: CUDA C++ Programming
    Guide, "Compute capability", sections on binary and PTX compatibility.
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        built, kind, ptx = (int(match[1]), int(match[2])), match[3], match[4]
        if kind == "a":
            fits = built == capability
        elif kind == "f" or not ptx:
            fits = built[0] == capability[0] and built[1] <= capability[1]
        else:
            fits = built <= capability
        if fits:
            return True
    return False


@functools.cache
def check_gpu(index: int) -> None:
    """Refuse a GPU that the extension was not built for, before CUDA does so in fewer words.

    Raises:
        RuntimeError: it has neither machine code nor PTX that runs on ``cuda:index``.
    """
    capability = torch.cuda.get_device_capability(index)
    archs = build_info()["cuda_archs"]
    if not runs_on(archs, capability):
        raise RuntimeError(wrong_gpu(index, torch.cuda.get_device_name(index), capability, archs))


def wrong_gpu(index: int, name: str, capability: tuple[int, int], archs: Sequence[str]) -> str:
    """The error for a GPU that none of ``archs`` runs on."""
    got = ".".join(map(str, capability))
    return (
        f"bnfused::batch_norm: expected a GPU that the extension was built for ({', '.join(archs)}), got cuda:{index}, "
        f"{name}, of compute capability {got}; rebuild it with: TORCH_CUDA_ARCH_LIST={got} {REBUILD}"
    )


def warn_once(message: str) -> None:
    """Warn of the line that called bnfused the first time that ``message`` comes, and never again in this process."""
    if message in _warned:
        return
    _warned.add(message)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    """Whether the code is bnfused's, or torch's, which calls a forward."""
    package = str(frame.f_globals.get("__name__")).split(".")[0]
    return package in ("bnfused", "torch")


# Dynamo, which cannot trace a warning, then runs this while it compiles. torch.compiler.assume_constant_result does the
# same, and imports all of Dynamo.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
