from typing import Any

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

# The ops of csrc/ops/schema.cpp take their arguments by position.
def __getattr__(name: str) -> Any: ...
