"""Facts about the syntax tree of a function: which variables a part reads and writes, and what it can notice."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence

# Builtins that only look at their arguments, if none of these is a tensor.
LOOKING = {"callable", "enumerate", "getattr", "hasattr", "id", "isinstance", "issubclass", "len", "range", "reversed"}
LOOKING |= {"super", "type", "zip"}

_IDENTITY = (ast.Is, ast.IsNot)

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names_read(node: ast.AST) -> list[str]:
    """The variables that the node reads; one that it reads twice is there twice."""
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        names.append(node.target.id)
    return names


def names_written(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def mark_computed(tree: ast.AST, names: Collection[str]) -> None:
    """Mark the reads of these attributes. They run code, as a property does."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name):
                node.is_computed = name in names  # type: ignore[attr-defined]
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=name), *_]):
                node.is_computed = name in names  # type: ignore[attr-defined]


def mark_aliases(tree: ast.AST, names: Collection[str]) -> None:
    """Mark the reads of variables that may be another name of one of these attributes, as those of the attribute."""
    aliases: set[str] = set()

    def may_be_one(value: ast.AST) -> bool:
        return any(
            (isinstance(node, ast.Attribute) and node.attr in names)
            or (isinstance(node, ast.Constant) and node.value in names)  # getattr(self.bn, "running_mean")
            or (isinstance(node, ast.Name) and node.id in aliases)
            for node in ast.walk(value)
        )

    def assigned() -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For)):
                value = node.iter if isinstance(node, ast.For) else node.value
                if value is not None and may_be_one(value):
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        yield from names_written(target)

    while new := set(assigned()) - aliases:
        aliases |= new
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in aliases:
            node.is_computed = True  # type: ignore[attr-defined]


def is_inert(node: ast.AST | None) -> bool:
    """Whether evaluating the node does nothing but look at variables and attributes."""
    if getattr(node, "is_computed", False):
        return False
    match node:
        case None | ast.Name() | ast.Constant() | ast.Lambda():
            return True
        case ast.Attribute(value=value):
            return is_inert(value)
        case ast.UnaryOp(op=ast.Not(), operand=value):
            return is_inert_test(value)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _IDENTITY) for op in ops):
            return all(map(is_inert, [left, *others]))
        case ast.Compare(left=left, comparators=others):
            return is_inert_test(left) and all(isinstance(other, ast.Constant) for other in others)
        case ast.BoolOp(values=values):
            return all(map(is_inert_test, values))
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return all(map(is_inert, elements))
        case ast.Subscript(value=ast.Attribute() as value, slice=index):  # self.layers[0]
            return is_inert(value) and is_inert(index)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in LOOKING:
            return all(map(is_inert, arguments))
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="jit"), attr="is_scripting" | "is_tracing")):
            return True
        case ast.Call(func=ast.Attribute(value=value, attr="items" | "values" | "children"), args=[], keywords=[]):
            return isinstance(value, ast.Attribute) and is_inert(value)
    return False


def is_inert_test(node: ast.AST) -> bool:
    """Whether asking the node's truth, or comparing it with a constant, does nothing but look at attributes.

    A variable may be another name of the counter of a batch norm that waits, whose value would come too early.
    """
    return is_inert(node) and not isinstance(node, ast.Name)


def has_call(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Call) for inner in ast.walk(node))


def is_made_of_calls(node: ast.AST | None) -> bool:
    """Whether the node consists of inert parts, and of calls, adds and choices, which are rewritten."""
    if is_inert(node):
        return True
    if getattr(node, "is_computed", False):
        return False
    match node:
        case ast.Call(func=function, args=arguments, keywords=keywords):
            return all(map(is_made_of_calls, [function, *arguments, *(k.value for k in keywords)]))
        case ast.Attribute(value=value) | ast.Starred(value=value):
            return is_made_of_calls(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right) if has_call(node):
            return is_made_of_calls(left) and is_made_of_calls(right)
        case ast.IfExp(test=test, body=body, orelse=other):
            return is_inert_test(test) and is_made_of_calls(body) and is_made_of_calls(other)
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return all(map(is_made_of_calls, elements))
        case ast.Dict(keys=keys, values=values):
            return all(map(is_inert, keys)) and all(map(is_made_of_calls, values))
    return False


def conditional_parts(node: ast.AST) -> Iterator[ast.AST]:
    """Parts of an expression that a run may evaluate never, or more than once."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.IfExp):
            yield from (inner.body, inner.orelse)
        elif isinstance(inner, ast.BoolOp):
            yield from inner.values[1:]
        elif isinstance(inner, ast.Compare):
            yield from inner.comparators[1:]
        elif isinstance(inner, SCOPES):
            yield inner


def evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of an expression, in the order in which Python evaluates them."""
    parts = [node.test, node.body, node.orelse] if isinstance(node, ast.IfExp) else ast.iter_child_nodes(node)
    for part in parts:
        yield from evaluated(part)
    yield node


def is_read_first(expression: ast.AST, name: str) -> bool:
    """Whether only calls and inert code are evaluated before the variable is read."""
    for node in evaluated(expression):
        if isinstance(node, ast.Name) and node.id == name:
            return True
        is_add = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and has_call(node)
        passes = isinstance(node, _PASSING) and not getattr(node, "is_computed", False)
        if isinstance(node, ast.IfExp):
            passes = is_inert_test(node.test)
        if isinstance(node, ast.expr) and not (is_add or passes or is_inert(node)):
            return False
    return True


_PASSING = (ast.Call, ast.Attribute, ast.Starred, ast.IfExp, ast.Tuple, ast.List, ast.Dict)


def live_before(body: Sequence[ast.stmt], after: set[str]) -> set[str]:
    """The variables whose values may be read from the first statement of the body on."""
    live = set(after)
    for s in reversed(body):
        if isinstance(s, ast.If):
            live = live_before(s.body, live) | live_before(s.orelse, live) | set(names_read(s.test))
        elif isinstance(s, (ast.For, ast.While)):
            inside = live_before(s.orelse, live) | live
            for _ in range(2):
                inside |= live_before(s.body, inside)
            head = s.iter if isinstance(s, ast.For) else s.test
            live = inside | set(names_read(head))
        elif isinstance(s, (ast.With, ast.Try)):
            live = live | set(names_read(s))
        elif isinstance(s, (ast.Return, ast.Raise)):
            live = set(names_read(s))
        elif isinstance(s, (ast.Break, ast.Continue)):
            pass  # no variable holds a Pending there
        else:
            live = (live - names_written(s)) | set(names_read(s))
    return live


_SYMBOLS = {ast.Mult: "mul", ast.Sub: "sub", ast.Div: "div", ast.MatMult: "matmul", ast.Pow: "pow", ast.Add: "add"}


def word_for(node: ast.AST) -> str:
    """The name of a statement or an expression in a report."""
    match node:
        case ast.BinOp(op=op):
            return _SYMBOLS.get(type(op), type(op).__name__.lower())
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
            return name
        case ast.expr():
            return f"`{ast.unparse(node)}`" if len(ast.unparse(node)) <= 40 else "an expression"
    return f"a statement `{type(node).__name__.lower()}`"
