"""The ops as plain callables, once the extension has defined them; ``csrc/ops/schema.cpp`` is their contract.

Each is the builtin that ``torch.ops.bnfused.<name>.default`` wraps: the wrapper costs half a microsecond a call, a
sixth of batch norm on a small tensor. torch.compile wants the wrapper.
"""

from __future__ import annotations

from typing import Any

import torch

from bnfused import _extension

batch_norm_train: Any = None
batch_norm_frozen: Any = None
batch_norm_eval: Any = None
batch_norm_backward: Any = None
batch_norm_stats: Any = None
batch_norm_apply: Any = None
batch_norm_backward_apply: Any = None

if _extension.is_available():
    batch_norm_train = torch.ops.bnfused.batch_norm_train.default._op
    batch_norm_frozen = torch.ops.bnfused.batch_norm_frozen.default._op
    batch_norm_eval = torch.ops.bnfused.batch_norm_eval.default._op
    batch_norm_backward = torch.ops.bnfused.batch_norm_backward.default._op
    batch_norm_stats = torch.ops.bnfused.batch_norm_stats.default._op
    batch_norm_apply = torch.ops.bnfused.batch_norm_apply.default._op
    batch_norm_backward_apply = torch.ops.bnfused.batch_norm_backward_apply.default._op
