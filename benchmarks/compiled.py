"""Batch norm under ``torch.compile`` on the CPU: ``python benchmarks/compiled.py``.

A compiler fuses torch's batch norm with its neighbours, and ours not at all: it is one node. This times a residual
block, compiled by Inductor, with torch's batch norm, with ours unfused, and with ours fused with the ReLU and the add;
eager torch is there to compare with. Results are compared first. Memory formats matter: Inductor makes the convolutions
of a contiguous network channels_last, and beside an op with gradients it copies.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks.report import describe_environment, make_console, plain_table, print_environment
from benchmarks.timing import Plan, band, interleave, make_clock, paired_ratios

SHAPES = ((8, 64, 28, 28), (8, 256, 14, 14))
COMPILED = "torch"
OTHERS = ("torch, eager", "bnfused", "bnfused, fused")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Block(nn.Module):
    """Two convolutions, each with its batch norm; ReLU between, add and ReLU at the end."""

    def __init__(self, channels: int, batch_norm: type[nn.Module], fused: bool):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(batch_norm(channels) for _ in range(2))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        (conv1, conv2), (norm1, norm2) = self.convs, self.norms
        if self.fused:
            return norm2(conv2(norm1(conv1(x), activation="relu")), residual=x, activation="relu")
        return F.relu(norm2(conv2(F.relu(norm1(conv1(x))))) + x)


class Norms(nn.Module):
    """The same without the convolutions, which take most of the time of the block."""

    def __init__(self, channels: int, batch_norm: type[nn.Module], fused: bool):
        super().__init__()
        self.norms = nn.ModuleList(batch_norm(channels) for _ in range(2))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        norm1, norm2 = self.norms
        if self.fused:
            return norm2(norm1(x, activation="relu"), residual=x, activation="relu")
        return F.relu(norm2(F.relu(norm1(x))) + x)


def make_function(
    network: type[nn.Module], implementation: str, shape: tuple[int, ...], memory_format: torch.memory_format, mode: str
) -> Callable[[], list[Tensor]]:
    """One training step, which returns y and all gradients, or one call in eval without gradients."""
    torch.manual_seed(0)
    batch_norm = nn.BatchNorm2d if implementation.startswith("torch") else bnfused.BatchNorm2d
    module = network(shape[1], batch_norm, implementation.endswith("fused")).to(memory_format=memory_format)
    module.train(mode == "train")
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_(mode == "train")
    upstream = torch.randn(shape).to(memory_format=memory_format)
    call = module if implementation.endswith("eager") else torch.compile(module, fullgraph=True)
    inputs = [x, *module.parameters()]

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(mode == "train"):
            y = call(x)
            return [y, *torch.autograd.grad(y, inputs, upstream)] if mode == "train" else [y]

    return run


def check_same(functions: Mapping[str, Callable[[], list[Tensor]]]) -> None:
    """Compile all, and hold y and the gradients to those of the first.

    Those of the parameters as one, because that of a weight before another batch norm is 0 but for rounding. Of 4e5
    values a few fall to the other side of a ReLU, each of which moves a gradient by 1/600 of its norm.

    Raises:
        SystemExit: one is off by more than a twentieth of its norm.
    """
    names = list(functions)
    wanted = results(functions[names[0]])
    for name in names[1:]:
        for what, ours in results(functions[name]).items():
            error = float((ours - wanted[what]).norm() / wanted[what].norm())
            if not error < 0.05:
                raise SystemExit(f"{name} differs from {names[0]} in {what}: by {error:.2g} of its norm")


def results(run: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    """What a call returned, as vectors."""
    y, *grads = [value.detach().reshape(-1) for value in run()]
    if not grads:
        return {"y": y}
    return {"y": y, "the gradient of x": grads[0], "the gradients of the parameters": torch.cat(grads[1:])}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compiled.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="samples (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    console = make_console()
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    clock = make_clock(torch.device("cpu"), options.threads)
    print_environment(console, describe_environment())
    console.print(f"T={options.threads}: {clock.description}", markup=False)
    console.print("Time of torch under Inductor over the time of each: above 1 is faster than Inductor's own.\n")
    table = plain_table("", ["network", "shape", "layout", "mode"], ["torch ms", *OTHERS])
    try:
        for network, shape, layout, mode in itertools.product((Norms, Block), SHAPES, FORMATS, ("train", "eval")):
            functions = {
                name: make_function(network, name, shape, FORMATS[layout], mode) for name in (COMPILED, *OTHERS)
            }
            check_same(functions)
            samples: dict[object, list[float | None]] = {}
            interleave(functions, clock, Plan(options.rounds, math.inf, 0), samples)
            add_row(table, [network.__name__, str(shape), layout, mode], samples)
            torch._dynamo.reset()
    finally:
        torch.set_num_threads(usual_threads)
    console.print(table)
    return 0


def add_row(table: Table, cells: list[str], samples: dict[object, list[float | None]]) -> None:
    """Milliseconds of torch under Inductor, and the ratio of each other implementation to it."""
    theirs = samples[COMPILED]
    own = band([1e3 * sample for sample in theirs if sample is not None])
    cells.append("-" if own is None else f"{own.median:.2f}")
    for implementation in OTHERS:
        ratio = band(paired_ratios(theirs, samples[implementation]))
        cells.append("-" if ratio is None else f"{ratio.median:.2f}x")
    table.add_row(*cells)


if __name__ == "__main__":
    sys.exit(main())
