"""Gradients of the ops: one ``autograd.Function`` for the forward, one for the backward.

The first derivative runs in the kernels, also where it is itself differentiated (``create_graph=True``). Every higher
one is torch's derivative of the reference formula: nothing is silently zero, whatever the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from bnfused import checks, ops, reference
from bnfused.activations import RELU_CODE

# What every call asks, by names of this module: those of torch are in dicts so large that each is a miss of the caches
# where convolutions run between two calls (measured in ResNet-50: 4 us of each backward). The layers above do the same.
_any_requires_grad = torch._C._any_requires_grad
_are_transforms_active = torch._C._are_functorch_transforms_active

# (running_mean, running_var, num_batches_tracked)
State = tuple[Tensor | None, Tensor | None, Tensor | None]
# (training, momentum, eps, activation code, activation_param)
Settings = tuple[bool, float | None, float, int, float]


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active: it would find no derivative of the ops."""
    return _are_transforms_active() or forward_ad._current_level >= 0


class BatchNormFunction(torch.autograd.Function):
    """Batch norm with residual and activation, differentiable to any order.

    ``apply(x, weight, bias, residual, state, settings)`` returns ``y``; with a further ``True`` it returns
    ``(y, mean, invstd, mask)``, as the ops do. What has no gradient travels in two tuples: each argument of a Function
    costs a third of a microsecond.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        state: State,
        settings: Settings,
        with_saved: bool = False,
    ) -> Any:
        training, momentum, eps, activation, activation_param = settings
        if training:
            if x.is_inference() or (residual is not None and residual.is_inference()):
                # save_for_backward would say so when the running statistics have moved.
                raise RuntimeError(
                    "batch_norm: expected tensors that can be saved for backward, got an inference tensor; clone() it "
                    "outside of inference mode"
                )
            y, mean, invstd, mask = ops.batch_norm_train(
                x, weight, bias, *state, residual, momentum, eps, activation, activation_param
            )
        else:
            y, mean, invstd, mask = ops.batch_norm_frozen(
                x, weight, bias, state[0], state[1], residual, eps, activation, activation_param
            )
        # A mask of no elements would be packed and unpacked all the same.
        kept_mask = mask if activation == RELU_CODE and residual is not None else None
        if activation == 0 or kept_mask is not None:
            residual = None  # its gradient is grad_y, or where the mask says so
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd, kept_mask)
        if not with_saved:
            return y
        ctx.mark_non_differentiable(mean, invstd, mask)
        return y, mean, invstd, mask

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> Any:
        if grad_y is None:  # of a Function that returns no gradient: not zeros, by which an optimizer would step
            return (None,) * 7
        x, weight, bias, residual, mean, invstd, mask = ctx.saved_tensors
        training, _, eps, activation, activation_param = ctx.settings
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        output_mask = (need_x, need_weight, need_bias, need_residual and activation != 0)
        args = (
            grad_y,
            x,
            weight,
            bias,
            residual,
            mean,
            invstd,
            mask,
            activation,
            activation_param,
            training,
            output_mask,
        )
        create_graph = is_grad_enabled()
        # A tangent of grad_y, or vmap over many of them; is_grads_batched has a vmap of its own, in which a Function
        # would leave no graph.
        if in_transform() or (create_graph and torch._C._functorch.is_legacy_batchedtensor(grad_y)):
            grad_x, grad_weight, grad_bias, grad_residual = _formula_grads(ctx, grad_y, output_mask)
        elif create_graph:
            grad_x, grad_weight, grad_bias, grad_residual = BatchNormBackwardFunction.apply(*args, eps)
        elif is_compiling():  # compiled autograd
            grad_x, grad_weight, grad_bias, grad_residual = torch.ops.bnfused.batch_norm_backward.default(*args)
        else:
            grad_x, grad_weight, grad_bias, grad_residual = ops.batch_norm_backward(*args)
        if activation == 0:
            grad_residual = grad_y
        return (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            grad_residual if need_residual else None,
            None,
            None,
            None,
        )


def _formula_grads(ctx: Any, grad_y: Tensor, output_mask: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """The backward op in plain torch, for what only that can be put through."""
    x, weight, bias, residual, mean, invstd, mask = ctx.saved_tensors
    training, _, eps, activation, activation_param = ctx.settings
    passes = _passes(x, weight, bias, mean, invstd, mask, activation_param, training)
    if passes is not None:
        residual = torch.zeros_like(x)  # to differentiate by; its values do not matter
    inputs = (x, weight, bias, residual)
    wanted = [i for i, needed in enumerate(output_mask) if needed]

    def formula(*sources: Tensor) -> Tensor:
        given = dict(zip(wanted, sources, strict=True))
        x, weight, bias, residual = [given.get(i, t) for i, t in enumerate(inputs)]
        return _formula(x, weight, bias, residual, mean, invstd, passes, activation, activation_param, training, eps)

    pull_back: Any = torch.func.vjp(formula, *(inputs[i] for i in wanted))[1]
    grads = iter(pull_back(grad_y))
    return tuple(next(grads) if needed else None for needed in output_mask)


def _formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    passes: Tensor | None,
    activation: int,
    activation_param: float,
    training: bool,
    eps: float,
) -> Tensor:
    """y as the reference computes it, from the statistics that were saved, or in training from ``x``."""
    values = x.to(reference.arithmetic_dtype(x))
    if training:
        mean, var = reference.statistics(values)
        invstd = (var + eps).rsqrt()
    return transform(values, mean, invstd, weight, bias, residual, passes, activation, activation_param, x.dtype)


def transform(
    values: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    passes: Tensor | None,
    activation: int,
    activation_param: float,
    dtype: torch.dtype,
) -> Tensor:
    """``reference.transform``, to be differentiated.

    Beside ``passes``, which says where ReLU lets a gradient through, only its derivatives are those of y: they need no
    value of the residual.
    """
    args = (values, mean, invstd, weight, bias, residual)
    if passes is None:
        return reference.transform(*args, activation, activation_param, dtype)
    return torch.where(passes, reference.transform(*args, 0, 0.0, dtype), 0)


def _passes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor | None,
    param: float,
    training: bool,
) -> Tensor | None:
    """Where ReLU lets a gradient through, like ``x``; None without a mask. Each backend orders its bits for itself."""
    if mask is None:
        return None
    only_residual = (False, False, False, True)
    args = (torch.ones_like(x), x, weight, bias, None, mean, invstd, mask, RELU_CODE, param, training, only_residual)
    return ops.batch_norm_backward(*args)[3] != 0


# Function.apply without its look at every argument for wrappers of torch.func, which the caller has ruled out: 2 us.
apply_unwrapped = super(torch.autograd.Function, BatchNormFunction).apply


class BatchNormBackwardFunction(torch.autograd.Function):
    """The backward op as a differentiable function of ``grad_y``, ``x``, ``weight``, ``bias`` and ``residual``."""

    @staticmethod
    def forward(
        ctx: Any,
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
        eps: float,
    ) -> Any:
        ctx.settings = (activation, activation_param, training, eps)
        ctx.output_mask = output_mask
        ctx.save_for_backward(grad_y, x, weight, bias, residual, mean, invstd, mask)
        ctx.set_materialize_grads(False)
        return ops.batch_norm_backward(
            grad_y,
            x,
            weight,
            bias,
            residual,
            mean,
            invstd,
            mask,
            activation,
            activation_param,
            training,
            output_mask,
        )

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        saved: Any = ctx.saved_tensors
        grad_y, x, weight, bias, residual, mean, invstd, mask = saved
        activation, activation_param, training, eps = ctx.settings
        passes = _passes(x, weight, bias, mean, invstd, mask, activation_param, training)
        if passes is not None:
            residual = torch.zeros_like(x)  # to differentiate by; its values do not matter
        create_graph = is_grad_enabled()
        with torch.enable_grad():
            # Fresh views: what is differentiated here must not reach back into the graph that made these tensors.
            inputs: Any = [
                None if t is None else differentiable(t, create_graph) for t in (grad_y, x, weight, bias, residual)
            ]
            grad_y, x, weight, bias, residual = inputs
            y = _formula(x, weight, bias, residual, mean, invstd, passes, activation, activation_param, training, eps)
        asked = [u if wanted else None for u, wanted in zip(grad_grads, ctx.output_mask, strict=True)]
        return (*second_gradients(y, inputs, asked, ctx.needs_input_grad[:5], create_graph), *[None] * 8)


def second_gradients(
    y: Tensor,
    inputs: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """What ``grad_grads``, upstream of the gradients of x, weight, bias and residual, are upstream of ``inputs``.

    Args:
        y: made of all inputs but the first.
        inputs: grad_y, x, weight, bias, residual.
        needed: for which inputs; the others get None.
    """
    grad_y, *sources = inputs
    pairs: Any = [(s, u) for s, u in zip(sources, grad_grads, strict=True) if s is not None and u is not None]
    if not pairs:
        return (None,) * len(inputs)
    wanted: Any = [t for t, is_needed in zip(inputs, needed, strict=True) if is_needed]
    with torch.enable_grad():
        first = torch.autograd.grad(y, [source for source, _ in pairs], grad_y, create_graph=True)
        upstream = [u for _, u in pairs]
        second = torch.autograd.grad(first, wanted, upstream, create_graph=create_graph, allow_unused=True)
    found = iter(second)
    return tuple(next(found) if is_needed else None for is_needed in needed)


def differentiable(tensor: Tensor, create_graph: bool) -> Tensor:
    """A tensor to differentiate by: still part of the caller's graph only where that graph is asked for."""
    if create_graph and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _requires_grad(op: str, *args: Any) -> bool:
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in args
    ):
        raise RuntimeError(
            f"bnfused::{op}: expected inputs without a tangent, got one; forward-mode derivatives are those of "
            "bnfused.functional.batch_norm"
        )
    return is_grad_enabled() and _any_requires_grad(*args)


