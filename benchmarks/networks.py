"""Training steps of whole networks, as they are and converted: ``python benchmarks/networks.py --quick``.

Images per second and peak memory of ResNet-50, MobileNetV2 and DenseNet-121, in both layouts, in float32 and under
bfloat16 autocast, on a CPU or a GPU. Each converted network is first held to the original in float64; then steps of
both are timed in turns. benchmarks/README.md says what that does and does not show.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks import models, pictures
from benchmarks.arguments import (
    add_output_arguments,
    check_least,
    check_output_arguments,
    set_output_files,
    settings,
    some_of,
)
from benchmarks.environment import describe_environment, print_environment
from benchmarks.memory import saved_for_backward
from benchmarks.report import make_console, mebibytes, milliseconds, pairs_text, plain_table, ratio_text, spread
from benchmarks.results import NetworkResult, Run
from benchmarks.running import finish, measure_each
from benchmarks.steps import LAYOUTS, TOLERANCE, largest_difference, precision, random_batch, training_step
from benchmarks.timing import Budget, Clock, band, interleave, make_clock, paired_ratios, using_threads

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": models.resnet50,
    "MobileNetV2": models.MobileNetV2,
    "DenseNet-121": models.DenseNet121,
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
IMPLEMENTATIONS = ("torch", "bnfused")
# Small enough to be held to the original in float64 in a moment.
CHECKED_SIZE = 64
MEMORY = {
    "cuda": "torch.cuda.max_memory_allocated in a step, the network and its optimizer included",
    "cpu": "what the graph keeps for the backward, without the parameters",
}


class Case(NamedTuple):
    """What is measured together."""

    network: str
    dtype: str
    layout: str

    @property
    def title(self) -> str:
        return f"{self.network} {self.dtype} {self.layout}"


def all_cases(networks: Iterable[str], dtypes: Iterable[str], layouts: Iterable[str]) -> list[Case]:
    """What is most used comes first, in case the time does not suffice: dtype and layout change slower than network."""
    return [
        Case(network, dtype, layout)
        for dtype, layout, network in itertools.product(DTYPES, reversed(LAYOUTS), networks)
        if dtype in dtypes and layout in layouts
    ]


def make_models(case: Case, device: torch.device) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    original = NETWORKS[case.network]()
    return {
        name: model.to(device=device, memory_format=LAYOUTS[case.layout])
        for name, model in (("torch", original), ("bnfused", bnfused.convert(original)))
    }


def check(network: str, device: torch.device) -> None:
    """Raise ValueError where the converted network is another function than the original."""
    torch.manual_seed(0)
    difference = largest_difference(NETWORKS[network]().to(device), CHECKED_SIZE)
    if not difference <= TOLERANCE:
        raise ValueError(f"{network}: loss and gradients in float64 are {difference:.1e} off, more than {TOLERANCE:g}")


def step_of(model: nn.Module, case: Case, batch: int, size: int, device: torch.device) -> Callable[[], None]:
    images, labels = random_batch(batch, size, device, torch.float32)
    return training_step(model, images.to(memory_format=LAYOUTS[case.layout]), labels, DTYPES[case.dtype])


def peak_memory(model: nn.Module, case: Case, batch: int, size: int, device: torch.device) -> int:
    """Bytes, as MEMORY says."""
    if device.type == "cuda":
        step = step_of(model, case, batch, size, device)
        step()  # the optimizer's state, and workspaces that stay
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    images, _ = random_batch(batch, size, device, torch.float32)
    images = images.to(memory_format=LAYOUTS[case.layout])
    with precision(device, DTYPES[case.dtype]):
        saved = saved_for_backward(lambda: model(images), model.parameters())
    return saved.output + saved.other


def measure(
    case: Case,
    batch: int,
    size: int,
    device: torch.device,
    clock: Clock,
    budget: Budget,
    on_round: Callable[[int], None] = lambda done: None,
) -> tuple[NetworkResult | None, bool]:
    """Returns the result, None without a whole round, and whether it was interrupted.

    For the memory, one network at a time is on the device.
    """
    originals = make_models(case, torch.device("cpu"))
    memory = {}
    for name, original in originals.items():
        model = copy.deepcopy(original).to(device)
        gc.collect()  # what is left of the network before
        memory[name] = peak_memory(model, case, batch, size, device)
        del model
    steps: dict[Hashable, Callable[[], object]] = {
        name: step_of(original.to(device), case, batch, size, device) for name, original in originals.items()
    }
    samples: dict[Hashable, list[float | None]] = {}
    interrupted = False
    try:
        interleave(steps, clock, budget, samples, on_round)
    except KeyboardInterrupt:
        interrupted = True
    if not samples or not samples["torch"]:
        return None, interrupted
    return network_result(case, batch, size, samples, memory), interrupted


def network_result(
    case: Case, batch: int, size: int, samples: dict[Hashable, list[float | None]], memory: dict[str, int]
) -> NetworkResult:
    ms = {name: band([1e3 * s for s in samples[name] if s is not None]) for name in IMPLEMENTATIONS}
    speeds = {name: None if value is None else 1e3 * batch / value.median for name, value in ms.items()}
    ratios = paired_ratios(samples["torch"], samples["bnfused"])
    return NetworkResult(*case, batch, size, ms, speeds, band(ratios), len(ratios), memory)


def measure_what_fits(
    case: Case, options: argparse.Namespace, clock: Clock, on_round: Callable[[int], None]
) -> tuple[NetworkResult | None, bool]:
    """With the batch halved until it fits the device's memory."""
    batch = options.batch_size
    budget = Budget(options.rounds, options.seconds, options.seed)
    while True:
        try:
            return measure(case, batch, options.size, options.device, clock, budget, on_round)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Not in the handler: the traceback there holds the tensors.
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def results_table(results: Sequence[NetworkResult]) -> Table:
    table = plain_table(
        "Training steps: ratio, torch's time / bnfused's; images per second; peak memory, and bnfused's of torch's",
        ["network"],
        ["batch", "torch ms", "bnfused ms", "ratio", "25-75 %", "pairs", "torch img/s", "bnfused img/s"]
        + ["torch MiB", "bnfused MiB", "share"],
    )
    for result in results:
        share = result.memory["bnfused"] / result.memory["torch"]
        speeds = (result.images_per_second[name] for name in IMPLEMENTATIONS)
        table.add_row(
            *(Case(result.network, result.dtype, result.layout).title, str(result.batch)),
            *(milliseconds(result.ms[name]) for name in IMPLEMENTATIONS),
            *(ratio_text(result.ratio), spread(result.ratio), pairs_text(result.pairs)),
            *("-" if speed is None else f"{speed:.3g}" if speed < 100 else f"{speed:.0f}" for speed in speeds),
            *(mebibytes(result.memory[name]) for name in IMPLEMENTATIONS),
            f"{share:.0%}",
        )
    return table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="networks.py", description="Training steps, as they are and converted.")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small batches of small images: < 2 min on two idle cores")
    parser.add_argument("--networks", default=tuple(NETWORKS), type=some_of(tuple(NETWORKS)), help="default: all")
    parser.add_argument("--dtypes", default=tuple(DTYPES), type=some_of(tuple(DTYPES)), help="default: all")
    parser.add_argument("--layouts", default=tuple(LAYOUTS), type=some_of(tuple(LAYOUTS)), help="default: all")
    parser.add_argument("--batch-size", type=int, help="default: 8, GPU: 128, quick: half; less if it has to")
    parser.add_argument("--size", type=int, help="of the images (default: 224, quick: 64)")
    parser.add_argument("--rounds", type=int, help="pairs of steps (default: 15)", default=15)
    parser.add_argument("--seconds", type=float, help="limit per case (default: 30, quick and GPU: 3)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin nothing later than this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    add_output_arguments(parser, "networks")
    options = parser.parse_args(arguments)
    gpu = options.device.type == "cuda"
    options.batch_size = options.batch_size or (128 if gpu else 8) // (2 if options.quick else 1)
    options.size = options.size or (64 if options.quick else 224)
    options.seconds = options.seconds or (3.0 if gpu or options.quick else 30.0)
    check_least(parser, options, batch_size=1, size=33, rounds=1, threads=1)
    check_output_arguments(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    try:
        clock = make_clock(options.device, options.threads, kernels=False)
    except (NotImplementedError, RuntimeError) as error:
        console.print(f"--device: {error}", style="red", markup=False)
        return 2
    memory = MEMORY[options.device.type]
    environment = describe_environment(options.device, options.commit)
    run: Run[NetworkResult] = Run(environment, settings(options) | {"clock": clock.description, "memory": memory})
    set_output_files(options, run.environment, "networks")
    print_environment(console, run.environment)
    console.print(f"{options.threads} threads; {clock.description}", markup=False)
    console.print(f"Images of {options.size}x{options.size}, training. Memory: {memory}.\n", markup=False)

    measure_all(options, clock, run, console)
    if run.results:
        console.print()
        console.print(results_table(run.results))
    draw = (lambda: pictures.save_networks(run, options.picture)) if run.results else None
    finish(run, options, console, "cases", draw)
    return run.exit_status


def measure_all(options: argparse.Namespace, clock: Clock, run: Run[NetworkResult], console: Console) -> None:
    """Fill ``run``, case by case. A network that converts wrongly is named once, and all of its cases are left out."""
    checked: dict[str, bool] = {}

    def measure_one(case: Case, on_round: Callable[[int], None]) -> tuple[list[NetworkResult], bool]:
        if case.network not in checked:
            checked[case.network] = False
            check(case.network, options.device)
            checked[case.network] = True
        if not checked[case.network]:
            return [], False
        result, interrupted = measure_what_fits(case, options, clock, on_round)
        return [] if result is None else [result], interrupted

    def keep(case: Case, results: list[NetworkResult], console: Console) -> None:
        run.results += results
        for result in results:
            share = result.memory["bnfused"] / result.memory["torch"]
            console.print(f"{case.title}: {ratio_text(result.ratio)} as fast, {share:.0%} of the memory", markup=False)

    cases = all_cases(options.networks, options.dtypes, options.layouts)
    with using_threads(options.threads):
        measure_each(cases, run, options, console, measure_one, keep)


if __name__ == "__main__":
    sys.exit(main())
