"""Record what one module's ``forward`` does, or say why a record would not prove it.

A graph that is traced once is right for every later call only if ``forward`` took its decisions from what is known to
stay. So ``forward`` is run here on stand-ins that let nothing else through:

- its tensors are values without a value: whoever branches on one, or asks for its type, is found out;
- its children can only be called, and become one node each;
- of the module itself it may read constants, which are noted, so that a later call can compare; it may write nothing;
- whatever else it calls must be an operation of torch that shows up in the graph, a pure function, or Python code for
  which the same holds.

Nodes stand in the order of execution and none is dropped: the graph does what ``forward`` did, side effects included.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import dis
import enum
import functools
import inspect
import itertools
import math
import operator
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, _jit_internal, fx, nn
from torch.compiler import is_compiling
from torch.fx.proxy import Attribute, GraphAppendingTracer, Proxy


class Untraceable(Exception):
    """Why the record would not hold; the message continues "its forward ..."."""


@dataclass(frozen=True)
class Record:
    """What ``forward`` did, in a graph whose placeholders are its arguments.

    ``forwards`` are that of its class and those behind it, which ``super`` finds. ``children`` are what it called, and
    asked nothing else. ``observed`` is what else it read of its module, as (name, fact), and ``observed_globals`` what
    its code names of the Python module that it stands in, and of classes and functions there, as (place, name, value).
    ``argument_types`` are those of its arguments.
    """

    forwards: list[Any]
    graph: fx.Graph
    children: tuple[str, ...]
    observed: tuple[tuple[str, Any], ...]
    observed_globals: tuple[tuple[_Place, str, Any], ...]
    argument_types: tuple[type, ...]
    asked_for_types: bool

    def holds(self, module: nn.Module) -> bool:
        """Whether the forward of ``module`` is the same and would read the same now.

        Every call of a block asks. A loop takes half the time of ``all`` over a generator.
        """
        for name, observed in self.observed:
            if fact(module, name) != observed:
                return False
        for place, name, value in self.observed_globals:
            if getattr(place, name, None) is not value:
                return False
        return _forwards(type(module)) == self.forwards and _are_children(module, self.children)


_Place = ModuleType | type | FunctionType


def _are_children(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether each ``module.name`` is a child of the module, found where ``nn.Module.__getattr__`` finds it.

    That is asked here of all names at once, in a sixth of the time that it takes to look them up one by one.
    """
    if is_compiling():  # Dynamo guards what is looked up by name, and only that
        return all(isinstance(getattr(module, name, None), nn.Module) for name in names)
    cls = type(module)
    if cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not nn.Module.__getattribute__:
        return False
    for place in (module, *cls.__mro__):
        if not place.__dict__.keys().isdisjoint(names):
            return False
    return all(map(isinstance, map(module._modules.get, names), itertools.repeat(nn.Module)))


def _forwards(cls: type) -> list[Any]:
    return [base.__dict__["forward"] for base in cls.__mro__ if "forward" in base.__dict__]


class _ABSENT:
    """What a missing attribute reads as."""


_CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(...),
    range,
    enum.Enum,
    type,
    FunctionType,
    BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)


def _is_constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_constant(element) for element in value)
    if isinstance(value, FunctionType):
        return _has_constant_defaults(value)
    return isinstance(value, _CONSTANTS)


