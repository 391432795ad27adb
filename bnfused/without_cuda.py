"""The errors of the ops for CUDA tensors in a build without CUDA kernels.

``bnfused.functional`` takes the reference path for CUDA tensors. If they reach the ops anyway, they came through
``torch.ops.bnfused``, or the tensors of a call are on different devices. The dispatcher's own error would name neither
the argument nor the remedy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from bnfused import _extension, fake


def refuse(op: str, *args: Any) -> None:
    """Raise for a call of ``torch.ops.bnfused.<op>`` with at least one CUDA tensor.

    Raises:
        RuntimeError: always. It names the first argument on another device than ``x`` (or than the first tensor, if the
            op has no ``x``). If all are on one device, it names the build.
    """
    arguments = fake.named(op, args)
    x = fake.check_devices(op, arguments)
    raise RuntimeError(
        f"bnfused::{op}: expected an extension with CUDA kernels for {x} on {arguments[x].device}, got one without; "
        f"{_extension.BUILD_CUDA}"
    )


def register() -> None:
    """Register these errors with the dispatcher, after the extension has defined the ops."""
    library = torch.library.Library("bnfused", "IMPL")
    for op in _extension.OPS:
        library.impl(op, functools.partial(refuse, op), "CUDA")
    _registered.append(library)


_registered: list[torch.library.Library] = []  # a Library that is freed takes its kernels with it
