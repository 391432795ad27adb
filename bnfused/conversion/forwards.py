"""The forwards that ``convert`` gives to modules. Each hides the forward of a class, and fuses inside it."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import fx, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from bnfused import modules, sync
from bnfused.conversion.facts import (
    NORMALIZE,
    SYNCHRONIZE,
    class_forward,
    is_sequence,
    may_be_activation,
    may_be_transparent,
)
from bnfused.conversion.pending import EXECUTION, Execution, FusedForward, Pending
from bnfused.conversion.rewriting import HELPERS, Rewritten, rewrite
from bnfused.conversion.source import Unreadable


class NormalizingForward(FusedForward):
    """The forward of a batch norm that keeps its class.

    ``synchronized``: it computes as ``bnfused.SyncBatchNorm`` does, in ``process_group``.
    """

    synchronized = False
    process_group: Any = None

    def normalize(self, *args: Any, **kwargs: Any) -> Any:
        """Run the batch norm alone. It takes the arguments of ``NORMALIZE`` but the module."""
        if self.synchronized:
            return sync.synchronized_forward(self.module, *args, **kwargs, process_group=self.process_group)
        return NORMALIZE(self.module, *args, **kwargs)


class BatchNormForward(NormalizingForward):
    """The forward of a subclass of torch's batch norm that inherits torch's forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.normalize(*args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], on: Execution) -> Any:
        if len(args) != 1 or kwargs:
            return on.plain(self.normalize, args, kwargs)
        return Pending(self.module, self.normalize, args[0])

    def ends_in_batch_norm(self) -> bool:
        return True


class NormActForward(NormalizingForward):
    """The forward of timm's ``BatchNormAct2d``: batch norm, then the children ``drop`` and ``act``."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], on: Execution) -> Any:
        if len(args) != 1 or kwargs:
            return on.plain(self.original, args, kwargs)
        if isinstance(args[0], fx.Proxy):
            # torch.fx records a call of the whole module, with drop and activation.
            in_graph = modules.is_part_of_trace(self.module, args[0])
            return modules.leaf_of_trace(self.module, args[0], {}) if in_graph else self.original(*args)
        y: Any = Pending(self.module, self.normalize, args[0])
        for child in (self.module.drop, self.module.act):
            y = on.call_module(child, y)  # type: ignore[arg-type]
        return y

    def ends_in_batch_norm(self) -> bool:
        return all(may_be_transparent(child) for child in (self.module.drop, self.module.act))  # type: ignore[arg-type]


class SequenceForward(FusedForward):
    """The forward of ``nn.Sequential``, and of its subclasses that inherit it."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], on: Execution) -> Any:
        if len(args) != 1 or kwargs or not is_sequence(self.module):
            return on.plain(self.original, args, kwargs)
        return on.sequence(self.module, args[0])

    def ends_in_batch_norm(self) -> bool:
        return is_sequence(self.module) and _sequence_ends_in_batch_norm(self.module)

    def has_something_to_fuse(self) -> bool:
        children: list[Any] = [c for c in self.module._modules.values() if c is not None and not may_be_transparent(c)]
        return any(
            ends_in_batch_norm(child) and may_be_activation(following)
            for child, following in itertools.pairwise(children)
        )


class BlockForward(FusedForward):
    """The forward of a module whose class has one in Python: it is rewritten, and the rewritten one runs."""

    _twins: dict[FunctionType, Twin] | None = None
    # Continues "the forward of ...", where it could not be rewritten.
    why_not: str | None = None

    @property
    def twins(self) -> dict[FunctionType, Twin]:
        """The rewritten forward, and the methods of the module that it may call."""
        if self._twins is None:
            self._twins, self.why_not = _twins_of(type(self.module))
        return self._twins

    def twin_of(self, function: Any) -> Any:
        """The rewritten function, or None: also for a function that the class was given later."""
        if self._twins is None and is_compiling():  # the compiler cannot read source files
            return None
        twin = self.twins.get(function)
        return None if twin is None else twin.function

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}  # loading it rewrites the code that is there

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module = state["module"]

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockForward:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(vars(self), module=copy.deepcopy(self.module, memo))
        return copied

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], on: Execution) -> Any:
        twin = self.twin_of(type(self.module).forward)
        if twin is None:
            return on.plain(self.original, args, kwargs)
        return twin(self.module, *args, **kwargs)

    def ends_in_batch_norm(self) -> bool:
        twin = self.twins.get(type(self.module).forward)  # type: ignore[call-overload]
        return twin is not None and twin.rewritten.returns_pending and self.has_something_to_fuse()

    def has_something_to_fuse(self) -> bool:
        can_run = type(self.module).forward in self.twins
        return can_run and any(map(ends_in_batch_norm, called_from(self.module)))


