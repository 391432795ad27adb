"""What the benchmarks say: results as JSON, tables, and the comparison of two runs; pictures.py draws them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import bnfused
from benchmarks.cases import DTYPE_BYTES, FUSION_LABELS, Cell, Target, target
from benchmarks.memory import Saved
from benchmarks.peers import OURS
from benchmarks.timing import COPY, Band, geometric_mean

FORMAT = 2
FEW_PAIRS = 5


def make_console() -> Console:
    """A console that does not squeeze tables to 80 columns in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 165, highlight=False)


def progress_bar(console: Console) -> Progress:
    """A bar that moves when it is told to: a thread of its own would take a core in the middle of a sample."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )


# --- results ---


@dataclass(frozen=True)
class PeerResult:
    """A peer in one cell. ``ratio`` is its time over bnfused's in ``pairs`` rounds: above 1, bnfused is faster."""

    ms: Band | None
    ratio: Band | None
    pairs: int
    copy_speed: float | None


@dataclass(frozen=True)
class CellResult:
    """One cell. Bands are (lower quartile, median, upper quartile); None stands where no sample counted.

    ``bytes`` is the least traffic, and ``copy_speed`` the bandwidth reached with it over that of a copy of the same
    tensor in the same rounds. ``ms`` and ``copy_speed`` are bnfused's. A chain's times are net of producer and
    consumer. ``saved`` is what the graph of a forward keeps, by implementation.
    """

    configuration: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    family: str
    pass_name: str
    fusion: str
    threads: int
    bytes: int
    ms: Band | None
    copy_ms: Band | None
    copy_speed: float | None
    peers: dict[str, PeerResult]
    saved: dict[str, Saved] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        return Cell(self.configuration, self.family, self.pass_name, self.fusion, self.threads)

    def ratio(self, peer: str) -> Band | None:
        return self.peers[peer].ratio if peer in self.peers else None

    def speed(self, name: str) -> float | None:
        """Of that of a copy, for bnfused or a peer."""
        if name == OURS:
            return self.copy_speed
        return self.peers[name].copy_speed if name in self.peers else None

    def bandwidth(self, name: str) -> float | None:
        """Bytes per second of bnfused, of a peer, or of "copy", counting the least traffic."""
        if name == COPY:
            activation = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
            return None if self.copy_ms is None else 2 * activation / (1e-3 * self.copy_ms.median)
        ms = self.ms if name == OURS else self.peers[name].ms if name in self.peers else None
        return None if ms is None or ms.median <= 0 else self.bytes / (1e-3 * ms.median)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CellResult:
        peers = {
            name: PeerResult(_band(peer["ms"]), _band(peer["ratio"]), peer["pairs"], peer["copy_speed"])
            for name, peer in row["peers"].items()
        }
        saved = {name: Saved(*value) for name, value in row["saved"].items()}
        bands = {name: _band(row[name]) for name in ("ms", "copy_ms")}
        return cls(**{**row, **bands, "shape": tuple(row["shape"]), "peers": peers, "saved": saved})


def _band(value: Sequence[float] | None) -> Band | None:
    return None if value is None else Band(*value)


Result = TypeVar("Result")


@dataclass
class Run(Generic[Result]):
    """One run of a benchmark: where, how, and what came out.

    ``roof`` is the bandwidth of a copy that no cache holds, bytes per second by number of threads. ``failed`` has a
    message for each measurement that raised an error or whose results were wrong, ``not_measured`` the names of those
    that the time, or the user, did not suffice for.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    roof: dict[int, float | None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_status(self) -> int:
        if self.failed:
            return 1
        return 130 if self.interrupted else 0 if self.results else 1

    def to_json(self) -> str:
        """A line for each result, and for each fact about the run."""
        whole = {"format": FORMAT, **dataclasses.asdict(self)}
        lines = ",\n".join(json.dumps(row) for row in whole.pop("results"))
        return json.dumps(whole, indent=1)[:-2] + f',\n "results": [\n{lines}\n ]\n}}\n'

    def write(self, path: Path) -> None:
        """Whole or not at all, so that a run that is cut off leaves its last whole file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_json())
        partial.replace(path)


