"""Finds the places of a CUDA kernel where ``mutate.py`` plants a fault, by the tokens of its text.

It relies on clang-format: an operator has a space on each side, and the bracket of a template does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

TOKEN = re.compile(r"::|->|<<|>>|&&|\|\||[<>=!]=|[-+*/%&|^]=|\+\+|--|\w+|\S")
OPENING, CLOSING = "([{", ")]}"
STATEMENT_ENDS = {",", ";", "=", "+=", "-=", "*=", "|=", "return", "?", ":"}
COMPARISONS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
# Statements without an expression to leave out: a type and a name, one word, declarations. And those that other tests
# drop: barriers, fences, waits.
NO_EXPRESSION = re.compile(
    r"(return|using|case|typename|template|else|const|static_assert)\b|(break|continue)\W|"
    r"[\w:]+(<[\w:<>, *&]*>)?[*&]*\s+[*&]*\w"
    r"|(__(syncthreads|threadfence)|cluster_barrier|cp_async_wait|BNFUSED_)|.*= default;"
)


@dataclass(frozen=True)
class Fault:
    file: str
    line: int
    what: str
    text: str
    occurrence: int  # counts faults with the same text in this file

    def __str__(self) -> str:
        again = f" (again, {self.occurrence})" if self.occurrence else ""
        return f"{self.file}: {self.what}: {self.text}{again}"


class Planter:
    """Finds the places for faults in one file, and writes the file with all faults behind switches."""

    def __init__(self, file: str, source: str, first: int):
        self.file, self.source, self.first = file, source, first
        self.faults: list[Fault] = []
        # For each edit: its negative length; whether it is inside of others of the same length; its begin and end; the
        # text to insert before and after.
        self.edits: list[tuple[int, bool, int, int, str, str]] = []
        self.commas: list[tuple[int, int]] = []  # the places of comparisons that become commas
        # Comments and directives become blanks, so that positions stay the same.
        self.code = re.sub(r"//.*|^#(.*\\\n)*.*", lambda m: re.sub(r"[^\n]", " ", m[0]), source, flags=re.MULTILINE)
        found = list(TOKEN.finditer(self.code))
        self.tokens, self.starts, self.ends = (
            [m[0] for m in found],
            [m.start() for m in found],
            [m.end() for m in found],
        )
        self.partner: dict[int, int] = {}
        stack: list[int] = []
        for at, token in enumerate(self.tokens):
            if token in OPENING:
                stack.append(at)
            elif token in CLOSING:
                self.partner[at] = stack.pop()
                self.partner[self.partner[at]] = at
        self.find()

    def find(self) -> None:
        headers: set[int] = set()  # tokens of the heads of loops
        fixed: set[int] = set()  # tokens of constant expressions
        statement_begins = {0}
        for at, token in enumerate(self.tokens):
            if token in ("if", "for", "while", "switch") and self.tokens[at + 1] == "(":
                close = self.partner[at + 1]
                statement_begins.add(close + 1)
                if token == "if":
                    self.condition(at + 2, close - 1, "if")
                if token == "for":
                    headers.update(range(at + 1, close))
                    above = self.source[: self.starts[at]].rstrip().rpartition("\n")[2]
                    if above.startswith("#pragma unroll"):
                        fixed.update(range(at + 1, close))
            elif token in ("constexpr", "static_assert"):
                end = at + 1
                while self.tokens[end] not in (";", "{"):
                    end += 1
                fixed.update(range(at, end))
            elif token in (";", "{", "}", "else") and at not in headers:
                statement_begins.add(at + 1)
        for at, token in enumerate(self.tokens):
            if at in fixed:
                continue
            spaced = self.code[self.starts[at] - 1] + self.code[self.ends[at] : self.ends[at] + 1]
            if token in COMPARISONS and spaced.isspace():
                left, right = self.reach(at, STATEMENT_ENDS | {"&&", "||", "==", "!="})
                if self.is_constant(left, at - 1) or self.is_choice(left, at, right):
                    continue
                fault = self.fault(left, right, f"{token} off by one")
                self.edit(left, right, f"{COMPARISONS[token]}({fault}, ", ")", inner=True)
                self.commas.append((self.starts[at], self.ends[at]))
            elif token in ("&&", "||") and spaced.isspace():
                left, right = self.reach(at, STATEMENT_ENDS | {"&&", "||"})
                operands = [(at + 1, right)]
                if self.tokens[left - 1] != token:  # otherwise it is the right operand of the operator before
                    operands.append((left, at - 1))
                for operand in operands:
                    if self.is_constant(*operand):
                        continue
                    fault = self.fault(*operand, f"{token} without")
                    dropped = f"planted({fault}) ||" if token == "&&" else f"!planted({fault}) &&"
                    self.edit(*operand, f"({dropped} (", "))")
            elif token == "?":
                left, _ = self.reach(at, STATEMENT_ENDS)
                self.condition(left, at - 1, "?")
        for at in sorted(statement_begins):
            self.statement(at)

    def reach(self, at: int, ends: set[str]) -> tuple[int, int]:
        """The first and the last token of the operands of the operator ``at``."""
        left = at - 1
        while self.tokens[left] not in ends and (self.tokens[left] not in OPENING):
            left = self.partner.get(left, left) - 1
        right = at + 1
        while self.tokens[right] not in ends and self.tokens[right] not in CLOSING:
            right = self.partner.get(right, right) + 1
        return left + 1, right - 1

    def is_constant(self, left: int, right: int) -> bool:
        """Whether the operand is one constant, such as kUnit, which the compiler knows."""
        return (
            right - left in (0, 2)
            and re.fullmatch(r"(\w+::)?k[A-Z]\w*", "".join(self.tokens[left : right + 1])) is not None
        )

    def is_choice(self, left: int, at: int, right: int) -> bool:
        """Whether the comparison chooses the smaller or the larger of two, where equality does not matter."""
        first, second = ("".join(self.tokens[i : j + 1]) for i, j in ((left, at - 1), (at + 1, right)))
        behind = (
            "".join(self.tokens[right + 1 : right + 2 + 2 * (right - left + 4)]).replace("int(", "").replace(")", "")
        )
        return behind.startswith((f"?{first}:{second}", f"?{second}:{first}"))

    def condition(self, left: int, right: int, what: str) -> None:
        if self.tokens[left - 2] == "constexpr" or self.is_constant(left, right):
            return
        true, false = (self.fault(left, right, f"{what} {value}") for value in ("always", "never"))
        self.edit(left, right, f"(planted({true}) || (!planted({false}) && (", ")))")

    def statement(self, at: int) -> None:
        end = at
        while end < len(self.tokens) and self.tokens[end] != ";":
            if self.tokens[end] in CLOSING or (self.tokens[end] == "{" and end == at):
                return
            end = self.partner.get(end, end) + 1
        if end in (at, len(self.tokens)) or NO_EXPRESSION.match(self.code[self.starts[at] : self.ends[end]]):
            return
        if self.tokens[at] in ("if", "for", "while", "switch", "do"):
            return
        self.edit(at, end, f"{{ if (!planted({self.fault(at, end, 'missing')})) {{ ", " } }")

    def fault(self, left: int, right: int, what: str) -> int:
        """Adds a fault and returns its number."""
        text = " ".join(self.source[self.starts[left] : self.ends[right]].split())
        line = self.source.count("\n", 0, self.starts[left]) + 1
        same = sum(f.what == what and f.text == text for f in self.faults)
        self.faults.append(Fault(self.file, line, what, text, same))
        return self.first + len(self.faults) - 1

    def edit(self, left: int, right: int, before: str, after: str, inner: bool = False) -> None:
        start, end = self.starts[left], self.ends[right]
        self.edits.append((start - end, inner, start, end, before, after))

    def text(self) -> str:
        """The file with a switch for each fault. Every line keeps its number."""
        source = self.source
        for start, end in self.commas:
            source = source[:start] + ",".ljust(end - start) + source[end:]
        opened: dict[int, str] = {}
        closed: dict[int, str] = {}
        for *_, start, end, before, after in sorted(self.edits, key=lambda edit: edit[:2]):  # outer edits first
            opened[start] = opened.get(start, "") + before
            closed[end] = after + closed.get(end, "")
        places = sorted({0, *opened, *closed, len(source)})
        pieces = (source[a:b] + closed.get(b, "") + opened.get(b, "") for a, b in pairwise(places))
        return "".join(pieces)
