"""What the benchmarks print: tables, and the comparison of two runs. pictures.py draws them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.cases import DTYPE_BYTES, FUSION_LABELS, Cell, Target, target
from benchmarks.peers import OURS
from benchmarks.results import CellResult, PeerResult, Run
from benchmarks.timing import Band, band, geometric_mean, paired_ratios

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
    for headings, justify in ((left, "left"), (right, "right"), (closing, "left")):
        for heading in headings:
            table.add_column(heading, justify=justify)
    return table


def pairs_text(count: int) -> str:
    return f"{count} (few)" if count < FEW_PAIRS else str(count)


PAIRED_COLUMNS = ("torch ms", "bnfused ms", "torch/bnfused", "25-75 %", "pairs")


def paired_columns(theirs: Sequence[float | None], ours: Sequence[float | None]) -> list[str]:
    """The median times of torch and bnfused in seconds, and the ratios round by round, for PAIRED_COLUMNS."""
    ratios = paired_ratios(theirs, ours)
    times = (milliseconds(band([1e3 * s for s in samples if s is not None])) for samples in (theirs, ours))
    return [*times, ratio_text(band(ratios)), spread(band(ratios)), str(len(ratios))]


def cell_table(title: str, results: Sequence[CellResult]) -> Table:
    """One row per cell of one measurement: bnfused, then each peer."""
    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    of_peer = [h for name in peers for h in (f"{name} ms", "of copy", f"{name}/bnfused", "25-75 %", "pairs")]
    table = plain_table(title, ["pass", "fusion"], ["moves MiB", "bnfused ms", "GB/s", "of copy", *of_peer])
    for result in results:
        texts = [result.pass_name, FUSION_LABELS[result.fusion], mebibytes(result.bytes), milliseconds(result.ms)]
        texts += [gigabytes(result.bandwidth(OURS)), _percent(result.copy_speed)]
        for name in peers:
            peer = result.peers.get(name, PeerResult(None, None, 0, None))
            texts += [milliseconds(peer.ms), _percent(peer.copy_speed), ratio_text(peer.ratio), spread(peer.ratio)]
            texts.append(pairs_text(peer.pairs))
        table.add_row(*texts)
    return table


Group = tuple[str, str, str]


def group_label(group: Group) -> str:
    family, pass_name, fusion = group
    return f"{family}, {pass_name} {FUSION_LABELS[fusion]}"


class GroupSummary(NamedTuple):
    """A group of cells against one peer at one number of threads, with its target."""

    peer: str
    group: Group
    threads: int
    members: Sequence[CellResult]
    geomean: float
    worst: CellResult
    copy_speed: float | None
    target: Target

    @property
    def label(self) -> str:
        return group_label(self.group)

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
        groups = dict.fromkeys(result.cell.group for result in measured)
        for group, threads in itertools.product(groups, counts):  # numbers of threads side by side in the table
            members = [result for result in measured if (result.cell.group, result.threads) == (group, threads)]
            if not members:
                continue
            worst = min(members, key=lambda member: _median(member, peer))
            geomean = geometric_mean(_median(member, peer) for member in members)
            speeds = [member.copy_speed for member in members if member.copy_speed]
            speed = geometric_mean(speeds) if speeds else None
            goal = target(group, threads) if peer == "torch" else Target()
            summaries.append(GroupSummary(peer, group, threads, members, geomean, worst, speed, goal))
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
    title = "Time of the peer over time of bnfused, by group"
    numbers = ["T", "cells", "of copy", "geomean", "worst"]
    if targets:
        title += " ('<': below target, set on a 2-core AVX-512 CPU)"
        numbers = [*numbers[:4], "target", "worst", "floor"]
    table = plain_table(title, ["peer", "group"], numbers, ["worst cell"])
    for summary in summaries:
        goals = [f"{goal:g}" if goal else "" for goal in (summary.target.geomean, summary.target.floor)]
        table.add_row(
            *(summary.peer, summary.label, str(summary.threads or ""), str(len(summary.members))),
            *(_percent(summary.copy_speed), _against(summary.geomean, summary.target.geomean), *goals[: int(targets)]),
            *(_against(summary.worst_ratio, summary.target.floor), *goals[1:][: int(targets)]),
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
            parts = [part / activation for part in (*saved, saved.total)]
            groups.setdefault((result.dtype, result.fusion, name), []).append(parts)
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


class Change(NamedTuple):
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
        runs = (text for band in (change.before, change.after) for text in (ratio_text(band), spread(band)))
        texts = [change.cell.name, change.peer, *runs, f"{change.factor:.2f}", change.verdict]
        cells.add_row(*texts, style=VERDICT_STYLES[change.verdict])
    by_group: dict[tuple[str, Group, int], list[Change]] = {}
    for change in changes:
        by_group.setdefault((change.peer, change.cell.group, change.cell.threads), []).append(change)
    headings = ["T", "cells", "change (geomean)", "worst", "best", *VERDICT_STYLES]
    groups = plain_table("By group", ["peer", "group"], headings)
    for (peer, group, threads), members in by_group.items():
        factors = [change.factor for change in members]
        shown = (f"{factor:.2f}" for factor in (geometric_mean(factors), min(factors), max(factors)))
        verdicts = (str(sum(change.verdict == verdict for change in members)) for verdict in VERDICT_STYLES)
        groups.add_row(peer, group_label(group), str(threads or ""), str(len(factors)), *shown, *verdicts)
    return cells, groups


def comparison_line(changes: Sequence[Change]) -> str:
    """The whole comparison in one line."""
    counts = [f"{sum(c.verdict == verdict for c in changes)} {verdict}" for verdict in VERDICT_STYLES]
    mean = geometric_mean(change.factor for change in changes)
    return f"{len(changes)} cells: {', '.join(counts)}; geometric mean of the change {mean:.3f}"
