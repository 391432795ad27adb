"""What the ops return, without the values: shapes, dtypes and strides for torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnfused.activations import RELU_CODE


def problem(x: Tensor) -> tuple[Any, Any, Any]:
    """Outer x channels x inner, as ``x`` lies in memory; ``problem_of`` in ``csrc/ops/ops.h`` is its twin.

    A channel's contiguous run has ``inner`` values: 1 where channels lie innermost.
    """
    dense = torch.empty_like(x)  # the strides that the kernels work in
    channel_stride = dense.stride(1) if x.shape[1] > 1 else None
    outer: Any = 1
    inner: Any = 1
    for dim in range(x.dim()):
        if dim == 1 or x.shape[dim] == 1:
            continue
        if channel_stride is None or dense.stride(dim) < channel_stride:
            inner = inner * x.shape[dim]
        else:
            outer = outer * x.shape[dim]
    return outer, x.shape[1], inner


def mask_bytes(x: Tensor) -> Any:
    """Bytes of the ReLU mask of ``x``: a bit for each element, each plane padded to whole bytes.

    ``mask_bytes`` in ``csrc/batch_norm.h`` is the same rule; channels that lie innermost make the whole tensor one run.
    """
    inner = problem(x)[2]
    if x.numel() == 0:
        return 0
    if inner == 1:
        return (x.numel() + 7) // 8
    return x.numel() // inner * ((inner + 7) // 8)


def _saved(x: Tensor, residual: Tensor | None, activation: int) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    mean = x.new_empty(channels, dtype=torch.float64)
    invstd = x.new_empty(channels, dtype=torch.float64)
    has_mask = activation == RELU_CODE and residual is not None
    mask = x.new_empty(mask_bytes(x) if has_mask else 0, dtype=torch.uint8)
    return mean, invstd, mask


def check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    """One meta tensor among others brings the call here: without this it would return no values and no error."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise RuntimeError(f"bnfused::{op}: expected {name} on {x.device}, got {other.device}")


def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: int,
    activation_param: float,
) -> tuple[Tensor, ...]:
    check_devices(
        "batch_norm_train",
        x,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
        residual=residual,
    )
    return torch.empty_like(x), *_saved(x, residual, activation)


def _frozen(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: int,
    activation_param: float,
) -> tuple[Tensor, ...]:
    check_devices(
        "batch_norm_frozen",
        x,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        residual=residual,
    )
    return torch.empty_like(x), *_saved(x, residual, activation)


def _eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    *_: Any,
) -> Tensor:
    check_devices(
        "batch_norm_eval",
        x,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        residual=residual,
    )
    return torch.empty_like(x)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    activation: int,
    activation_param: float,
    training: bool,
    output_mask: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, ...]:
    check_devices(
        "batch_norm_backward",
        x,
        grad_y=grad_y,
        weight=weight,
        bias=bias,
        residual=residual,
        mean=mean,
        invstd=invstd,
        mask=mask,
    )
    need_x, need_weight, need_bias, need_residual = output_mask
    absent = x.new_empty(0)
    # A gradient of float32 where there is no parameter to take the dtype from.
    parameter = x.new_empty(0, dtype=mean.dtype if x.dtype == torch.float64 else torch.float32)
    return (
        torch.empty_like(x) if need_x else absent,
        (parameter if weight is None else weight).new_empty(x.shape[1] if need_weight else 0),
        (parameter if bias is None else bias).new_empty(x.shape[1] if need_bias else 0),
        torch.empty_like(x) if need_residual else x.new_empty(0),
    )


def _stats(x: Tensor) -> Tensor:
    """``packed_size`` in ``csrc/batch_norm.h`` is the same rule."""
    channels = x.shape[1]
    if x.dtype == torch.float64:
        return x.new_empty(2 * channels + 1)
    return x.new_empty(3 * channels + 2, dtype=torch.float32)


def _gather_stats(
    moments: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    merged: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(
        "batch_norm_gather_stats",
        moments,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
        merged=merged,
    )
    channels = (moments.shape[1] - 1) // 2 if moments.dtype == torch.float64 else (moments.shape[1] - 2) // 3
    mean = moments.new_empty(channels, dtype=torch.float64)
    return mean, torch.empty_like(mean), mean.new_empty(())


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: int,
    activation_param: float,
) -> tuple[Tensor, ...]:
    check_devices("batch_norm_apply", x, weight=weight, bias=bias, mean=mean, var=var, residual=residual)
    _, invstd, mask = _saved(x, residual, activation)
    return torch.empty_like(x), invstd, mask


def _backward_reduce(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    activation: int,
    activation_param: float,
) -> Tensor:
    check_devices(
        "batch_norm_backward_reduce",
        x,
        grad_y=grad_y,
        weight=weight,
        bias=bias,
        residual=residual,
        mean=mean,
        invstd=invstd,
        mask=mask,
    )
    return x.new_empty(2, x.shape[1], dtype=torch.float64)


def _backward_apply(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    count: Tensor,
    activation: int,
    activation_param: float,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    check_devices(
        "batch_norm_backward_apply",
        x,
        grad_y=grad_y,
        weight=weight,
        bias=bias,
        residual=residual,
        mean=mean,
        invstd=invstd,
        mask=mask,
        sums=sums,
        count=count,
    )
    need_x, need_residual = output_mask
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(x) if need_residual else x.new_empty(0),
    )


def register(library: str = "bnfused") -> None:
    """Give torch the shapes; called once a library has defined the ops."""
    torch.library.register_fake(f"{library}::batch_norm_train", _train)
    torch.library.register_fake(f"{library}::batch_norm_frozen", _frozen)
    torch.library.register_fake(f"{library}::batch_norm_eval", _eval)
    torch.library.register_fake(f"{library}::batch_norm_backward", _backward)
    torch.library.register_fake(f"{library}::batch_norm_stats", _stats)
    torch.library.register_fake(f"{library}::batch_norm_gather_stats", _gather_stats)
    torch.library.register_fake(f"{library}::batch_norm_apply", _apply)
    torch.library.register_fake(f"{library}::batch_norm_backward_reduce", _backward_reduce)
    torch.library.register_fake(f"{library}::batch_norm_backward_apply", _backward_apply)
