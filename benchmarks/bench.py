"""Speed of bnfused against eager torch, cell by cell: ``python benchmarks/bench.py --quick``.

Every function of a configuration (both implementations, all passes and fusions, and a copy of the
same buffer) is timed once per round, in one process, in an order reshuffled every round; a ratio is
the median over rounds of torch's time over bnfused's in the same round. benchmarks/README.md says
what that does and does not show.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks.cases import (
    CHAIN,
    DEFAULT_DTYPES,
    DTYPE_BYTES,
    Cell,
    Configuration,
    bytes_moved,
    configurations,
)
from benchmarks.report import (
    CellResult,
    Run,
    cell_table,
    compare,
    comparison_tables,
    describe_environment,
    make_console,
    print_environment,
    save_picture,
    summarize,
    summary_table,
)
from benchmarks.timing import (
    CpuClock,
    Plan,
    band,
    differences,
    interleave,
    make_clock,
    paired_ratios,
)

IMPLEMENTATIONS = ("torch", "bnfused")
MOMENTUM, EPS = 0.1, 1e-5
# Relative difference of outputs and gradients (sum of |a-b| over sum of |b|) above which a timing
# would be of two different functions. 16-bit outputs round after every unfused step, float32 sums
# differ in order.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}


class Tensors:
    """The buffers of one configuration, shared by everything that is timed on it."""

    def __init__(self, configuration: Configuration, device: torch.device, seed: int) -> None:
        # On the device: a CPU takes seconds for what a GPU fills in a millisecond.
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, configuration.dtype)
        shape = configuration.shape

        def normal(shape: tuple[int, ...], layout: str) -> Tensor:
            return to_layout(torch.randn(shape, generator=generator, device=device).to(dtype), layout)

        self.x = normal(shape, configuration.layout).requires_grad_()
        self.residual = normal(shape, configuration.layout).requires_grad_()
        if configuration.grad_y == "expanded":
            self.grad_y = torch.ones((), device=device, dtype=dtype).expand(shape)
        else:
            same = configuration.grad_y == "like x"
            self.grad_y = normal(shape, configuration.layout if same else configuration.grad_y)
        self.copy = torch.empty_like(self.x, requires_grad=False)
        channels = shape[1]
        self.weight = torch.rand(channels, generator=generator, device=device) + 0.5
        self.bias = torch.randn(channels, generator=generator, device=device)
        self.weight.requires_grad_()
        self.bias.requires_grad_()
        self.statistics = {
            name: (torch.zeros(channels, device=device), torch.ones(channels, device=device))
            for name in IMPLEMENTATIONS
        }


def to_layout(tensor: Tensor, layout: str) -> Tensor:
    """``tensor`` with the strides that ``layout`` names."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last_3d":
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    if layout == "NLC view":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def batch_norm(implementation: str, tensors: Tensors, x: Tensor, training: bool, fusion: str) -> Tensor:
    """The function under test, as a network would call it.

    The unfused peer adds and clips in place: autograd allows it here (batch norm does not save its
    output), it is what torchvision's networks do, and it is the faster way.
    """
    mean, var = tensors.statistics[implementation]
    affine = tensors.weight, tensors.bias
    if implementation == "torch":
        y = F.batch_norm(x, mean, var, *affine, training, MOMENTUM, EPS)
        if fusion == "add_relu":
            y = y.add_(tensors.residual)
        return y if fusion == "plain" else F.relu_(y)
    return bnfused.functional.batch_norm(
        x,
        mean,
        var,
        *affine,
        training,
        MOMENTUM,
        EPS,
        residual=tensors.residual if fusion == "add_relu" else None,
        activation=None if fusion == "plain" else "relu",
    )


def gradients(tensors: Tensors, y: Tensor, fusion: str, retain: bool) -> tuple[Tensor, ...]:
    inputs = [tensors.x, tensors.weight, tensors.bias]
    if fusion == "add_relu":
        inputs.append(tensors.residual)
    return torch.autograd.grad(y, inputs, tensors.grad_y, retain_graph=retain)