def _has_constant_defaults(function: FunctionType) -> bool:
    """Whether a call of the function finds the defaults of the call before."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return all(_is_constant(default) for default in defaults)


def _has_length(module: nn.Module) -> bool:
    """Whether it can be false. Python asks the class; the module itself would be searched for what it lacks."""
    return hasattr(type(module), "__len__") or hasattr(type(module), "__bool__")


def fact(module: nn.Module, name: str) -> Any:
    """What reading ``module.name`` can tell a ``forward`` that only calls children and computes with tensors.

    Equal facts mean an equal run, in a copy of the module too.
    """
    value = getattr(module, name, _ABSENT)
    if value is None:  # the usual one: a child that a block can have
        return type(None), None
    if type(value) is nn.ModuleList:
        return nn.ModuleList, len(value)
    if type(value) is nn.ModuleDict:
        return nn.ModuleDict, tuple(value)
    if isinstance(value, nn.Module):
        return nn.Module, _has_length(value)
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, MethodType):
        return value.__func__
    return type(value), value  # True == 1


def record(module: nn.Module, argument_types: tuple[type, ...]) -> Record:
    """Run ``type(module).forward`` on as many stand-ins of the given types (Tensor or list) as it needs arguments.

    Raises:
        Untraceable: the record would not hold for other calls.
    """
    result = _Recording(module, argument_types, module.training).run()
    if "training" in dict(result.observed):
        other = _Recording(module, argument_types, not module.training).run()
        if _lines(result.graph) != _lines(other.graph):
            return _with_mode_as_value(module, argument_types)
        observed = dict(result.observed) | dict(other.observed)
        del observed["training"]
        result = dataclasses.replace(
            result,
            children=tuple(dict.fromkeys((*result.children, *other.children))),
            observed=tuple(observed.items()),
            observed_globals=tuple(dict.fromkeys((*result.observed_globals, *other.observed_globals))),
        )
    return result


def _with_mode_as_value(module: nn.Module, argument_types: tuple[type, ...]) -> Record:
    """For a forward that hands ``self.training`` on, as to dropout, and decides nothing by it."""
    try:
        return _Recording(module, argument_types, None).run()
    except Untraceable:
        raise Untraceable("does one thing in training and another in eval") from None


def _lines(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]


def argument_counts(module: nn.Module) -> range:
    """With how many arguments, all by position, ``forward`` is recorded: what it needs, and up to two more.

    Raises:
        Untraceable: ``forward`` is no plain Python function, or a default is more than a constant.
    """
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        raise Untraceable("is wrapped by a decorator")
    required = by_position = 0
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        has_default = parameter.default is not parameter.empty
        if has_default and not _is_constant(parameter.default):
            raise Untraceable(f"has a default for {parameter.name} that can change")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            by_position += 1
            required += not has_default
        elif not has_default:
            raise Untraceable(f"needs {parameter.name} by name")
    return range(required, min(by_position, required + 2) + 1)


# ------------------------------------------------------------------------------------------ what may be called

# Builtins whose result depends on their arguments alone, which change nothing and keep nothing.
_PURE_BUILTINS = frozenset(
    """abs all any bool dict divmod enumerate filter float getattr hasattr int isinstance issubclass len list map max
    min pow range reversed round set slice sorted str sum super tuple zip""".split()  # noqa: SIM905
)
_PURE_MODULES = {math.__name__, operator.add.__module__, operator.__name__}
_CONTAINERS = (list, dict, set, tuple, str)


@functools.cache
def _recorded() -> tuple[set[Any], set[CodeType]]:
    """The functions of torch that become a node where a stand-in is among their arguments, and their code."""
    functions = {function for group in torch.overrides.get_overridable_functions().values() for function in group}
    functions.add(torch._assert)
    return functions, {function.__code__ for function in functions if isinstance(function, FunctionType)}


def _is_outside(frame: FrameType) -> bool:
    """Whether a frame runs code of neither torch nor this file."""
    package = str(frame.f_globals.get("__name__", "")).split(".")[0]
    return package != "torch" and frame.f_globals is not globals()


def _may_call(frame: FrameType) -> bool:
    return (
        frame.f_globals is globals()
        or str(frame.f_globals.get("__name__")).startswith("torch.fx.")
        or frame.f_code in _recorded()[1]
        or frame.f_code is _jit_internal.is_scripting.__code__
    )


def _may_call_builtin(called: Any) -> bool:
    owner = getattr(called, "__self__", None)
    return (
        _hashed_in(called, _recorded()[0])
        or (owner is builtins and called.__name__ in _PURE_BUILTINS)
        or getattr(called, "__module__", None) in _PURE_MODULES
        or type(owner) in _CONTAINERS
    )


def _watched(watch: Callable[..., None], function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, with ``watch`` for the profile function of its thread.

    A profiler written in C is none that could be put back: cProfile before Python 3.12, and torch.profiler where it
    takes stacks. Beside one the function runs in a thread of its own, and the profiler goes on.
    """
    present = sys.getprofile()
    if present is None or callable(present):
        return _watched_here(watch, present, function, *args)
    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(_watched_here, watch, None, function, *args).result()


