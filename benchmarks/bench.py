"""Speed of bnfused against its peers, on a CPU or a GPU: ``python benchmarks/bench.py --quick``.

Every function of a configuration (bnfused and its peers, all passes and fusions, and a copy of the same buffer) is
timed once per round, in one process, in an order reshuffled every round; a ratio is the median over rounds of the
peer's time over bnfused's in the same round. benchmarks/README.md says what that does and does not show.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from benchmarks.cases import CHAIN, DEFAULT_DTYPES, DTYPE_BYTES, GPU_DTYPES, SWEEPS, Cell, Configuration, bytes_moved
from benchmarks.memory import Saved, saved_for_backward
from benchmarks.peers import (
    COMPILE_MODES,
    COMPILED_PASSES,
    OURS,
    PEERS,
    Tensors,
    check_agreement,
    forward_function,
    make_chain,
    make_function,
    takes_cudnn,
)
from benchmarks.report import (
    CellResult,
    PeerResult,
    Run,
    cell_table,
    closing_lines,
    compare,
    comparison_line,
    comparison_tables,
    describe_environment,
    gigabytes,
    make_console,
    merge,
    milliseconds,
    print_environment,
    progress_bar,
    read_cells,
    saved_table,
    summarize,
    summary_table,
)
from benchmarks.timing import (
    COPY,
    ROOF_BYTES,
    Clock,
    Plan,
    band,
    copy_bandwidth,
    differences,
    interleave,
    make_clock,
    paired_ratios,
)

NO_BATCH_NORM = "no batch norm"
TINY_ROOF_BYTES = 2**16


@dataclass(frozen=True)
class Measurement:
    """What is timed together: some cells of one configuration, at one number of threads, with some peers."""

    configuration: Configuration
    cells: tuple[Cell, ...]
    peers: tuple[str, ...]

    @property
    def threads(self) -> int:
        return self.cells[0].threads

    @property
    def title(self) -> str:
        threads = f", T={self.threads}" if self.threads else ""
        compiled = set(self.peers) & set(COMPILE_MODES)
        return f"{self.configuration.name}{threads}" + (f", {' '.join(self.peers)}" if compiled else "")


def plan_measurements(
    configurations: Sequence[Configuration], threads: Sequence[int], pattern: str, peers: Sequence[str], every: bool
) -> list[Measurement]:
    """All eager measurements, then those with torch.compile, one mode and fusion each: compiling takes seconds.

    There is not time for all of these on a GPU: a dtype has all of its layers in one mode, then in the next.

    ``every``: not only the configurations that are marked for torch.compile are compiled.
    """
    work = []
    compiled = []
    for configuration in configurations:
        # A sweep over the threads needs several, any other sweep only one.
        for count in threads if configuration.sweep in ("", "threads") else threads[-1:]:
            cells = configuration.cells(count, pattern)
            eager = tuple(name for name in peers if name not in COMPILE_MODES)
            if cells and eager:
                work.append(Measurement(configuration, tuple(cells), eager))
            if not (every or configuration.compiled):
                continue
            for name in COMPILE_MODES:
                for fusion in configuration.fusions if name in peers else ():
                    some = [cell for cell in cells if cell.fusion == fusion and cell.pass_name in COMPILED_PASSES]
                    if some:
                        compiled.append(Measurement(configuration, tuple(some), (name,)))
    dtypes = [configuration.dtype for configuration in configurations]
    modes = list(COMPILE_MODES)
    compiled.sort(key=lambda what: (dtypes.index(what.configuration.dtype), modes.index(what.peers[0])))
    return work + compiled


def measure(
    what: Measurement, device: torch.device, clock: Clock, plan: Plan, on_round: Callable[[int], None]
) -> tuple[list[CellResult], bool]:
    """Time what belongs together.

    Returns the results and whether the measurement was interrupted; then the results are of the
    rounds that were done.
    """
    configuration, cells = what.configuration, what.cells
    tensors = Tensors(configuration, device, plan.seed)
    peers = [name for name in what.peers if name != "cuDNN" or takes_cudnn(tensors)]
    if set(peers) & set(COMPILE_MODES):
        # Else what was compiled before counts, and at the limit torch.compile runs eagerly without a word.
        torch.compiler.reset()
    check_agreement(configuration, cells, tensors, peers)
    functions: dict[object, Callable[[], object]] = {}
    x = tensors.x.detach()
    functions[COPY] = lambda: tensors.copy.copy_(x)
    for cell in cells:
        for name in (OURS, *peers):
            key = (name, cell.pass_name, cell.fusion)
            if cell.pass_name == "chain":
                functions[NO_BATCH_NORM] = make_chain(None, cell.fusion, tensors)
                functions[key] = make_chain(name, cell.fusion, tensors)
            else:
                functions[key] = make_function(name, cell.pass_name, cell.fusion, tensors)
    samples: dict[object, list[float | None]] = {}
    interrupted = False
    try:
        interleave(functions, clock, plan, samples, on_round)
    except KeyboardInterrupt:
        interrupted = True
    if not samples.get(COPY):
        return [], interrupted
    saved = {
        fusion: {
            name: saved_for_backward(forward_function(name, tensors, True, fusion), tensors.inputs(fusion))
            for name in (OURS, *peers)
            if name not in COMPILE_MODES
        }
        for fusion in {cell.fusion for cell in cells if cell.pass_name == "forward"}
    }
    return [
        cell_result(
            cell, configuration, peers, samples, saved.get(cell.fusion) if cell.pass_name == "forward" else None
        )
        for cell in cells
    ], interrupted


def cell_result(
    cell: Cell,
    configuration: Configuration,
    peers: Sequence[str],
    samples: Mapping[object, Sequence[float | None]],
    saved: dict[str, Saved] | None = None,
) -> CellResult:
    """Medians, quartiles and paired ratios of one cell from the samples of its measurement."""
    times = {}
    for name in (OURS, *peers):
        times[name] = samples[name, cell.pass_name, cell.fusion]
        if cell.pass_name == "chain":
            times[name] = differences(times[name], samples[NO_BATCH_NORM])
    least = bytes_moved(cell.pass_name, cell.fusion, configuration.activation_bytes)
    # A copy moves two activations: scaled to the bytes of this pass it is the time at copy speed.
    scale = least / (2 * configuration.activation_bytes)

    def in_ms(values: Sequence[float | None]) -> list[float]:
        return [1e3 * value for value in values if value is not None]

    def copy_speed(name: str) -> float | None:
        fractions = band(paired_ratios(samples[COPY], times[name]))
        return None if fractions is None else fractions.median * scale

    def against(name: str) -> PeerResult:
        ratios = paired_ratios(times[name], times[OURS])
        return PeerResult(band(in_ms(times[name])), band(ratios), len(ratios), copy_speed(name))

    return CellResult(
        configuration=cell.configuration,
        shape=configuration.shape,
        layout=configuration.layout,
        dtype=configuration.dtype,
        family=cell.family,
        pass_name=cell.pass_name,
        fusion=cell.fusion,
        threads=cell.threads,
        bytes=least,
        ms=band(in_ms(times[OURS])),
        copy_ms=band(in_ms(samples[COPY])),
        copy_speed=copy_speed(OURS),
        peers={name: against(name) for name in peers},
        saved=saved or {},
    )


def parse_sweeps(text: str) -> tuple[str, ...]:
    return SWEEPS if text == "all" else some_of(SWEEPS)(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Time bnfused against its peers, cell by cell: prints the peer's time over bnfused's.",
    )
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few configurations, few rounds: < 90 s on two idle cores")
    parser.add_argument(
        "--sweep",
        default=(),
        type=parse_sweeps,
        metavar="|".join((*SWEEPS, "all")),
        help="instead: tensors that differ in one size, in the first of --dtypes; several with commas",
    )
    parser.add_argument(
        "--peers",
        type=some_of(PEERS),
        help=f"of {', '.join(PEERS)} (default: torch on a CPU, where compiling a cell takes some 20 s; all on a GPU)",
    )
    parser.add_argument("--threads", type=parse_threads, help="of a CPU (default: 1,all; --sweep: all)")
    parser.add_argument(
        "--dtypes",
        type=some_of(tuple(DTYPE_BYTES)),
        help="of float32, bfloat16, float16; 16-bit inputs have float32 parameters (default: "
        f"{','.join(DEFAULT_DTYPES)}; on a GPU {','.join(GPU_DTYPES)})",
    )
    parser.add_argument(
        "--filter",
        default="",
        metavar="REGEX",
        help="only cells whose name matches, e.g. 'channels_last float32 backward relu T=1'; fewer "
        "functions per round leave more data in the cache: ratios can be higher than in a full run",
    )
    parser.add_argument("--rounds", type=int, help="samples per function (default: 41, quick: 21, GPU: 15)")
    parser.add_argument(
        "--seconds",
        type=float,
        help="limit per configuration and number of threads (default: 8, quick: 1.5, GPU: 0.5)",
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin nothing later than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", choices=("cpu", "cuda"), help="the tensors of this device, on any (to try a script)")
    parser.add_argument("--tiny", action="store_true", help="of a few values each (to try a script)")
    add_output_arguments(parser, "bench")
    parser.add_argument(
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
    options.rounds = options.rounds or (15 if gpu else 21 if options.quick else 41)
    options.seconds = options.seconds or (0.5 if gpu else 1.5 if options.quick else 8.0)
    options.cases = options.cases or options.device.type
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
    if options.sweep:
        every = [
            configuration
            for sweep in options.sweep
            for configuration in cases.sweep_configurations(sweep, options.cases, options.dtypes[0], options.quick)
        ]
    elif options.cases == "cuda":
        every = cases.gpu_configurations(options.dtypes, options.quick)
    else:
        every = cases.cpu_configurations(options.dtypes, options.quick)
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
        console.print(
            f"{name} commit {environment['commit']}, {environment['date']}, "
            f"torch {environment['torch']}, {environment['device']}"
            f"{', interrupted' if run.interrupted else ''}",
            markup=False,
        )
    if before.environment["device"] != after.environment["device"]:
        console.print("[bold red]The runs are of different devices: the change is not the code's alone.[/]")
    if not changes:
        console.print("The runs have no cell in common.")
        return 2
    for table in comparison_tables(changes):
        console.print(table)
        console.print()
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
    work = plan_measurements(
        chosen_configurations(options), options.threads, options.filter, options.peers, options.every_compiled
    )
    if not work:
        console.print(f"No cell matches --filter {options.filter!r}.", style="red", markup=False)
        return 2

    clock_names = {str(count): clock.description for count, clock in clocks.items()}
    run: Run[CellResult] = Run(
        describe_environment(options.device, options.commit), settings(options) | {"clocks": clock_names}
    )
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
    """Fill ``run``, measurement by measurement, and its file with it. Ctrl-C ends it and keeps what there is."""
    usual_threads, cudnn = torch.get_num_threads(), torch.backends.cudnn.enabled
    plan = Plan(options.rounds, options.seconds, options.seed)
    begin = time.perf_counter()
    left = list(work)
    progress = progress_bar(console)
    try:
        with progress:
            for threads, clock in clocks.items():
                set_threads(threads)
                size = TINY_ROOF_BYTES if options.tiny else ROOF_BYTES[options.device.type]
                run.roof[threads] = copy_bandwidth(options.device, clock, size)
                console.print(
                    f"{f'T={threads}: ' if threads else ''}a copy of {size / 2**20:g} MiB moves "
                    f"{gigabytes(run.roof[threads])} GB/s, read and written"
                )
            console.print()
            task = progress.add_task("", total=len(work) * options.rounds)
            while left and (options.limit is None or time.perf_counter() - begin < options.limit):
                what = left[0]

                def on_round(done: int, before: int = len(work) - len(left), title: str = what.title) -> None:
                    # Rounds may end early for lack of time, so the bar can only jump forward from here.
                    completed = before * options.rounds + done
                    progress.update(task, completed=completed, description=f"{title}, round {done}")
                    progress.refresh()

                on_round(0)
                set_threads(what.threads)
                try:
                    results, run.interrupted = measure(what, options.device, clocks[what.threads], plan, on_round)
                except Exception as error:  # a peer that cannot do a case is a result, and the rest is worth having
                    message = str(error).splitlines()[0][:300] if str(error) else ""
                    run.failed.append(f"{what.title}: {type(error).__name__}: {message}")
                    progress.console.print(f"FAILED {run.failed[-1]}", style="bold red", markup=False)
                    results = []
                del left[0]
                show_measurement(what, results, progress.console)
                merge(run.results, results)
                if options.json:
                    run.write(options.json)
                if run.interrupted:
                    break
    except KeyboardInterrupt:
        run.interrupted = True
    finally:
        run.not_measured = [what.title for what in left]
        torch.set_num_threads(usual_threads)
        torch.backends.cudnn.set_flags(_enabled=cudnn)


def set_threads(count: int) -> None:
    """0 stands for a GPU, where the CPU's threads are as they were."""
    if count:
        torch.set_num_threads(count)


