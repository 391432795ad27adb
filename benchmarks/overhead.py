"""Time per call where there is nothing to compute: ``python benchmarks/overhead.py``.

On tiny tensors a call costs what Python, the dispatcher, autograd and the allocator cost. That is
what a network of many small layers, or one run at batch size 1, pays for every batch norm.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks.cases import FUSION_LABELS, FUSIONS
from benchmarks.report import describe_environment, make_console, plain_table, print_environment
from benchmarks.timing import Band, Plan, band, interleave, make_clock, paired_ratios

SHAPES = ((2, 4, 2, 2), (4, 8), (64, 256))
PASSES = ("train, no grad", "train, grad", "forward+backward", "eval, no grad")
# The grad mode is set once per so many calls, so that its switch is not part of what is measured.
CALLS = 50


def make_function(implementation: str, pass_name: str, fusion: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """CALLS calls of one module on one tensor, as a network would write them."""
    modules: dict[tuple[str, int], type[nn.Module]] = {
        ("torch", 2): nn.BatchNorm1d,
        ("torch", 4): nn.BatchNorm2d,
        ("bnfused", 2): bnfused.BatchNorm1d,
        ("bnfused", 4): bnfused.BatchNorm2d,
    }
    generator = torch.Generator().manual_seed(0)
    module = modules[implementation, len(shape)](shape[1])
    module.train(pass_name != "eval, no grad")
    x, residual = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    grad_y = torch.randn(shape, generator=generator)
    inputs = [x, *module.parameters(), *([residual] if fusion == "add_relu" else [])]

    def unfused() -> Tensor:
        y = module(x)
        if fusion == "add_relu":
            y = y.add_(residual)
        return y if fusion == "plain" else F.relu_(y)

    def fused() -> Tensor:
        if fusion == "plain":
            return module(x)
        if fusion == "relu":
            return module(x, activation="relu")
        return module(x, residual=residual, activation="relu")

    call = unfused if implementation == "torch" else fused
    with_grad = pass_name in ("train, grad", "forward+backward")

    def run() -> None:
        with torch.set_grad_enabled(with_grad):
            for _ in range(CALLS):
                y = call()
                if pass_name == "forward+backward":
                    torch.autograd.grad(y, inputs, grad_y)

    return run


def per_call(samples: Sequence[float | None]) -> Band | None:
    """Quartiles in microseconds per call."""
    return band([1e6 * sample / CALLS for sample in samples if sample is not None])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="overhead.py",
        description="Time per call on tiny tensors: torch.nn (with F.relu_ and add_) against bnfused.",
    )
    parser.add_argument("--rounds", type=int, default=51, help="samples (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    clock = make_clock(torch.device("cpu"), options.threads)
    print_environment(console, describe_environment())
    console.print(f"T={options.threads}: {clock.description}\n", markup=False)
    table = plain_table(
        "",
        ["shape", "pass", "fusion"],
        ["torch us", "bnfused us", "bnfused - torch us", "torch/bnfused", "25-75 %"],
    )
    interrupted = False
    try:
        for shape in SHAPES:
            functions = {
                (implementation, pass_name, fusion): make_function(implementation, pass_name, fusion, shape)
                for implementation in ("torch", "bnfused")
                for pass_name in PASSES
                for fusion in FUSIONS
            }
            samples: dict[object, list[float | None]] = {}
            try:
                interleave(functions, clock, Plan(options.rounds, math.inf, options.seed), samples)
            except KeyboardInterrupt:
                interrupted = True
            for pass_name in PASSES:
                for fusion in FUSIONS:
                    theirs, ours = (
                        samples.get((implementation, pass_name, fusion), []) for implementation in ("torch", "bnfused")
                    )
                    add_row(table, shape, pass_name, fusion, theirs, ours)
            table.add_section()
            if interrupted:
                break
    finally:
        torch.set_num_threads(usual_threads)
    console.print(table)
    if interrupted:
        console.print("Interrupted: the numbers are of the rounds that were done.")
    return 130 if interrupted else 0


def add_row(
    table: Table,
    shape: tuple[int, ...],
    pass_name: str,
    fusion: str,
    theirs: Sequence[float | None],
    ours: Sequence[float | None],
) -> None:
    """One row; nothing where no round counted."""
    their_band, our_band = per_call(theirs), per_call(ours)
    ratio = band(paired_ratios(theirs, ours))
    if their_band is None or our_band is None or ratio is None:
        return
    table.add_row(
        str(shape),
        pass_name,
        FUSION_LABELS[fusion],
        f"{their_band.median:.1f}",
        f"{our_band.median:.1f}",
        f"{our_band.median - their_band.median:+.1f}",
        f"{ratio.median:.2f}x",
        f"{ratio.low:.2f}-{ratio.high:.2f}",
    )


if __name__ == "__main__":
    sys.exit(main())
