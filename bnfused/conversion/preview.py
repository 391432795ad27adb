"""Finds out what the helpers of a rewritten forward would decide, without running any of the user's code.

It interprets the tree that was compiled, with the modules that are there. An expression that only looks at modules,
constants and settings has a value. Every other one is ``UNKNOWN``, and is taken for a tensor whose shape, dtype and
layout fit. If a condition is unknown, both branches are interpreted.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import itertools
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, _jit_internal, nn

from bnfused.conversion.facts import module_of_method
from bnfused.conversion.pending import Execution, FusedForward, Pending
from bnfused.conversion.rewriting import HELPERS, PREFIX, replace_parts


class _Unknown:
    """A value that only a call can tell."""


UNKNOWN = _Unknown()

Note = Callable[[nn.Module, str, Any], None]


class Preview(Execution):
    """Computes nothing. ``note(batch norm, what is fused with it, why it is not more)`` is told of each op."""

    def __init__(self, note: Note, is_ours: Callable[[nn.Module], bool]) -> None:
        self._note = note
        self._is_ours = is_ours

    def compute(self, pending: Pending, activation: str | None = None, param: float | None = None) -> Any:
        if activation is not None:
            self._note(pending.module, ("+add" if pending.residual is not None else "") + f"+{activation}", "")
        return UNKNOWN

    def note(self, pending: Pending, why: Any) -> None:
        self._note(pending.module, "+add" if pending.residual is not None else "", why)

    def plain(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if isinstance(function, nn.Module) and self._is_ours(function):
            self._note(function, "", function)
        elif isinstance(module, nn.Module) and getattr(function, "__name__", "") == "normalize":
            self._note(module, "", "it is called with more than its input")
        return UNKNOWN

    def attribute(self, value: Any, name: str) -> Any:
        return attribute(value, name)

    def fits(self, residual: Any, pending: Pending) -> bool:
        return residual is UNKNOWN

    def run_forward(self, forward: FusedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        twins = getattr(forward, "twins", None)
        if twins is None:
            return forward.run(args, kwargs, self)
        return self.run_twin(twins.get(type(forward.module).forward), forward.module, args, kwargs)

    def run_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = module_of_method(function)
        if module is None:
            return self.plain(function, args, kwargs)
        twins = getattr(module.__dict__.get("forward"), "twins", {})
        return self.run_twin(twins.get(function.__func__), module, args, kwargs)

    def run_twin(self, twin: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value that the rewritten function would return."""
        if twin is None:
            return UNKNOWN
        try:
            bound = inspect.signature(twin.function).bind(module, *args, **kwargs)
        except TypeError:
            return UNKNOWN
        bound.apply_defaults()
        run = _Run(self, twin.function, dict(bound.arguments))
        returned = run.block(twin.rewritten.tree.body, run.variables)
        return returned.value if isinstance(returned, _Returned) else None


class _Returned:
    def __init__(self, value: Any) -> None:
        self.value = value


_LEAVES_LOOP = object()
_FALLS_THROUGH = None

# Functions that look at what they are given: these at its type, the others at its elements too.
_ASKING: set[Any] = {isinstance, issubclass, type, callable, _jit_internal.is_scripting}
_ASKING |= {torch.jit.is_tracing}  # type: ignore[attr-defined]
_LOOKING: set[Any] = {len, range, enumerate, zip, reversed, bool, int, float, list, tuple, max, min}
_LOOKING_METHODS = {"items", "values", "keys", "children"}
_KNOWN = (type(None), bool, int, float, str, type(...), type, FunctionType, ModuleType, nn.Module)
_MOST_ROUNDS = 256


def _is_known(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_known, value))
    if isinstance(value, dict):
        return all(map(_is_known, value.values()))
    return isinstance(value, (*_KNOWN, range, enumerate, zip, MethodType)) and not isinstance(value, Tensor)


# Python calls these methods of a module for its truth, its length, its elements and in comparisons.
_SPECIAL = {"__bool__", "__len__", "__iter__", "__reversed__", "__getitem__", "__contains__"}
_SPECIAL |= {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}


def _runs_no_code(value: Any) -> bool:
    """Whether truth, length, elements and comparisons of a known value run no code of the user's."""
    if type(value) in (tuple, list):
        return all(map(_runs_no_code, value))
    if type(value) is dict:
        return all(map(_runs_no_code, value.values()))
    if isinstance(value, nn.Module):
        methods = [inspect.getattr_static(type(value), name, None) for name in _SPECIAL]
        return all((getattr(method, "__module__", None) or "torch.").startswith("torch.") for method in methods)
    return isinstance(value, type) or type(value).__module__ == "builtins"


