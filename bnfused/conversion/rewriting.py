"""A function rewritten so that a batch norm can wait for the add and the activation that follow it.

In the tree of a function, a call such as ``self.child(v)``, an add ``a + b`` and a method call ``y.relu_()`` become
calls of a helper (``pending.Execution``), which stands at the same place and decides when it runs. A helper that calls
a batch norm returns a ``Pending``, and the next helper runs both as one op, or runs the batch norm alone. Everything
else stays the user's own code, and runs when it always ran: attributes and branches are read in their order.

The rules below see to it that nothing can notice that a batch norm waits:

- Only a local variable, the argument of a helper or the value that is returned may hold a ``Pending``. Everywhere else
  stands ``force(v, why)``, which is the tensor.
- Between the call of a batch norm and its use only *inert* code runs: names, constants, attributes, ``is``. Before a
  statement with anything else stands ``v = force(v, why)``, which runs the batch norm. Another call is made with
  ``call_after((v, ...), ...)``, which runs it too, unless the call returns its input itself, as an ``Identity`` does.
- A ``Pending`` is used once. A variable that is read again later, or not on every path, is forced first.

The reasons ``why`` are for the report, which interprets the same tree (``preview.py``).

This file is longer than most, because the rules for statements and for expressions share their state.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Collection, Iterable, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from bnfused.conversion.source import Unreadable, compiled, tree_of
from bnfused.conversion.trees import (
    LOOKING,
    SCOPES,
    conditional_parts,
    is_inert,
    is_inert_test,
    is_made_of_calls,
    is_read_first,
    live_before,
    mark_aliases,
    mark_computed,
    names_read,
    names_written,
    word_for,
)

HELPERS = ("call", "call_with", "call_after", "add", "iadd", "method", "force")
PREFIX = "__bnfused_"

_TWICE = "its output is used more than once"
_UNUSED = "its output is not used"
_ELSEWHERE = "its output is used in another way"

# These read or write the variables of their caller. So do vars and dir without an argument.
_READS_VARIABLES = {"locals", "eval", "exec", "_getframe", "currentframe"}


# A batch norm writes these when it runs. A forward that reads one must find it written.
_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class Rewritten(NamedTuple):
    """A rewritten function: its tree, its code, and whether it may return a ``Pending``."""

    tree: ast.FunctionDef
    code: CodeType
    returns_pending: bool

    def bind(self, function: FunctionType, helpers: dict[str, Any]) -> FunctionType:
        """A function of the rewritten code, with the globals, defaults and closure of ``function``."""
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        cells |= {PREFIX + name: CellType(helper) for name, helper in helpers.items()}
        closure = tuple(cells[name] for name in self.code.co_freevars)
        twin = FunctionType(self.code, function.__globals__, function.__name__, function.__defaults__, closure)
        twin.__kwdefaults__ = function.__kwdefaults__
        twin.__qualname__, twin.__module__ = function.__qualname__, function.__module__
        return twin


def rewrite(function: FunctionType, computed: Collection[str] = ()) -> Rewritten:
    """The function, rewritten. ``computed``: attributes that run code when they are read.

    Raises:
        Unreadable: it has no source, or has something that cannot be rewritten.
    """
    if hasattr(function, "__wrapped__"):
        raise Unreadable("is wrapped by a decorator")
    definition = tree_of(function)
    _refuse(definition)
    mark_computed(definition, {*computed, *_STATISTICS})
    mark_aliases(definition, _STATISTICS)
    writer = _Writer(function, set(function.__code__.co_varnames) - _shared_names(definition))
    arguments = function.__code__.co_varnames[: _number_of_arguments(function.__code__)]
    definition.body, end = writer.block(definition.body, _State(set(), set(arguments)), set(), is_protected=False)
    if end is not None:
        definition.body += writer.released(end.held, _UNUSED)
    definition.decorator_list = []
    ast.fix_missing_locations(definition)
    code = compiled(definition, function, [PREFIX + name for name in HELPERS])
    return Rewritten(definition, code, writer.returns_pending)


def _number_of_arguments(code: CodeType) -> int:
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + starred


# ----------------------------------------------------------------------------------------- what is not rewritten


def _refuse(definition: ast.FunctionDef) -> None:
    if getattr(definition, "type_params", None):
        raise Unreadable("has type parameters")
    for node in ast.walk(definition):
        if isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await)):
            raise Unreadable("is a generator, or asynchronous")
        if isinstance(node, (ast.Match, ast.TryStar, ast.ClassDef, ast.AsyncFor, ast.AsyncWith)):
            raise Unreadable(f"has a {type(node).__name__.lower()} statement")
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        is_vars = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("vars", "dir")
        if is_vars and not node.args:  # type: ignore[attr-defined]
            raise Unreadable("reads its own variables")
        if name in _READS_VARIABLES:
            raise Unreadable(f"uses {name}")
        if name.startswith("__") and not name.endswith("__"):
            raise Unreadable(f"uses {name}, a private name of its class")


def _shared_names(definition: ast.FunctionDef) -> set[str]:
    """Variables that more than the statements of the function read or write: they never hold a ``Pending``."""
    shared = set()
    for node in ast.walk(definition):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            shared.update(node.names)
        if isinstance(node, ast.NamedExpr):
            shared.add(node.target.id)
        if isinstance(node, SCOPES) and node is not definition:
            shared.update(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))
    return shared


# ---------------------------------------------------------------------------------------------- writing a tree


class _State(NamedTuple):
    """At a point of the function: variables that may hold a ``Pending``, and variables that surely have a value."""

    held: set[str]
    bound: set[str]


# The state behind statements; None where control does not get there.
_End = _State | None


def _name(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _at(statements: list[ast.stmt], place: ast.AST) -> list[ast.stmt]:
    """Give new statements the line of ``place``, so that tracebacks show the user's own lines."""
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, (ast.stmt, ast.expr, ast.keyword, ast.arg)) and not hasattr(node, "lineno"):
                ast.copy_location(node, place)
    return statements


