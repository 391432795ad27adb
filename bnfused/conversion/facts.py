"""Facts about a module or a function at the moment of a call: whether fusing could be noticed, and what it computes.

Functions and methods of torch are compared with those that were there when bnfused was imported. Profilers and
quantisers replace some of them later. A function that was replaced is not fused, but called.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from bnfused import modules, sync

# Each batch norm of bnfused inherits one of these two, so that they tell its class.
NORMALIZE = modules.BatchNorm2d.forward
SYNCHRONIZE = sync.SyncBatchNorm.forward

_CALL = nn.Module.__call__
_CALL_IMPLEMENTATION = nn.Module._call_impl
_SEQUENTIAL_FORWARD = nn.Sequential.forward


def class_forward(module: nn.Module) -> Any:
    """The forward of the module's class. A module of ``torch.jit`` has none: then it is None."""
    return getattr(type(module), "forward", None)


def is_sequence(module: nn.Module) -> bool:
    """Whether the module calls its children one after the other and does nothing else."""
    return class_forward(module) is _SEQUENTIAL_FORWARD and None not in module._modules.values()


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its forward, and nobody watches it."""
    cls = type(module)
    return (
        # torch.export wraps nn.Module.__call__ to note which module each node came from.
        (cls.__call__ is _CALL or (is_compiling() and cls.__call__ is nn.Module.__call__))
        and cls._call_impl is _CALL_IMPLEMENTATION
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        )
    )


# Modules that return their input itself if they drop nothing. The value names the attribute with the probability.
_DROPS = {
    ("torch.nn.modules.dropout", "Dropout"): "p",
    ("torch.nn.modules.dropout", "Dropout1d"): "p",
    ("torch.nn.modules.dropout", "Dropout2d"): "p",
    ("torch.nn.modules.dropout", "Dropout3d"): "p",
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): "p",
    ("timm.layers.drop", "DropPath"): "drop_prob",
    ("timm.layers.drop", "DropBlock2d"): "drop_prob",
}


def drop_probability(module: nn.Module) -> str | None:
    """The attribute of a drop layer that holds its probability; None for other modules."""
    return _DROPS.get((type(module).__module__, type(module).__qualname__))


def may_be_transparent(module: nn.Module) -> bool:
    """Whether ``is_transparent`` could become true of the module."""
    return type(module) is nn.Identity or drop_probability(module) is not None


_IDENTITY_FORWARD = nn.Identity.forward


def is_transparent(module: nn.Module) -> bool:
    """Whether the module returns its input itself."""
    cls = type(module)
    if cls is nn.Identity:
        if cls.forward is not _IDENTITY_FORWARD:
            return False
    else:
        probability = drop_probability(module)
        if probability is None or (module.training and getattr(module, probability) != 0):
            return False
    return is_bare(module) and "forward" not in module.__dict__


# (name for ``batch_norm``, activation_param)
NameAndParam = tuple[str, float | None]

# For each activation of torch.nn.functional, the name of its parameter; then the functions that compute each.
_PARAMETERS: dict[str, str | None] = {
    "relu": None,
    "relu6": None,
    "leaky_relu": "negative_slope",
    "elu": "alpha",
    "silu": None,
    "gelu": None,
    "hardswish": None,
    "sigmoid": None,
    "tanh": None,
}
_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in _PARAMETERS if name not in ("sigmoid", "tanh")},
    torch.relu: "relu",
    torch.relu_: "relu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}
# torch.nn.functional.relu calls these. The functions of the other activations are not written in Python.
_RELU = (torch.relu, torch.relu_)
_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"}
_METHOD_OF = {name: getattr(Tensor, name) for name in _METHODS}
ADDITIONS = (torch.add, operator.add)

# For each module: the name, the module's forward, and the function that this forward calls, with its place and name.
_MODULES: dict[type[nn.Module], tuple[str, Any, Any, str, Any]] = {
    cls: (name, cls.forward, place, called, getattr(place, called))
    for cls, name, place, called in (
        (nn.ReLU, "relu", F, "relu"),
        (nn.ReLU6, "relu6", F, "hardtanh"),  # nn.ReLU6 inherits the forward of nn.Hardtanh
        (nn.LeakyReLU, "leaky_relu", F, "leaky_relu"),
        (nn.ELU, "elu", F, "elu"),
        (nn.SiLU, "silu", F, "silu"),
        (nn.GELU, "gelu", F, "gelu"),
        (nn.Hardswish, "hardswish", F, "hardswish"),
        (nn.Sigmoid, "sigmoid", torch, "sigmoid"),
        (nn.Tanh, "tanh", torch, "tanh"),
    )
}


def _is_intact(name: str) -> bool:
    return name != "relu" or (torch.relu is _RELU[0] and torch.relu_ is _RELU[1])


def may_be_activation(module: nn.Module) -> bool:
    """Whether ``activation_of`` could know the module."""
    return type(module) in _MODULES


def activation_of(module: nn.Module) -> NameAndParam | None:
    """The activation that the module computes, if it is one that ``batch_norm`` knows."""
    found = _MODULES.get(type(module))
    if found is None:
        return None
    name, forward, place, called, function = found
    if type(module).forward is not forward or getattr(place, called) is not function:
        return None
    if "forward" in module.__dict__ or not is_bare(module) or not _is_intact(name):
        return None
    if name == "gelu" and getattr(module, "approximate", "none") != "none":
        return None
    parameter = _PARAMETERS[name]
    return name, None if parameter is None else getattr(module, parameter)


def activation_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NameAndParam | None:
    """The activation that ``function(y, *args, **kwargs)`` computes of ``y``, for a function of torch."""
    try:
        name = _FUNCTIONS.get(function)
    except TypeError:  # a callable that has no hash
        return None
    if name is None or not _is_intact(name):
        return None
    if not args and not kwargs:
        return name, None
    parameter = _PARAMETERS[name]
    options = {key: value for key, value in kwargs.items() if key != "inplace"}
    values = list(args)
    if name == "gelu" and options.pop("approximate", "none") != "none":
        return None
    if parameter is not None and parameter in options:
        values.append(options.pop(parameter))
    if options or len(values) > (parameter is not None) or not all(type(value) in (int, float) for value in values):
        return None
    return name, float(values[0]) if values else None


def activation_method(name: str) -> NameAndParam | None:
    """The activation that ``y.name()`` computes of a tensor ``y``."""
    if name in _METHODS and getattr(Tensor, name) is _METHOD_OF[name]:
        return name.rstrip("_"), None
    return None


def module_of_method(function: Any) -> nn.Module | None:
    """The module whose method ``function`` is, if it is one."""
    if type(function) is MethodType and isinstance(function.__self__, nn.Module):
        return function.__self__
    return None


def fits(residual: Any, x: Any) -> bool:
    """Whether the op takes ``residual`` with ``x``: nothing has to be broadcast, promoted, moved or copied."""
    return (
        isinstance(residual, Tensor)
        and isinstance(x, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
        and residual.layout == x.layout == torch.strided
        and _have_one_memory_order(residual, x)
    )


def _have_one_memory_order(a: Tensor, b: Tensor) -> bool:
    """Whether dimensions follow each other in memory in the same order, as in a tensor and a slice of a larger one.

    Otherwise the strides of a sum depend on the order in which it is written.
    """
    if a.stride() == b.stride():
        return True
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return all(t.stride(i) > t.stride(j) for t in (a, b) for i, j in itertools.pairwise(order))


def name_of(function: Callable[..., Any] | Any) -> str:
    """The name of a function or a module in a report."""
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__
