"""What is measured on a CPU, on a GPU and in sweeps: configurations (one tensor each), least traffic, targets.

Data only: no timing, no printing. A cell is one configuration, one pass, one fusion and one number
of threads.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

FUSIONS = ("plain", "relu", "add_relu")
FUSION_LABELS = {"plain": "plain", "relu": "+ReLU", "add_relu": "+add+ReLU"}
# The passes without a graph; "forward, no grad" is in training mode.
WITHOUT_GRAD = ("forward, no grad", "eval")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_DTYPES = ("float32", "bfloat16")
GPU_DTYPES = ("bfloat16", "float16", "float32")

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
CALLS = "one call of a module"
COMPILED = "compiled block"

_REGULAR = (FIRST_32, LAST_32, FIRST_16, LAST_16)


@dataclass(frozen=True)
class Cell:
    """One number of the result; ``threads`` is how many torch may use, 0 on a GPU."""

    configuration: str
    family: str
    pass_name: str
    fusion: str
    threads: int

    @property
    def name(self) -> str:
        """What ``--filter`` searches and what the tables print."""
        threads = f" T={self.threads}" if self.threads else ""
        return f"{self.configuration} {self.pass_name} {self.fusion}{threads}"

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
    ``network`` has a layer with this input, or is the module that is called. ``sweep`` is what is varied.
    ``compiled``: compared with torch.compile on a GPU, which takes seconds per cell.
    """

    shape: tuple[int, ...]
    layout: str
    dtype: str
    family: str
    passes: tuple[str, ...]
    fusions: tuple[str, ...] = FUSIONS
    grad_y: str = "like x"
    quick: bool = False
    network: str = ""
    sweep: str = ""
    compiled: bool = False

    @property
    def name(self) -> str:
        network = f"{self.network} " if self.network else ""
        chain = " chain" if self.family == CHAIN else ""
        grad_y = "" if self.grad_y == "like x" else f" grad_y={self.grad_y}"
        sweep = f" over {self.sweep}" if self.sweep else ""
        return f"{network}{'x'.join(map(str, self.shape))} {self.layout} {self.dtype}{grad_y}{chain}{sweep}"

    @property
    def activation_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def cells(self, threads: int, pattern: str = "") -> list[Cell]:
        """The cells whose name contains the regular expression ``pattern``."""
        every = itertools.product(self.passes, self.fusions)
        cells = [Cell(self.name, self.family, pass_name, fusion, threads) for pass_name, fusion in every]
        return [cell for cell in cells if re.search(pattern, cell.name)]


def bytes_moved(pass_name: str, fusion: str, activation_bytes: int) -> int:
    """Least traffic of a pass in bytes: every tensor is read or written once, x not twice.

    Forward and eval read x and write y (2A, A one activation); backward reads x and grad_y and writes grad_x (3A). A
    residual adds one A to read in the forward and one A of grad_residual to write in the backward. The ReLU mask needs
    nothing more: it follows from x, or costs one bit per value.
    """
    residual = 1 if fusion == "add_relu" else 0
    activations = 0
    if pass_name != "backward":
        activations += 2 + residual
    if "backward" in pass_name:
        activations += 3 + residual
    return activations * activation_bytes


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


def _family(layout: str, dtype: str) -> str:
    if layout in _CHANNELS_FIRST:
        return FIRST_32 if dtype == "float32" else FIRST_16
    return LAST_32 if dtype == "float32" else LAST_16


def _regular(dtype: str) -> Iterator[Configuration]:
    for shape, layout, quick in _SHAPES:
        family = TINY if shape == (64, 256) else _family(layout, dtype)
        # float16 takes bfloat16's code paths with another conversion: the quick run leaves it out.
        yield Configuration(shape, layout, dtype, family, _TRAIN_AND_EVAL, quick=quick and dtype != "float16")


_BACKWARD = ("backward", "forward+backward")
_PLAIN, _WITH_RELU = ("plain",), ("plain", "relu")
# (shape, layout, family, passes, fusions, layout of grad_y, in the quick run): where torch 2.13 on a CPU falls far
# below its own usual speed, or a new kernel easily might. All are float32.
_CLIFFS: tuple[tuple[tuple[int, ...], str, str, tuple[str, ...], tuple[str, ...], str, bool], ...] = (
    ((32, 3, 224, 224), "channels_last", FEW, _TRAIN_AND_EVAL, _WITH_RELU, "like x", False),
    ((16, 2, 256, 256), "channels_last", FEW, _TRAIN_AND_EVAL, _WITH_RELU, "like x", True),
    ((8, 12, 112, 112), "channels_last", FEW, _TRAIN_AND_EVAL, _WITH_RELU, "like x", True),
    ((8, 512, 28, 28), "channels_last", MIXED, _BACKWARD, _PLAIN, "contiguous", True),
    ((8, 512, 28, 28), "NCHW", MIXED, _BACKWARD, _PLAIN, "channels_last", True),
    ((16, 256, 1024), "NLC view", MIXED, ("forward", *_BACKWARD), _PLAIN, "like x", True),
    ((8, 512, 28, 28), "NCHW", EXPANDED, _BACKWARD, _PLAIN, "expanded", False),
    ((8, 512, 28, 28), "channels_last", EXPANDED, _BACKWARD, _PLAIN, "expanded", False),
    ((16, 64, 112, 112), "NCHW", LARGE, ("forward", "backward", "eval"), _WITH_RELU, "like x", False),
    ((16, 64, 112, 112), "channels_last", LARGE, ("forward", "backward", "eval"), _WITH_RELU, "like x", False),
)