def _watched_here(watch: Any, afterwards: Any, function: Callable[..., Any], *args: Any) -> Any:
    sys.setprofile(watch)
    try:
        return function(*args)
    finally:
        sys.setprofile(afterwards)


class _Recording:
    """One run of ``forward`` on stand-ins."""

    def __init__(self, module: nn.Module, argument_types: tuple[type, ...], training: bool | None) -> None:
        self.module = module
        self.training = training
        self.argument_types = argument_types
        self.tracer = _Tracer(self)
        self.called: dict[str, None] = {}
        self.observed: dict[str, Any] = {}
        self.observed_globals: dict[tuple[_Place, str], Any] = {}
        self.children: dict[str, _Child] = {}
        self.reason: str | None = None
        self.asked_for_types = False
        self.nested: set[CodeType] = set()
        # For each Python frame of the run, whether its calls are to be watched: what torch calls is torch's business.
        self.watched = [False]

    def run(self) -> Record:
        cls = type(self.module)
        if cls.__getattribute__ is not nn.Module.__getattribute__ or cls.__getattr__ is not nn.Module.__getattr__:
            raise Untraceable("looks attributes up in its own way")
        arguments = []
        for i, kind in enumerate(self.argument_types):
            value = self.tracer.create_proxy("placeholder", f"argument_{i}", (), {})
            object.__setattr__(value, "_type", kind)
            arguments.append(value)
        try:
            result = _watched(self.watch, cls.forward, _Self(self), *arguments)
            self.tracer.create_node("output", "output", (self.tracer.create_arg(self.result(result)),), {})
        except Exception as error:
            if self.reason is None:
                self.reason = f"does not run on stand-ins: {error}"
        if self.reason is not None:  # even where the code of forward caught the exception
            raise Untraceable(self.reason)
        return Record(
            forwards=_forwards(cls),
            graph=self.tracer.graph,
            children=tuple(self.called),
            observed=tuple(self.observed.items()),
            observed_globals=tuple((*place, value) for place, value in self.observed_globals.items()),
            argument_types=self.argument_types,
            asked_for_types=self.asked_for_types,
        )

    def fail(self, reason: str) -> NoReturn:
        self.reason = self.reason or reason
        raise Untraceable(self.reason)

    def result(self, value: Any) -> Any:
        """Only what the generated code builds anew in the same way."""
        if isinstance(value, Proxy) or _is_constant(value):
            return value
        if type(value) in (list, tuple):
            return type(value)([self.result(element) for element in value])
        if type(value) is dict and all(_is_constant(key) for key in value):
            return {key: self.result(element) for key, element in value.items()}
        self.fail(f"returns a {type(value).__name__}")

    # -------------------------------------------------------------------------------------- what forward reads

    def read(self, stand_in: _Self, name: str) -> Any:
        """``self.name`` of the running ``forward``, in the order of Python's own lookup."""
        module, cls = self.module, type(self.module)
        if name == "__class__":
            return cls
        # By hand, as every other call here would be taken for one of forward's.
        of_class = next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), _ABSENT)
        is_descriptor = hasattr(type(of_class), "__get__")
        if name == "training" and self.training is None:
            return self.tracer.create_proxy("get_attr", name, (), {})
        if name in module.__dict__ and not (is_descriptor and hasattr(type(of_class), "__set__")):
            return self.constant(name, self.training if name == "training" else module.__dict__[name])
        if is_descriptor:
            # Not a class method: what that reads of the class would go unseen.
            if not isinstance(of_class, (FunctionType, property, staticmethod)):
                self.fail(f"reads {name}")
            if isinstance(of_class, FunctionType):
                if not _has_constant_defaults(of_class):
                    self.fail(f"calls {name}, which has a default that can change")
                self.observed[name] = of_class
            return of_class.__get__(stand_in, cls)
        if of_class is not _ABSENT:
            return self.constant(name, of_class)
        for store in (module._parameters, module._buffers):
            if name in store:
                if store[name] is None:
                    return self.constant(name, None)
                self.observed[name] = Tensor
                return self.tracer.create_proxy("get_attr", name, (), {})
        if name in module._modules:
            return self.child(name, module._modules[name])
        self.observed[name] = fact(module, name)
        raise AttributeError(name)

    def constant(self, name: str, value: Any) -> Any:
        if not _is_constant(value):
            self.fail(f"reads {name}, a {type(value).__name__}")
        self.observed[name] = (type(value), value)
        return value

    def child(self, name: str, child: nn.Module | None) -> Any:
        if child is not None and type(child) not in (nn.ModuleList, nn.ModuleDict):
            self.called[name] = None
            return self.stand_in(name, child)
        self.observed[name] = fact(self.module, name)
        if type(child) is nn.ModuleList:
            return tuple(self.stand_in(f"{name}.{i}", element) for i, element in enumerate(child))
        if type(child) is nn.ModuleDict:
            return {key: self.stand_in(f"{name}.{key}", element) for key, element in child.items()}
        return None

    def stand_in(self, target: str, child: nn.Module) -> _Child:
        return self.children.setdefault(target, _Child(self, target, _has_length(child)))

    # -------------------------------------------------------------------------------------- what forward calls

    def watch(self, frame: FrameType, event: str, called: Any) -> None:
        """The profile function of the run: every call that forward's own code makes passes here before it happens."""
        if event == "return":
            self.watched.pop()
        elif event == "call":
            caller = frame.f_back
            by_this_file = caller is not None and caller.f_globals is globals()
            watched = (self.watched[-1] or by_this_file) and _is_outside(frame)
            if watched:
                self.check_code(frame)
            elif self.watched[-1] and not _may_call(frame):
                self.fail(f"calls {frame.f_globals.get('__name__')}.{frame.f_code.co_name}")
            self.watched.append(watched)
        elif event == "c_call" and self.watched[-1] and not _may_call_builtin(called):
            self.fail(f"calls {getattr(called, '__qualname__', called)}")

    def check_code(self, frame: FrameType) -> None:
        """Code outside torch may use global names for constants, functions and types, and write none."""
        code = frame.f_code
        instructions = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
        for i, instruction in enumerate(instructions):
            name = instruction.argval
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME"):
                self.fail(f"changes or imports {name}")
            if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and name == "__class__":
                self.fail("asks for a class")
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                if not self.may_name(frame, name):
                    self.fail(f"uses {name}")
                self.observe_attributes(frame.f_globals.get(name), name, instructions[i + 1 :])
        if code not in self.nested:  # what was not made in this run
            for name in code.co_freevars:  # of a variable that somebody else can assign to
                if name != "__class__":
                    self.fail(f"uses {name}")
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            reason = _unrecordable(code, type(first) is _Self)
            if reason is not None:
                self.fail(reason)
        self.nested.update(constant for constant in code.co_consts if isinstance(constant, CodeType))

    def observe_attributes(self, place: Any, path: str, following: Sequence[dis.Instruction]) -> None:
        """Note what the next instructions read of a class or a function, as of one that holds settings."""
        for instruction in following:
            if not isinstance(place, (type, FunctionType)):
                return
            name = str(instruction.argval)
            if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                self.fail(f"writes {path}.{name}")
            if instruction.opname.startswith("STORE_") and isinstance(place, type):
                self.fail(f"uses {path} by another name")
            if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                return
            value, path = getattr(place, name, _ABSENT), f"{path}.{name}"
            if not _is_constant(value):
                self.fail(f"uses {path}")
            self.observed_globals[place, name] = value
            place = value

    def may_name(self, frame: FrameType, name: str) -> bool:
        if name not in frame.f_globals:
            value = getattr(builtins, name, None)
            return name in _PURE_BUILTINS or value is None or _is_exception(value)
        value = frame.f_globals[name]
        if isinstance(value, ModuleType):
            return value.__name__.split(".")[0] == "torch" or value.__name__ in _PURE_MODULES
        place = sys.modules.get(frame.f_globals["__name__"])
        if place is None or vars(place) is not frame.f_globals or not _is_constant(value):
            return False
        self.observed_globals[place, name] = value
        return True


