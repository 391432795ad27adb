"""From a function to its syntax tree, if its source is what runs, and from a tree back to code."""

from __future__ import annotations

import ast
import copy
import functools
import linecache
from collections.abc import Iterator
from types import CodeType, FunctionType


class Unreadable(Exception):
    """Why a function cannot be rewritten; the message continues "its forward ..."."""


def tree_of(function: FunctionType) -> ast.FunctionDef:
    """A tree of the function's definition, with the line numbers of its file. The caller may change the tree.

    Raises:
        Unreadable: there is no source, or the file was edited after it was imported: it compiles to other code.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    definitions, compiled = _parsed("".join(lines), code.co_filename)
    definition = definitions.get((code.co_name, code.co_firstlineno))
    if not lines:
        raise Unreadable("has no source to read")
    if definition is None or code not in compiled:
        raise Unreadable("has a source that is not what runs: the file has changed since it was imported")
    return copy.deepcopy(definition)


@functools.lru_cache(maxsize=64)
def _parsed(text: str, filename: str) -> tuple[dict[tuple[str, int], ast.FunctionDef], list[CodeType]]:
    """The functions of a file by name and first line, and all of its code objects.

    The whole file is compiled, because CPython compiles ``F.relu(x)`` in another way where it sees the import of ``F``.
    """
    try:
        tree = ast.parse(text)
        code = compile(tree, filename, "exec", dont_inherit=True)
    except SyntaxError:
        return {}, []
    definitions = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first_line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            definitions[node.name, first_line] = node
    return definitions, list(_codes_in(code))


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes_in(constant)


def compiled(definition: ast.FunctionDef, function: FunctionType, free: list[str]) -> CodeType:
    """The code of a definition; ``free`` names its free variables beyond those of the function."""
    given = [ast.arg(name) for name in (*function.__code__.co_freevars, *free)]
    arguments = ast.arguments(posonlyargs=[], args=given, kwonlyargs=[], kw_defaults=[], defaults=[])
    outer = ast.FunctionDef(name="outer", args=arguments, body=[definition], decorator_list=[])
    if "type_params" in ast.FunctionDef._fields:
        outer.type_params = []  # type: ignore[attr-defined]
    ast.copy_location(outer, definition)
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    code = compile(module, function.__code__.co_filename, "exec", dont_inherit=True)
    for name in ("outer", definition.name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return code