class _Writer:
    """Rewrites the statements of one function; only the variables of ``may_hold`` can hold a ``Pending``."""

    def __init__(self, function: FunctionType, may_hold: set[str]) -> None:
        self.may_hold = may_hold
        self.returns_pending = False
        self._globals = function.__globals__
        self._locals = {*function.__code__.co_varnames, *function.__code__.co_cellvars, *function.__code__.co_freevars}
        self._first_argument = next(iter(function.__code__.co_varnames), "")
        self._temporaries = 0
        # In the expression that is being rewritten: the variables that may hold a Pending, each read once at most; and
        # all names that may hold one while a call runs, temporary ones too.
        self._held: set[str] = set()
        self._waiting: list[str] = []

    def helper(self, name: str, *arguments: ast.expr, keywords: Iterable[ast.keyword] = ()) -> ast.Call:
        return ast.Call(_name(PREFIX + name), list(arguments), list(keywords))

    def force(self, value: ast.expr, why: str) -> ast.expr:
        return self.helper("force", value, ast.Constant(why))

    def released(self, names: Iterable[str], why: str) -> list[ast.stmt]:
        """Statements after which the variables hold tensors."""
        return [ast.Assign([ast.Name(n, ast.Store())], self.force(_name(n), why)) for n in sorted(names)]

    # ------------------------------------------------------------------------------------------------- statements

    def block(
        self, body: Sequence[ast.stmt], state: _State, after: set[str], is_protected: bool
    ) -> tuple[list[ast.stmt], _End]:
        """The statements rewritten. ``after``: variables that are read behind them.

        ``is_protected``: they stand in a ``with`` or a ``try``, and return no ``Pending``, which would run outside.
        """
        written: list[ast.stmt] = []
        end: _End = state
        for i, statement in enumerate(body):
            assert end is not None
            live = live_before(body[i + 1 :], after)
            unused = end.held - live_before([statement], live)
            written += _at(self.released(unused, _UNUSED), statement)
            new, end = self._statement(statement, _State(end.held - unused, end.bound), live, is_protected)
            written += _at(new, statement)
            if end is None:
                break
        return written, end

    def _statement(self, s: ast.stmt, state: _State, live: set[str], is_protected: bool) -> tuple[list[ast.stmt], _End]:
        match s:
            case ast.Expr(value=ast.Constant()) | ast.Pass() | ast.Global() | ast.Nonlocal():
                return [s], state
            case ast.If():
                return self._if(s, state, live, is_protected)
            case ast.For(orelse=[]) if is_inert(s.iter):
                return self._for(s, state, live, is_protected)
            case ast.Expr() | ast.Assign() | ast.AugAssign() | ast.AnnAssign() | ast.Return():
                return self._simple(s, state, live, is_protected)
        before = self.released(state.held, f"{word_for(s)} comes before its output is used")
        state = _State(set(), state.bound)
        everything = live | set(names_read(s))
        for field in ("test", "msg", "exc", "cause", "iter"):
            if isinstance(value := getattr(s, field, None), ast.expr):
                setattr(s, field, self.plain(value))
        for item in getattr(s, "items", ()):
            item.context_expr = self.plain(item.context_expr)
        for part in [s, *getattr(s, "handlers", ())]:
            for field in ("body", "orelse", "finalbody"):
                if isinstance(s, _STATEMENTS_WITH_BODIES) and getattr(part, field, None):
                    is_loop = isinstance(s, (ast.For, ast.While))
                    new = self._inner(getattr(part, field), state, everything, is_protected or not is_loop)
                    setattr(part, field, new)
        if isinstance(s, (ast.Raise, ast.Break, ast.Continue)):
            return [*before, s], None
        return [*before, s], _State(set(), state.bound)

    def _inner(self, body: list[ast.stmt], state: _State, live: set[str], is_protected: bool) -> list[ast.stmt]:
        """The statements inside another one. At their end no variable holds a ``Pending``."""
        new, end = self.block(body, state, live, is_protected)
        if end is not None:
            new += _at(self.released(end.held, "a block of statements ends before its output is used"), body[-1])
        return new

    def _if(self, s: ast.If, state: _State, live: set[str], is_protected: bool) -> tuple[list[ast.stmt], _End]:
        early = state.held & set(names_read(s.test)) if is_inert_test(s.test) else set(state.held)
        before = self.released(early, f"{word_for(s.test)} comes before its output is used")
        held = state.held - early
        s.test = self.plain(s.test)
        ends: list[_End] = []
        for branch in (s.body, s.orelse):
            unused = held - live_before(branch, live)
            new, end = self.block(branch, _State(held - unused, state.bound), live, is_protected)
            branch[:] = [*_at(self.released(unused, _UNUSED), s), *new]
            ends.append(end)
        for branch, end, other in ((s.body, ends[0], ends[1]), (s.orelse, ends[1], ends[0])):
            if end is not None and other is not None:
                # If the other path gives it no value, it cannot be forced behind both.
                branch += _at(self.released(end.held - other.bound, "it is assigned on one path only"), s)
        found = [end for end in ends if end is not None]
        if not found:
            return [*before, s], None
        bound = set.intersection(*(end.bound for end in found))
        return [*before, s], _State(set().union(*(end.held for end in found)) & bound, bound)

    def _for(self, s: ast.For, state: _State, live: set[str], is_protected: bool) -> tuple[list[ast.stmt], _End]:
        """A loop whose iterable is inert. A ``Pending`` may pass from round to round."""
        targets = names_written(s.target)
        early = state.held & {*names_read(s.iter), *targets}
        before = self.released(early, _ELSEWHERE)
        held = state.held - early
        s.iter = self.plain(s.iter)
        live_in_body = live_before([s], live) | live
        original, crossing = s.body, set(held)
        while True:
            body = copy.deepcopy(original)
            s.body, end = self.block(body, _State(set(crossing), state.bound | targets), live_in_body, is_protected)
            left = set() if end is None else end.held
            if left & state.bound <= crossing:
                break
            crossing |= left & state.bound
        s.body += _at(self.released(left - state.bound, "a round of the loop ends before its output is used"), s)
        # At a break, every variable was forced: none holds a Pending.
        return [*before, s], _State(crossing, state.bound)

    def _simple(self, s: Any, state: _State, live: set[str], is_protected: bool) -> tuple[list[ast.stmt], _End]:
        """A statement with one value."""
        if isinstance(s, ast.Return) and s.value is None:
            return [*self.released(state.held, _UNUSED), s], None
        target = s.targets[0] if isinstance(s, ast.Assign) and len(s.targets) == 1 else getattr(s, "target", None)
        variable = target.id if isinstance(target, ast.Name) else ""
        reads = names_read(s)
        conditional = {name for part in conditional_parts(s) for name in names_read(part)}
        after = live - {variable}
        early: dict[str, str] = {}
        for name in sorted(state.held):
            count = reads.count(name)
            if count > 1 or (count == 1 and (name in after or name in conditional)):
                early[name] = _TWICE
            elif s.value is not None and not self._may_wait(s, name, variable):
                early[name] = f"{word_for(s.value)} comes before its output is used"
        before = [statement for name, why in early.items() for statement in self.released([name], why)]
        held = state.held - set(early)
        self._held, self._waiting = held, sorted(held)
        bound = state.bound | names_written(s)
        rest = held - set(reads) - {variable}
        new: Any = s
        holds = False
        if isinstance(s, ast.AugAssign):
            new, holds = self._augmented(s, variable)
        elif s.value is not None:
            s.value, holds = self.expression(s.value)
        if isinstance(s, ast.Return):
            if holds and is_protected:
                s.value, holds = self.force(new.value, "it is returned from a block of statements"), False
            self.returns_pending |= holds
            return [*before, s], None
        if holds and variable not in self.may_hold:
            new.value, holds = self.force(new.value, _UNUSED if isinstance(s, ast.Expr) else _ELSEWHERE), False
        for node in getattr(s, "targets", [target] if target is not None else []):
            if not isinstance(node, ast.Name):
                replace_parts(node, self.plain)
        return [*before, new], _State(rest | ({variable} if holds else set()), bound)

    def _may_wait(self, s: Any, name: str, variable: str) -> bool:
        """Whether nothing in the statement could notice that the batch norm in ``name`` has not run yet."""
        if isinstance(s, ast.AugAssign):
            # It may write the tensor that another batch norm has yet to read.
            is_add = bool(variable) and isinstance(s.op, ast.Add)
            return is_add and name in names_read(s) and is_made_of_calls(s.value)
        if not variable and not isinstance(s, (ast.Expr, ast.Return)):
            return False  # an assignment to an attribute or an element, or to several names
        if name in names_read(s):
            return is_read_first(s.value, name)
        return is_made_of_calls(s.value)

    def _augmented(self, s: ast.AugAssign, variable: str) -> tuple[ast.stmt, bool]:
        held = variable in self._held
        value, holds = self.expression(s.value)
        if held:  # an add: everything else has been forced before
            return ast.Assign([ast.Name(variable, ast.Store())], self.helper("iadd", _name(variable), value)), True
        s.value = self.force(value, "something is changed in place by adding its output") if holds else value
        return s, False

    # ------------------------------------------------------------------------------------------------ expressions

    def plain(self, e: Any) -> Any:
        """The expression, rewritten where no batch norm waits. Its value is a tensor."""
        self._held, self._waiting = set(), []
        return self.forced(e)

    def forced(self, e: Any) -> Any:
        new, holds = self.expression(e)
        return self.force(new, _ELSEWHERE) if holds else new

    def expression(self, e: Any) -> tuple[Any, bool]:
        """The expression rewritten, and whether its value may be a ``Pending``."""
        match e:
            case ast.Name(id=name, ctx=ast.Load()):
                return e, name in self._held
            case ast.Call():
                return self._call(e)
            case ast.BinOp(op=ast.Add()):
                (left, right), holds = self._in_order([e.left, e.right])
                if any(holds):
                    return _at_place(self.helper("add", left, right), e), True
                e.left, e.right = left, right
                return e, False
            case ast.IfExp():
                e.test = self.forced(e.test)
                e.body, a = self.expression(e.body)
                e.orelse, b = self.expression(e.orelse)
                return e, a or b
            case _ if isinstance(e, SCOPES):
                return e, False
        replace_parts(e, self.forced)
        return e, False

    def _in_order(self, expressions: Sequence[ast.expr]) -> tuple[list[ast.expr], list[bool]]:
        """Rewrite expressions that are evaluated one after the other and then given to one helper."""
        new: list[ast.expr] = []
        holding: list[bool] = []
        waiting = list(self._waiting)
        for i, e in enumerate(expressions):
            value, holds = self.expression(e)
            later = expressions[i + 1 :]
            if holds and not all(map(is_inert, later)):
                if not all(map(is_made_of_calls, later)):
                    word = next(word_for(other) for other in later if not is_made_of_calls(other))
                    value, holds = self.force(value, f"{word} comes before its output is used"), False
                elif not isinstance(value, ast.Name):
                    self._temporaries += 1
                    temporary = f"{PREFIX}{self._temporaries}"
                    value = ast.NamedExpr(ast.Name(temporary, ast.Store()), value)
                    self._waiting.append(temporary)
            new.append(value)
            holding.append(holds)
        self._waiting = waiting
        return new, holding

    def _call(self, e: ast.Call) -> tuple[ast.expr, bool]:
        function = e.func
        if is_inert(e) or (isinstance(function, ast.Name) and function.id in LOOKING):
            replace_parts(e, self.forced)
            return e, False
        own = set(names_read(e))
        waiting = [name for name in self._waiting if name not in own]
        parts = [*e.args, *(keyword.value for keyword in e.keywords)]
        if isinstance(function, ast.Attribute) and self._may_be_method_of_tensor(function):
            (base, *values), (of_pending, *holds) = self._in_order([function.value, *parts])
            if of_pending:
                arguments, keywords = self._put_back(e, values)
                name = ast.Constant(function.attr)
                helper = self.helper("method", self._tuple(waiting), name, base, *arguments, keywords=keywords)
                return _at_place(helper, e), True
            function.value = base
        else:
            if isinstance(function, ast.Attribute):
                function.value = self.forced(function.value)
            else:
                function = self.forced(function)
            values, holds = self._in_order(parts)
        arguments, keywords = self._put_back(e, values)
        if not waiting and not any(holds) and self._is_of_torch(function):
            e.func, e.args, e.keywords = function, arguments, keywords
            return e, False
        if waiting:
            why = ast.Constant(f"{word_for(e)} runs before its output is used")
            new = self.helper("call_after", self._tuple(waiting), why, function, *arguments, keywords=keywords)
        elif len(arguments) == 1 and not keywords and not isinstance(arguments[0], ast.Starred):
            new = self.helper("call", function, *arguments)
        else:
            new = self.helper("call_with", function, *arguments, keywords=keywords)
        return _at_place(new, e), True

    def _put_back(self, e: ast.Call, values: list[ast.expr]) -> tuple[list[ast.expr], list[ast.keyword]]:
        count = len(e.args)
        return values[:count], [ast.keyword(k.arg, v) for k, v in zip(e.keywords, values[count:], strict=True)]

    def _tuple(self, names: Sequence[str]) -> ast.expr:
        return ast.Tuple([_name(name) for name in names], ast.Load())

    def _root(self, e: ast.expr) -> ast.expr:
        while isinstance(e, ast.Attribute):
            e = e.value
        return e

    def _may_be_method_of_tensor(self, function: ast.Attribute) -> bool:
        """Whether the function is an attribute of what may be a ``Pending``."""
        root = self._root(function)
        if isinstance(root, ast.Name):
            return isinstance(function.value, ast.Name) and root.id in self._held
        is_super = isinstance(root, ast.Call) and isinstance(root.func, ast.Name) and root.func.id == "super"
        return isinstance(root, (ast.Call, ast.BinOp)) and root is function.value and not is_super

    def _is_of_torch(self, function: ast.expr) -> bool:
        """Whether the function stands in a module of Python, or is a method of a local value that is no module.

        The helpers have nothing to do for such a call where no argument is a ``Pending``.
        """
        root = self._root(function)
        if not isinstance(root, ast.Name) or not isinstance(function, ast.Attribute):
            return False
        if root.id in self._locals:
            return root.id != self._first_argument and function.attr != "forward"
        return isinstance(self._globals.get(root.id), ModuleType)


_STATEMENTS_WITH_BODIES = (ast.For, ast.While, ast.With, ast.Try)


def replace_parts(node: ast.AST, replace: Any) -> None:
    """Replace each expression directly under the node by what ``replace`` returns for it."""
    for field, value in ast.iter_fields(node):
        if isinstance(value, ast.expr):
            setattr(node, field, replace(value))
        elif isinstance(value, list):
            for i, element in enumerate(value):
                if isinstance(element, ast.expr):
                    value[i] = replace(element)
                elif isinstance(element, (ast.keyword, ast.FormattedValue)):
                    element.value = replace(element.value)


def _at_place(new: ast.expr, place: ast.expr) -> ast.expr:
    """Give a new expression the location of the one that it stands for."""
    for node in ast.walk(new):
        if isinstance(node, (ast.expr, ast.keyword)) and not hasattr(node, "lineno"):
            ast.copy_location(node, place)
    return new