def show_measurement(what: Measurement, results: Sequence[CellResult], console: Console) -> None:
    if not results:
        return
    # The chain's name says already that its times are net.
    net = ": net of producer and consumer" if what.configuration.family == CHAIN else ""
    first = results[0]
    copy = f"; a copy: {milliseconds(first.copy_ms)} ms, {gigabytes(first.bandwidth(COPY))} GB/s"
    console.print(cell_table(f"{what.title}{net}{copy}", results))
    console.print()


def show_end(run: Run[CellResult], clocks: Mapping[int, Clock], options: argparse.Namespace, console: Console) -> None:
    """Tables over all cells, what is missing and why, and the files."""
    summaries = summarize(run.results)
    saved = saved_table(run.results)
    if saved is not None:
        console.print(saved)
        console.print()
    if summaries:
        console.print(summary_table(summaries))
        console.print()
    discarded = sum(clock.unclean for clock in clocks.values())
    if discarded:
        console.print(f"{discarded} samples were discarded: another process had the core.")
    without = sum(peer.ratio is None for result in run.results for peer in result.peers.values())
    if without:
        console.print(
            f"{without} ratios have no valid pair of samples and are not in the table: run again on a quieter machine.",
            style="yellow",
        )
    if run.interrupted:
        console.print("[bold]Interrupted:[/] the numbers are of what was measured until then.")
    if run.not_measured:
        console.print(f"{len(run.not_measured)} measurements were left out, {run.not_measured[0]} first.", markup=False)
    if options.json:
        run.write(options.json)
        console.print(f"numbers: {options.json}", markup=False)
    if options.picture and summaries:
        (pictures.save_sweeps if options.sweep else pictures.save_ratios)(run, options.picture)
        console.print(f"picture: {options.picture}", markup=False)
    for message in run.failed:
        console.print(f"FAILED {message}", style="bold red", markup=False)
    for line in closing_lines(run.results):
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
