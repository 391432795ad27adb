"""Gradients of SyncBatchNorm, of any order: the forward once the statistics are known, and the whole backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnfused import activations, parts, reference
from bnfused.autograd import (
    gradients_of_inputs,
    kept_for_backward,
    needed_of_op,
    second_gradients,
    source_of_residual,
    transform,
)
from bnfused.sync.collectives import all_reduce, start_all_reduce

# (eps, activation, activation_param)
Settings = tuple[float, str | None, float | None]


class SyncBatchNormFunction(torch.autograd.Function):
    """The second half of the forward, and the whole backward, differentiable to any order.

    ``apply(x, weight, bias, residual, mean, var, count, group, settings)`` returns ``y``. The statistics come as
    values without a gradient; the gradient that flows through them is part of the gradient of ``x``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        group: Any,
        settings: Settings,
    ) -> Tensor:
        eps, activation, activation_param = settings
        y, invstd, mask = parts.batch_norm_apply(
            *(x, mean, var, weight, bias, eps),
            residual=residual,
            activation=activation,
            activation_param=activation_param,
        )
        residual, kept_mask = kept_for_backward(_code_of(settings), residual, mask)
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd, count, kept_mask)
        ctx.group, ctx.settings = group, settings
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        code = _code_of(ctx.settings)
        args = (grad_y, *ctx.saved_tensors, ctx.group, ctx.settings, needed_of_op(ctx, code))
        # torch.compile traces one derivative, and itself refuses the next one.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _SyncBackwardFunction.apply(*args)
        else:
            grads = _backward(*args)
        return (*gradients_of_inputs(ctx, grads, grad_y, code), *[None] * 5)


def _code_of(settings: Settings) -> int:
    _, activation, activation_param = settings
    return activations.resolve(activation, activation_param)[0]


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    mask: Tensor | None,
    group: Any,
    settings: Settings,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and residual, with None for one that is not needed.

    One collective runs if the gradient of ``x`` is needed. Meanwhile the gradients of weight and bias are computed,
    which are this process's share. The gradient of the residual could be computed meanwhile too, but it would take a
    pass of its own over the tensor; now it is one more write in the pass that computes the gradient of ``x``.
    """
    _, activation, activation_param = settings
    need_x, need_weight, need_bias, need_residual = needed
    forward: Any = {
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "mask": mask,
        "activation": activation,
        "activation_param": activation_param,
    }
    own_sums = parts.batch_norm_backward_reduce(grad_y, x, mean, invstd, **forward)
    finish = start_all_reduce(own_sums.clone(), group) if need_x else None
    # Copies, because gradients must not share memory.
    grad_bias = own_sums[0].to(bias.dtype, copy=True) if need_bias and bias is not None else None
    grad_weight = own_sums[1].to(weight.dtype, copy=True) if need_weight and weight is not None else None
    sums = own_sums if finish is None else finish()
    grad_x = grad_residual = None
    if need_x or need_residual:
        grad_x, grad_residual = parts.batch_norm_backward_apply(
            *(grad_y, x, mean, invstd, sums, count),
            output_mask=(need_x, need_residual),
            **forward,
        )
    return grad_x if need_x else None, grad_weight, grad_bias, grad_residual if need_residual else None


class _SyncBackwardFunction(torch.autograd.Function):
    """``_backward`` as a differentiable function of ``grad_y``, ``x``, ``weight``, ``bias`` and ``residual``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *saved, group, settings, needed = args
        ctx.save_for_backward(*saved)
        ctx.group, ctx.settings, ctx.needed = group, settings, needed
        ctx.set_materialize_grads(False)
        return _backward(*args)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        saved: Any = ctx.saved_tensors
        grad_y, x, weight, bias, residual, mean, invstd, count, mask = saved
        eps, activation, activation_param = ctx.settings
        code, param = activations.resolve(activation, activation_param)
        passes = _passes(x, mean, invstd, count, mask)

        def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            values = x.to(reference.arithmetic_dtype(x))
            mean, var = _statistics(values, count, ctx.group)
            invstd = (var + eps).rsqrt()
            return transform(values, mean, invstd, weight, bias, residual, passes, code, param, x.dtype)

        inputs = (grad_y, x, weight, bias, source_of_residual(x, residual, passes))
        return (*second_gradients(formula, inputs, grad_grads, ctx.needs_input_grad[:5]), *[None] * 7)


def _passes(x: Tensor, mean: Tensor, invstd: Tensor, count: Tensor, mask: Tensor | None) -> Tensor | None:
    """Where ReLU lets a gradient through: bool, of the shape of ``x``; None without a mask."""
    if mask is None:
        return None
    no_sums = mean.new_zeros(2, mean.numel())
    _, gradients = parts.batch_norm_backward_apply(
        *(torch.ones_like(x), x, mean, invstd, no_sums, count),
        mask=mask,
        activation="relu",
        output_mask=(False, True),
    )
    return gradients != 0


class _Sum(torch.autograd.Function):
    """The sum over all ranks, on each of them.

    Its gradient is the same sum of the gradients, since what is differentiated is the sum of the ranks' losses.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce(values.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad, ctx.group), None


def _statistics(values: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all ranks, both ``(C,)``, differentiable to any order."""
    dims = [0, *range(2, values.dim())]
    count = count.clamp(min=1)
    mean = _Sum.apply(values.sum(dims), group) / count
    return mean, _Sum.apply((values - reference.per_channel(mean, values)).square().sum(dims), group) / count
