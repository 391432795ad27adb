"""batch_norm that moves its arguments to a device and its results back, so that CPU tests run on a GPU unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ALIGNMENT = 16  # bytes; the widest access has as many


def copy_of(t: Tensor, device: torch.device) -> Tensor:
    """A copy of ``t`` on ``device`` with its strides, its misalignment, and the memory between its values."""
    if t.layout != torch.strided or t.numel() == 0:
        return t.to(device, copy=True)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    phase = t.data_ptr() % ALIGNMENT // t.element_size()
    buffer = torch.empty(phase + extent, dtype=t.dtype, device=device)
    buffer[phase:].copy_(t.as_strided((extent,), (1,)))
    # Not a view of the buffer: autograd must treat writes into the copy like those into any other tensor.
    return torch.empty(0, dtype=t.dtype, device=device).set_(buffer.untyped_storage(), phase, t.shape, t.stride())


class _Move(torch.autograd.Function):
    """``copy_of``, differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: torch.device) -> Tensor:
        ctx.device = t.device
        return copy_of(t, device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Move.apply(grad, ctx.device), None


def move(t: Any, device: torch.device) -> Any:
    """``t`` on ``device``. Returns ``t`` itself if it is not a tensor or has no values to move."""
    if not isinstance(t, Tensor) or t.is_meta:
        return t
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return t.to(device)  # functorch and forward mode do not support _Move
    return _Move.apply(t, device)


def on_device(batch_norm: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """A function of CPU tensors that runs ``batch_norm`` on ``device``; its signature is that of bnfused.functional."""
    there, here = torch.device(device), torch.device("cpu")

    def run(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        *,
        residual: Tensor | None = None,
        num_batches_tracked: Tensor | None = None,
        **activation: Any,
    ) -> Tensor:
        state = (running_mean, running_var, num_batches_tracked)
        mean, var, count = (move(t, there) for t in state)
        y = batch_norm(
            move(input, there),
            mean,
            var,
            move(weight, there),
            move(bias, there),
            training,
            momentum,
            eps,
            residual=move(residual, there),
            num_batches_tracked=count,
            **activation,
        )
        if training:
            with torch.no_grad():
                for original, updated in zip(state, (mean, var, count), strict=True):
                    if original is not None:
                        original.copy_(updated)
        return move(y, here)

    return run
