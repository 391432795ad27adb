"""What the ops answer to CUDA tensors in a build without CUDA kernels.

``bnfused.functional`` takes the reference path there. Tensors that reach the ops all the same came through
``torch.ops.bnfused``, or lie on several devices; the dispatcher's own error would name neither the argument nor what
to do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from bnfused import _extension, fake


def refuse(op: str, *args: Any) -> None:
    """Raise for a call of ``torch.ops.bnfused.<op>`` with at least one CUDA tensor.

    Raises:
        RuntimeError: always. It names the first argument that is not where ``x`` is (of the op without one: the first
            tensor), if there is one, else the build.
    """
    arguments = fake.named(op, args)
    x = fake.check_devices(op, arguments)
    raise RuntimeError(
        f"bnfused::{op}: expected an extension with CUDA kernels for {x} on {arguments[x].device}, got one without; "
        f"{_extension.BUILD_CUDA}"
    )


def register() -> None:
    """Give the dispatcher this answer; called once the extension has defined the ops."""
    library = torch.library.Library("bnfused", "IMPL")
    for op in _extension.OPS:
        library.impl(op, functools.partial(refuse, op), "CUDA")
    _registered.append(library)


_registered: list[torch.library.Library] = []  # what a Library registered goes with it
