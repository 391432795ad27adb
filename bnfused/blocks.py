"""Fusion inside a module whose forward is Python code, such as a residual block.

The recorded forward is kept as generated code, in which a call of a child that ends in a batch norm, and the add and
the activation that follow it at once, are replaced by a ``Site``. The site decides in every call whether they are one
op; and where the record does not hold any more, the class's own forward runs.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.compiler import is_compiling

from bnfused import tracing
from bnfused.fusion import (
    EXECUTION,
    NOTHING,
    Activation,
    Execution,
    Forward,
    Then,
    activation_of,
    batch_norm_at_end,
    is_bare,
    is_batch_norm,
    is_transparent,
    may_be_activation,
    may_be_transparent,
    run,
)


class BlockForward(Forward):
    """Of a module whose forward is Python code."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._plans: list[Plan] | None = None
        # Continues "its forward ...", where it could not be recorded.
        self.why_not: str | None = None

    @property
    def plans(self) -> list[Plan]:
        """One for each combination of argument types; none where forward cannot be recorded."""
        if self._plans is None:
            try:
                self._plans = [_plan(self.module, record) for record in _records(self.module)]
            except tracing.Untraceable as error:
                self._plans, self.why_not = [], str(error)
        return self._plans

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_plans": None}  # recorded again where it is loaded, from the code that is there

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockForward:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(vars(self), module=copy.deepcopy(self.module, memo))
        return twin

    def run(self, args: tuple[Any, ...], then: Then, on: Execution) -> Any:
        plans = self._plans
        if plans is None:
            if is_compiling():  # loaded and never called: recording is not for the compiler
                return on.finish(then, self.original(*args))
            plans = self.plans
        for plan in plans:
            if plan.holds(self.module, args):
                return on.block(plan, self.module, args, then)
        return on.finish(then, self.original(*args))

    def batch_norm_at_end(self) -> nn.Module | None:
        for plan in self.plans:
            for site in plan.sites:
                if site.is_open:
                    return batch_norm_at_end(self.module.get_submodule(site.norm))
        return None

    def has_something_to_fuse(self) -> bool:
        return any(plan.sites for plan in self.plans)


def _records(module: nn.Module) -> list[tracing.Record]:
    """For each number of arguments, which may be tensors or, where forward asks or has to know, lists of tensors.

    Raises:
        tracing.Untraceable: there is none; why not for tensors.
    """
    records: list[tracing.Record] = []
    first_reason: tracing.Untraceable | None = None
    for count in tracing.argument_counts(module):
        for types in itertools.product((Tensor, list), repeat=count):
            try:
                records.append(tracing.record(module, types))
            except tracing.Untraceable as reason:
                first_reason = first_reason or reason
                continue
            if not records[-1].asked_for_types:
                break
    if not records and first_reason is not None:
        raise first_reason
    return records


class Step(NamedTuple):
    """One operation after a batch norm: ``function(y, residual)``, or a child's call where there is no function."""

    function: Callable[[Any, Any], Any] | None
    activation: Activation | None


