"""Gradients of the ops: one ``autograd.Function`` for the forward, one for the backward.

The first derivative runs in the kernels, also if it is itself differentiated (``create_graph=True``). Every higher
derivative is torch's derivative of the reference formula, so none is silently zero, whatever its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from bnfused import checks, ops, reference
from bnfused.activations import RELU_CODE

# Bound here once, because every call asks them. A look-up in torch's huge dicts costs cache misses if convolutions run
# between two calls (measured in ResNet-50: 4 us of each backward). functional.py does the same.
_any_requires_grad = torch._C._any_requires_grad
_are_transforms_active = torch._C._are_functorch_transforms_active

# (running_mean, running_var, num_batches_tracked); in eval the third is None
State = tuple[Tensor | None, Tensor | None, Tensor | None]
# (training, momentum, eps, activation code, activation_param); momentum is ignored in eval
Settings = tuple[bool, float | None, float, int, float]


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active, for which the ops have no derivative."""
    return _are_transforms_active() or forward_ad._current_level >= 0


class BatchNormFunction(torch.autograd.Function):
    """Batch norm with residual and activation, differentiable to any order.

    ``apply(x, weight, bias, residual, state, settings)`` returns ``y``; with a further ``True`` it returns
    ``(y, mean, invstd, mask)``, as the ops do. The arguments without a gradient are in two tuples, because each
    argument of a Function costs a third of a microsecond.
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
                # save_for_backward would raise too, but only after the running statistics have moved.
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
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, *kept_for_backward(activation, residual, mask), mean, invstd)
        if not with_saved:
            return y
        ctx.mark_non_differentiable(mean, invstd, mask)
        return y, mean, invstd, mask

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> Any:
        if grad_y is None:  # the next Function returned no gradient; with zeros, an optimizer would make a step
            return (None,) * 7
        x, weight, bias, residual, mask, mean, invstd = ctx.saved_tensors
        training, _, eps, activation, activation_param = ctx.settings
        output_mask = needed_of_op(ctx, activation)
        settings = (activation, activation_param, training, output_mask)
        args = (grad_y, x, weight, bias, residual, mean, invstd, mask, *settings)
        create_graph = is_grad_enabled()
        # grad_y may have a tangent, or be one of many under vmap. is_grads_batched has a vmap of its own, under which a
        # Function would leave no graph.
        if in_transform() or (create_graph and torch._C._functorch.is_legacy_batchedtensor(grad_y)):
            grads = _formula_grads(ctx, grad_y, output_mask)
        elif create_graph:
            grads = BatchNormBackwardFunction.apply(*args, eps)
        elif is_compiling():  # compiled autograd
            grads = torch.ops.bnfused.batch_norm_backward.default(*args)
        else:
            grads = ops.batch_norm_backward(*args)
        return (*gradients_of_inputs(ctx, grads, grad_y, activation), None, None, None)


def kept_for_backward(activation: int, residual: Tensor | None, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The residual and the mask, with None for one that the backward does not need.

    ReLU after a residual needs the mask alone, and without an activation the residual's gradient is ``grad_y``. A mask
    without elements is not kept either: it would be packed and unpacked all the same.
    """
    if activation == RELU_CODE and residual is not None:
        return None, mask
    return None if activation == 0 else residual, None


def needed_of_op(ctx: Any, activation: int) -> tuple[bool, bool, bool, bool]:
    """Which gradients of x, weight, bias and residual the backward op has to compute.

    Without an activation that of the residual is ``grad_y``, so the op does not.
    """
    x, weight, bias, residual = ctx.needs_input_grad[:4]
    return x, weight, bias, residual and activation != 0


