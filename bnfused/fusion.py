"""Runs a batch norm and what follows it as one op, where that is the same; decided in every call.

Nothing is stored: each call looks at the modules that are there, and where one has hooks, was replaced, drops values or
is no activation that ``batch_norm`` knows, they are called one after the other as ever.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from bnfused import modules, sync

_tracing_state = torch._C._get_tracing_state

# Every batch norm of bnfused inherits one of these: a class that has it normalizes as bnfused does.
NORMALIZE = modules.BatchNorm2d.forward
_FORWARDS = (NORMALIZE, sync.SyncBatchNorm.forward)

# ---------------------------------------------------------------------------- what is known of a module at this moment


def class_forward(module: nn.Module) -> Any:
    """The forward of the module's class; None where that has none to look at, as the modules of ``torch.jit``."""
    return getattr(type(module), "forward", None)


def is_sequence(module: nn.Module) -> bool:
    """Whether the module calls its children one after the other and does nothing else."""
    return class_forward(module) is nn.Sequential.forward and None not in module._modules.values()


def sequence_of(module: Any) -> list[nn.Module]:
    """What such a module calls; one that stands there twice is called twice."""
    return list(module)


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its forward, and nobody watches."""
    return type(module).__call__ is nn.Module.__call__ and not (
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


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is bnfused's batch norm and no more."""
    forward = module.__dict__.get("forward")
    return class_forward(module) in _FORWARDS if forward is None else isinstance(forward, BatchNormForward)


def is_synchronized(module: nn.Module) -> bool:
    """Whether such a module, or timm's, has the statistics of all processes."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, NormalizingForward):
        return forward.synchronized
    return class_forward(module) is sync.SyncBatchNorm.forward


# Modules that return their input itself in eval or where they drop nothing: the attribute that says how much they drop.
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


def is_transparent(module: nn.Module) -> bool:
    """Whether the module returns its input itself."""
    probability = drop_probability(module)
    if probability is None:
        if type(module) is not nn.Identity:
            return False
    elif module.training and getattr(module, probability) != 0:
        return False
    return is_bare(module) and "forward" not in module.__dict__


# Name for ``batch_norm``, and the attribute that is its parameter.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, str | None]] = {
    nn.ReLU: ("relu", None),
    nn.ReLU6: ("relu6", None),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.SiLU: ("silu", None),
    nn.GELU: ("gelu", None),
    nn.Hardswish: ("hardswish", None),
    nn.Sigmoid: ("sigmoid", None),
    nn.Tanh: ("tanh", None),
}
# (name, activation_param)
Activation = tuple[str | None, float | None]


def may_be_activation(module: nn.Module) -> bool:
    """Whether ``activation_of`` could know the module."""
    return type(module) in _ACTIVATIONS


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that the module computes, if it is one that ``batch_norm`` knows."""
    found = _ACTIVATIONS.get(type(module))
    if found is None or not is_bare(module) or "forward" in module.__dict__:
        return None
    name, parameter = found
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    return name, None if parameter is None else getattr(module, parameter)


def batch_norm_at_end(module: nn.Module) -> nn.Module | None:
    """The batch norm of bnfused whose output the module returns, so that it could be asked for more."""
    forward = module.__dict__.get("forward")
    if forward is not None:
        return forward.batch_norm_at_end() if isinstance(forward, Forward) else None
    if class_forward(module) in _FORWARDS:
        return module
    return _batch_norm_at_end_of(sequence_of(module)) if is_sequence(module) else None


def _batch_norm_at_end_of(sequence: Sequence[nn.Module]) -> nn.Module | None:
    for module in reversed(sequence):
        if not may_be_transparent(module):
            return batch_norm_at_end(module)
    return None


# ------------------------------------------------------------------------------------------ what follows a batch norm