def _has_attribute(module: nn.Module, name: str) -> Any:
    """Whether a module has an attribute; ``UNKNOWN`` if that is for code of the user's to tell."""
    if any(name in place for place in (module.__dict__, module._modules, module._parameters, module._buffers)):
        return True
    found = inspect.getattr_static(type(module), name, None)
    runs_code = hasattr(type(found), "__get__") and not isinstance(found, (FunctionType, staticmethod, classmethod))
    if runs_code or type(module).__getattr__ is not nn.Module.__getattr__:
        return UNKNOWN
    return found is not None


class _Run:
    """One interpreted call of a rewritten function."""

    def __init__(self, preview: Preview, function: FunctionType, variables: dict[str, Any]) -> None:
        self.preview = preview
        self.globals = function.__globals__
        self.variables = variables
        self.closure = {
            name: cell.cell_contents
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            if not name.startswith(PREFIX)
        }

    # ------------------------------------------------------------------------------------------------- statements

    def block(self, body: Iterable[ast.stmt], variables: dict[str, Any]) -> Any:
        self.variables = variables
        for statement in body:
            end = self.statement(statement)
            if end is not _FALLS_THROUGH:
                return end
        return _FALLS_THROUGH

    def statement(self, s: ast.stmt) -> Any:
        match s:
            case ast.Return(value=value):
                return _Returned(None if value is None else self.value(value))
            case ast.Raise() | ast.Break() | ast.Continue():
                return _LEAVES_LOOP
            case ast.Assign(targets=targets, value=value):
                assigned = self.value(value)
                for target in targets:
                    self.assign(target, assigned)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.value(value))
            case ast.AugAssign(target=target, value=value):
                self.value(value)
                self.assign(target, UNKNOWN)
            case ast.Expr(value=value):
                self.value(value)
            case ast.If(test=test, body=body, orelse=other):
                return self.either(self.truth(self.value(test)), body, other)
            case ast.For():
                return self.loop(s)
            case ast.While(body=body) | ast.With(body=body):
                return self.block(body, self.variables)
            case ast.Try(body=body, finalbody=final):
                return self.block([*body, *final], self.variables)
        return _FALLS_THROUGH

    def either(self, truth: bool | None, body: list[ast.stmt], other: list[ast.stmt]) -> Any:
        if truth is not None:
            return self.block(body if truth else other, self.variables)
        before = self.variables
        ends = [(self.block(branch, _copied(before)), self.variables) for branch in (body, other)]
        # Go on in the branch that does not return. If both return, the first one's value counts.
        end, self.variables = next((end for end in ends if end[0] is _FALLS_THROUGH), ends[0])
        return end

    def loop(self, s: ast.For) -> Any:
        values = self.value(s.iter)
        rounds: Iterable[Any] = [UNKNOWN]
        if isinstance(values, Iterable) and _runs_no_code(values):
            rounds = itertools.islice(values, _MOST_ROUNDS)
        for value in rounds:
            self.assign(s.target, value)
            end = self.block(s.body, self.variables)
            if isinstance(end, _Returned):
                return end
        return _FALLS_THROUGH

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            known = isinstance(value, (tuple, list)) and len(value) == len(target.elts)
            for i, element in enumerate(target.elts):
                self.assign(element, value[i] if known else UNKNOWN)

    # ------------------------------------------------------------------------------------------------ expressions

    def value(self, e: ast.expr) -> Any:
        match e:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                for place in (self.variables, self.closure, self.globals, vars(builtins)):
                    if name in place:
                        return place[name]
                return UNKNOWN
            case ast.NamedExpr(target=target, value=value):
                self.assign(target, found := self.value(value))
                return found
            case ast.Attribute(value=value, attr=name):
                return attribute(self.value(value), name)
            case ast.Call():
                return self.call(e)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return [self.value(element) for element in elements]
            case ast.Dict(values=values):
                for element in values:
                    self.value(element)
            case ast.Starred(value=value):
                return self.value(value)
            case ast.IfExp(test=test, body=body, orelse=other):
                truth = self.truth(self.value(test))
                if truth is not None:
                    return self.value(body if truth else other)
                first, second = self.value(body), self.value(other)
                return first if isinstance(first, Pending) else second if isinstance(second, Pending) else UNKNOWN
            case ast.BoolOp(op=op, values=values):
                return self.chain(isinstance(op, ast.And), values)
            case ast.UnaryOp() | ast.BinOp() | ast.Compare() | ast.Subscript():
                return self.computed(e)
        return UNKNOWN

    def chain(self, is_and: bool, values: list[ast.expr]) -> Any:
        found: Any = UNKNOWN
        for value in values:
            found = self.value(value)
            truth = self.truth(found)
            if truth is None:
                return UNKNOWN
            if truth is not is_and:
                return found
        return found

    def computed(self, e: ast.expr) -> Any:
        """The value of an operator or an index, which Python itself computes of the values of its parts."""
        parts: dict[str, Any] = {}

        def evaluated(part: ast.expr) -> ast.expr:
            parts[name := f"part_{len(parts)}"] = self.value(part)
            return ast.copy_location(ast.Name(name, ast.Load()), part)

        replace_parts(e := copy.deepcopy(e), evaluated)
        values = list(parts.values())
        if isinstance(e, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in e.ops):
            if len(values) == 2 and any(v is None for v in values) and any(v is UNKNOWN for v in values):
                return isinstance(e.ops[0], ast.IsNot)  # a tensor is not None
        elif not _runs_no_code(values):
            return UNKNOWN
        elif not isinstance(e, (ast.Compare, ast.Subscript)) and any(isinstance(v, nn.Module) for v in values):
            return UNKNOWN  # a module may have any operator
        if not _is_known(values):
            return UNKNOWN
        try:
            return eval(compile(ast.Expression(e), "", "eval"), parts)
        except Exception:  # the call itself would raise it
            return UNKNOWN

    def truth(self, value: Any) -> bool | None:
        return bool(value) if _is_known(value) and _runs_no_code(value) else None

    def call(self, e: ast.Call) -> Any:
        if isinstance(e.func, ast.Name) and e.func.id == "super" and not e.args:
            return super(self.closure["__class__"], next(iter(self.variables.values())))
        function: Any = None
        if isinstance(e.func, ast.Name) and e.func.id.startswith(PREFIX):
            name = e.func.id.removeprefix(PREFIX)
            assert name in HELPERS, name
            function = getattr(self.preview, name)
        else:
            found = self.value(e.func)
        args: list[Any] = []
        for argument in e.args:
            value = self.value(argument)
            if isinstance(argument, ast.Starred):
                args += value if isinstance(value, (tuple, list)) else [UNKNOWN]
            else:
                args.append(value)
        kwargs = {k.arg: self.value(k.value) for k in e.keywords if k.arg is not None}
        if function is not None:
            return function(*args, **kwargs)
        return self.looked(found, args, kwargs)

    def looked(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if function is hasattr or function is getattr:
            if not all(map(_is_known, args)) or not isinstance(args[0], nn.Module):
                return UNKNOWN
            has = _has_attribute(args[0], args[1])
            if function is hasattr or has is UNKNOWN:
                return has
            return attribute(args[0], args[1]) if has else args[2] if len(args) == 3 else UNKNOWN
        if kwargs or not _is_known(args):
            return UNKNOWN
        is_method = isinstance(function, MethodType) and isinstance(function.__self__, nn.Module)
        if is_method and function.__name__ in _LOOKING_METHODS and function.__module__.startswith("torch."):
            return list(function())
        try:
            if function in _ASKING or (function in _LOOKING and _runs_no_code(args)):
                return function(*args)
            return UNKNOWN
        except Exception:  # the call itself would raise it, or the function has no hash
            return UNKNOWN


def _copied(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables, with a copy of each batch norm that waits: each branch may do something else with it."""
    return {name: copy.copy(value) if isinstance(value, Pending) else value for name, value in variables.items()}


def attribute(of: Any, name: str) -> Any:
    """``of.name``, found without calling anything: what a property computes is unknown."""
    if isinstance(of, (super, ModuleType)):
        return getattr(of, name, UNKNOWN)
    if isinstance(of, nn.Module):
        for place in (of.__dict__, of._modules):
            if name in place:
                value = place[name]
                return value if _is_known(value) or isinstance(value, MethodType) else UNKNOWN
        for store in (of._parameters, of._buffers):
            if name in store:
                return None if store[name] is None else UNKNOWN
        found = inspect.getattr_static(type(of), name, UNKNOWN)
        if isinstance(found, FunctionType):
            return MethodType(found, of)
        if isinstance(found, staticmethod):
            return found.__func__
        return found if _is_known(found) else UNKNOWN
    if isinstance(of, (type, FunctionType)):
        found = inspect.getattr_static(of, name, UNKNOWN)
        return found if _is_known(found) else UNKNOWN
    return UNKNOWN
