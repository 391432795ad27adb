"""A training step of ResNet-18, as it is and converted: ``make demo`` ends with it.

The converted network is first held to the original in float64, then both are timed in turns. The script fails where
they differ.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks.arguments import check_least
from benchmarks.environment import describe_environment, print_environment
from benchmarks.models import resnet18
from benchmarks.report import PAIRED_COLUMNS, make_console, paired_columns, plain_table
from benchmarks.steps import LAYOUTS, TOLERANCE, largest_difference, random_batch, training_step
from benchmarks.timing import Budget, Clock, interleave, make_clock, paired_ratios, using_threads


def time_steps(
    original: nn.Module, layout: torch.memory_format, options: argparse.Namespace, clock: Clock
) -> dict[Hashable, list[float | None]]:
    """Seconds of a step of "torch" and "bnfused", taken in turns."""
    images, labels = random_batch(options.batch_size, options.size, torch.device("cpu"), torch.float32)
    images = images.to(memory_format=layout)
    models = {"torch": copy.deepcopy(original), "bnfused": bnfused.convert(original)}
    steps = {name: training_step(model.to(memory_format=layout), images, labels) for name, model in models.items()}
    samples: dict[Hashable, list[float | None]] = {}
    interleave(steps, clock, Budget(options.rounds, options.seconds / len(LAYOUTS)), samples)
    return samples


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert_resnet18.py", description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=112, help="of the images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="at most, for timing (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--no-environment", action="store_true", help="do not print the machine")
    options = parser.parse_args(arguments)
    check_least(parser, options, batch_size=1, size=33, rounds=1, threads=1)
    return options


def report(times: dict[str, dict[Hashable, list[float | None]]], console: Console) -> None:
    table = plain_table("", ["median of a training step"], PAIRED_COLUMNS)
    for layout, samples in times.items():
        table.add_row(layout, *paired_columns(samples["torch"], samples["bnfused"]))
    console.print(table)
    if not all(paired_ratios(samples["torch"], samples["bnfused"]) for samples in times.values()):
        console.print("Other processes had the cores in every step: run again on a quiet machine.", style="yellow")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    if not options.no_environment:
        print_environment(console, describe_environment())
    torch.manual_seed(0)
    original = resnet18()
    console.print("\n[bold]bnfused.convert(resnet18())[/], and which op each of its batch norms runs as:")
    console.print(str(bnfused.fusion_report(bnfused.convert(original))), markup=False)
    difference = largest_difference(original, options.size)
    console.print(f"\nLoss and gradients against the original, in float64: {difference:.1e} apart")
    if not difference <= TOLERANCE:
        console.print(f"FAILED: more than {TOLERANCE:g}", style="bold red")
        return 1
    images = f"{options.batch_size} images of {options.size}x{options.size}, float32"
    console.print(f"\nTraining steps on {images}, {options.threads} thread(s), in turns ...")
    clock = make_clock(torch.device("cpu"), options.threads)
    times: dict[str, dict[Hashable, list[float | None]]] = {}
    try:
        with using_threads(options.threads):
            for name, layout in LAYOUTS.items():
                times[name] = time_steps(original, layout, options, clock)
    except KeyboardInterrupt:
        console.print("Interrupted: the numbers are of what was timed until then.")
    report(times, console)
    return 0 if len(times) == len(LAYOUTS) else 130


if __name__ == "__main__":
    sys.exit(main())