class Then(NamedTuple):
    """What is to be done with a module's output: by ``plain``, or by the op of the batch norm that the module ends in.

    ``end`` is why it is not more, for the report: the module that comes next, or in words.
    """

    residual: Tensor | None
    activation: str | None
    activation_param: float | None
    plain: Callable[[Any], Any]
    end: nn.Module | str

    def fits(self, x: Any) -> bool:
        """Whether the op takes the residual: nothing has to be broadcast, promoted, moved or laid out anew."""
        residual = self.residual
        return residual is None or (
            isinstance(residual, Tensor)
            and residual.shape == x.shape
            and residual.dtype == x.dtype
            and residual.device == x.device
            and residual.layout == x.layout == torch.strided
            and _lie_alike(residual, x)
        )

    def followed_by(self, other: Then) -> tuple[Then, Then]:
        """Both as one where the op can do both, and what is left to do after it."""
        if self.activation is not None or (self.residual is not None and other.residual is not None):
            return self, other
        first, second = self.plain, other.plain
        residual = other.residual if self.residual is None else self.residual
        both = Then(residual, other.activation, other.activation_param, lambda y: second(first(y)), other.end)
        return both, NOTHING


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether dimensions follow each other in memory in the same order, as in a tensor and a slice of a larger one.

    Where they do not, the strides of a sum depend on the order in which it is written.
    """
    if a.stride() == b.stride():
        return True
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return all(t.stride(i) > t.stride(j) for t in (a, b) for i, j in itertools.pairwise(order))


def _as_it_is(y: Any) -> Any:
    return y


NOTHING = Then(None, None, None, _as_it_is, "nothing follows it in its module")


class Execution:
    """Carries out what ``run`` decides; the report has another one, which only notes it."""

    def fused(self, module: nn.Module, function: Callable[..., Any], x: Any, then: Then) -> Any:
        """``then`` of the batch norm ``module`` in one op; ``function`` is its forward."""
        return function(x, then.residual, then.activation, then.activation_param)

    def plain(self, function: Callable[..., Any], x: Any, in_the_way: nn.Module | None = None) -> Any:
        """``function(x)``; ``in_the_way`` is what keeps it from being fused."""
        return function(x)

    def block(self, plan: Any, module: nn.Module, args: tuple[Any, ...], then: Then) -> Any:
        """``then`` of a block's forward; ``plan`` is of ``bnfused/blocks.py``, which knows this file."""
        return plan.execute(module, args, then)

    def finish(self, then: Then, y: Any) -> Any:
        return then.plain(y)


EXECUTION = Execution()


def run(module: nn.Module, x: Any, then: Then, on: Execution) -> Any:
    """``then`` of ``module(x)``, in one op where the module ends in a batch norm of bnfused."""
    if is_bare(module):
        forward = module.__dict__.get("forward")
        if isinstance(forward, Forward):
            return forward.run((x,), then, on)
        if forward is None:
            if class_forward(module) in _FORWARDS:
                # A bare module's call is its forward, in two thirds of the time; who records modules wants the call.
                recorded = is_compiling() or _tracing_state() is not None
                return normalize(module, module if recorded else module.forward, x, then, on)
            if is_sequence(module):
                return _run_sequence(sequence_of(module), x, then, on)
    return on.finish(then, on.plain(module, x, module))


def normalize(module: nn.Module, function: Callable[..., Any], x: Any, then: Then, on: Execution) -> Any:
    """``then`` of the batch norm ``module``, whose forward is ``function``."""
    if then.fits(x):
        return on.fused(module, function, x, then)
    return on.finish(then, on.plain(function, x))


def _run_sequence(sequence: Sequence[nn.Module], x: Any, then: Then, on: Execution) -> Any:
    """``then`` of the modules, called one after the other."""
    i = 0
    while i < len(sequence):
        if batch_norm_at_end(sequence[i]) is None:
            x, i = on.plain(sequence[i], x), i + 1
            continue
        own, end = _what_follows(sequence, i)
        if end == len(sequence):
            own, rest = own.followed_by(then)
            return on.finish(rest, run(sequence[i], x, own, on))
        x, i = run(sequence[i], x, own, on), end
    return on.finish(then, x)


def _what_follows(sequence: Sequence[nn.Module], i: int) -> tuple[Then, int]:
    """What the op of ``sequence[i]`` can do as well, and the index of the first module that it cannot."""
    activation: Activation = None, None
    for end in range(i + 1, len(sequence)):
        found = activation_of(sequence[end])
        if found is not None:
            activation = found
            break
        if not is_transparent(sequence[end]):
            return Then(None, None, None, _as_it_is, sequence[end]), i + 1
    else:
        end = len(sequence) - 1
    fused = sequence[i + 1 : end + 1]
    return Then(None, *activation, lambda y: _one_by_one(fused, y), NOTHING.end), end + 1


