"""The helpers that a rewritten forward calls. They let a batch norm wait for the next call, and run both as one op.

Each helper looks at the modules that are there when it is called. A module that has hooks, was replaced, drops values
or is no activation that ``batch_norm`` knows runs after the batch norm, as in the original forward.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from bnfused.conversion.facts import (
    ADDITIONS,
    NORMALIZE,
    SYNCHRONIZE,
    NameAndParam,
    activation_call,
    activation_method,
    activation_of,
    class_forward,
    fits,
    is_bare,
    is_sequence,
    is_transparent,
    module_of_method,
)

_tracing_state = torch._C._get_tracing_state
_WAITING, _DONE, _TAKEN = range(3)

_ADD = "followed by add"
_ADDS_IN_PLACE = "something is changed in place by adding its output"


class Pending:
    """A batch norm, perhaps with an add, that was called and has not run yet.

    ``function(x, residual, activation, activation_param)`` runs it. Once it is ``_DONE``, ``output`` is its result, and
    ``is_own`` says that nobody else has that tensor. One that is ``_TAKEN`` became a part of a larger op.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], x: Any, residual: Any = None) -> None:
        self.module = module
        self.function = function
        self.x = x
        self.residual = residual
        self.output: Any = None
        self.state = _WAITING
        self.is_own = True


