"""Drop-in modules: torch.nn's own batch norms with another ``forward``.

They subclass torch's, so that constructor, ``state_dict``, ``isinstance``, repr, pickle and every tool that looks for a
batch norm keep working. Fusion is an argument of the call and is never stored: a module that carried its own ReLU would
lose it if somebody replaced the module (as ``SyncBatchNorm.convert_sync_batchnorm`` does).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._jit_internal import is_scripting

from bnfused import functional


def _get(module: Any, store: dict[str, Tensor | None], name: str) -> Any:
    """``module.name``, looked up in ``store`` first. ``nn.Module.__getattr__`` takes three times as long.

    A parametrized or deleted attribute is not in ``store``, and is looked up as usual.
    """
    return store[name] if name in store else getattr(module, name)


class _BatchNormForward:
    """The ``forward`` of every batch norm here. It is mixed in before torch's class, and uses the state of that."""

    def forward(
        self: Any,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        activation_param: float | None = None,
    ) -> Tensor:
        """``act(bn(input) + residual)`` in one op; see ``bnfused.functional.batch_norm``.

        Args:
            input: in a shape that torch's module of the same name takes.
            residual: added before the activation; shape and dtype of ``input``.
            activation: a name in ``bnfused.activations.ACTIVATIONS``, or None.
            activation_param: ``negative_slope`` of leaky_relu, ``alpha`` of elu.

        Returns:
            ``y``, with the shape, dtype and (where it is dense) strides of ``input``.

        Raises:
            ValueError: ``input`` does not have the number of dimensions that torch's module takes.
            Also the errors of ``bnfused.functional.batch_norm``.
        """
        if not is_scripting():  # torch.jit.script skips this block and compiles the lines after it
            if isinstance(input, fx.Proxy) and is_part_of_trace(self, input):
                fusion = {"residual": residual, "activation": activation, "activation_param": activation_param}
                return leaf_of_trace(self, input, fusion)
            self._check_input_dim(input)
            return with_state_of(self, functional.batch_norm, input, residual, activation, activation_param)
        if residual is not None or activation is not None:
            raise RuntimeError("batch_norm: expected no residual and no activation in torch.jit.script, got one")
        return self._forward_of_torch(input)

    # For torch.jit.script, which takes a method by its name.
    _forward_of_torch = FunctionType(
        nn.BatchNorm2d.forward.__code__, nn.BatchNorm2d.forward.__globals__, "_forward_of_torch"
    )


def with_state_of(
    module: Any,
    batch_norm: Callable[..., Tensor],
    input: Tensor,
    residual: Tensor | None,
    activation: str | None,
    activation_param: float | None,
) -> Tensor:
    """Call ``batch_norm``, which has the signature of ``functional.batch_norm``, with the state of ``module``.

    The statistics of the batch are used in training, and in eval by a module without running statistics. The counter
    is handed over as int64, and gets its value back if the module has it in another dtype.
    """
    training = module.training
    buffers, parameters = module._buffers, module._parameters
    running_mean, running_var = _get(module, buffers, "running_mean"), _get(module, buffers, "running_var")
    tracked: Any = None
    if training:
        if module.track_running_stats:
            tracked = _get(module, buffers, "num_batches_tracked")
        else:
            running_mean = running_var = None
    else:
        training = running_mean is None and running_var is None
    count = tracked
    if tracked is not None and tracked.dtype != torch.int64:  # Module.type() casts every buffer
        count = tracked.to(torch.int64)
    y = batch_norm(
        input,
        running_mean,
        running_var,
        _get(module, parameters, "weight"),
        _get(module, parameters, "bias"),
        training,
        module.momentum,
        module.eps,
        residual=residual,
        activation=activation,
        activation_param=activation_param,
        num_batches_tracked=count,
    )
    if count is not tracked:
        tracked.copy_(count)
    return y


def is_part_of_trace(module: nn.Module, input: fx.Proxy) -> bool:
    """Whether torch.fx records a call of the module within a graph. A module traced by itself would have no name."""
    return getattr(input.tracer, "root", None) is not module


def leaf_of_trace(module: nn.Module, input: fx.Proxy, fusion: dict[str, Any]) -> Any:
    """Record one ``call_module`` node, as torch.fx does for the modules of ``torch.nn``, which it does not trace."""
    tracer: Any = input.tracer
    options = {name: value for name, value in fusion.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), options)


class BatchNorm1d(_BatchNormForward, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` on fused kernels: (N, C) or (N, C, L)."""


class BatchNorm2d(_BatchNormForward, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` on fused kernels: (N, C, H, W)."""


class BatchNorm3d(_BatchNormForward, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` on fused kernels: (N, C, D, H, W)."""


class _LazyBatchNormForward(_BatchNormForward):
    """The first call takes ``num_features`` from the input; the other arguments of the call do not matter for that."""

    def initialize_parameters(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> None:
        super().initialize_parameters(input)  # type: ignore[misc]


class LazyBatchNorm1d(_LazyBatchNormForward, nn.LazyBatchNorm1d):
    """``torch.nn.LazyBatchNorm1d``; becomes ``bnfused.BatchNorm1d``."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNormForward, nn.LazyBatchNorm2d):
    """``torch.nn.LazyBatchNorm2d``; becomes ``bnfused.BatchNorm2d``."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNormForward, nn.LazyBatchNorm3d):
    """``torch.nn.LazyBatchNorm3d``; becomes ``bnfused.BatchNorm3d``."""

    cls_to_become = BatchNorm3d
