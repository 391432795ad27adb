"""What bench.py times together, and how samples become results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.cases import COMPILED, Cell, Configuration, bytes_moved
from benchmarks.memory import Saved, saved_for_backward
from benchmarks.modules import SUBJECTS, check_same, subject_of
from benchmarks.peers import (
    COMPILE_MODES,
    COMPILED_PASSES,
    OURS,
    check_agreement,
    make_chain,
    make_function,
    takes_cudnn,
)
from benchmarks.results import CellResult, PeerResult
from benchmarks.timing import COPY, Budget, Clock, band, differences, interleave, paired_ratios

NO_BATCH_NORM = "no batch norm"


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
            together = configuration.family == COMPILED  # bnfused is compiled there too
            eager = tuple(name for name in peers if together or name not in COMPILE_MODES)
            if cells and eager:
                work.append(Measurement(configuration, tuple(cells), eager))
            if together or not (every or configuration.compiled):
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
    what: Measurement, device: torch.device, clock: Clock, budget: Budget, on_round: Callable[[int], None]
) -> tuple[list[CellResult], bool]:
    """Time what belongs together.

    Returns the results, and whether the measurement was interrupted; then they are those of the rounds that were done.
    """
    configuration, cells = what.configuration, what.cells
    tensors = subject_of(configuration, device, budget.seed)
    peers = [name for name in what.peers if name != "cuDNN" or takes_cudnn(tensors)]
    compiled = configuration.family == COMPILED
    if compiled or set(peers) & set(COMPILE_MODES):
        # Otherwise earlier compilations count, and at the limit torch.compile silently runs eagerly.
        torch.compiler.reset()
    (check_same if compiled else check_agreement)(configuration, cells, tensors, peers)
    x = tensors.x.detach()
    functions: dict[object, Callable[[], object]] = {COPY: lambda: tensors.copy.copy_(x)}
    for cell, name in itertools.product(cells, (OURS, *peers)):
        key = (name, cell.pass_name, cell.fusion)
        if cell.pass_name == "chain":
            functions[NO_BATCH_NORM] = make_chain(None, cell.fusion, tensors)
            functions[key] = make_chain(name, cell.fusion, tensors)
        else:
            functions[key] = make_function(name, cell.pass_name, cell.fusion, tensors)
    samples: dict[object, list[float | None]] = {}
    interrupted = False
    try:
        interleave(functions, clock, budget, samples, on_round)
    except KeyboardInterrupt:
        interrupted = True
    if not samples.get(COPY):
        return [], interrupted
    for key in samples.keys() - {COPY}:
        samples[key] = [None if seconds is None else seconds / tensors.calls for seconds in samples[key]]
    saved = {
        fusion: {
            name: saved_for_backward(tensors.forward(name, True, fusion), tensors.inputs(fusion))
            for name in (OURS, *peers)
            if name not in COMPILE_MODES
        }
        for fusion in {cell.fusion for cell in cells if cell.pass_name == "forward" and cell.family not in SUBJECTS}
    }
    with_graph = [saved.get(cell.fusion) if cell.pass_name == "forward" else None for cell in cells]
    pairs = zip(cells, with_graph, strict=True)
    return [cell_result(cell, configuration, peers, samples, kept) for cell, kept in pairs], interrupted


def cell_result(
    cell: Cell,
    configuration: Configuration,
    peers: Sequence[str],
    samples: Mapping[object, Sequence[float | None]],
    saved: dict[str, Saved] | None = None,
) -> CellResult:
    """Medians, quartiles and paired ratios of one cell from the samples of its measurement."""
    times = {name: samples[name, cell.pass_name, cell.fusion] for name in (OURS, *peers)}
    if cell.pass_name == "chain":
        times = {name: differences(seconds, samples[NO_BATCH_NORM]) for name, seconds in times.items()}
    # A block moves more than one batch norm does; how much is not counted.
    least = 0 if cell.family == COMPILED else bytes_moved(cell.pass_name, cell.fusion, configuration.activation_bytes)
    # A copy moves two activations: scaled to the bytes of this pass it is the time at copy speed.
    scale = least / (2 * configuration.activation_bytes)

    def in_ms(values: Sequence[float | None]) -> list[float]:
        return [1e3 * value for value in values if value is not None]

    def copy_speed(name: str) -> float | None:
        fractions = band(paired_ratios(samples[COPY], times[name]))
        return fractions.median * scale if fractions and scale else None

    def against(name: str) -> PeerResult:
        ratios = paired_ratios(times[name], times[OURS])
        return PeerResult(band(in_ms(times[name])), band(ratios), len(ratios), copy_speed(name))

    return CellResult(
        *(cell.configuration, configuration.shape, configuration.layout, configuration.dtype),
        *(cell.family, cell.pass_name, cell.fusion, cell.threads, least),
        ms=band(in_ms(times[OURS])),
        copy_ms=band(in_ms(samples[COPY])),
        copy_speed=copy_speed(OURS),
        peers={name: against(name) for name in peers},
        saved=saved or {},
    )