def read_cells(path: Path) -> Run[CellResult]:
    """What bench.py has written. Raises ValueError where it is anything else."""
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise ValueError(f"expected benchmark results of format {FORMAT}")
        results = [CellResult.from_row(row) for row in raw.pop("results")]
        roof = {int(threads): value for threads, value in raw.pop("roof").items()}
        return Run(results=results, roof=roof, **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def merge(results: list[CellResult], new: Iterable[CellResult]) -> None:
    """Add ``new`` to ``results``: the peers of a cell that is there already go to it, each with the ratio of its own
    rounds."""
    index = {result.cell: number for number, result in enumerate(results)}
    for result in new:
        if result.cell in index:
            there = results[index[result.cell]]
            results[index[result.cell]] = dataclasses.replace(
                there, peers=there.peers | result.peers, saved=result.saved | there.saved
            )
        else:
            results.append(result)


# --- environment ---


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with ``+`` if files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    # Also where the files are another user's, as in a container: this file is one of them.
    git = ["git", "-C", str(root), "-c", f"safe.directory={root}"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def huge_pages() -> str | None:
    """Linux' setting for huge pages, which decides the price of fresh memory; None elsewhere."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return None


def describe_environment(device: torch.device | None = None, named_commit: str | None = None) -> dict[str, Any]:
    """What a reader needs to judge numbers: versions, machine, commit, date; of ``device`` too if it is a GPU.

    ``named_commit`` stands in for that of a copy that git knows nothing of.
    """
    environment: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bnfused": bnfused.__version__,
        "bnfused_extension": bnfused.is_available(),
        "bnfused_build": {key: str(value) for key, value in bnfused.build_info().items()},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "huge_pages": huge_pages(),
        "commit": commit() or named_commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_name(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "L2_MiB": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return environment


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def folder_of_device(results: Path, environment: Mapping[str, Any]) -> Path:
    """Where results of this device are kept in a folder of results."""
    return results / re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")


def backend_line() -> str:
    """Which code ``bnfused`` runs in this process, in one line."""
    if bnfused.is_available():
        build = bnfused.build_info()
        shown = ", ".join(f"{key} {value}" for key, value in build.items() if value is not None)
        return f"bnfused {bnfused.__version__}, compiled extension ({shown})"
    return f"bnfused {bnfused.__version__}, REFERENCE PATH in plain torch, not the kernels: {bnfused.why_unavailable()}"


def print_environment(console: Console, environment: Mapping[str, Any]) -> None:
    if "capability" in environment:
        console.print(
            f"[bold]{environment['device']}[/], compute capability {environment['capability']}, "
            f"{environment['multiprocessors']} SMs, {environment['memory_GiB']} GiB, L2 {environment['L2_MiB']} MiB, "
            f"CUDA {environment['cuda']}, cuDNN {environment['cudnn']}, driver {environment['driver']}"
        )
    console.print(
        f"[bold]{environment['cpu']}[/], {environment['cores']} cores, {environment['system']}, "
        f"huge pages: {environment['huge_pages']}"
    )
    console.print(
        f"torch {environment['torch']} ({environment['torch_cpu_capability']}), "
        f"Python {environment['python']}, commit {environment['commit'] or 'unknown'}, "
        f"{environment['date']}"
    )
    style = "" if bnfused.is_available() else "bold red"
    console.print(backend_line(), style=style, markup=False, soft_wrap=True)


# --- tables ---


def milliseconds(value: Band | None) -> str:
    if value is None:
        return "-"
    return f"{value.median:.1f}" if value.median >= 10 else f"{value.median:.3g}"


def ratio_text(value: Band | None) -> str:
    return "-" if value is None else f"{value.median:.2f}x"


def spread(value: Band | None) -> str:
    return "-" if value is None else f"{value.low:.2f}-{value.high:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def gigabytes(bytes_per_second: float | None) -> str:
    """In GB/s."""
    return "-" if bytes_per_second is None else f"{bytes_per_second / 1e9:.3g}"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.3g}" if count < 1000 * 2**20 else f"{count / 2**20:.0f}"


def plain_table(title: str, left: Sequence[str], right: Sequence[str], closing: Sequence[str] = ()) -> Table:
    """Without lines; ``left`` and ``right`` say how the columns are aligned, the ``closing`` ones are to the left."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    for heading in closing:
        table.add_column(heading)
    return table


def cell_table(title: str, results: Sequence[CellResult]) -> Table:
    """One row per cell of one measurement: bnfused, then each peer."""
    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    of_peer = [[f"{name} ms", "of copy", f"{name}/bnfused", "25-75 %", "pairs"] for name in peers]
    table = plain_table(
        title,
        ["pass", "fusion"],
        ["moves MiB", "bnfused ms", "GB/s", "of copy", *(h for four in of_peer for h in four)],
    )
    for result in results:
        columns = []
        for name in peers:
            peer = result.peers.get(name, PeerResult(None, None, 0, None))
            few = " (few)" if peer.pairs < FEW_PAIRS else ""
            columns += [
                milliseconds(peer.ms),
                _percent(peer.copy_speed),
                ratio_text(peer.ratio),
                spread(peer.ratio),
                f"{peer.pairs}{few}",
            ]
        table.add_row(
            result.pass_name,
            FUSION_LABELS[result.fusion],
            mebibytes(result.bytes),
            milliseconds(result.ms),
            gigabytes(result.bandwidth(OURS)),
            _percent(result.copy_speed),
            *columns,
        )
    return table


@dataclass(frozen=True)
class GroupSummary:
    """A group of cells against one peer at one number of threads, beside its target."""

    peer: str
    group: tuple[str, str, str]
    threads: int
    count: int
    geomean: float
    worst: CellResult
    copy_speed: float | None
    target: Target

    @property
    def label(self) -> str:
        family, pass_name, fusion = self.group
        return f"{family}, {pass_name} {FUSION_LABELS[fusion]}"

    @property
    def worst_ratio(self) -> float:
        return _median(self.worst, self.peer)


def _median(result: CellResult, peer: str) -> float:
    ratio = result.ratio(peer)
    assert ratio is not None
    return ratio.median


def peers_of(results: Iterable[CellResult]) -> list[str]:
    """The peers that have a ratio, in the order of first appearance."""
    return list(dict.fromkeys(name for result in results for name, peer in result.peers.items() if peer.ratio))


def summarize(results: Sequence[CellResult]) -> list[GroupSummary]:
    """Geometric mean and worst cell of every group, peer by peer, in the order of first appearance.

    Cells without a ratio are left out. ``copy_speed`` is the geometric mean of bnfused's.
    """
    summaries = []
    counts = sorted({result.threads for result in results})
    for peer in peers_of(results):
        measured = [result for result in results if result.ratio(peer) is not None]
        groups: dict[tuple[tuple[str, str, str], int], list[CellResult]] = {}
        for group in dict.fromkeys(result.cell.group for result in measured):
            for threads in counts:  # side by side in the table
                groups[group, threads] = []
        for result in measured:
            groups[result.cell.group, result.threads].append(result)
        for (group, threads), members in groups.items():
            if not members:
                continue
            speeds = [member.copy_speed for member in members if member.copy_speed]
            summaries.append(
                GroupSummary(
                    peer,
                    group,
                    threads,
                    len(members),
                    geometric_mean(_median(member, peer) for member in members),
                    min(members, key=lambda member: _median(member, peer)),
                    geometric_mean(speeds) if speeds else None,
                    target(group, threads) if peer == "torch" else Target(),
                )
            )
    return summaries


def _against(value: float, goal: float | None) -> str:
    """``value`` coloured by whether it reaches ``goal``."""
    text = f"{value:.2f}x"
    if goal is None:
        return text
    return f"[green]{text}[/]" if value >= goal else f"[red]{text} <[/]"


def summary_table(summaries: Sequence[GroupSummary]) -> Table:
    """One row per peer and group; ``<`` marks what is below its target."""
    targets = any(summary.target != Target() for summary in summaries)
    table = plain_table(
        "Time of the peer over time of bnfused, by group"
        + (" ('<': below target, set on a 2-core AVX-512 CPU)" if targets else ""),
        ["peer", "group"],
        [
            "T",
            "cells",
            "of copy",
            "geomean",
            *(["target"] if targets else []),
            "worst",
            *(["floor"] if targets else []),
        ],
        ["worst cell"],
    )
    for summary in summaries:
        goal = summary.target
        table.add_row(
            summary.peer,
            summary.label,
            str(summary.threads or ""),
            str(summary.count),
            _percent(summary.copy_speed),
            _against(summary.geomean, goal.geomean),
            *([f"{goal.geomean:g}" if goal.geomean else ""] if targets else []),
            _against(summary.worst_ratio, goal.floor),
            *([f"{goal.floor:g}" if goal.floor else ""] if targets else []),
            summary.worst.configuration,
        )
    return table


def closing_lines(results: Sequence[CellResult]) -> list[str]:
    """For each peer, all its cells and the worst of them. Peers are not mixed: a fast one must not hide a slow one."""
    lines = []
    for peer in peers_of(results):
        measured = [result for result in results if result.ratio(peer) is not None]
        worst = min(measured, key=lambda result: _median(result, peer))
        ratios = [_median(result, peer) for result in measured]
        lines.append(
            f"{peer}, all {len(ratios)} cells: geometric mean {geometric_mean(ratios):.2f}, "
            f"worst {min(ratios):.2f}: {worst.cell.name}"
        )
    return lines


def saved_table(results: Sequence[CellResult]) -> Table | None:
    """What a graph keeps, in activations (the size of x), by dtype, fusion and implementation; None where unknown.

    A range where tensors differ: what belongs to channels weighs more in a small one.
    """
    groups: dict[tuple[str, str, str], list[list[float]]] = {}
    for result in results:
        activation = math.prod(result.shape) * DTYPE_BYTES[result.dtype]
        for name, saved in result.saved.items():
            groups.setdefault((result.dtype, result.fusion, name), []).append(
                [part / activation for part in (*saved, saved.total)]
            )
    if not groups:
        return None
    table = plain_table(
        "Memory kept for the backward by one layer (its peak, at the end of the forward), in sizes of x",
        ["dtype", "fusion", "implementation"],
        ["inputs", "output", "other", "in all"],
    )
    for (dtype, fusion, name), parts in groups.items():
        table.add_row(dtype, FUSION_LABELS[fusion], name, *(_range(values) for values in zip(*parts, strict=True)))
    return table


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low}-{high}"


# --- comparison of two runs ---


@dataclass(frozen=True)
class Change:
    """A cell against one peer in two runs: ``factor`` above 1 where the second run's bnfused gained on the peer.

    Each run's ratio is to the peer in the same rounds, so that a faster or busier machine cancels. The noise band is
    the quartiles of those ratios: it is wider than the uncertainty of their median, because two runs differ by more
    than their samples do (where the tensors lie, what else the machine does).
    """

    cell: Cell
    peer: str
    before: Band
    after: Band
    pairs: int

    @property
    def factor(self) -> float:
        return self.after.median / self.before.median

    @property
    def verdict(self) -> str:
        """Within noise where the bands touch, or stand on few pairs (``pairs``, of the run that has fewer)."""
        if self.pairs >= FEW_PAIRS:
            if self.after.low > self.before.high:
                return "faster"
            if self.after.high < self.before.low:
                return "slower"
        return "within noise"


VERDICT_STYLES = {"faster": "green", "slower": "red", "within noise": ""}


def compare(before: Run[CellResult], after: Run[CellResult]) -> list[Change]:
    """The cells and peers that both runs have, in the order of the first, by name."""
    later = {result.cell: result for result in after.results}
    changes = []
    for result in before.results:
        for name, peer in result.peers.items():
            other = later[result.cell].peers.get(name) if result.cell in later else None
            if other is not None and peer.ratio is not None and other.ratio is not None:
                changes.append(Change(result.cell, name, peer.ratio, other.ratio, min(peer.pairs, other.pairs)))
    return changes


def comparison_tables(changes: Sequence[Change]) -> tuple[Table, Table]:
    """(cell by cell, by group)."""
    cells = plain_table(
        "Time of the peer over time of bnfused in both runs; change > 1: the second is better",
        ["cell", "peer"],
        ["first", "25-75 %", "second", "25-75 %", "change"],
        ["verdict"],
    )
    for change in changes:
        cells.add_row(
            change.cell.name,
            change.peer,
            ratio_text(change.before),
            spread(change.before),
            ratio_text(change.after),
            spread(change.after),
            f"{change.factor:.2f}",
            change.verdict,
            style=VERDICT_STYLES[change.verdict],
        )
    by_group: dict[tuple[str, tuple[str, str, str], int], list[Change]] = {}
    for change in changes:
        by_group.setdefault((change.peer, change.cell.group, change.cell.threads), []).append(change)
    groups = plain_table(
        "By group", ["peer", "group"], ["T", "cells", "change (geomean)", "worst", "best", *VERDICT_STYLES]
    )
    for (peer, (family, pass_name, fusion), threads), members in by_group.items():
        factors = [change.factor for change in members]
        groups.add_row(
            peer,
            f"{family}, {pass_name} {FUSION_LABELS[fusion]}",
            str(threads or ""),
            str(len(factors)),
            f"{geometric_mean(factors):.2f}",
            f"{min(factors):.2f}",
            f"{max(factors):.2f}",
            *(str(sum(change.verdict == verdict for change in members)) for verdict in VERDICT_STYLES),
        )
    return cells, groups


def comparison_line(changes: Sequence[Change]) -> str:
    """The whole comparison in one line."""
    counts = [f"{sum(c.verdict == verdict for c in changes)} {verdict}" for verdict in VERDICT_STYLES]
    mean = geometric_mean(change.factor for change in changes)
    return f"{len(changes)} cells: {', '.join(counts)}; geometric mean of the change {mean:.3f}"