def make_function(implementation: str, pass_name: str, fusion: str, tensors: Tensors) -> Callable[[], object]:
    """What is timed for one implementation in one cell.

    Outputs are allocated and freed inside, as in training.
    """
    if pass_name == "forward":
        return lambda: batch_norm(implementation, tensors, tensors.x, True, fusion)
    if pass_name == "backward":
        y = batch_norm(implementation, tensors, tensors.x, True, fusion)
        return lambda: gradients(tensors, y, fusion, retain=True)
    if pass_name == "forward+backward":
        return lambda: gradients(
            tensors,
            batch_norm(implementation, tensors, tensors.x, True, fusion),
            fusion,
            retain=False,
        )
    if pass_name == "eval":

        def evaluate() -> Tensor:
            with torch.no_grad():
                return batch_norm(implementation, tensors, tensors.x, False, fusion)

        return evaluate
    raise ValueError(f"make_function: expected a pass other than {pass_name!r}")


def make_chain(implementation: str | None, fusion: str, tensors: Tensors) -> Callable[[], object]:
    """Producer writes x, batch norm reads it and writes y, consumer reads y.

    ``implementation`` None stands for the chain without batch norm: the consumer reads x.
    """
    source, x, sink = tensors.residual.detach(), tensors.x.detach(), tensors.copy

    def chain() -> None:
        with torch.no_grad():
            torch.mul(source, 1.0001, out=x)
            y = x
            if implementation is not None:
                y = batch_norm(implementation, tensors, x, True, fusion)
            torch.mul(y, 1.0001, out=sink)

    return chain


def check_agreement(configuration: Configuration, cells: Sequence[Cell], tensors: Tensors) -> None:
    """Raise ValueError where the results differ: the times would be of different functions."""
    for pass_name, fusion in sorted({(cell.pass_name, cell.fusion) for cell in cells}):
        outputs = []
        for implementation in IMPLEMENTATIONS:
            y = batch_norm(implementation, tensors, tensors.x, pass_name != "eval", fusion)
            backward = pass_name in ("backward", "forward+backward")
            grads = gradients(tensors, y, fusion, retain=False) if backward else ()
            outputs.append((y.detach(), *grads))
        names = ("y", "grad_x", "grad_weight", "grad_bias", "grad_residual")
        for name, theirs, ours in zip(names, *outputs, strict=False):
            # A gradient can be zero up to rounding (grad_x of a constant grad_y), hence the least
            # scale; grad_weight and grad_bias sum that rounding over the rows.
            rows = tensors.x.numel() // max(theirs.numel(), 1)
            scale = max(theirs.double().abs().mean().item(), 1e-2 * rows)
            difference = (ours.double() - theirs.double()).abs().mean().item()
            if difference > AGREEMENT[configuration.dtype] * scale:
                raise ValueError(
                    f"{configuration.name} {pass_name} {fusion}: {name} of torch and bnfused "
                    f"differ: mean |difference| {difference:.3g}, scale {scale:.3g}"
                )


def measure(
    configuration: Configuration,
    cells: Sequence[Cell],
    device: torch.device,
    clock: CpuClock,
    plan: Plan,
    on_round: Callable[[int], None],
) -> tuple[list[CellResult], bool]:
    """Time the ``cells`` of one configuration, all at one number of threads.

    Returns the results and whether the measurement was interrupted; then the results are of the
    rounds that were done.
    """
    tensors = Tensors(configuration, device, plan.seed)
    check_agreement(configuration, cells, tensors)
    functions: dict[object, Callable[[], object]] = {}
    x = tensors.x.detach()
    functions["copy"] = lambda: tensors.copy.copy_(x)
    for cell in cells:
        for implementation in IMPLEMENTATIONS:
            key = (implementation, cell.pass_name, cell.fusion)
            if cell.pass_name == "chain":
                functions["no batch norm"] = make_chain(None, cell.fusion, tensors)
                functions[key] = make_chain(implementation, cell.fusion, tensors)
            else:
                functions[key] = make_function(implementation, cell.pass_name, cell.fusion, tensors)
    samples: dict[object, list[float | None]] = {}
    interrupted = False
    try:
        interleave(functions, clock, plan, samples, on_round)
    except KeyboardInterrupt:
        interrupted = True
    if not samples.get("copy"):
        return [], interrupted
    return [cell_result(cell, configuration, samples) for cell in cells], interrupted


