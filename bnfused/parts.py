"""Batch norm in parts, for a batch that is spread over processes, so that no call sees all of it.

Forward: ``batch_norm_stats`` on each part, ``batch_norm_gather_stats`` over all of them, ``batch_norm_apply``.
Backward: ``batch_norm_backward_reduce``, a sum over the parts, ``batch_norm_backward_apply``. None of them is
differentiable; ``bnfused.SyncBatchNorm``, which is made of them, is. Statistics are merged and applied in float64, and
nothing is read on the host. Each function is one kernel on the CPU and on CUDA. On other devices, and without the
extension, it is plain torch, which is right but slow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnfused import _extension, activations, checks, fake, ops, reference


@torch.no_grad()
def batch_norm_stats(input: Tensor) -> Tensor:
    """The moments of a part of a batch: mean, standard deviation and number of values of each channel.

    They are packed into one tensor for one collective; ``pack_moments`` documents the form and its precision.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64, in any layout; N may be 0.

    Returns:
        Moments: float64 ``(2 C + 1,)`` for a float64 input, otherwise float32 ``(3 C + 2,)``.

    Raises:
        TypeError, RuntimeError: ``input`` is not a dense tensor of one of these dtypes.
    """
    checks.check_input(input)
    if _has_kernel(input):
        return _op("batch_norm_stats")(input)
    mean, var = reference.statistics(input.to(reference.arithmetic_dtype(input)))
    return pack_moments(mean, var, mean.new_full((), checks.values_per_channel(input)), _dtype_of_moments(input))


@torch.no_grad()
def pack_moments(mean: Tensor, var: Tensor, count: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Statistics that were computed elsewhere, in the form of ``batch_norm_stats``.

    In float64 that is the mean, the standard deviation ``sqrt(var)``, and the count. In float32, mean and count are two
    values each: the rounded one, and the rest that rounding left. Together they have 48 bits, so that a mean that is
    large compared with the deviation keeps its digits, and every count is exact. The deviation is one value: rounding
    it, by 2**-24, changes a normalized value no more than rounding that value does. It is sent instead of the variance
    or the sum of squares, because float32 can hold the deviation of all values that it can hold (1e30 or 1e-30), but
    not their squares.

    Args:
        mean, var: ``(*, C)``. ``var`` is the biased variance; without values it may be anything finite.
        count: ``(*,)``.
        dtype: float32 or float64; the same for all parts.

    Returns:
        ``(*, 3 C + 2)`` in float32: mean, its rest, deviation, count, its rest; ``(*, 2 C + 1)`` in float64.
    """
    deviation, count = var.sqrt(), count.unsqueeze(-1)
    if dtype == torch.float64:
        return torch.cat([mean.to(dtype), deviation.to(dtype), count.to(dtype)], -1)
    return torch.cat([*_pair(mean), deviation.to(dtype), *_pair(count)], -1)


def _pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 tensors that add up to ``values``: the rounded values and the rest, which is 0 for an infinity."""
    rounded = values.float()
    rest = values - rounded.to(values.dtype)
    return rounded, rest.float().where(rest.isfinite(), 0)


@torch.no_grad()
def unpack_moments(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``pack_moments``: mean and var, ``(*, C)``, and count, ``(*,)``, in float64.

    Raises:
        RuntimeError: ``moments`` does not have a dtype and size that ``pack_moments`` returns.
    """
    channels = _channels_of("unpack_moments", moments)
    values = moments.to(reference.arithmetic_dtype(moments))
    if moments.dtype == torch.float64:
        mean, deviation, count = values.split([channels, channels, 1], -1)
    else:
        mean, rest, deviation, count, rest_of_count = values.split([channels, channels, channels, 1, 1], -1)
        mean, count = mean + rest, count + rest_of_count
    return mean, deviation.square(), count.squeeze(-1)