def _chains() -> Iterator[Configuration]:
    """Batch norm between two other operations: what bypasses the cache costs the consumer."""
    shapes = (8, 64, 112, 112), (8, 512, 28, 28), (8, 2048, 7, 7)
    for shape, layout, dtype in itertools.product(shapes, ("NCHW", "channels_last"), DEFAULT_DTYPES):
        quick = shape == (8, 512, 28, 28) and dtype == "float32"
        yield Configuration(shape, layout, dtype, CHAIN, ("chain",), ("plain", "relu"), quick=quick)


def cpu_configurations(dtypes: Iterable[str], quick: bool) -> list[Configuration]:
    """Everything that a run on a CPU measures, in the order in which it is measured."""
    dtypes = tuple(dtypes)
    every = [configuration for dtype in dtypes for configuration in _regular(dtype)]
    for shape, layout, family, passes, fusions, grad_y, quick_too in _CLIFFS:
        every.append(Configuration(shape, layout, "float32", family, passes, fusions, grad_y, quick_too))
    every += _chains()
    return [c for c in every if c.dtype in dtypes and (c.quick or not quick)]


# (network, shape of a batch norm layer's input, compiled). The compiled ones are also the quick run's.
_LAYERS: tuple[tuple[str, tuple[int, ...], bool], ...] = (
    ("ResNet-50", (256, 64, 112, 112), False),
    ("ResNet-50", (256, 64, 56, 56), False),
    ("ResNet-50", (256, 256, 56, 56), True),
    ("ResNet-50", (256, 128, 28, 28), False),
    ("ResNet-50", (256, 512, 28, 28), False),
    ("ResNet-50", (256, 1024, 14, 14), False),
    ("ResNet-50", (256, 2048, 7, 7), True),
    ("MobileNetV2", (256, 96, 112, 112), False),
    ("MobileNetV2", (256, 144, 56, 56), True),
    ("MobileNetV2", (256, 384, 14, 14), False),
    ("MobileNetV2", (256, 960, 7, 7), False),
    ("DenseNet-121", (128, 96, 56, 56), False),
    ("DenseNet-121", (128, 320, 28, 28), True),
    ("DenseNet-121", (128, 672, 14, 14), False),
    ("DenseNet-121", (128, 992, 7, 7), False),
    ("U-Net", (16, 64, 256, 256), True),
    ("U-Net", (16, 256, 64, 64), False),
    ("U-Net", (16, 512, 32, 32), False),
    ("MLP", (64, 256), False),
    ("MLP", (4096, 1024), True),
    ("MLP", (65536, 256), False),
    ("MLP", (16384, 4096), False),
)


def gpu_configurations(dtypes: Iterable[str], quick: bool) -> list[Configuration]:
    """What a run on a GPU measures; what is most used comes first, in case the time does not suffice."""
    passes = ("forward", "forward+backward")
    every = [
        Configuration(shape, layout, dtype, _family(layout, dtype), passes, network=network, compiled=compiled)
        for dtype in dtypes
        for network, shape, compiled in _LAYERS
        for layout in (("channels_last", "NCHW") if len(shape) == 4 else ("NC",))
    ]
    every = [replace(c, quick=c.compiled and c.dtype == "bfloat16") for c in every]
    return [c for c in every if c.quick or not quick]


def call_configurations() -> list[Configuration]:
    """Tensors so small that there is nothing to compute."""
    passes = ("forward, no grad", "forward", "forward+backward", "eval")
    return [
        Configuration(shape, layout, "float32", CALLS, passes, network="Module")
        for shape, layout in (((2, 4, 2, 2), "NCHW"), ((4, 8), "NC"), ((64, 256), "NC"))
    ]