def cell_result(cell: Cell, configuration: Configuration, samples: dict[object, list[float | None]]) -> CellResult:
    """Medians, quartiles and paired ratios of one cell from the samples of its configuration."""
    times = {}
    for implementation in IMPLEMENTATIONS:
        times[implementation] = samples[implementation, cell.pass_name, cell.fusion]
        if cell.pass_name == "chain":
            times[implementation] = differences(times[implementation], samples["no batch norm"])
    ratios = paired_ratios(times["torch"], times["bnfused"])
    least = bytes_moved(cell.pass_name, cell.fusion, configuration.activation_bytes)
    # A copy moves two activations: scaled to the bytes of this pass it is the time at copy speed.
    scale = least / (2 * configuration.activation_bytes)
    speed = {}
    for implementation in IMPLEMENTATIONS:
        fractions = band(paired_ratios(samples["copy"], times[implementation]))
        speed[implementation] = None if fractions is None else fractions.median * scale

    def in_ms(values: Sequence[float | None]) -> list[float]:
        return [1e3 * value for value in values if value is not None]

    return CellResult(
        configuration=cell.configuration,
        family=cell.family,
        pass_name=cell.pass_name,
        fusion=cell.fusion,
        threads=cell.threads,
        pairs=len(ratios),
        bytes=least,
        ratio=band(ratios),
        torch_ms=band(in_ms(times["torch"])),
        bnfused_ms=band(in_ms(times["bnfused"])),
        copy_ms=band(in_ms(samples["copy"])),
        copy_speed_torch=speed["torch"],
        copy_speed_bnfused=speed["bnfused"],
    )