@torch.no_grad()
def batch_norm_gather_stats(
    moments: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of the whole batch from the moments of its parts; moves the running statistics, in place.

    They are merged in float64. Every process that computes them from the same moments gets the same bits. A part
    without values has no weight, whatever else it holds. A batch of fewer than two values per channel, whose variance
    is undefined, is counted and leaves the running statistics as they are.

    Args:
        moments: ``(parts, 3 C + 2)`` float32 or ``(parts, 2 C + 1)`` float64: the results of ``batch_norm_stats`` on
            all processes, after an all-gather.
        running_mean, running_var: ``(C,)``, of any floating-point dtype, or None.
        num_batches_tracked: int64 with one element, which counts the batches in place, or None.
        momentum: the weight of the new batch; None means ``1 / num_batches_tracked``, the cumulative average.

    Returns:
        ``mean`` and the biased ``var``, float64 ``(C,)``; the total count, float64 with one element.

    Raises:
        RuntimeError: a shape or dtype does not fit. Nothing has been written then.

    Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0  # torch leaves the statistics as they are if nothing counts the batches
    if _has_kernel(moments):
        state = (running_mean, running_var, num_batches_tracked)
        return _op("batch_norm_gather_stats")(moments, *state, None, momentum)
    _check_gathered(moments, running_mean, running_var)
    mean, var, count = unpack_moments(moments)
    total = count.sum()
    share = (count / total.clamp(min=1)).unsqueeze(1)
    # An empty part may hold a NaN, and 0 * NaN is NaN.
    mean, var = (torch.where(count.unsqueeze(1) > 0, of_part, 0) for of_part in (mean, var))
    center = (share * mean).sum(0)
    center = center + (share * (mean - center)).sum(
        0
    )  # what rounding left, so that the mean of equal means is that value
    m2 = (count.unsqueeze(1) * (var + (mean - center).square())).sum(0)

    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    factor: Any = momentum
    if momentum is None:
        assert num_batches_tracked is not None
        factor = num_batches_tracked.to(center.dtype).reciprocal()
    for running, of_batch in ((running_mean, center), (running_var, m2 / (total - 1).clamp(min=1))):
        if running is not None:
            old = running.to(center.dtype)
            running.copy_(torch.where(total > 1, (1 - factor) * old + factor * of_batch, old))
    return center, m2 / total.clamp(min=1), total


@torch.no_grad()
def merge_moments(moments: Tensor) -> Tensor:
    """The moments of several parts, merged into those of one part, which can be gathered again.

    Args:
        moments: as for ``batch_norm_gather_stats``.

    Returns:
        The moments that ``batch_norm_stats`` would return for all parts together.

    Raises:
        RuntimeError: a shape or dtype does not fit.
    """
    if _has_kernel(moments):
        merged = torch.empty_like(moments[0])
        _op("batch_norm_gather_stats")(moments, None, None, None, merged, 0.0)
        return merged
    return pack_moments(*batch_norm_gather_stats(moments), moments.dtype)


@torch.no_grad()
def batch_norm_apply(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((input - mean) * invstd * weight + bias + residual)`` with ``invstd = 1 / sqrt(var + eps)``.

    Args:
        mean, var: float64 ``(C,)``, the statistics of the whole batch.
        input, weight, bias, residual, activation, activation_param: as for ``bnfused.functional.batch_norm``.

    Returns:
        ``y``, with shape and dtype of ``input``; ``invstd``, float64 ``(C,)``; ``mask``, uint8. With a residual and
        ReLU, the mask has a bit for each value, which is 1 if ReLU let the value pass; ``bnfused.fake.mask_bytes``
        documents the order. The backward needs it, and then needs no residual. Otherwise the mask is empty.

    Raises:
        RuntimeError, ValueError: an argument does not fit ``input``; the message names it.
    """
    checks.check_input(input)
    code, param = activations.resolve(activation, activation_param)
    mean, var = mean.contiguous(), var.contiguous()
    if _has_kernel(input):
        return _op("batch_norm_apply")(input, weight, bias, mean, var, residual, eps, code, param)
    checks.check_arguments(input, weight, bias, None, None, residual, None, True)
    invstd = (var + eps).rsqrt()
    values = input.to(mean.dtype)
    y = reference.transform(values, mean, invstd, weight, bias, residual, code, param, input.dtype)
    masked = code == activations.RELU_CODE and residual is not None
    return y, invstd, _packed((y > 0) | y.isnan(), input) if masked else input.new_empty(0, dtype=torch.uint8)


@torch.no_grad()
def batch_norm_backward_reduce(
    grad_y: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
) -> Tensor:
    """Two sums over this part: ``g = grad_y * act'(z)``, and ``g * xhat`` with ``xhat = (input - mean) * invstd``.

    The gradient of ``input`` in every part needs the sums over all parts. The sums over this part are also its share of
    the gradients of bias and weight.

    Args:
        grad_y: shape and dtype of ``input``.
        mean, invstd: float64 ``(C,)``, the statistics of the whole batch.
        mask: from ``batch_norm_apply``.
        residual: as in the forward; None if there is a mask.
        other arguments: as in the forward.

    Returns:
        ``(2, C)``, float64: ``sum g`` and ``sum g * xhat``. float32 would round once more for each part that is added,
        and would save 8 bytes per channel in a collective whose time is mostly latency.

    Raises:
        RuntimeError, ValueError: an argument does not fit ``input``; the message names it.
    """
    _check_input_of_backward(input)
    code, param = activations.resolve(activation, activation_param)
    if _has_kernel(input):
        args = (grad_y, input, weight, bias, residual, mean, invstd, mask, code, param)
        return _op("batch_norm_backward_reduce")(*args)
    g = _grad_before_activation(grad_y, input, mean, invstd, weight, bias, residual, mask, code, param)
    xhat = (input.to(g.dtype) - reference.per_channel(mean, input)) * reference.per_channel(invstd, input)
    dims = [0, *range(2, input.dim())]
    return torch.stack([g.sum(dims), (g * xhat).sum(dims)])


@torch.no_grad()
def batch_norm_backward_apply(
    grad_y: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sums: Tensor,
    count: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    output_mask: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """``grad_x = weight * invstd * (g - sums[0] / count - xhat * sums[1] / count)`` and ``grad_residual = g``.

    Args:
        sums: float64 ``(2, C)``, the results of ``batch_norm_backward_reduce`` added up over all parts.
        count: float64 with one element, from ``batch_norm_gather_stats``.
        output_mask: which of the two gradients are wanted; an unwanted one has no elements.
        other arguments: as for ``batch_norm_backward_reduce``.

    Returns:
        ``grad_x`` and ``grad_residual``, with shape and dtype of ``input``.

    Raises:
        RuntimeError, ValueError: an argument does not fit ``input``; the message names it.
    """
    _check_input_of_backward(input)
    code, param = activations.resolve(activation, activation_param)
    if _has_kernel(input):
        args = (grad_y, input, weight, bias, residual, mean, invstd, mask, sums, count, code, param, output_mask)
        return _op("batch_norm_backward_apply")(*args)
    mean_grad, mean_grad_xhat = sums / count.clamp(min=1)
    g = _grad_before_activation(grad_y, input, mean, invstd, weight, bias, residual, mask, code, param)
    xhat = (input.to(g.dtype) - reference.per_channel(mean, input)) * reference.per_channel(invstd, input)
    grad_x = g - reference.per_channel(mean_grad, input) - xhat * reference.per_channel(mean_grad_xhat, input)
    scale = invstd if weight is None else invstd * weight
    grad_x = (grad_x * reference.per_channel(scale, input)).to(input.dtype)
    absent = input.new_empty(0)
    return grad_x if output_mask[0] else absent, g.to(input.dtype) if output_mask[1] else absent


def _has_kernel(x: Tensor) -> bool:
    return _extension.has_kernels_for(x, torch.compiler.is_compiling())


def _check_input_of_backward(x: Tensor) -> None:
    if not torch.compiler.is_compiling():  # Dynamo cannot trace the layout in a backward; the forward checked it
        checks.check_input(x)


def _op(name: str) -> Any:
    """The op. torch.compile can trace the wrapper of torch only, which ``bnfused.ops`` goes around."""
    return getattr(torch.ops.bnfused, name).default if torch.compiler.is_compiling() else getattr(ops, name)


def _grad_before_activation(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: int,
    activation_param: float,
) -> Tensor:
    """``g``, the gradient of the activation's input, in the dtype of ``mean``."""
    if activation == 0:
        return grad_y.to(mean.dtype)
    if activation == activations.RELU_CODE and mask is not None and mask.numel() > 0:
        return torch.where(_unpacked(mask, x), grad_y, 0).to(mean.dtype)
    values = x.to(mean.dtype)
    added = torch.zeros_like(values) if residual is None else residual.to(mean.dtype)
    with torch.enable_grad():
        added = added.detach().requires_grad_()
        y = reference.transform(values, mean, invstd, weight, bias, added, activation, activation_param, x.dtype)
        (g,) = torch.autograd.grad(y, added, grad_y)
    return g


def _packed(passes: Tensor, x: Tensor) -> Tensor:
    """The mask that the kernels would write: a bool tensor in bits, in the memory order of ``torch.empty_like(x)``."""
    if x.numel() == 0:
        return x.new_empty(0, dtype=torch.uint8)
    bits = torch.empty_like(x, dtype=torch.uint8).copy_(passes).as_strided((x.numel(),), (1,))
    bits = bits.view(-1, _values_in_run(x))
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def _unpacked(mask: Tensor, x: Tensor) -> Tensor:
    """The inverse of ``_packed``: bool, with the shape of ``x`` and the strides of ``torch.empty_like(x)``."""
    run = _values_in_run(x)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    passes = torch.empty_like(x, dtype=torch.bool)
    passes.as_strided((x.numel(),), (1,)).copy_(bits.view(-1, run + -run % 8)[:, :run].reshape(-1))
    return passes


def _values_in_run(x: Tensor) -> int:
    """The number of values that lie together in memory and share the padding to whole bytes."""
    inner: int = fake.problem(x)[2]
    return x.numel() if inner == 1 else inner


def _dtype_of_moments(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _channels_of(op: str, moments: Tensor) -> int:
    """The number of channels in packed moments; ``packed_size`` in ``csrc/batch_norm.h`` has the same sizes."""
    if moments.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{op}: expected moments of torch.float32 or torch.float64, got {moments.dtype}")
    of_channel, of_count = (2, 1) if moments.dtype == torch.float64 else (3, 2)
    size = moments.shape[-1]
    if size < of_count or (size - of_count) % of_channel:
        raise RuntimeError(
            f"{op}: expected moments of shape [parts, {of_channel} C + {of_count}], got {list(moments.shape)}"
        )
    return (size - of_count) // of_channel


def _check_gathered(moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    channels = _channels_of("batch_norm_gather_stats", moments)
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None and tensor.shape != (channels,):
            raise RuntimeError(
                f"batch_norm_gather_stats: expected {name} of shape {[channels]}, got {list(tensor.shape)}"
            )