@dataclass(frozen=True)
class Site:
    """In a block's forward, a child that ends in a batch norm, and the add and the activation that follow it.

    ``norm`` names the child, ``children`` those among ``steps``. The result of a site that ``is_open`` is what the
    block returns, so that what follows the block can be fused as well. An add in place that would overwrite the result
    of another child, and not the batch norm's, has that child's name in ``overwritten``.
    """

    norm: str
    steps: tuple[Step, ...]
    children: tuple[str, ...]
    has_residual: bool
    overwritten: str | None
    is_open: bool
    __name__ = "fused"  # in the generated code

    def modules(self) -> tuple[str, ...]:
        """Names of the modules that a call takes, in this order: the first one, then all others."""
        return (self.norm, *self.children, *(() if self.overwritten is None else (self.overwritten,)))

    def __call__(
        self,
        x: Any,
        residual: Any,
        then: Then | None,
        norm: nn.Module,
        *others: nn.Module,
        on: Execution = EXECUTION,
    ) -> Any:
        activation, in_the_way = self._activation(others)
        own = Then(
            residual if self.has_residual else None,
            *activation,
            lambda y: self._one_by_one(y, residual, others),
            NOTHING.end,
        )
        if in_the_way is not None:
            return on.finish(then or NOTHING, on.finish(own, on.plain(norm, x, in_the_way)))
        if then is None:
            return run(norm, x, own, on)
        own, rest = own.followed_by(then)
        return on.finish(rest, run(norm, x, own, on))

    def _activation(self, others: Sequence[nn.Module]) -> tuple[Activation, nn.Module | None]:
        """What the activation is at this moment, and the module that keeps the steps from being one op, if any."""
        activation: Activation = None, None
        # Nobody else may hold what is overwritten: a batch norm's result is new, that of an Identity is not.
        if self.overwritten is not None and not (is_batch_norm(others[-1]) and is_bare(others[-1])):
            return activation, others[-1]
        remaining = iter(others)
        for i, step in enumerate(self.steps):
            if step.function is not None:
                activation = step.activation or activation
                continue
            child = next(remaining)
            found = activation_of(child)
            if found is None and is_transparent(child):
                continue
            if found is None or i + 1 < len(self.steps):
                return activation, child
            activation = found
        return activation, None

    def _one_by_one(self, y: Any, residual: Any, others: Sequence[nn.Module]) -> Any:
        remaining = iter(others)
        for step in self.steps:
            y = next(remaining)(y) if step.function is None else step.function(y, residual)
        return y


@dataclass(frozen=True)
class Plan:
    """A block's recorded forward with its sites.

    ``function(module, *args, then)`` runs it, ``then`` being for the open site, if it ``is_open``. Where it
    ``reads_children_only``, anything that has them will do for the module. ``unfused`` has the other children that end
    in a batch norm, and why. ``transparent`` are children whose call was moved before the batch norm's, because they
    return their input.
    """

    record: tracing.Record
    function: Callable[..., Any]
    sites: tuple[Site, ...]
    is_open: bool
    reads_children_only: bool
    unfused: tuple[tuple[str, nn.Module | str], ...]
    transparent: tuple[str, ...]

    def holds(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the class's forward would do now what it did when it was recorded."""
        types = self.record.argument_types
        if len(args) != len(types):
            return False
        for arg, kind in zip(args, types, strict=True):
            if not _is_of_type(arg, kind, self.record.asked_for_types):
                return False
        for a, b in itertools.combinations(args, 2):
            if a is b:
                return False
        return self.holds_for(module)

    def holds_for(self, module: nn.Module) -> bool:
        """The same, whatever the arguments are."""
        return self.record.holds(module) and all(map(is_transparent, map(module.get_submodule, self.transparent)))

    def execute(self, module: nn.Module, args: tuple[Any, ...], then: Then) -> Any:
        of: Any = module
        if self.reads_children_only and not is_compiling():
            of = _Children()
            of.__dict__ = module._modules
        if self.is_open:
            return self.function(of, *args, then)
        return then.plain(self.function(of, *args, None))


class _Children:
    """Has a module's children for attributes, as they are at any moment: the dict that keeps them is its ``__dict__``.

    Generated code reads them from here in a tenth of the time that ``nn.Module.__getattr__`` takes.
    """


def _is_of_type(arg: Any, kind: type, exactly: bool) -> bool:
    """``exactly``: forward asks for types, and might ask for a subclass."""
    if kind is Tensor:
        return type(arg) in (Tensor, nn.Parameter) if exactly else isinstance(arg, Tensor)
    return type(arg) is kind


def _plan(module: nn.Module, record: tracing.Record) -> Plan:
    graph = record.graph
    for last in graph.nodes:
        if last.op != "placeholder":
            break
    with graph.inserting_before(last):
        then = graph.placeholder("then")
    sites: list[Site] = []
    unfused: list[tuple[str, nn.Module | str]] = []
    transparent: list[str] = []
    for node in list(graph.nodes):
        if node.op != "call_module" or batch_norm_at_end(module.get_submodule(str(node.target))) is None:
            continue
        chain = _Chain(module, node)
        if not chain.steps and not chain.is_open:
            unfused.append((str(node.target), chain.end))
            continue
        for moved in chain.moved:
            node.prepend(moved)
            transparent.append(str(moved.target))
        site = chain.site()
        sites.append(site)
        with graph.inserting_before(node):
            modules = [graph.create_node("get_attr", name) for name in site.modules()]
            follows = then if site.is_open else None
            fused = graph.call_function(site, (node.args[0], chain.residual, follows, *modules))
        chain.nodes[-1].replace_all_uses_with(fused)
        for done in reversed(chain.nodes):
            graph.erase_node(done)
    read = {str(node.target).split(".")[0] for node in graph.nodes if node.op in ("get_attr", "call_module")}
    return Plan(
        record,
        _compiled(graph, type(module)),
        tuple(sites),
        any(site.is_open for site in sites),
        read <= set(record.children),
        tuple(unfused),
        tuple(transparent),
    )


def _compiled(graph: fx.Graph, cls: type) -> Callable[..., Any]:
    code = graph.python_code("self")
    file = f"<bnfused: {cls.__module__}.{cls.__qualname__} {hash(code.src):x}>"
    namespace = dict(code.globals)
    exec(compile(code.src, file, "exec"), namespace)
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)  # for tracebacks
    return namespace["forward"]