def ends_in_batch_norm(module: nn.Module) -> bool:
    """Whether the module may return the output of a batch norm of bnfused, which could be fused with the next op."""
    forward = module.__dict__.get("forward")
    if forward is not None:
        return isinstance(forward, FusedForward) and forward.ends_in_batch_norm()
    if class_forward(module) in (NORMALIZE, SYNCHRONIZE):
        return True
    return is_sequence(module) and _sequence_ends_in_batch_norm(module)


def _sequence_ends_in_batch_norm(module: nn.Module) -> bool:
    for child in reversed(module._modules.values()):
        if child is not None and not may_be_transparent(child):
            return ends_in_batch_norm(child)
    return False


def called_from(module: nn.Module) -> Iterator[nn.Module]:
    """The children that a forward can call, also from a list of them."""
    for child in module.children():
        yield from child.children() if type(child) in (nn.ModuleList, nn.ModuleDict) else (child,)


def fusing_forward(module: nn.Module) -> SequenceForward | BlockForward | None:
    """A forward for the module that fuses calls of its children, or None."""
    if "forward" in module.__dict__ or isinstance(module, _BatchNorm):
        return None
    if is_sequence(module):
        return SequenceForward(module)
    if type(module).__module__.startswith("torch.") or not any(map(ends_in_batch_norm, called_from(module))):
        return None
    return BlockForward(module)


# ------------------------------------------------------------------------------------------- rewritten functions


class Twin:
    """The rewritten twin of a function: ``function`` takes the same arguments, and may return a ``Pending``."""

    def __init__(self, original: FunctionType, rewritten: Rewritten) -> None:
        self.rewritten = rewritten
        self.function = rewritten.bind(original, {name: getattr(EXECUTION, name) for name in HELPERS})


# For each class, the forward that was rewritten, and the twins.
_known: weakref.WeakKeyDictionary[type, tuple[Any, dict[FunctionType, Twin]]] = weakref.WeakKeyDictionary()


def _twins_of(cls: type) -> tuple[dict[FunctionType, Twin], str | None]:
    """The rewritten forward of a class and the methods that it may call; or why there is none."""
    forward = cls.forward  # type: ignore[attr-defined]
    known = _known.get(cls)
    if known is not None and known[0] is forward:
        return known[1], None
    twins, why_not = _rewritten_methods(cls)
    if why_not is None:
        _known[cls] = forward, twins
    return twins, why_not


def _computed_attributes(cls: type) -> set[str]:
    """The properties of a class, and other attributes that run code when they are read."""
    plain = (FunctionType, staticmethod, classmethod, type)
    return {
        name
        for base in cls.__mro__
        if base is not object
        for name, value in vars(base).items()
        if hasattr(type(value), "__get__") and not isinstance(value, plain) and name not in ("__dict__", "__weakref__")
    }


def _rewritten_methods(cls: type) -> tuple[dict[FunctionType, Twin], str | None]:
    forward = cls.forward  # type: ignore[attr-defined]
    own: Any = cls
    if own.__getattribute__ is not nn.Module.__getattribute__ or own.__getattr__ is not nn.Module.__getattr__:
        return {}, "looks attributes up in its own way"
    if not isinstance(forward, FunctionType):
        return {}, "is no function of Python"
    computed = _computed_attributes(cls)
    twins: dict[FunctionType, Twin] = {}
    try:
        twins[forward] = Twin(forward, rewrite(forward, computed))
    except Unreadable as error:
        return {}, str(error)
    names = ["forward"]
    for name in names:
        for base in cls.__mro__:
            function = base.__dict__.get(name)
            if base.__module__.startswith("torch.") or not isinstance(function, FunctionType):
                continue
            if function not in twins:
                try:
                    twins[function] = Twin(function, rewrite(function, computed))
                except Unreadable:
                    continue
            names += [called for called in function.__code__.co_names if called not in names]
    return twins, None
