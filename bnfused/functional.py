"""``batch_norm``: torch's signature plus fusion. Checks what only Python can, then calls one op."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnfused import _extension, activations, autograd, checks, fake, ops, reference, without_cuda

_any_requires_grad = torch._C._any_requires_grad
_tracing_state = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

if _extension.is_available():
    autograd.register()
    fake.register()
    if not _extension.has_cuda():
        without_cuda.register()


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
    """Normalize each channel of ``input``, scale and shift it, add ``residual``, apply ``activation``: in one pass.

    ``y = act((input - mean) * invstd * weight + bias + residual)`` with ``invstd = 1 / sqrt(var + eps)``. In training
    ``mean`` and the biased ``var`` come from this batch, and the running statistics move by ``momentum`` toward
    ``mean`` and the unbiased ``var``, in place. Otherwise the running statistics are used as they are.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64. Every dense layout (contiguous, channels_last, any
            permutation) is read as it is and kept in the output; other strides are copied first.
        running_mean, running_var: ``(C,)``, float32 or the dtype of ``input``; each may be None in training.
        weight, bias: ``(C,)``, float32 or the dtype of ``input``; None means 1 and 0.
        training: use the statistics of this batch.
        momentum: the weight of the new batch; None means ``1 / num_batches_tracked``, the cumulative average.
        eps: added to the variance, positive in training.
        residual: shape and dtype of ``input``; None means 0.
        activation: a name in ``bnfused.activations.ACTIVATIONS``, or None.
        activation_param: ``negative_slope`` of leaky_relu (0.01 if None), ``alpha`` of elu (1 if None).
        num_batches_tracked: int64 of one element, counts the training batches in place.

    Returns:
        ``y``, with the shape, dtype and (where it is dense) strides of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor; ``activation_param`` is one that requires grad.
        ValueError: training with one value per channel, whose variance is undefined; ``eps`` not positive in training;
            an activation that is not known.
        RuntimeError: a rank, shape, dtype or device that does not fit ``input``, or running statistics that require
            grad; the message names the argument.
        Running statistics and the counter are as before where anything is raised.

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithm 1; semantics of ``torch.nn.functional.batch_norm``.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        return handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias, residual),
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            activation_param=activation_param,
            num_batches_tracked=num_batches_tracked,
        )
    checks.check_input(input)
    code, param = activations.resolve(activation, activation_param)
    checks.check_values(input, training, eps)
    if training:
        if momentum is None and num_batches_tracked is None:
            momentum = 0.0  # nothing counts the batches, so torch leaves the statistics alone
    elif running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"batch_norm: expected {missing} when not training, got None")

    compiling = is_compiling()
    if not _has_kernel(input, compiling):
        return reference.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            activation_param=activation_param,
            num_batches_tracked=num_batches_tracked,
        )
    state = (running_mean, running_var, num_batches_tracked)
    if compiling or _tracing_state() is not None:
        # The op is a node of the graph; its gradient comes from the dispatcher.
        if training:
            train = torch.ops.bnfused.batch_norm_train.default
            return train(input, weight, bias, *state, residual, momentum, eps, code, param)[0]
        evaluate = torch.ops.bnfused.batch_norm_eval.default
        return evaluate(input, weight, bias, running_mean, running_var, residual, eps, code, param)
    if is_grad_enabled():
        if _any_requires_grad(running_mean, running_var):
            checks.check_no_gradient(running_mean, running_var)
        if _any_requires_grad(input, weight, bias, residual):
            settings = (training, momentum, eps, code, param)
            return autograd.apply_unwrapped(input, weight, bias, residual, state, settings)
    if training:
        return ops.batch_norm_train(input, weight, bias, *state, residual, momentum, eps, code, param)[0]
    return ops.batch_norm_eval(input, weight, bias, running_mean, running_var, residual, eps, code, param)


def _has_kernel(x: Tensor, compiling: bool) -> bool:
    """Whether the ops can run on ``x``: they have kernels for its device, and nothing asks for a transform."""
    return (
        _extension.has_kernels_for(x, compiling)
        and x.dim() >= 2  # not (0,), which has nothing to compute
        and not autograd.in_transform()
        # What outlived its transform; Dynamo cannot ask, and hands no such tensor on.
        and (compiling or not _is_wrapped(x))
    )
