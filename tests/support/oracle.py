"""The expected results, in float64: the formulas of the paper, torch's activations, torch's autograd.

Nothing here comes from bnfused. ``test_oracle.py`` compares it with ``torch.nn.functional.batch_norm`` in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from support.cases import Problem

_ACTIVATIONS: dict[str | None, Callable[..., Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

SMOOTH = ("elu", "silu", "gelu", "sigmoid", "tanh")


def activate(z: Tensor, activation: str | None, param: float | None = None) -> Tensor:
    """torch's own activation."""
    return _ACTIVATIONS[activation](z, *([] if param is None else [param]))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel. A second pass corrects a mean that is large compared with the std."""
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims)
    mean = mean + (x - per_channel(mean, x)).mean(dims)
    return mean, (x - per_channel(mean, x)).square().mean(dims)


def formula(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
) -> Tensor:
    """``act((x - mean) / sqrt(var + eps) * weight + bias + residual)``, differentiable to any order."""
    if training:
        mean, var = statistics(x)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    z = (x - per_channel(mean, x)) * per_channel((var + eps).rsqrt(), x)
    if weight is not None:
        z = z * per_channel(weight, x)
    if bias is not None:
        z = z + per_channel(bias, x)
    if residual is not None:
        z = z + residual
    return activate(z, activation, activation_param)


def torch_batch_norm(
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
    """The same call with torch's separate operations. bnfused must never be less accurate."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = 1.0 / float(num_batches_tracked) if training and num_batches_tracked is not None else 0.0
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        z = z + residual
    return activate(z, activation, activation_param)


@dataclass
class Expected:
    """The results in float64, and the scale to which the error of each is relative."""

    values: dict[str, Tensor | None]
    scales: dict[str, float]
    num_batches_tracked: int | None


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().contiguous()


def finite_max(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return 0.0 if finite.numel() == 0 else float(finite.abs().max())


def before_activation(problem: Problem) -> Tensor:
    """z, the input of the activation."""
    p = problem
    tensors = [_double(t) for t in (p.x, p.running_mean, p.running_var, p.weight, p.bias, p.residual)]
    return formula(*tensors[:5], p.training, p.eps, tensors[5])


def expected(problem: Problem) -> Expected:
    """Values, gradients and running statistics of one call."""
    p = problem
    names = ("x", "weight", "bias", "residual")
    leaves = {name: _double(getattr(p, name)) for name in names}
    present = [name for name in names if leaves[name] is not None]
    for name in present:
        leaves[name].requires_grad_()
    running_mean, running_var = _double(p.running_mean), _double(p.running_var)
    z = formula(
        leaves["x"],
        running_mean,
        running_var,
        leaves["weight"],
        leaves["bias"],
        p.training,
        p.eps,
        leaves["residual"],
    )
    y = activate(z, p.activation, p.activation_param)
    upstream = p.grad_y.double()
    grads = torch.autograd.grad(y, [z, *(leaves[n] for n in present)], upstream, allow_unused=True)
    grad_z, *gradients = grads
    values: dict[str, Tensor | None] = {"y": y.detach()}
    values |= {f"grad_{name}": None for name in names}
    values |= {
        f"grad_{n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(present, gradients, strict=True)
    }

    x = leaves["x"].detach()
    mean, var = (running_mean, running_var)
    if p.training and x.numel():
        mean, var = statistics(x)
    count = None if p.num_batches_tracked is None else int(p.num_batches_tracked)
    if p.training and count is not None:
        count += 1
    factor = p.momentum
    if factor is None:
        factor = 1.0 / count if count else 0.0
    if p.training and x.numel():
        rows = p.rows
        if running_mean is not None:
            running_mean = (1 - factor) * running_mean + factor * mean
        if running_var is not None:
            unbiased = var * rows / (rows - 1) if rows > 1 else var
            running_var = (1 - factor) * running_var + factor * unbiased
    values |= {"running_mean": running_mean, "running_var": running_var}

    scales = {name: 0.0 if v is None else finite_max(v) for name, v in values.items()}
    # An activation cuts away values, but it does not make the others more accurate: y has the error of z.
    scales["y"] = max(scales["y"], finite_max(z.detach()))
    if x.numel() and mean is not None and var is not None:
        invstd = (var + p.eps).rsqrt()
        centred = (x - per_channel(mean, x)) * per_channel(invstd, x)
        dims = [0, *range(2, x.dim())]
        # exp and tanh saturate. A gradient there, such as s * (1 - s) near s = 1, is tiny but has the rounding of 1.
        left = 0.1 * finite_max(upstream) if p.activation in SMOOTH else 0.0
        scales["grad_residual"] = max(scales["grad_residual"], left)
        # A sum of `rows` terms of either sign is about as large as the root of the sum of their squares. By chance it
        # can be much smaller, and then an error relative to the sum itself means nothing.
        terms = grad_z.abs().clamp(min=left)
        scales["grad_bias"] = max(scales["grad_bias"], finite_max(terms.square().sum(dims).sqrt()))
        terms = terms * centred
        scales["grad_weight"] = max(scales["grad_weight"], finite_max(terms.square().sum(dims).sqrt()))
        # The error of a mean is relative to the standard deviation, because y has the mean in these units.
        if p.training:
            scales["running_mean"] = max(scales["running_mean"], factor * finite_max(var.sqrt()))
        # The three terms of grad_x nearly cancel if there are few rows (with two they cancel wholly), or if grad_z is
        # the same in the whole channel. Then the error is relative to one of the terms.
        gain = invstd if p.weight is None else invstd * p.weight.detach().double().abs()
        first = grad_z[(slice(0, 1), slice(None), *[slice(0, 1)] * (x.dim() - 2))]
        cancels = (grad_z == first).all(dims) | (p.rows < 16)
        one_term = grad_z * per_channel(cancels, x) if p.training else torch.zeros_like(grad_z)
        one_term = one_term.abs().clamp(min=left) * per_channel(gain, x)
        scales["grad_x"] = max(scales["grad_x"], finite_max(one_term))
    return Expected(values, scales, count)
