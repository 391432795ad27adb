"""What the ops return, without the values: shapes, dtypes and strides for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnfused.activations import RELU_CODE


def problem(x: Tensor) -> tuple[Any, Any, Any]:
    """Outer x channels x inner, as ``x`` lies in memory; ``problem_of`` in ``csrc/ops/memory_order.h`` is its twin.

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


def named(op: str, args: Sequence[Any], library: str = "bnfused") -> dict[str, Any]:
    """The arguments of a call of the op, by the names that its schema gives them."""
    schema = getattr(getattr(torch.ops, library), op).default._schema
    return {argument.name: value for argument, value in zip(schema.arguments, args, strict=True)}


def check_devices(op: str, arguments: dict[str, Any]) -> str:
    """Refuse tensors that are not where ``x`` is, or the first of an op without; returns the name of that one.

    One meta tensor among others brings a call to the kernels below: they would return no values and no error.

    Raises:
        RuntimeError: names the tensor that is elsewhere.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    first = "x" if "x" in tensors else next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.device != tensors[first].device:
            raise RuntimeError(f"bnfused::{op}: expected {name} on {tensors[first].device}, got {tensor.device}")
    return first


# ----------------------------------------------------------------------- the kernels, each of the arguments it needs


def _own_dtype(x: Tensor) -> torch.dtype:
    """Of what is neither like ``x`` nor like a parameter."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _saved(x: Tensor, residual: Tensor | None, activation: int) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    mean = x.new_empty(channels, dtype=torch.float64)
    invstd = x.new_empty(channels, dtype=torch.float64)
    has_mask = activation == RELU_CODE and residual is not None
    mask = x.new_empty(mask_bytes(x) if has_mask else 0, dtype=torch.uint8)
    return mean, invstd, mask


def _train_or_frozen(x: Tensor, residual: Tensor | None, activation: int, **_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *_saved(x, residual, activation)


def _eval(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, output_mask: tuple[bool, bool, bool, bool], **_: Any
) -> tuple[Tensor, ...]:
    need_x, need_weight, need_bias, need_residual = output_mask
    parameter = x.new_empty(0, dtype=_own_dtype(x))  # where there is none to take the dtype from
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        (parameter if weight is None else weight).new_empty(x.shape[1] if need_weight else 0),
        (parameter if bias is None else bias).new_empty(x.shape[1] if need_bias else 0),
        torch.empty_like(x) if need_residual else x.new_empty(0),
    )


def _stats(x: Tensor) -> Tensor:
    """``packed_size`` in ``csrc/batch_norm.h`` is the same rule."""
    channels = x.shape[1]
    return x.new_empty(2 * channels + 1 if x.dtype == torch.float64 else 3 * channels + 2, dtype=_own_dtype(x))


def _gather_stats(moments: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels = (moments.shape[1] - 1) // 2 if moments.dtype == torch.float64 else (moments.shape[1] - 2) // 3
    mean = moments.new_empty(channels, dtype=torch.float64)
    return mean, torch.empty_like(mean), mean.new_empty(())


def _apply(x: Tensor, residual: Tensor | None, activation: int, **_: Any) -> tuple[Tensor, ...]:
    _mean, invstd, mask = _saved(x, residual, activation)
    return torch.empty_like(x), invstd, mask


def _backward_reduce(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=torch.float64)


def _backward_apply(x: Tensor, output_mask: tuple[bool, bool], **_: Any) -> tuple[Tensor, Tensor]:
    need_x, need_residual = output_mask
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(x) if need_residual else x.new_empty(0),
    )


# Every op of csrc/ops/schema.cpp. This is the list of ops for the whole package: bnfused._extension.OPS.
KERNELS: dict[str, Callable[..., Any]] = {
    "batch_norm_train": _train_or_frozen,
    "batch_norm_frozen": _train_or_frozen,
    "batch_norm_eval": _eval,
    "batch_norm_backward": _backward,
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats": _gather_stats,
    "batch_norm_apply": _apply,
    "batch_norm_backward_reduce": _backward_reduce,
    "batch_norm_backward_apply": _backward_apply,
}


def register(library: str = "bnfused") -> None:
    """Give torch the shapes; called once a library has defined the ops."""
    for op in KERNELS:
        torch.library.register_fake(f"{library}::{op}", _kernel(library, op))


def _kernel(library: str, op: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        arguments = named(op, args, library)
        check_devices(op, arguments)
        return KERNELS[op](**arguments)

    return kernel