def _one_by_one(sequence: Sequence[nn.Module], y: Any) -> Any:
    for module in sequence:
        y = module(y)
    return y


# ----------------------------------------------------------------------------------------------------- the forwards


class Forward:
    """Hides the forward of a module's class, as an attribute of the module; it is copied and pickled with it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            return self.original(*args, **kwargs)
        return self.run(args, NOTHING, EXECUTION)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        """Of the forward that this one stands for: torch.export names its line."""
        return type(self.module).forward.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        """None, which would be those of this file: torch.jit.script looks for them first."""
        raise AttributeError(
            f"torch.jit.script: expected the forward of {type(self.module).__name__} itself, got what bnfused.convert "
            "put before it; script bnfused.revert(model)"
        )

    def run(self, args: tuple[Any, ...], then: Then, on: Execution) -> Any:
        """``then`` of what ``original(*args)`` returns."""
        raise NotImplementedError

    def batch_norm_at_end(self) -> nn.Module | None:
        """See the function of this name."""
        raise NotImplementedError


class NormalizingForward(Forward):
    """Of a batch norm that keeps its class; ``synchronized``: as ``bnfused.SyncBatchNorm``, in ``process_group``."""

    synchronized = False
    process_group: Any = None

    def normalize(self, *args: Any, **kwargs: Any) -> Any:
        """The batch norm alone: what ``NORMALIZE`` takes but for the module."""
        if self.synchronized:
            return sync.synchronized_forward(self.module, *args, **kwargs, process_group=self.process_group)
        return NORMALIZE(self.module, *args, **kwargs)


class BatchNormForward(NormalizingForward):
    """Of a subclass of torch's batch norm that inherits torch's forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.normalize(*args, **kwargs)

    def run(self, args: tuple[Any, ...], then: Then, on: Execution) -> Any:
        (x,) = args
        return normalize(self.module, self, x, then, on)

    def batch_norm_at_end(self) -> nn.Module:
        return self.module


class NormActForward(NormalizingForward):
    """Of timm's ``BatchNormAct2d``: batch norm, then the children ``drop`` and ``act``."""

    def _following(self) -> list[Any]:
        return [self.module.drop, self.module.act]

    def run(self, args: tuple[Any, ...], then: Then, on: Execution) -> Any:
        if len(args) != 1:
            return on.finish(then, self.original(*args))
        if isinstance(args[0], fx.Proxy):
            # torch.fx calls the module by its name, and so gets what follows the batch norm as well.
            in_graph = modules.is_part_of_trace(self.module, args[0])
            y = modules.leaf_of_trace(self.module, args[0], {}) if in_graph else self.original(*args)
            return on.finish(then, y)
        sequence = [self.module, *self._following()]
        own, end = _what_follows(sequence, 0)
        if end == len(sequence):
            own, then = own.followed_by(then)
        y = normalize(self.module, self.normalize, args[0], own, on)
        for child in sequence[end:]:
            y = on.plain(child, y)
        return on.finish(then, y)

    def batch_norm_at_end(self) -> nn.Module | None:
        return self.module if all(map(may_be_transparent, self._following())) else None


class SequenceForward(Forward):
    """Of ``nn.Sequential``, and of its subclasses that inherit its forward."""

    def run(self, args: tuple[Any, ...], then: Then, on: Execution) -> Any:
        # torch.fx names the nodes of a graph after the modules that it sees called, and tools ask for them by name.
        if len(args) != 1 or isinstance(args[0], fx.Proxy) or not is_sequence(self.module):
            return on.finish(then, self.original(*args))
        return _run_sequence(sequence_of(self.module), args[0], then, on)

    def batch_norm_at_end(self) -> nn.Module | None:
        return _batch_norm_at_end_of(sequence_of(self.module))

    def has_something_to_fuse(self) -> bool:
        sequence = [child for child in sequence_of(self.module) if not may_be_transparent(child)]
        return any(
            batch_norm_at_end(child) is not None and may_be_activation(following)
            for child, following in itertools.pairwise(sequence)
        )
