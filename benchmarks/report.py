"""What the benchmarks say: results as JSON, tables, a picture, and the comparison of two runs."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import bnfused
from benchmarks.cases import FUSION_LABELS, Cell, Target, target
from benchmarks.timing import Band, geometric_mean

FORMAT = 1
FEW_PAIRS = 5


def make_console() -> Console:
    """A console that does not squeeze tables to 80 columns in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 150, highlight=False)


@dataclass(frozen=True)
class CellResult:
    """Times in ms and paired ratios of one cell, each as (lower quartile, median, upper quartile).

    ``ratio`` is torch's time over bnfused's, above 1 where bnfused is faster. ``copy_speed`` is the
    bandwidth reached over that of a copy, counting the least traffic ``bytes``. A chain's times are
    net of producer and consumer. None stands where no sample counted.
    """

    configuration: str
    family: str
    pass_name: str
    fusion: str
    threads: int
    pairs: int
    bytes: int
    ratio: Band | None
    torch_ms: Band | None
    bnfused_ms: Band | None
    copy_ms: Band | None
    copy_speed_torch: float | None
    copy_speed_bnfused: float | None

    @property
    def cell(self) -> Cell:
        return Cell(self.configuration, self.family, self.pass_name, self.fusion, self.threads)


@dataclass
class Run:
    """One run of the benchmark: where, how, and what came out."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[CellResult]
    interrupted: bool = False

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Raises ValueError where ``text`` is not a run of this format."""
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            got = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"expected benchmark results of format {FORMAT}, got {got!r}")
        bands = ("ratio", "torch_ms", "bnfused_ms", "copy_ms")
        results = [
            CellResult(
                **{key: Band(*value) if key in bands and value is not None else value for key, value in row.items()}
            )
            for row in raw["results"]
        ]
        return cls(raw["environment"], raw["settings"], results, raw["interrupted"])

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json())

    @classmethod
    def read(cls, path: Path) -> Run:
        try:
            return cls.from_json(path.read_text())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error


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
    git = ["git", "-C", str(root)]
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