class _Chain:
    """The operations that follow ``norm``, the call of a child that ends in a batch norm, and can be one op with it.

    Each is executed right after the one before and is the only one to use its result: so nothing in the block can tell
    whether they are one.
    """

    def __init__(self, module: nn.Module, norm: fx.Node) -> None:
        self.nodes = [norm]
        self.steps: list[Step] = []
        self.children: list[str] = []
        self.residual: fx.Node | None = None
        self.overwritten: str | None = None
        self.moved: list[fx.Node] = []
        self.is_open = False
        # Why it does not go on.
        self.end: nn.Module | str = NOTHING.end
        self._module = module
        if len(norm.args) != 1 or norm.kwargs:
            self.end = "it is called with more than its input"
            return
        is_complete, useful = False, 0
        while not is_complete and self._extend():
            child = None if self.steps[-1].function is not None else self._child(self.nodes[-1])
            is_complete = self.steps[-1].activation is not None or (child is not None and may_be_activation(child))
            if child is None or not may_be_transparent(child):
                useful = len(self.steps)
        if not self.is_open:  # what only lies between says nothing
            del self.steps[useful:], self.nodes[useful + 1 :]
            self.children = [str(node.target) for node in self.nodes[1:] if node.op == "call_module"]

    def _child(self, call: fx.Node) -> nn.Module:
        return self._module.get_submodule(str(call.target))

    def _extend(self) -> bool:
        """Take the next operation in, or say why not."""
        current, following = self.nodes[-1], self._next()
        if following.op == "output" and following.args[0] is current:
            self.is_open = True
            return False
        if len(current.users) != 1:
            self.end = "its output is used more than once" if current.users else "its output is not used"
            return False
        if following not in current.users:
            self.end = f"{_name_of(following)} runs before its output is used"
            return False
        if following.op == "call_module" and following.args == (current,) and not following.kwargs:
            child = self._child(following)
            if not may_be_transparent(child) and not may_be_activation(child):
                self.end = child
                return False
            self.children.append(str(following.target))
            self.steps.append(Step(None, None))
        elif self.residual is None and (added := _added(following, current)) is not None:
            if following.target in _ADDITIONS_IN_PLACE and following.args[0] is added:
                if not self._is_new(added):
                    self.end = f"{_name_of(following)} writes into something else"
                    return False
                self.overwritten = str(added.target)
            self.residual = added
            self.steps.append(Step(_function(following, current, added), None))
        elif (activation := _activation_call(following, current)) is not None:
            self.steps.append(Step(_function(following, current, None), activation))
        else:
            self.end = f"followed by {_name_of(following)}"
            return False
        self.nodes.append(following)
        return True

    def _next(self) -> fx.Node:
        """The next operation, but for an Identity of something else: that may as well come before."""
        following = self.nodes[-1].next
        while (
            following.op == "call_module"
            and type(self._child(following)) is nn.Identity
            and len(following.args) == 1
            and not following.kwargs
            and not any(node in self.nodes or node in self.moved for node in following.all_input_nodes)
            and following not in self.nodes[-1].users
        ):
            self.moved.append(following)
            following = following.next
        return following

    def _is_new(self, node: fx.Node) -> bool:
        """Whether ``node`` is what a batch norm returned, and the addition its only use."""
        return node.op == "call_module" and len(node.users) == 1 and is_batch_norm(self._child(node))

    def site(self) -> Site:
        return Site(
            norm=str(self.nodes[0].target),
            steps=tuple(self.steps),
            children=tuple(self.children),
            has_residual=self.residual is not None,
            overwritten=self.overwritten,
            is_open=self.is_open,
        )


