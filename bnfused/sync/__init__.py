"""SyncBatchNorm: the statistics of a batch that is spread over the processes of a group.

Each way has one collective: the forward gathers mean, standard deviation and count, the backward adds up two sums.
They run on any backend of torch.distributed; Gloo with CPU tensors is one of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnfused import activations, checks, parts
from bnfused.modules import _BatchNormForward, with_state_of
from bnfused.sync.autograd import SyncBatchNormFunction
from bnfused.sync.collectives import Hierarchy, compare_ranks_once, gather, group_to_sync, hierarchy, levels

__all__ = [
    "Hierarchy",
    "SyncBatchNorm",
    "SyncBatchNormFunction",
    "hierarchy",
    "sync_batch_norm",
    "synchronized_forward",
]


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    num_batches_tracked: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Batch norm in training, with the statistics of all processes in ``group``. Every one of them has to call it.

    The batches of the processes may differ in every size but C, and may be empty. The statistics are sent in the form
    of ``bnfused.parts.pack_moments``: the count is exact, and a mean that is large compared with the standard deviation
    keeps its digits. The running statistics end bitwise the same on every rank. The gradients of weight and bias are
    this process's share, which DDP adds up; the gradient of ``input`` is that of the sum of all processes' losses.
    Gradients of every order are right, provided that every process computes the same ones.

    Args:
        group: a ``ProcessGroup`` that this process is in, or a ``Hierarchy``; None means all processes.
        other arguments: as for ``bnfused.functional.batch_norm``.

    Returns:
        ``y``, with the shape, dtype and (where it is dense) strides of ``input``.

    Raises:
        ValueError: all processes together have one value per channel. Every rank raises. If ``input`` is not on the
            CPU, and under torch.compile, ``torch._assert_async`` raises instead, without waiting for the device.
            Also ``eps`` and the activation, as for ``bnfused.functional.batch_norm``.
        RuntimeError: an argument does not fit ``input``, or a collective failed; then the message names rank, op and
            shape.
        Whatever is raised, the running statistics are as they were.
    """
    checks.check_input(input)
    activations.resolve(activation, activation_param)
    checks.check_eps(eps, training=True)
    _refuse_transforms()
    checks.check_arguments(input, weight, bias, running_mean, running_var, residual, num_batches_tracked, training=True)
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0  # torch leaves the statistics as they are if nothing counts the batches
    group = dist.group.WORLD if group is None else group

    moments = parts.batch_norm_stats(input.detach())
    *inner, outermost = levels(group)
    for level in inner:
        moments = parts.merge_moments(gather(moments, level))
    gathered = gather(moments, outermost)
    _refuse_single_value(gathered, input)
    mean, var, total = parts.batch_norm_gather_stats(gathered, running_mean, running_var, num_batches_tracked, momentum)
    settings = (eps, activation, activation_param)
    return SyncBatchNormFunction.apply(input, weight, bias, residual, mean, var, total, group, settings)


def synchronized_forward(
    module: Any,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    *,
    process_group: Any = None,
    check_ranks: bool = True,
) -> Tensor:
    """``SyncBatchNorm.forward`` for a batch norm of any of torch's classes.

    Args and errors: as for ``SyncBatchNorm`` and ``SyncBatchNorm.forward``.
    """
    group = group_to_sync(process_group) if module.training else None
    if group is None or isinstance(input, fx.Proxy):
        return _BatchNormForward.forward(module, input, residual, activation, activation_param)
    module._check_input_dim(input)
    if check_ranks and not torch.compiler.is_compiling():
        compare_ranks_once(module, input, group)
    in_group = functools.partial(_in_training, group)
    return with_state_of(module, in_group, input, residual, activation, activation_param)


def _in_training(
    group: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    **others: Any,
) -> Tensor:
    """``sync_batch_norm`` with the signature of ``functional.batch_norm``; only a training module synchronizes."""
    assert training
    return sync_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, **others, group=group)


class SyncBatchNorm(_BatchNormForward, _BatchNorm):
    """``torch.nn.SyncBatchNorm`` on fused kernels, on the CPU too: (N, C, *).

    The batches of the processes may differ in size and may be empty. In eval, without a process group, or in a group of
    one process, it is batch norm on this process alone.

    It has the constructor, the methods, the state and the name of ``torch.nn.SyncBatchNorm``, and ``isinstance`` takes
    it for a ``_BatchNorm``. It is no subclass of ``torch.nn.SyncBatchNorm``, because DistributedDataParallel looks for
    that class and refuses to train it on the CPU. A class that was a subclass on GPUs only would be a different class
    in the checkpoint. Apart from DDP's log, nothing else in torch looks for that class.

    Args:
        process_group: as for ``torch.nn.SyncBatchNorm``, or a ``bnfused.sync.Hierarchy``.
        check_ranks: at its first synchronized call, and again after a change of the group, the module compares the
            number of channels, the dtype and requires_grad of the input between the ranks, and raises on all of them
            if they differ. That costs a collective, and reading its result on the host.
        other arguments: as for ``torch.nn.SyncBatchNorm``.
    """

    # For a module that got this class without a call of __init__.
    process_group: Any = None
    check_ranks: bool = True
    # The class that bnfused.convert found, and that bnfused.revert restores; None means torch.nn.SyncBatchNorm.
    converted_from: type[nn.Module] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *args: Any,
        check_ranks: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, *args, **kwargs)
        self.process_group = process_group
        self.check_ranks = check_ranks

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> Tensor:
        """``act(bn(input) + residual)``: ``bnfused.sync.sync_batch_norm`` in training, otherwise as ``BatchNorm*d``.

        Args:
            input: ``(N, C, *)``; N may be 0.
            residual: added before the activation; shape and dtype of ``input``.
            activation: a name in ``bnfused.activations.ACTIVATIONS``, or None.
            activation_param: ``negative_slope`` of leaky_relu, ``alpha`` of elu.

        Raises:
            ValueError: ``input`` has fewer than two dimensions, or no channels.
            RuntimeError: with ``check_ranks``, the ranks do not agree.
            Also the errors of ``bnfused.sync.sync_batch_norm`` and of ``bnfused.functional.batch_norm``.
        """
        return synchronized_forward(
            self,
            input,
            residual,
            activation,
            activation_param,
            process_group=self.process_group,
            check_ranks=self.check_ranks,
        )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, to this class.

        ``bnfused.convert(module, sync=True)`` also fuses, keeps hooks, and can be undone.
        """
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for converted in module.modules():
            kind: type[nn.Module] = type(converted)
            if kind is nn.SyncBatchNorm:
                converted.__class__ = cls
        return module

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")


def _refuse_single_value(moments: Tensor, input: Tensor) -> None:
    """Raise, on every rank, if all ranks together have one value per channel.

    A rank with two or more values knows that there are enough. Only the others look at the counts, and not on the host
    unless they are on the CPU, so that the host does not wait for the device.
    """
    if checks.values_per_channel(input) > 1:
        return
    _, _, counts = parts.unpack_moments(moments)
    message = "Expected more than 1 value per channel in all ranks together when training"
    if counts.is_cpu and not torch.compiler.is_compiling():
        if counts.sum() == 1:
            raise ValueError(f"{message}, got input {input.shape}")
    else:  # the message has no shape, since a graph for any batch size does not know it
        torch._assert_async(counts.sum() != 1, message)


def _refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("SyncBatchNorm: expected no torch.func transform in training, got one")
