"""The ops as plain callables, once the extension has defined them; ``csrc/ops/schema.cpp`` is their contract.

Each is the builtin that ``torch.ops.bnfused.<name>.default`` wraps: the wrapper costs half a microsecond a call, a
sixth of batch norm on a small tensor. torch.compile wants the wrapper.
"""

from __future__ import annotations

from typing import Any

import torch

from bnfused import _extension


def _builtin(name: str) -> Any:
    return getattr(torch.ops.bnfused, name).default._op if _extension.is_available() else None


batch_norm_train: Any = _builtin("batch_norm_train")
batch_norm_frozen: Any = _builtin("batch_norm_frozen")
batch_norm_eval: Any = _builtin("batch_norm_eval")
batch_norm_backward: Any = _builtin("batch_norm_backward")
batch_norm_stats: Any = _builtin("batch_norm_stats")
batch_norm_gather_stats: Any = _builtin("batch_norm_gather_stats")
batch_norm_apply: Any = _builtin("batch_norm_apply")
batch_norm_backward_reduce: Any = _builtin("batch_norm_backward_reduce")
batch_norm_backward_apply: Any = _builtin("batch_norm_backward_apply")
