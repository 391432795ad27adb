"""The ops as plain callables, one for each name in ``_extension.OPS``; ``csrc/ops/schema.cpp`` is their contract.

They take every argument by position and run below autograd: the caller takes care of gradients. Each does the same as
``torch.ops.bnfused.<name>.default``, but saves two microseconds of argument handling, which is a tenth of batch norm on
a small tensor. torch.compile needs the version in ``torch.ops``. Without the extension every op is None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnfused import _extension

globals().update({name: _extension.op(name) for name in _extension.OPS})

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
