"""Loads the compiled extension, or remembers why it could not be loaded.

The package imports either way: without the extension ``bnfused.functional`` runs the reference.
"""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation -e ."

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
    return module, None


_module, _reason = _load()
_warned: set[str] = set()


def is_available() -> bool:
    """Whether the compiled extension is loaded."""
    return _module is not None


def why_unavailable() -> str | None:
    """Why the compiled extension is not loaded, with the command that mends it; None if it is loaded."""
    return _reason


def build_info() -> dict[str, Any]:
    """What the extension was built with: torch, compiler, CPU capability, CUDA. Empty without the extension."""
    return {} if _module is None else dict(_module.build_info())


def plan(**problem: Any) -> dict[str, Any]:
    """How the CUDA backend would cut a problem: ``csrc/plan.h``, with the arguments of ``csrc/ops/module.cpp``."""
    assert _module is not None
    return dict(_module.plan(**problem))


def warn_once(message: str) -> None:
    """Warn the first time that ``message`` comes, and never again in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