def gradients_of_inputs(
    ctx: Any, grads: Sequence[Tensor | None], grad_y: Tensor, activation: int
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and residual for autograd: ``grads`` of the op, or None for an unneeded one."""
    grad_x, grad_weight, grad_bias, grad_residual = grads
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        (grad_y if activation == 0 else grad_residual) if need_residual else None,
    )


def _formula_grads(ctx: Any, grad_y: Tensor, output_mask: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """The backward op in plain torch, which transforms of torch.func can differentiate and batch."""
    x, weight, bias, residual, mask, mean, invstd = ctx.saved_tensors
    training, _, eps, activation, activation_param = ctx.settings
    passes = _passes(x, weight, bias, mean, invstd, mask, activation_param, training)
    residual = source_of_residual(x, residual, passes)
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
    """y as the reference computes it: in training from ``x`` alone, otherwise with the saved statistics."""
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

    ``passes`` says where ReLU lets a gradient through. With it, the result is not y; it only has the derivatives of y,
    which do not need the value of the residual.
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
    """Where ReLU lets a gradient through: bool, of the shape of ``x``; None without a mask.

    The op reads the mask, since each backend orders the bits as suits it.
    """
    if mask is None:
        return None
    only_residual = (False, False, False, True)
    args = (torch.ones_like(x), x, weight, bias, None, mean, invstd, mask, RELU_CODE, param, training, only_residual)
    return ops.batch_norm_backward(*args)[3] != 0


# Function.apply without its search of every argument for wrappers of torch.func, which takes 2 us. The caller has made
# sure that there are no such wrappers.
apply_unwrapped = super(torch.autograd.Function, BatchNormFunction).apply


class BatchNormBackwardFunction(torch.autograd.Function):
    """The backward op as a differentiable function of ``grad_y``, ``x``, ``weight``, ``bias`` and ``residual``."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        """Takes the arguments of ``ops.batch_norm_backward``, and eps."""
        *args_of_op, eps = args
        *saved, activation, activation_param, training, output_mask = args_of_op
        ctx.settings = (activation, activation_param, training, eps)
        ctx.output_mask = output_mask
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return ops.batch_norm_backward(*args_of_op)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> Any:
        saved: Any = ctx.saved_tensors
        grad_y, x, weight, bias, residual, mean, invstd, mask = saved
        activation, activation_param, training, eps = ctx.settings
        passes = _passes(x, weight, bias, mean, invstd, mask, activation_param, training)

        def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
            sources = (x, weight, bias, residual)
            return _formula(*sources, mean, invstd, passes, activation, activation_param, training, eps)

        upstream = [u if wanted else None for u, wanted in zip(grad_grads, ctx.output_mask, strict=True)]
        inputs = (grad_y, x, weight, bias, source_of_residual(x, residual, passes))
        return (*second_gradients(formula, inputs, upstream, ctx.needs_input_grad[:5]), *[None] * 8)


def source_of_residual(x: Tensor, residual: Tensor | None, passes: Tensor | None) -> Tensor | None:
    """The residual to differentiate by. With ``passes`` it was not kept, and its values do not matter."""
    return residual if passes is None else torch.zeros_like(x)


def second_gradients(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``inputs`` of a backward, given the gradients ``grad_grads`` of its results.

    Args:
        formula: y as a function of x, weight, bias and residual.
        inputs: grad_y, x, weight, bias, residual.
        grad_grads: upstream of the gradients of x, weight, bias and residual.
        needed: for which inputs a gradient is wanted; the others get None.
    """
    create_graph = is_grad_enabled()
    with torch.enable_grad():
        # Fresh views: the derivatives taken here must not reach back into the graph that made these tensors.
        inputs = [None if t is None else differentiable(t, create_graph) for t in inputs]
        grad_y, *sources = inputs
        y = formula(*sources)
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
    """A tensor to differentiate by, which stays part of the caller's graph only with ``create_graph``."""
    if create_graph and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


def _requires_grad(op: str, *args: Any) -> bool:
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in args
    ):
        raise RuntimeError(
            f"bnfused::{op}: expected inputs without a tangent, got one; for forward-mode derivatives, call "
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


def _with_running(op: str, with_saved: bool) -> Callable[..., Any]:
    """The gradient of ``batch_norm_eval``, or of ``batch_norm_frozen``, which returns what it saved too."""

    def call(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None,
        *settings: Any,
    ) -> Any:
        checks.check_no_gradient(running_mean, running_var, f"bnfused::{op}")
        if _requires_grad(op, x, weight, bias, residual):
            state = (running_mean, running_var, None)
            return BatchNormFunction.apply(x, weight, bias, residual, state, (False, None, *settings), with_saved)
        return getattr(ops, op)(x, weight, bias, running_mean, running_var, residual, *settings)

    return call


def _backward(grad_y: Tensor, x: Tensor, *rest: Any) -> Any:
    if _requires_grad("batch_norm_backward", grad_y, x, *rest[:3]):
        raise RuntimeError(
            "bnfused::batch_norm_backward: expected inputs that do not require grad; it is differentiable "
            "through bnfused.functional.batch_norm"
        )
    return ops.batch_norm_backward(grad_y, x, *rest)


def register() -> None:
    """Register these gradients with the dispatcher, for callers of ``torch.ops.bnfused`` and for torch.compile."""
    library = torch.library.Library("bnfused", "IMPL")
    library.impl("batch_norm_train", _train, "Autograd")
    library.impl("batch_norm_frozen", _with_running("batch_norm_frozen", True), "Autograd")
    library.impl("batch_norm_eval", _with_running("batch_norm_eval", False), "Autograd")
    library.impl("batch_norm_backward", _backward, "Autograd")
    _registered.append(library)


_registered: list[torch.library.Library] = []  # keeps each alive, since a Library takes its kernels with it