def describe_environment() -> dict[str, Any]:
    """What a reader needs to judge numbers: versions, machine, commit, date."""
    return {
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
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def backend_line() -> str:
    """Which code ``bnfused`` runs in this process, in one line."""
    if bnfused.is_available():
        build = bnfused.build_info()
        shown = ", ".join(f"{key} {value}" for key, value in build.items() if value is not None)
        return f"bnfused {bnfused.__version__}, compiled extension ({shown})"
    return f"bnfused {bnfused.__version__}, REFERENCE PATH in plain torch, not the kernels: {bnfused.why_unavailable()}"


def print_environment(console: Console, environment: Mapping[str, Any]) -> None:
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


def _spread(value: Band | None) -> str:
    return "-" if value is None else f"{value.low:.2f}-{value.high:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def cell_table(title: str, results: Sequence[CellResult]) -> Table:
    """One row per cell."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("pass")
    table.add_column("fusion")
    for heading in (
        "torch ms",
        "bnfused ms",
        "torch/bnfused",
        "25-75 %",
        "pairs",
        "of copy speed: torch",
        "bnfused",
    ):
        table.add_column(heading, justify="right")
    for result in results:
        few = result.pairs < FEW_PAIRS
        table.add_row(
            result.pass_name,
            FUSION_LABELS[result.fusion],
            milliseconds(result.torch_ms),
            milliseconds(result.bnfused_ms),
            ratio_text(result.ratio),
            _spread(result.ratio),
            f"{result.pairs}{' (few)' if few else ''}",
            _percent(result.copy_speed_torch),
            _percent(result.copy_speed_bnfused),
        )
    return table


@dataclass(frozen=True)
class GroupSummary:
    """A group of cells at one number of threads, beside its target."""

    group: tuple[str, str, str]
    threads: int
    count: int
    geomean: float
    worst: CellResult
    target: Target

    @property
    def label(self) -> str:
        family, pass_name, fusion = self.group
        return f"{family}, {pass_name} {FUSION_LABELS[fusion]}"

    @property
    def worst_ratio(self) -> float:
        assert self.worst.ratio is not None
        return self.worst.ratio.median


def summarize(results: Iterable[CellResult]) -> list[GroupSummary]:
    """Geometric mean and worst cell of every group, in the order of first appearance.

    Cells without a ratio are left out.
    """
    groups: dict[tuple[tuple[str, str, str], int], list[CellResult]] = {}
    measured = [result for result in results if result.ratio is not None]
    counts = sorted({result.threads for result in measured})
    for group in dict.fromkeys(result.cell.group for result in measured):
        for threads in counts:  # side by side in the table
            groups[group, threads] = []
    for result in measured:
        groups[result.cell.group, result.threads].append(result)
    return [
        GroupSummary(
            group,
            threads,
            len(members),
            geometric_mean(member.ratio.median for member in members if member.ratio),
            min(members, key=lambda member: member.ratio.median if member.ratio else 0.0),
            target(group, threads),
        )
        for (group, threads), members in groups.items()
        if members
    ]


def _against(value: float, goal: float | None) -> str:
    """``value`` coloured by whether it reaches ``goal``."""
    text = f"{value:.2f}x"
    if goal is None:
        return text
    return f"[green]{text}[/]" if value >= goal else f"[red]{text} <[/]"


def summary_table(summaries: Sequence[GroupSummary]) -> Table:
    """One row per group; ``<`` marks what is below its target."""
    table = Table(
        title="Speed-up over eager torch by group ('<': below target, set on a 2-core AVX-512 CPU)",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("group")
    for heading in ("T", "cells", "geomean", "target", "worst", "floor"):
        table.add_column(heading, justify="right")
    table.add_column("worst cell")
    for summary in summaries:
        goal = summary.target
        table.add_row(
            summary.label,
            str(summary.threads),
            str(summary.count),
            _against(summary.geomean, goal.geomean),
            f"{goal.geomean:g}" if goal.geomean else "",
            _against(summary.worst_ratio, goal.floor),
            f"{goal.floor:g}" if goal.floor else "",
            summary.worst.configuration,
        )
    return table


# --- comparison of two runs ---


@dataclass(frozen=True)
class Change:
    """A cell in two runs: ``factor`` above 1 where the second run's bnfused gained on torch.

    Each run's ratio is to torch in the same rounds, so that a faster or busier machine cancels. ``clear`` says that
    the quartile bands of the two ratios do not touch, and stand on enough pairs (``pairs``, of the run that has fewer):
    less than that is noise.
    """

    cell: Cell
    before: Band
    after: Band
    pairs: int

    @property
    def factor(self) -> float:
        return self.after.median / self.before.median

    @property
    def clear(self) -> bool:
        apart = self.after.low > self.before.high or self.after.high < self.before.low
        return apart and self.pairs >= FEW_PAIRS


def compare(before: Run, after: Run) -> list[Change]:
    """The cells that both runs have, in the order of the first, by name."""
    later = {result.cell: result for result in after.results if result.ratio is not None}
    changes = []
    for result in before.results:
        other = later.get(result.cell)
        if result.ratio is not None and other is not None and other.ratio is not None:
            changes.append(Change(result.cell, result.ratio, other.ratio, min(result.pairs, other.pairs)))
    return changes


def comparison_tables(changes: Sequence[Change]) -> tuple[Table, Table]:
    """(cell by cell, by group)."""
    cells = Table(
        title="torch/bnfused in both runs; change > 1: the second is better; '*': beyond the noise",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    cells.add_column("cell")
    for heading in ("first", "25-75 %", "second", "25-75 %", "change"):
        cells.add_column(heading, justify="right")
    for change in changes:
        style = "" if not change.clear else "green" if change.factor > 1 else "red"
        cells.add_row(
            change.cell.name,
            ratio_text(change.before),
            _spread(change.before),
            ratio_text(change.after),
            _spread(change.after),
            f"{change.factor:.2f}{'*' if change.clear else ' '}",
            style=style,
        )
    by_group: dict[tuple[tuple[str, str, str], int], list[float]] = {}
    for change in changes:
        key = (change.cell.group, change.cell.threads)
        by_group.setdefault(key, []).append(change.factor)
    groups = Table(title="By group", title_justify="left", title_style="bold", box=None, pad_edge=False)
    groups.add_column("group")
    for heading in ("T", "cells", "change (geomean)", "worst", "best"):
        groups.add_column(heading, justify="right")
    for ((family, pass_name, fusion), threads), factors in by_group.items():
        groups.add_row(
            f"{family}, {pass_name} {FUSION_LABELS[fusion]}",
            str(threads),
            str(len(factors)),
            f"{geometric_mean(factors):.2f}",
            f"{min(factors):.2f}",
            f"{max(factors):.2f}",
        )
    return cells, groups


# --- picture ---


def save_picture(run: Run, path: Path) -> None:
    """Every cell's ratio as a dot with its noise band, a row per group, targets as ticks.

    Raises:
        ValueError: no cell has a ratio.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summaries = summarize(run.results)
    if not summaries:
        raise ValueError("save_picture: expected at least one cell with a ratio, got none")
    labels = list(dict.fromkeys(summary.label for summary in summaries))
    rows = {label: row for row, label in enumerate(labels)}
    threads = sorted({summary.threads for summary in summaries})
    colours = {count: f"C{index}" for index, count in enumerate(threads)}
    offset = {count: 0.5 * ((index + 0.5) / len(threads) - 0.5) for index, count in enumerate(threads)}
    figure, axes = pyplot.subplots(figsize=(11, 1.8 + 0.36 * len(labels)), layout="constrained")
    for summary in summaries:
        y = rows[summary.label] + offset[summary.threads]
        bands = [
            result.ratio
            for result in run.results
            if result.ratio is not None and result.cell.group == summary.group and result.threads == summary.threads
        ]
        colour = colours[summary.threads]
        axes.hlines([y] * len(bands), [b.low for b in bands], [b.high for b in bands], colour, alpha=0.25)
        axes.plot([b.median for b in bands], [y] * len(bands), "o", ms=3.5, c=colour, alpha=0.6)
        axes.plot(summary.geomean, y, "D", ms=6, c=colour, mec="black", mew=0.8)
        for goal, style in ((summary.target.floor, ":"), (summary.target.geomean, "-")):
            if goal:
                axes.vlines(goal, y - 0.2, y + 0.2, "black", linestyles=style, lw=1.2)
    axes.axvline(1.0, color="grey", lw=1)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 10, 20, 50, 100]
    low, high = axes.get_xlim()
    ticks = [tick for tick in ticks if low <= tick <= high] or [1]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    for count in threads:
        axes.plot([], [], "D", c=colours[count], mec="black", label=f"geometric mean, T={count}")
    axes.plot([], [], "o", ms=3.5, c="grey", label="cell (bar: quartiles)")
    axes.vlines([], [], [], "black", linestyles="-", label="target, geometric mean")
    axes.vlines([], [], [], "black", linestyles=":", label="target, worst cell")
    figure.legend(fontsize=8, loc="outside lower center", ncols=5)
    axes.set_xlabel("time of eager torch / time of bnfused (right of 1x: bnfused is faster)")
    environment = run.environment
    code = "" if environment["bnfused_extension"] else ", REFERENCE PATH (extension not built)"
    axes.set_title(
        f"{environment['cpu']}, torch {environment['torch']}, bnfused {environment['bnfused']} "
        f"(commit {environment['commit'] or 'unknown'}){code}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