class FusedForward:
    """The ``forward`` attribute of a converted module. It hides its class's forward; copies and pickles have it too."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return EXECUTION.force(self.run(args, kwargs, EXECUTION))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], on: Execution) -> Any:
        """Return the value of ``original``, or a ``Pending`` that stands for it."""
        raise NotImplementedError

    def ends_in_batch_norm(self) -> bool:
        """Whether ``run`` may return a ``Pending``."""
        raise NotImplementedError

    def twin_of(self, function: Any) -> Any:
        """The rewritten twin of a method of the module, or None. It may return a ``Pending``."""
        return None

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> CodeType:
        """The code of the hidden forward: torch.export reports its line."""
        return type(self.module).forward.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        """Missing on purpose: torch.jit.script looks here first, and would find the globals of this file."""
        raise AttributeError(
            f"torch.jit.script: expected the forward of {type(self.module).__name__} itself, got the one that "
            "bnfused.convert put before it; script bnfused.revert(model)"
        )


class Execution:
    """The helpers. Each stands in a rewritten function in the place of a call, an add or a method call."""

    # ---------------------------------------------------------------------- steps that the preview replaces

    def compute(self, pending: Pending, activation: str | None = None, param: float | None = None) -> Any:
        """The output of the op."""
        return pending.function(pending.x, pending.residual, activation, param)

    def plain(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is not fused."""
        return function(*args, **kwargs)

    def attribute(self, value: Any, name: str) -> Any:
        return getattr(value, name)

    def fits(self, residual: Any, pending: Pending) -> bool:
        return fits(residual, pending.x)

    def note(self, pending: Pending, why: Any) -> None:
        """Take note of why the batch norm runs alone."""

    def run_forward(self, forward: FusedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward.run(args, kwargs, self)

    def run_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function; if it is a method of a module whose forward is rewritten, the rewritten method."""
        module = module_of_method(function)
        forward = None if module is None else module.__dict__.get("forward")
        twin = forward.twin_of(function.__func__) if isinstance(forward, FusedForward) else None
        return self.plain(function, args, kwargs) if twin is None else twin(module, *args, **kwargs)

    # ---------------------------------------------------------------------------------------- the helpers

    def force(self, value: Any, why: Any = "") -> Any:
        """The tensor that a value stands for. Others may hold it from now on."""
        if type(value) is not Pending:
            return value
        self._settle(value, why)
        value.is_own = False
        return value.output

    def _settle(self, pending: Pending, why: Any) -> None:
        if pending.state == _WAITING:
            self.note(pending, why)
            pending.output = self.compute(pending)
            pending.state = _DONE
            pending.x = pending.residual = None

    def _finish(self, pending: Pending, activation: NameAndParam) -> Any:
        """The batch norm with its activation."""
        pending.state = _TAKEN
        return self.compute(pending, *activation)

    def call(self, function: Any, value: Any) -> Any:
        """``function(value)``."""
        if isinstance(function, nn.Module):
            return self.call_module(function, value)
        if type(value) is Pending:
            if value.state == _WAITING:
                activation = activation_call(function, (), {})
                if activation is not None:
                    return self._finish(value, activation)
            value = self.force(value, function)
        return self.run_function(function, (value,), {})

    def call_module(self, module: nn.Module, value: Any) -> Any:
        """``module(value)``."""
        if type(value) is Pending:
            if value.state == _WAITING:
                activation = activation_of(module)
                if activation is not None:
                    return self._finish(value, activation)
                if is_transparent(module):
                    return value
            value = self.force(value, module)
        if is_bare(module):
            forward = module.__dict__.get("forward")
            if forward is None:
                found = class_forward(module)
                if found is NORMALIZE or found is SYNCHRONIZE:
                    # The forward of a bare module takes two thirds of the time of its call. A recording needs the call.
                    recorded = is_compiling() or _tracing_state() is not None
                    return Pending(module, module if recorded else module.forward, value)
                if is_sequence(module):
                    return self.sequence(module, value)
            elif isinstance(forward, FusedForward):
                return self.run_forward(forward, (value,), {})
        return self.plain(module, (value,), {})

    def sequence(self, module: nn.Module, value: Any) -> Any:
        """The children of a ``Sequential``, one after the other."""
        for child in module._modules.values():
            value = self.call_module(child, value)  # type: ignore[arg-type]
        return value

    def call_with(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``."""
        is_module = isinstance(function, nn.Module)
        if len(args) == 1 and not kwargs and is_module:
            return self.call_module(function, args[0])
        if args and type(args[0]) is Pending and args[0].state == _WAITING:
            activation = activation_call(function, args[1:], kwargs)
            if activation is not None:
                return self._finish(args[0], activation)
        if len(args) == 2 and not kwargs:
            if any(function is addition for addition in ADDITIONS):
                return self.add(*args, function)
            if function is operator.iadd:
                return self.iadd(*args)
        args = tuple([self.force(value, function) for value in args])
        kwargs = {name: self.force(value, function) for name, value in kwargs.items()}
        if not is_module:
            return self.run_function(function, args, kwargs)
        forward = function.__dict__.get("forward")
        if isinstance(forward, FusedForward) and is_bare(function):
            return self.run_forward(forward, args, kwargs)
        return self.plain(function, args, kwargs)

    def call_after(self, waiting: tuple[Any, ...], why: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` after the batch norms that wait, unless it returns its input itself."""
        if not (isinstance(function, nn.Module) and len(args) == 1 and not kwargs and is_transparent(function)):
            for value in waiting:
                if type(value) is Pending:
                    self._settle(value, why)
        return self.call_with(function, *args, **kwargs)

    def add(self, a: Any, b: Any, function: Callable[[Any, Any], Any] = operator.add) -> Any:
        """``a + b``."""
        added = None
        if type(b) is Pending and b.state == _WAITING:
            added = self._add_to(b, a := self.force(a, _ADD))
        elif type(a) is Pending and a.state == _WAITING:
            added = self._add_to(a, b := self.force(b, _ADD))
        return added or self.plain(function, (self.force(a, _ADD), self.force(b, _ADD)), {})

    def _add_to(self, pending: Pending, residual: Any) -> Pending | None:
        """The batch norm with the residual, which one op runs; None if it cannot."""
        if pending.residual is not None or not self.fits(residual, pending):
            return None
        pending.state = _TAKEN
        return Pending(pending.module, pending.function, pending.x, residual)

    def iadd(self, a: Any, b: Any) -> Any:
        """``a += b`` for a variable that may hold a ``Pending``, whose tensor nobody else has."""
        added = None
        if type(a) is Pending and a.state == _WAITING:
            added = self._add_to(a, b := self.force(b, _ADD))
        elif type(a) is Pending and a.is_own and type(b) is Pending and b.state == _WAITING:
            added = self._add_to(b, a.output)
        return added or self.plain(operator.iadd, (self.force(a, _ADD), self.force(b, _ADDS_IN_PLACE)), {})

    def method(self, waiting: tuple[Any, ...], name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """``value.name(*args, **kwargs)``, after the batch norms that wait."""
        for other in waiting:
            if type(other) is Pending:
                self._settle(other, f"{name} runs before its output is used")
        if type(value) is Pending:
            if not args and not kwargs and value.state == _WAITING:
                activation = activation_method(name)
                if activation is not None:
                    return self._finish(value, activation)
            if len(args) == 1 and not kwargs and name in ("add", "add_"):
                return self.add(value, args[0], Tensor.add) if name == "add" else self.iadd(value, args[0])
            value = self.force(value, f"followed by {name}")
        return self.call_with(self.attribute(value, name), *args, **kwargs)


EXECUTION = Execution()
