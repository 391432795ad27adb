"""What is measured: configurations (one tensor each), their cells, the least traffic, the targets.

Data only: no timing, no printing. A cell is one configuration, one pass, one fusion and one number
of threads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FUSIONS = ("plain", "relu", "add_relu")
FUSION_LABELS = {"plain": "plain", "relu": "+ReLU", "add_relu": "+add+ReLU"}
PASSES = ("forward", "backward", "forward+backward", "eval", "chain")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_DTYPES = ("float32", "bfloat16")

# Families of configurations that share a target.
FIRST_32 = "channels first float32"
LAST_32 = "channels last float32"
FIRST_16 = "channels first 16-bit"
LAST_16 = "channels last 16-bit"
EVERY = "all layouts and dtypes"
TINY = "tiny (64,256)"
FEW = "few channels, channels last"
MIXED = "x and grad_y in different layouts, NLC view"
EXPANDED = "expanded grad_y"
LARGE = "outputs >= 32 MiB"
CHAIN = "between producer and consumer, net"

_REGULAR = (FIRST_32, LAST_32, FIRST_16, LAST_16)


@dataclass(frozen=True)
class Cell:
    """One number of the result; ``threads`` is how many torch may use."""

    configuration: str
    family: str
    pass_name: str
    fusion: str
    threads: int

    @property
    def name(self) -> str:
        """What ``--filter`` searches and what the tables print."""
        return f"{self.configuration} {self.pass_name} {self.fusion} T={self.threads}"

    @property
    def group(self) -> tuple[str, str, str]:
        """(family, pass, fusion): cells of one group share a geometric mean and a target."""
        family = EVERY if self.pass_name == "eval" and self.family in _REGULAR else self.family
        return family, self.pass_name, self.fusion


@dataclass(frozen=True)
class Configuration:
    """One input tensor. All functions of its cells are timed interleaved, on the same buffers.

    ``grad_y`` is the layout of the upstream gradient: ``like x``, ``contiguous``,
    ``channels_last``, or ``expanded`` (one stored value, as ``y.sum().backward()`` makes it).
    """

    shape: tuple[int, ...]
    layout: str
    dtype: str
    family: str
    passes: tuple[str, ...]
    fusions: tuple[str, ...] = FUSIONS
    grad_y: str = "like x"
    quick: bool = False

    @property
    def name(self) -> str:
        chain = " chain" if self.family == CHAIN else ""
        grad_y = "" if self.grad_y == "like x" else f" grad_y={self.grad_y}"
        return f"{'x'.join(map(str, self.shape))} {self.layout} {self.dtype}{grad_y}{chain}"

    @property
    def activation_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def cells(self, threads: int, pattern: str = "") -> list[Cell]:
        """The cells whose name contains the regular expression ``pattern``."""
        cells = [
            Cell(self.name, self.family, pass_name, fusion, threads)
            for pass_name in self.passes
            for fusion in self.fusions
        ]
        return [cell for cell in cells if re.search(pattern, cell.name)]


def bytes_moved(pass_name: str, fusion: str, activation_bytes: int) -> int:
    """Least traffic of a pass in bytes: every tensor read or written once, x not looked at twice.

    Forward and eval read x and write y (2A, A one activation); backward reads x and grad_y and
    writes grad_x (3A). A residual adds one A to read in the forward and one A of grad_residual to
    write in the backward. The ReLU mask needs nothing more: it follows from x, or costs one bit per
    value.
    """
    residual = 1 if fusion == "add_relu" else 0
    forward, backward = 2 + residual, 3 + residual
    passes = {
        "forward": forward,
        "eval": forward,
        "chain": forward,
        "backward": backward,
        "forward+backward": forward + backward,
    }
    return passes[pass_name] * activation_bytes


_TRAIN_AND_EVAL = ("forward", "backward", "forward+backward", "eval")

# (shape, layout, in the quick run), the sizes of residual networks at batch 8 and of the usual 1d
# and 3d networks.
_SHAPES: tuple[tuple[tuple[int, ...], str, bool], ...] = (
    ((8, 64, 112, 112), "NCHW", False),
    ((8, 256, 56, 56), "NCHW", False),
    ((8, 512, 28, 28), "NCHW", True),
    ((8, 2048, 7, 7), "NCHW", True),
    ((32, 64, 56, 56), "NCHW", False),
    ((16, 256, 1024), "NCL", False),
    ((2, 32, 16, 56, 56), "NCDHW", False),
    ((8, 64, 112, 112), "channels_last", False),
    ((8, 256, 56, 56), "channels_last", False),
    ((8, 512, 28, 28), "channels_last", True),
    ((8, 2048, 7, 7), "channels_last", True),
    ((32, 64, 56, 56), "channels_last", False),
    ((4096, 1024), "NC", False),
    ((64, 256), "NC", True),
    ((2, 32, 16, 56, 56), "channels_last_3d", False),
)
_CHANNELS_FIRST = ("NCHW", "NCL", "NCDHW")


def _regular(dtype: str) -> Iterator[Configuration]:
    for shape, layout, quick in _SHAPES:
        if shape == (64, 256):
            family = TINY
        elif layout in _CHANNELS_FIRST:
            family = FIRST_32 if dtype == "float32" else FIRST_16
        else:
            family = LAST_32 if dtype == "float32" else LAST_16
        # float16 takes bfloat16's code paths with another conversion: the quick run leaves it out.
        yield Configuration(shape, layout, dtype, family, _TRAIN_AND_EVAL, quick=quick and dtype != "float16")


def _cliffs() -> Iterator[Configuration]:
    """Where torch 2.13 on CPU falls far below its own usual speed, or a new kernel easily might."""
    for shape, quick in (
        ((32, 3, 224, 224), False),
        ((16, 2, 256, 256), True),
        ((8, 12, 112, 112), True),
    ):
        yield Configuration(shape, "channels_last", "float32", FEW, _TRAIN_AND_EVAL, ("plain", "relu"), quick=quick)
    for layout, grad_y in (("channels_last", "contiguous"), ("NCHW", "channels_last")):
        yield Configuration(
            (8, 512, 28, 28),
            layout,
            "float32",
            MIXED,
            ("backward", "forward+backward"),
            ("plain",),
            grad_y=grad_y,
            quick=True,
        )
    yield Configuration(
        (16, 256, 1024),
        "NLC view",
        "float32",
        MIXED,
        ("forward", "backward", "forward+backward"),
        ("plain",),
        quick=True,
    )
    for layout in ("NCHW", "channels_last"):
        yield Configuration(
            (8, 512, 28, 28),
            layout,
            "float32",
            EXPANDED,
            ("backward", "forward+backward"),
            ("plain",),
            grad_y="expanded",
        )
    for layout in ("NCHW", "channels_last"):
        yield Configuration(
            (16, 64, 112, 112),
            layout,
            "float32",
            LARGE,
            ("forward", "backward", "eval"),
            ("plain", "relu"),
        )


def _chains() -> Iterator[Configuration]:
    """Batch norm between two other operations: what bypasses the cache costs the consumer."""
    for shape in ((8, 64, 112, 112), (8, 512, 28, 28), (8, 2048, 7, 7)):
        for layout in ("NCHW", "channels_last"):
            for dtype in DEFAULT_DTYPES:
                quick = shape == (8, 512, 28, 28) and dtype == "float32"
                yield Configuration(shape, layout, dtype, CHAIN, ("chain",), ("plain", "relu"), quick=quick)


def configurations(dtypes: Iterable[str], quick: bool) -> list[Configuration]:
    """Everything that a run measures, in the order in which it is measured."""
    dtypes = tuple(dtypes)
    every = [configuration for dtype in dtypes for configuration in _regular(dtype)]
    every += [*_cliffs(), *_chains()]
    return [c for c in every if c.dtype in dtypes and (c.quick or not quick)]


@dataclass(frozen=True)
class Target:
    """Speed-up over eager torch: no cell below ``floor``, geometric mean at least ``geomean``."""

    floor: float | None = None
    geomean: float | None = None


def _pair(one: Target, every: Target | None = None) -> tuple[Target, Target]:
    return one, one if every is None else every


# (on one thread, on all threads). They come from a prototype's measured speed on a 2-core AVX-512
# machine; other machines have other ratios.
TARGETS: dict[tuple[str, str, str], tuple[Target, Target]] = {
    (FIRST_32, "forward", "plain"): _pair(Target(2.7, 4.2)),
    (FIRST_32, "backward", "plain"): _pair(Target(1.15, 1.6)),
    (FIRST_32, "forward", "relu"): _pair(Target(3.7, 5.0)),
    (FIRST_32, "backward", "relu"): _pair(Target(2.1, 2.8)),
    (FIRST_32, "forward", "add_relu"): _pair(Target(3.2, 3.8)),
    (FIRST_32, "backward", "add_relu"): _pair(Target(1.15, 1.6)),
    (LAST_32, "forward", "plain"): _pair(Target(1.25, 2.0)),
    (LAST_32, "backward", "plain"): _pair(Target(1.2, 1.7)),
    (LAST_32, "forward", "relu"): _pair(Target(1.6, 2.5)),
    (LAST_32, "backward", "relu"): _pair(Target(2.1, 2.8)),
    (LAST_32, "forward", "add_relu"): _pair(Target(1.9, 2.3)),
    (LAST_32, "backward", "add_relu"): _pair(Target(1.25, 1.6)),
    (FIRST_16, "forward", "plain"): _pair(Target(1.6, 1.9)),
    (FIRST_16, "backward", "plain"): _pair(Target(1.2, 1.7)),
    (FIRST_16, "forward", "relu"): _pair(Target(2.2, 2.7)),
    (FIRST_16, "backward", "relu"): _pair(Target(2.2, 2.8)),
    (FIRST_16, "forward", "add_relu"): _pair(Target(2.1, 2.5)),
    (FIRST_16, "backward", "add_relu"): _pair(Target(1.0, 1.5)),
    (LAST_16, "forward", "plain"): _pair(Target(1.4, 2.0)),
    (LAST_16, "backward", "plain"): _pair(Target(1.4, 1.9)),
    (LAST_16, "forward", "relu"): _pair(Target(2.2, 2.8)),
    (LAST_16, "backward", "relu"): _pair(Target(2.1, 2.7)),
    (EVERY, "eval", "plain"): _pair(Target(0.95, 1.3)),
    (EVERY, "eval", "relu"): _pair(Target(1.6, 2.3)),
    (TINY, "forward", "plain"): _pair(Target(1.3, 1.6), Target(1.3, 2.3)),
    (TINY, "backward", "plain"): _pair(Target(1.3, 1.6), Target(1.3, 2.3)),
    (FEW, "forward", "plain"): _pair(Target(4.0), Target(12.0)),
    (FEW, "backward", "plain"): _pair(Target(3.5), Target(12.0)),
    (MIXED, "backward", "plain"): _pair(Target(5.0)),
    (LARGE, "forward", "plain"): _pair(Target(2.0)),
    (LARGE, "backward", "plain"): _pair(Target(1.5)),
}


def target(group: tuple[str, str, str], threads: int) -> Target:
    """The target of a group; an empty one where none was set."""
    one, every = TARGETS.get(group, (Target(), Target()))
    return one if threads == 1 else every