@functools.cache
def _unrecordable(code: CodeType, is_method: bool) -> str | None:
    """What stand-ins cannot notice, read off the source.

    That is ``is``, ``hasattr`` and its like, and what is done about exceptions and on leaving. ``is_method``: the first
    argument is the module.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError):
        return "has no source to read"
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    identities = _Identities(tree, arguments, arguments[0] if is_method else None)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Try, ast.With, ast.AsyncWith, ast.Match)):
            return f"has a {type(node).__name__.lower()} statement"
        if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            with_constant = len(node.ops) == 1 and isinstance(node.comparators[0], ast.Constant)
            if not with_constant or not identities.is_known(node.left):
                return f"asks whether {ast.unparse(node)}"
        match node:
            case ast.Call(func=ast.Name(id="hasattr" | "getattr" as asked), args=[of, *rest]):
                is_question = asked == "hasattr" or len(rest) > 1
                if is_question and not (isinstance(of, ast.Name) and identities.is_module(of.id)):
                    return f"asks for {ast.unparse(node)}"
    return None


class _Identities:
    """Which expressions of a function are None or not for its stand-ins as for what they stand for.

    Those are its arguments, as long as nothing else is assigned to them, and what the module has; but not what a child
    or an operation returns. ``module`` is the argument that is the module, if any.
    """

    def __init__(self, tree: ast.AST, arguments: tuple[str, ...], module: str | None) -> None:
        self.arguments = arguments
        self.module = module
        self.first_written: dict[str, int] = {}
        self.assigned: dict[str, list[ast.expr | None]] = {}
        values = {
            target: node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.assigned.setdefault(node.id, []).append(values.get(node))
                self.first_written[node.id] = min(node.lineno, self.first_written.get(node.id, node.lineno))
            if isinstance(node, (ast.For, ast.While)):  # what stands behind in a loop can come before
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                        self.first_written[inner.id] = 0

    def is_known(self, node: ast.expr | None) -> bool:
        match node:
            case ast.Name(id=name) if name in self.arguments:
                return node.lineno <= self.first_written.get(name, node.lineno)
            case ast.Name(id=name):
                return name in self.assigned and all(self._is_of_module(value) for value in self.assigned[name])
        return self._is_of_module(node)

    def _is_of_module(self, node: ast.expr | None) -> bool:
        match node:
            case (
                ast.Attribute(value=ast.Name(id=name))
                | ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id=name), *_])
            ):
                return self.is_module(name)
        return False

    def is_module(self, name: str) -> bool:
        return name == self.module and name not in self.assigned


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _hashed_in(value: Any, values: set[Any]) -> bool:
    try:
        return value in values
    except TypeError:
        return False


# ------------------------------------------------------------------------------------------------- stand-ins


class _Self:
    """Stands for the module."""

    __slots__ = ("recording",)

    def __init__(self, recording: _Recording) -> None:
        object.__setattr__(self, "recording", recording)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "recording").read(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__getattribute__(self, "recording").fail(f"writes {name}")


class _Child:
    """Stands for a module that ``forward`` calls."""

    __slots__ = ("has_length", "recording", "target")

    def __init__(self, recording: _Recording, target: str, has_length: bool) -> None:
        for name, value in (("recording", recording), ("target", target), ("has_length", has_length)):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _of(self, "recording").tracer.create_proxy("call_module", _of(self, "target"), args, kwargs)

    def __bool__(self) -> bool:
        recording, target = _of(self, "recording"), _of(self, "target")
        if _of(self, "has_length"):
            recording.fail(f"asks for the length of {target}")
        if target in recording.called:
            recording.observed[target] = fact(recording.module, target)
        return True

    def __getattribute__(self, name: str) -> Any:
        _of(self, "recording").fail(f"reads {name} of {_of(self, 'target')}")

    def __setattr__(self, name: str, value: Any) -> None:
        _of(self, "recording").fail(f"writes {name} of {_of(self, 'target')}")


_of = object.__getattribute__


class _Tracer(GraphAppendingTracer):
    def __init__(self, recording: _Recording) -> None:
        super().__init__(fx.Graph())
        self.recording = recording

    def proxy(self, node: fx.Node) -> _Value:
        return _Value(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        self.recording.fail("decides by the values or the shape of its input")

    def iter(self, obj: Proxy) -> Iterator[Any]:
        self.recording.fail("iterates over a tensor")


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


def _unpacked(values: Any, count: int) -> tuple[Any, ...]:
    """What ``a, b = values`` assigns, ``count`` being 2."""
    found = tuple(values)
    if len(found) != count:
        raise ValueError(f"expected {count} values to unpack, got {len(found)}")
    return found


class _Value(Proxy):
    """Stands for a tensor, or for a list of tensors."""

    _type: type | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What ``isinstance`` asks for where the class of this stand-in is not the answer."""
        if not _is_outside(sys._getframe(1)):
            return type(self)
        recording = self.tracer.recording  # type: ignore[attr-defined]
        kind = self.__dict__.get("_type")
        if kind is None:
            return recording.fail("asks for the type of a result")
        recording.asked_for_types = True
        return kind

    def __getattr__(self, k: str) -> Proxy:  # type: ignore[override]
        if _is_outside(sys._getframe(1)) and not callable(getattr(Tensor, k, None)):
            # Read now: a later operation may change it, as the shape.
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return _Attribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(f"writes {name} of a tensor")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse(f"deletes {name} of a tensor")
        super().__delattr__(name)

    # Python would take a stand-in for any other key, and its name for what stands in a text.
    def __hash__(self) -> int:
        self._refuse("looks a value up")
        return super().__hash__()

    def __repr__(self) -> str:
        self._refuse("makes a text of a value")
        return super().__repr__()

    def _refuse(self, reason: str) -> None:
        if _is_outside(sys._getframe(2)):
            self.tracer.recording.fail(reason)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        if dis.opname[code[at]] != "UNPACK_SEQUENCE" or dis.opname[code[at - 2]] == "EXTENDED_ARG":
            return self.tracer.iter(self)
        count = code[at + 1]
        values: Any = self.tracer.create_proxy("call_function", _unpacked, (self, count), {})
        return iter([values[i] for i in range(count)])

    # Proxy has none of these, and Python would take `x += y` for `x = x + y`.
    __iadd__ = _in_place("iadd")
    __isub__ = _in_place("isub")
    __imul__ = _in_place("imul")
    __itruediv__ = _in_place("itruediv")
    __ifloordiv__ = _in_place("ifloordiv")
    __imod__ = _in_place("imod")
    __ipow__ = _in_place("ipow")
    __iand__ = _in_place("iand")
    __ior__ = _in_place("ior")
    __ixor__ = _in_place("ixor")
    __ilshift__ = _in_place("ilshift")
    __irshift__ = _in_place("irshift")
    __imatmul__ = _in_place("imatmul")


class _Attribute(Attribute, _Value):
    """Stands for an attribute of a tensor, as its shape."""
