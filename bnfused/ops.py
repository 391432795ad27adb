"""The ops as plain callables, once the extension has defined them; ``csrc/ops/schema.cpp`` is their contract.

They take every argument by position and run below autograd: what calls them sees to the gradients. Each calls what
``torch.ops.bnfused.<name>.default`` does, without its two microseconds of looking up arguments, a tenth of batch norm
on a small tensor. torch.compile wants that one.
"""

from __future__ import annotations

from typing import Any

from bnfused import _extension

batch_norm_train: Any = _extension.op("batch_norm_train")
batch_norm_frozen: Any = _extension.op("batch_norm_frozen")
batch_norm_eval: Any = _extension.op("batch_norm_eval")
batch_norm_backward: Any = _extension.op("batch_norm_backward")
batch_norm_stats: Any = _extension.op("batch_norm_stats")
batch_norm_gather_stats: Any = _extension.op("batch_norm_gather_stats")
batch_norm_apply: Any = _extension.op("batch_norm_apply")
batch_norm_backward_reduce: Any = _extension.op("batch_norm_backward_reduce")
batch_norm_backward_apply: Any = _extension.op("batch_norm_backward_apply")