def block_configurations() -> list[Configuration]:
    """A residual block, and the same without its convolutions. The fusion "plain" is bnfused's unfused batch norm."""
    passes, fusions = ("forward+backward", "eval"), ("plain", "add_relu")
    return [
        Configuration(shape, layout, "float32", COMPILED, passes, fusions, network=network)
        for network in ("Norms", "Block")
        for shape in ((8, 64, 28, 28), (8, 256, 14, 14))
        for layout in ("NCHW", "channels_last")
    ]


SWEEPS = ("batch", "channels", "spatial", "threads")


def sweep_configurations(sweep: str, device: str, dtype: str, quick: bool) -> list[Configuration]:
    """One of SWEEPS: inputs that differ in one size, in both layouts; for ``threads`` it is one input."""
    cpu = device == "cpu"
    shapes: dict[str, list[tuple[int, ...]]] = {
        "batch": [(2**k, 256, 28, 28) for k in range(6 if cpu else 10)],
        "channels": [(8 if cpu else 128, 2**k, 28, 28) for k in range(2, 11 if cpu else 12)],
        "spatial": [(8 if cpu else 128, 64, size, size) for size in (4, 7, 14, 28, 56, 112, *(() if cpu else (224,)))],
        "threads": [(8, 256, 56, 56)],
    }
    passes, fusions = ("forward", "forward+backward"), ("plain", "add_relu")
    return [
        Configuration(shape, layout, dtype, f"{sweep} sweep, {layout}", passes, fusions, sweep=sweep)
        for shape in (shapes[sweep][::2] if quick else shapes[sweep])
        for layout in ("NCHW", "channels_last")
    ]


def tiny(configuration: Configuration) -> Configuration:
    """The same kind of tensor, small enough to try a script with."""
    batch, channels, *sizes = configuration.shape
    return replace(configuration, shape=(min(batch, 4), min(channels, 6), *(min(size, 4) for size in sizes)))


@dataclass(frozen=True)
class Target:
    """Speed-up over eager torch: no cell below ``floor``, geometric mean at least ``geomean``."""

    floor: float | None = None
    geomean: float | None = None


def _targets(family: str, pass_name: str, **fusions: tuple[float | None, ...]) -> dict[tuple[str, str, str], Target]:
    return {(family, pass_name, fusion): Target(*goal) for fusion, goal in fusions.items()}


# (floor, geometric mean) on one thread. They come from a prototype's measured speed on a 2-core AVX-512 machine; other
# machines have other ratios.
_ONE_THREAD = {
    **_targets(FIRST_32, "forward", plain=(2.7, 4.2), relu=(3.7, 5.0), add_relu=(3.2, 3.8)),
    **_targets(FIRST_32, "backward", plain=(1.15, 1.6), relu=(2.1, 2.8), add_relu=(1.15, 1.6)),
    **_targets(LAST_32, "forward", plain=(1.25, 2.0), relu=(1.6, 2.5), add_relu=(1.9, 2.3)),
    **_targets(LAST_32, "backward", plain=(1.2, 1.7), relu=(2.1, 2.8), add_relu=(1.25, 1.6)),
    **_targets(FIRST_16, "forward", plain=(1.6, 1.9), relu=(2.2, 2.7), add_relu=(2.1, 2.5)),
    **_targets(FIRST_16, "backward", plain=(1.2, 1.7), relu=(2.2, 2.8), add_relu=(1.0, 1.5)),
    **_targets(LAST_16, "forward", plain=(1.4, 2.0), relu=(2.2, 2.8)),
    **_targets(LAST_16, "backward", plain=(1.4, 1.9), relu=(2.1, 2.7)),
    **_targets(EVERY, "eval", plain=(0.95, 1.3), relu=(1.6, 2.3)),
    **_targets(TINY, "forward", plain=(1.3, 1.6)),
    **_targets(TINY, "backward", plain=(1.3, 1.6)),
    **_targets(FEW, "forward", plain=(4.0,)),
    **_targets(FEW, "backward", plain=(3.5,)),
    **_targets(MIXED, "backward", plain=(5.0,)),
    **_targets(LARGE, "forward", plain=(2.0,)),
    **_targets(LARGE, "backward", plain=(1.5,)),
}
# On all threads, where it is another one.
_ALL_THREADS = {
    **_targets(TINY, "forward", plain=(1.3, 2.3)),
    **_targets(TINY, "backward", plain=(1.3, 2.3)),
    **_targets(FEW, "forward", plain=(12.0,)),
    **_targets(FEW, "backward", plain=(12.0,)),
}
# (on one thread, on all threads)
TARGETS = {group: (one, _ALL_THREADS.get(group, one)) for group, one in _ONE_THREAD.items()}


def target(group: tuple[str, str, str], threads: int) -> Target:
    """The target of a group; an empty one where none was set, as for a GPU, where ``threads`` is 0."""
    if threads == 0:
        return Target()
    one, every = TARGETS.get(group, (Target(), Target()))
    return one if threads == 1 else every