def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    *settings: Any,
) -> Any:
    checks.check_no_gradient(running_mean, running_var, "bnfused::batch_norm_train")
    state = (running_mean, running_var, num_batches_tracked)
    if _requires_grad("batch_norm_train", x, weight, bias, residual):
        return BatchNormFunction.apply(x, weight, bias, residual, state, (True, *settings), True)
    return ops.batch_norm_train(x, weight, bias, *state, residual, *settings)


def _frozen(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    *settings: Any,
) -> Any:
    checks.check_no_gradient(running_mean, running_var, "bnfused::batch_norm_frozen")
    if _requires_grad("batch_norm_frozen", x, weight, bias, residual):
        state = (running_mean, running_var, None)
        return BatchNormFunction.apply(x, weight, bias, residual, state, (False, None, *settings), True)
    return ops.batch_norm_frozen(x, weight, bias, running_mean, running_var, residual, *settings)


def _eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    *settings: Any,
) -> Any:
    checks.check_no_gradient(running_mean, running_var, "bnfused::batch_norm_eval")
    if _requires_grad("batch_norm_eval", x, weight, bias, residual):
        state = (running_mean, running_var, None)
        return BatchNormFunction.apply(x, weight, bias, residual, state, (False, None, *settings))
    return ops.batch_norm_eval(x, weight, bias, running_mean, running_var, residual, *settings)


def _backward(grad_y: Tensor, x: Tensor, *rest: Any) -> Any:
    if _requires_grad("batch_norm_backward", grad_y, x, *rest[:3]):
        raise RuntimeError(
            "bnfused::batch_norm_backward: expected inputs that do not require grad; it is differentiable "
            "through bnfused.functional.batch_norm"
        )
    return ops.batch_norm_backward(grad_y, x, *rest)


def register() -> None:
    """Give the dispatcher these gradients, for callers of ``torch.ops.bnfused`` and for torch.compile."""
    library = torch.library.Library("bnfused", "IMPL")
    library.impl("batch_norm_train", _train, "Autograd")
    library.impl("batch_norm_frozen", _frozen, "Autograd")
    library.impl("batch_norm_eval", _eval, "Autograd")
    library.impl("batch_norm_backward", _backward, "Autograd")
    _registered.append(library)


_registered: list[torch.library.Library] = []  # what a Library registered goes with it