def parse_threads(text: str) -> list[int]:
    """``1,all`` -> [1, number of cores], without repeats."""
    cores = os.cpu_count() or 1
    try:
        counts = [cores if part.strip() == "all" else int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers or 'all', got {text!r}") from None
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected at least one thread, got {text!r}")
    return list(dict.fromkeys(counts))


def parse_dtypes(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise argparse.ArgumentTypeError(f"expected some of {known}; got {name!r}")
    return names


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Time bnfused against eager torch, cell by cell: prints torch's time over bnfused's.",
    )
    parser.add_argument("--device", default="cpu", type=torch.device, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few configurations, few rounds: < 90 s on two idle cores")
    parser.add_argument("--threads", default="1,all", type=parse_threads, help="default: %(default)s")
    parser.add_argument(
        "--dtypes",
        default=",".join(DEFAULT_DTYPES),
        type=parse_dtypes,
        help="of float32, bfloat16, float16; 16-bit inputs have float32 parameters (default: %(default)s)",
    )
    parser.add_argument(
        "--filter",
        default="",
        metavar="REGEX",
        help="only cells whose name matches, e.g. 'channels_last float32 backward relu T=1'; fewer "
        "functions per round leave more data in the cache: ratios can be higher than in a full run",
    )
    parser.add_argument("--rounds", type=int, help="samples per function (default: 41, quick: 21)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="limit per configuration and number of threads (default: 8, quick: 1.5)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="write a plot here")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="measure nothing: compare two runs written by --json",
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {options.seconds}")
    options.rounds = options.rounds or (21 if options.quick else 41)
    options.seconds = options.seconds or (1.5 if options.quick else 8.0)
    if options.picture and options.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--picture: expected a name that ends in .png, .svg or .pdf, got {options.picture}")
    return options


def show_comparison(paths: Sequence[Path], console: Console) -> int:
    before, after = (Run.read(path) for path in paths)
    changes = compare(before, after)
    for name, run in zip(("first: ", "second:"), (before, after), strict=True):
        environment = run.environment
        console.print(
            f"{name} commit {environment['commit']}, {environment['date']}, "
            f"torch {environment['torch']}, {environment['cpu']}"
            f"{', interrupted' if run.interrupted else ''}",
            markup=False,
        )
    if before.environment["cpu"] != after.environment["cpu"]:
        console.print("[bold red]The runs are of different CPUs: the change is not the code's alone.[/]")
    if not changes:
        console.print("The runs have no cell in common.")
        return 1
    for table in comparison_tables(changes):
        console.print(table)
        console.print()
    only = len(before.results) + len(after.results) - 2 * len(changes)
    if only:
        console.print(f"{only} cells are in one run only, or had no valid pair, and are left out.")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    if options.compare:
        try:
            return show_comparison(options.compare, console)
        except (OSError, ValueError) as error:
            console.print(f"--compare: {error}", style="red", markup=False)
            return 2
    try:
        clocks = {count: make_clock(options.device, count) for count in options.threads}
    except NotImplementedError as error:
        console.print(f"--device: {error}", style="red", markup=False)
        return 2
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        # Better known now than after measuring.
        console.print("--picture needs matplotlib: pip install matplotlib", style="red")
        return 2

    work: list[tuple[Configuration, list[Cell]]] = []
    for configuration in configurations(options.dtypes, options.quick):
        for threads in options.threads:
            cells = configuration.cells(threads, options.filter)
            if cells:
                work.append((configuration, cells))
    if not work:
        console.print(f"No cell matches --filter {options.filter!r}.", style="red", markup=False)
        return 2

    run = Run(
        describe_environment(),
        {
            "device": str(options.device),
            "quick": options.quick,
            "threads": options.threads,
            "dtypes": list(options.dtypes),
            "filter": options.filter,
            "rounds": options.rounds,
            "seconds": options.seconds,
            "seed": options.seed,
            "clocks": {str(count): clock.description for count, clock in clocks.items()},
        },
        [],
    )
    print_environment(console, run.environment)
    for count, clock in clocks.items():
        console.print(f"T={count}: {clock.description}", markup=False)
    console.print(
        "Ratio: time of eager torch / time of bnfused, median of same-round pairs.\n"
        "Of copy speed: least traffic (forward and eval 2A, backward 3A, a residual 1A more, A one "
        "activation) against\ntorch's own copy_ of x, whose ordinary stores can be beaten: more "
        "than 100% is possible.\n"
    )
    wrong = measure_all(work, options, clocks, run, console)

    summaries = summarize(run.results)
    if summaries:
        console.print(summary_table(summaries))
    discarded = sum(clock.unclean for clock in clocks.values())
    if discarded:
        console.print(f"\n{discarded} samples were discarded: another process had the core.")
    without = sum(result.ratio is None for result in run.results)
    if without:
        console.print(
            f"{without} of {len(run.results)} cells have no valid pair of samples and are not in the table: run again "
            "on a quieter machine.",
            style="yellow",
        )
    if run.interrupted:
        console.print("\n[bold]Interrupted:[/] the numbers are of what was measured until then.")
    if options.json:
        run.write(options.json)
        console.print(f"\nnumbers: {options.json}", markup=False)
    if options.picture and summaries:
        save_picture(run, options.picture)
        console.print(f"picture: {options.picture}", markup=False)
    for message in wrong:
        console.print(f"NOT MEASURED, results differ: {message}", style="bold red", markup=False)
    return 1 if wrong else 130 if run.interrupted else 0


def measure_all(
    work: Sequence[tuple[Configuration, list[Cell]]],
    options: argparse.Namespace,
    clocks: Mapping[int, CpuClock],
    run: Run,
    console: Console,
) -> list[str]:
    """Fill ``run`` configuration by configuration.

    Returns a message for each that was not measured because the results differ.
    """
    wrong: list[str] = []
    usual_threads = torch.get_num_threads()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # its thread would take a core in the middle of a sample
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        with progress:
            task = progress.add_task("", total=len(work) * options.rounds)
            for index, (configuration, cells) in enumerate(work):
                threads = cells[0].threads
                title = f"{configuration.name}, T={threads}"

                def on_round(done: int, index: int = index, title: str = title) -> None:
                    # Rounds may end early for lack of time, so the bar can only jump forward from
                    # here.
                    completed = index * options.rounds + done
                    progress.update(task, completed=completed, description=f"{title}, round {done}")
                    progress.refresh()

                on_round(0)
                torch.set_num_threads(threads)
                plan = Plan(options.rounds, options.seconds, options.seed)
                try:
                    results, run.interrupted = measure(
                        configuration, cells, options.device, clocks[threads], plan, on_round
                    )
                except ValueError as error:
                    wrong.append(str(error))
                    continue
                run.results.extend(results)
                if results:
                    # The chain's name says already that its times are net.
                    net = ": net of producer and consumer" if configuration.family == CHAIN else ""
                    progress.console.print(cell_table(title + net, results))
                    progress.console.print()
                if run.interrupted:
                    break
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        torch.set_num_threads(usual_threads)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
