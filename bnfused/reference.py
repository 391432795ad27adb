"""The specification: batch norm, residual and activation in plain torch, to be read next to the paper.

The kernels are compared with it, higher derivatives are derivatives of it, and it runs where no kernel can: under the
transforms of torch.func, in forward-mode AD, and without the extension. It computes in float64, whatever the dtype of
the input is. Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnfused import activations, checks


def batch_norm(
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
    activation: str | None = None,
    activation_param: float | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Compute ``bnfused.functional.batch_norm``, which documents the arguments, the result and the errors."""
    code, param = activations.resolve(activation, activation_param)
    checks.check_input(input)
    checks.check_values(input, training, eps)
    checks.check_arguments(input, weight, bias, running_mean, running_var, residual, num_batches_tracked, training)
    values = input.to(arithmetic_dtype(input))
    if training:
        mean, var = statistics(values)
        count = checks.values_per_channel(input)
        update_running(running_mean, running_var, num_batches_tracked, mean, var, momentum, count)
    else:
        assert running_mean is not None and running_var is not None  # check_arguments made sure of it
        mean, var = running_mean.to(values.dtype), running_var.to(values.dtype)
    invstd = (var + eps).rsqrt()
    return transform(values, mean, invstd, weight, bias, residual, code, param, input.dtype)


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, both ``(C,)``; zeros if there are no values."""
    if values.numel() == 0:
        zeros = values.new_zeros(checks.channels_of(values))
        return zeros, zeros
    dims = [0, *range(2, values.dim())]
    mean = values.mean(dims)
    # Adds what rounding left, so that the mean of equal values is exactly that value.
    mean = mean + (values - per_channel(mean, values)).mean(dims)
    return mean, (values - per_channel(mean, values)).square().mean(dims)


def transform(
    values: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    activation_param: float,
    dtype: torch.dtype,
) -> Tensor:
    """``act((values - mean) * invstd * weight + bias + residual)``, rounded to ``dtype`` once."""
    z = (values - per_channel(mean, values)) * per_channel(invstd, values)
    if weight is not None:
        z = z * per_channel(weight.to(values.dtype), values)
    if bias is not None:
        z = z + per_channel(bias.to(values.dtype), values)
    if residual is not None:
        z = z + residual
    if activation == activations.RELU_CODE:
        # y is the same, and its gradient passes exactly where y is positive, even if z rounds to zero.
        z = z.to(dtype)
    return activations.apply(activation, activation_param, z).to(dtype)


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    count: int,
) -> None:
    """Count the batch and move the running statistics toward this batch's mean and *unbiased* variance, in place.

    ``momentum`` is the weight of the new batch; None means ``1 / num_batches_tracked``, the cumulative average.
    ``count`` is the number of values per channel. An empty batch is counted and leaves the statistics as they are.
    """
    if count > 0:
        factor: float | Tensor = 0.0 if momentum is None else momentum
        if momentum is None and num_batches_tracked is not None:
            factor = (num_batches_tracked + 1).to(mean.dtype).reciprocal()
        unbiased = var * (count / (count - 1))
        pairs = [(old, new) for old, new in ((running_mean, mean), (running_var, unbiased)) if old is not None]
        for running, batch in pairs:
            checks.check_batched_alike(running, batch)
        for running, batch in pairs:
            running.copy_((1 - factor) * running.to(batch.dtype) + factor * batch)
    # The counter comes last: a transform of torch.func that may not write to the statistics has raised by now.
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float64, which makes the specification exact to the last bit of float32. MPS has no float64, so float32 there."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values``, ``(C,)``, in a shape that broadcasts against ``x``, ``(N, C, *)``."""
    return values.view(-1, *[1] * (x.dim() - 2))
