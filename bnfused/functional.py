"""``batch_norm``: torch's signature plus fusion. It chooses between one op and the reference."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnfused import _extension, activations, autograd, checks, fake, ops, reference, without_cuda

_any_requires_grad = torch._C._any_requires_grad
_tracing_state = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PLAIN_TENSORS = (Tensor, nn.Parameter)  # other classes may be without memory, as FakeTensor is

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
    ``mean`` and the unbiased ``var``, in place. Otherwise they are the running statistics, which stay as they are.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64. Every dense layout (contiguous, channels_last, any
            permutation) is read as it is and kept in the output; a tensor with other strides is copied first.
        running_mean, running_var: ``(C,)``, float32 (float64 for a float64 ``input``) or the dtype of ``input``; each
            may be None in training.
        weight, bias: ``(C,)``, float32 (float64 for a float64 ``input``) or the dtype of ``input``; None means 1 and 0.
        training: use the statistics of this batch.
        momentum: the weight of the new batch; None means ``1 / num_batches_tracked``, the cumulative average.
        eps: added to the variance, positive in training.
        residual: shape and dtype of ``input``; None means 0.
        activation: a name in ``bnfused.activations.ACTIVATIONS``, or None.
        activation_param: ``negative_slope`` of leaky_relu (0.01 if None), ``alpha`` of elu (1 if None).
        num_batches_tracked: int64 with one element; counts the training batches, in place.

    Returns:
        ``y``, with the shape, dtype and (where it is dense) strides of ``input``.

    Raises:
        TypeError: ``input`` is not a tensor; ``activation_param`` is a tensor that requires grad.
        ValueError: training with one value per channel, whose variance is undefined; ``eps`` is not positive in
            training, or negative otherwise; the activation is not known.
        RuntimeError: a rank, shape, dtype or device does not fit ``input``, or running statistics require grad or, in
            eval, are missing. The message names the argument.
        Whatever is raised, the running statistics and the counter are as they were.

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithm 1; semantics of ``torch.nn.functional.batch_norm``.
    """
    compiling = is_compiling()
    elsewhere: Any = None
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        tensors = (input, running_mean, running_var, weight, bias, residual)
        elsewhere = functools.partial(handle_torch_function, batch_norm, tensors)  # type: ignore[call-arg]
    elif not _has_kernel(input, compiling):
        elsewhere = reference.batch_norm
    if elsewhere is not None:
        return elsewhere(
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
    code, param = activations.resolve(activation, activation_param)
    if training and momentum is None and num_batches_tracked is None:
        momentum = 0.0  # torch leaves the statistics as they are if nothing counts the batches
    state = (running_mean, running_var, num_batches_tracked)
    if compiling or input.is_meta or type(input) not in _PLAIN_TENSORS:
        # The stand-ins of the kernels (bnfused/fake.py) make no checks.
        checks.check_call(input, running_mean, running_var, training, eps)
    try:
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
    except (RuntimeError, TypeError, ValueError):
        # An op refuses arguments before it writes anything. What torch's batch_norm refuses too is refused in its
        # words and with its exceptions. A call that succeeds does not pay for these checks.
        try:
            checks.check_call(input, running_mean, running_var, training, eps)
        except (RuntimeError, TypeError, ValueError) as refusal:
            raise refusal from None
        raise


def _has_kernel(x: Tensor, compiling: bool) -> bool:
    """Whether the ops can run on ``x``. The reference takes, or refuses, everything that they cannot."""
    return (
        isinstance(x, Tensor)
        and x.dim() >= 2  # shape (0,) has nothing to compute
        and ((x.is_cpu and _extension.is_available()) or _extension.has_kernels_for(x, compiling))
        and not autograd.in_transform()
        # A tensor may outlive its transform. Dynamo cannot trace the question, and passes on no such tensor.
        and (compiling or not _is_wrapped(x))
    )