def _name_of(node: fx.Node) -> str:
    if node.op == "output":
        return "a return of more than that"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ADDITIONS_IN_PLACE = (operator.iadd, "add_")


def _added(node: fx.Node, current: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``current``, if it is an addition of two values."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    if node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
        return None
    other = node.args[1] if node.args[0] is current else node.args[0]
    return other if isinstance(other, fx.Node) else None


# Name for ``batch_norm``, and the parameter's name, which is the second argument.
_ACTIVATION_FUNCTIONS: dict[Any, tuple[str, str | None]] = {
    F.relu: ("relu", None),
    torch.relu: ("relu", None),
    torch.relu_: ("relu", None),
    F.relu6: ("relu6", None),
    F.leaky_relu: ("leaky_relu", "negative_slope"),
    F.elu: ("elu", "alpha"),
    F.silu: ("silu", None),
    F.gelu: ("gelu", None),
    F.hardswish: ("hardswish", None),
    torch.sigmoid: ("sigmoid", None),
    torch.tanh: ("tanh", None),
}
_ACTIVATION_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_"}


def _activation_call(node: fx.Node, current: fx.Node) -> Activation | None:
    """The activation that ``node`` computes of ``current``."""
    if not node.args or node.args[0] is not current:
        return None
    if node.op == "call_method" and node.target in _ACTIVATION_METHODS:
        return None if len(node.args) > 1 or node.kwargs else (str(node.target).rstrip("_"), None)
    if node.op != "call_function" or node.target not in _ACTIVATION_FUNCTIONS:
        return None
    name, parameter = _ACTIVATION_FUNCTIONS[node.target]
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    values = list(node.args[1:])
    if name == "gelu" and options.pop("approximate", "none") != "none":
        return None
    if parameter is not None and parameter in options:
        values.append(options.pop(parameter))
    if options or len(values) > (parameter is not None) or not all(type(value) in (int, float) for value in values):
        return None
    return name, float(values[0]) if values else None  # type: ignore[arg-type]


def _function(node: fx.Node, current: fx.Node, residual: fx.Node | None) -> Callable[[Any, Any], Any]:
    """The operation of ``node`` as a function of ``current`` and ``residual``."""
    places = ["y" if argument is current else "residual" if argument is residual else "" for argument in node.args]
    target: Any = _method(node.target) if isinstance(node.target, str) else node.target
    constants, options = node.args, dict(node.kwargs)

    def function(y: Any, residual: Any) -> Any:
        values = {"y": y, "residual": residual}
        arguments = [values.get(place, constant) for place, constant in zip(places, constants, strict=True)]
        return target(*arguments, **options)

    return function


def _method(name: str) -> Callable[..., Any]:
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)
