from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def plan(
    *,
    op: str,
    outer: int,
    channels: int,
    inner: int,
    dtype: int,
    wide: bool = True,
    residual: bool = False,
    mask: bool = False,
    training: bool = True,
    grad_x: bool = True,
    grad_residual: bool = False,
    grad_parameters: bool = True,
    means: bool = False,
    sm_count: int,
    compute_capability: int,
    shared_per_sm: int = 0,
    cooperative: bool = True,
    strategy: str | None = None,
) -> dict[str, Any]: ...
def cpu_plan(
    *,
    op: str,
    outer: int,
    channels: int,
    inner: int,
    dtype: int,
    threads: int,
    residual: bool = False,
    mask: bool = False,
    aligned: bool = True,
) -> dict[str, Any]: ...
def merge_plan(*, parts: int, channels: int) -> dict[str, int]: ...

# The ops: csrc/ops/schema.cpp.
def batch_norm_train(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def batch_norm_frozen(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def batch_norm_eval(*args: Any) -> Tensor: ...
def batch_norm_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def batch_norm_stats(*args: Any) -> Tensor: ...
def batch_norm_gather_stats(*args: Any) -> tuple[Tensor, Tensor, Tensor]: ...
def batch_norm_apply(*args: Any) -> tuple[Tensor, Tensor, Tensor]: ...
def batch_norm_backward_reduce(*args: Any) -> Tensor: ...
def batch_norm_backward_apply(*args: Any) -> tuple[Tensor, Tensor]: ...
