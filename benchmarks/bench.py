"""Speed of bnfused against its peers, on a CPU or a GPU: ``python benchmarks/bench.py --quick``.

Every function of a configuration (bnfused and its peers, all passes and fusions, and a copy of the same buffer) is
timed once per round, in one process, in an order reshuffled every round; a ratio is the median over rounds of the
peer's time over bnfused's in the same round. benchmarks/README.md says what that does and does not show.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import cases, pictures
from benchmarks.arguments import (
    add_output_arguments,
    check_output_arguments,
    parse_threads,
    set_output_files,
    settings,
    some_of,
)
from benchmarks.cases import CHAIN, DEFAULT_DTYPES, DTYPE_BYTES, GPU_DTYPES, SWEEPS, Configuration
from benchmarks.environment import describe_environment, print_environment
from benchmarks.measurement import Measurement, measure, plan_measurements
from benchmarks.peers import PEERS
from benchmarks.report import (
    cell_table,
    closing_lines,
    compare,
    comparison_line,
    comparison_tables,
    gigabytes,
    make_console,
    milliseconds,
    saved_table,
    summarize,
    summary_table,
)
from benchmarks.results import CellResult, Run, merge, read_cells
from benchmarks.running import finish, measure_each
from benchmarks.timing import COPY, ROOF_BYTES, Budget, Clock, copy_bandwidth, make_clock, using_threads

TINY_ROOF_BYTES = 2**16
# Peers and rounds of the cases that are modules.
MODULE_CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "overhead": (("torch",), 51),
    "compiled": (("torch", "compile"), 31),
}


def parse_sweeps(text: str) -> tuple[str, ...]:
    return SWEEPS if text == "all" else some_of(SWEEPS)(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Time bnfused against its peers, cell by cell: prints the peer's time over bnfused's.",
    )
    add = parser.add_argument
    add("--device", default="cpu", type=torch.device, help="cpu or cuda (default: %(default)s)")
    add("--quick", action="store_true", help="few configurations, few rounds: < 90 s on two idle cores")
    swept = "instead: tensors that differ in one size, in the first of --dtypes; several with commas"
    add("--sweep", default=(), type=parse_sweeps, metavar="|".join((*SWEEPS, "all")), help=swept)
    compiling = "default: torch on a CPU, where compiling a cell takes some 20 s; all on a GPU"
    add("--peers", type=some_of(PEERS), help=f"of {', '.join(PEERS)} ({compiling})")
    add("--threads", type=parse_threads, help="of a CPU (default: 1,all; --sweep: all)")
    add(
        "--dtypes",
        type=some_of(tuple(DTYPE_BYTES)),
        help="of float32, bfloat16, float16; 16-bit inputs have float32 parameters (default: "
        f"{','.join(DEFAULT_DTYPES)}; on a GPU {','.join(GPU_DTYPES)})",
    )
    add(
        "--filter",
        default="",
        metavar="REGEX",
        help="only cells whose name matches, e.g. 'channels_last float32 backward relu T=1'; fewer "
        "functions per round leave more data in the cache: ratios can be higher than in a full run",
    )
    add("--rounds", type=int, help="samples per function (default: 41, quick: 21, GPU: 15)")
    limit = "limit per configuration and number of threads (default: 8, quick: 1.5, GPU: 0.5)"
    add("--seconds", type=float, help=limit)
    add("--limit", type=float, metavar="SECONDS", help="begin nothing later than this")
    add("--seed", type=int, default=0)
    add(
        "--cases",
        choices=("cpu", "cuda", *MODULE_CASES),
        help="the tensors of this device, on any (to try a script); overhead: time per call on tiny tensors; compiled: "
        "a residual block under torch.compile, compared with Inductor's own fusion",
    )
    add("--tiny", action="store_true", help="of a few values each (to try a script)")
    add_output_arguments(parser, "bench")
    add(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="measure nothing: say of each cell of two runs whether the second is faster, slower, or within noise; "
        "exit status 0 whatever it says, 2 if there is nothing to compare",
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: expected more than 0, got {options.seconds}")
    gpu = options.device.type == "cuda"
    options.cases = options.cases or options.device.type
    if options.cases in MODULE_CASES:
        peers, rounds = MODULE_CASES[options.cases]
        if gpu or options.sweep or not set(options.peers or ()) <= set(peers):
            parser.error(f"--cases {options.cases} is for a CPU, without --sweep, and for the peers {', '.join(peers)}")
        options.peers, options.rounds = options.peers or peers, options.rounds or rounds
        options.seconds, options.threads = options.seconds or 60.0, options.threads or [1]
    options.rounds = options.rounds or (15 if gpu else 21 if options.quick else 41)
    options.seconds = options.seconds or (0.5 if gpu else 1.5 if options.quick else 8.0)
    options.every_compiled = options.peers is not None
    options.peers = options.peers or (PEERS if options.cases == "cuda" else ("torch",))
    options.dtypes = options.dtypes or (GPU_DTYPES if options.cases == "cuda" else DEFAULT_DTYPES)
    if gpu:
        if options.threads or "threads" in options.sweep and options.sweep != SWEEPS:
            parser.error("--threads and --sweep threads are for a CPU")
        options.sweep = tuple(sweep for sweep in options.sweep if sweep != "threads")
        options.threads = [0]
    elif options.threads is None:
        cores = os.cpu_count() or 1
        powers = [2**k for k in range(cores.bit_length()) if 2**k < cores]
        options.threads = [*powers, cores] if "threads" in options.sweep else list(dict.fromkeys([1, cores]))
    check_output_arguments(parser, options)
    return options


def chosen_configurations(options: argparse.Namespace) -> list[Configuration]:
    every: list[Configuration] = []
    for sweep in options.sweep:
        every += cases.sweep_configurations(sweep, options.cases, options.dtypes[0], options.quick)
    if options.cases in MODULE_CASES:
        every = cases.call_configurations() if options.cases == "overhead" else cases.block_configurations()
    elif not options.sweep:
        of_device = cases.gpu_configurations if options.cases == "cuda" else cases.cpu_configurations
        every = of_device(options.dtypes, options.quick)
    if not options.tiny:
        return every
    small: dict[str, Configuration] = {}
    for configuration in map(cases.tiny, every):
        if configuration.compiled or configuration.name not in small:
            small[configuration.name] = configuration
    return list(small.values())


def show_comparison(paths: Sequence[Path], console: Console) -> int:
    before, after = (read_cells(path) for path in paths)
    changes = compare(before, after)
    for name, run in zip(("first: ", "second:"), (before, after), strict=True):
        environment = run.environment
        facts = [f"{name} commit {environment['commit']}", environment["date"], f"torch {environment['torch']}"]
        facts += [environment["device"], *(["interrupted"] if run.interrupted else [])]
        console.print(", ".join(facts), markup=False)
    if before.environment["device"] != after.environment["device"]:
        console.print("[bold red]The runs are of different devices: the change is not the code's alone.[/]")
    if not changes:
        console.print("The runs have no cell in common.")
        return 2
    for table in comparison_tables(changes):
        console.print(table, "")
    only = sum(len(result.peers) for run in (before, after) for result in run.results) - 2 * len(changes)
    if only:
        console.print(f"{only} cells are in one run only, or had no valid pair, and are left out.")
    console.print(comparison_line(changes), style="bold")
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
    except (NotImplementedError, RuntimeError) as error:
        console.print(f"--device: {error}", style="red", markup=False)
        return 2
    chosen = chosen_configurations(options)
    work = plan_measurements(chosen, options.threads, options.filter, options.peers, options.every_compiled)
    if not work:
        console.print(f"No cell matches --filter {options.filter!r}.", style="red", markup=False)
        return 2

    clock_names = {str(count): clock.description for count, clock in clocks.items()}
    environment = describe_environment(options.device, options.commit)
    run: Run[CellResult] = Run(environment, settings(options) | {"clocks": clock_names})
    set_output_files(options, run.environment, "bench")
    print_environment(console, run.environment)
    for count, clock in clocks.items():
        console.print(f"T={count}: {clock.description}" if count else clock.description, markup=False)
    console.print(
        "Ratio: time of the peer / time of bnfused, median of same-round pairs.\n"
        "Moves: least traffic (forward and eval 2A, backward 3A, a residual 1A more each, A one activation); GB/s with "
        "it; of copy:\nrelative to torch's own copy_ of x, whose ordinary stores can be beaten: more than 100% is "
        "possible."
    )
    measure_all(work, options, clocks, run, console)
    show_end(run, clocks, options, console)
    return run.exit_status


def measure_all(
    work: Sequence[Measurement],
    options: argparse.Namespace,
    clocks: Mapping[int, Clock],
    run: Run[CellResult],
    console: Console,
) -> None:
    """Fill ``run``, measurement by measurement, and its file with it."""
    cudnn = torch.backends.cudnn.enabled
    budget = Budget(options.rounds, options.seconds, options.seed)

    def measure_one(what: Measurement, on_round: Callable[[int], None]) -> tuple[list[CellResult], bool]:
        with using_threads(what.threads):
            return measure(what, options.device, clocks[what.threads], budget, on_round)

    def keep(what: Measurement, results: list[CellResult], console: Console) -> None:
        show_measurement(what, results, console)
        merge(run.results, results)

    run.not_measured = [what.title for what in work]
    try:
        for threads, clock in clocks.items():
            size = TINY_ROOF_BYTES if options.tiny else ROOF_BYTES[options.device.type]
            with using_threads(threads):
                run.roof[threads] = copy_bandwidth(options.device, clock, size)
            console.print(
                f"{f'T={threads}: ' if threads else ''}a copy of {size / 2**20:g} MiB moves "
                f"{gigabytes(run.roof[threads])} GB/s, read and written"
            )
        console.print()
        measure_each(work, run, options, console, measure_one, keep)
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        torch.backends.cudnn.set_flags(_enabled=cudnn)


def show_measurement(what: Measurement, results: Sequence[CellResult], console: Console) -> None:
    if not results:
        return
    # The chain's name says already that its times are net.
    net = ": net of producer and consumer" if what.configuration.family == CHAIN else ""
    first = results[0]
    copy = f"; a copy: {milliseconds(first.copy_ms)} ms, {gigabytes(first.bandwidth(COPY))} GB/s"
    console.print(cell_table(f"{what.title}{net}{copy}", results), "")


def show_end(run: Run[CellResult], clocks: Mapping[int, Clock], options: argparse.Namespace, console: Console) -> None:
    """Tables over all cells, what is missing and why, and the files."""
    summaries = summarize(run.results)
    for table in (saved_table(run.results), summary_table(summaries) if summaries else None):
        if table is not None:
            console.print(table, "")
    discarded = sum(clock.unclean for clock in clocks.values())
    if discarded:
        console.print(f"{discarded} samples were discarded: another process had the core.")
    without = sum(peer.ratio is None for result in run.results for peer in result.peers.values())
    if without:
        missing = f"{without} ratios have no valid pair of samples and are not in the table"
        console.print(f"{missing}: run again on a quieter machine.", style="yellow")
    draw = pictures.save_sweeps if options.sweep else pictures.save_ratios
    finish(run, options, console, "measurements", (lambda: draw(run, options.picture)) if summaries else None)
    for line in closing_lines(run.results):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
