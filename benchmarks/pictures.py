"""What the benchmarks draw. matplotlib is needed only where a picture is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.cases import FUSION_LABELS, SWEEPS
from benchmarks.peers import OURS, PEERS
from benchmarks.report import peers_of, summarize
from benchmarks.results import CellResult, NetworkResult, Run
from benchmarks.timing import COPY, geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {OURS: "black", **{peer: f"C{index}" for index, peer in enumerate(PEERS)}}
RATIO_TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 10, 20, 50, 100)


def subplots(*arguments: Any, **options: Any) -> tuple[Figure, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*arguments, layout="constrained", **options)
    return figure, axes


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)


def title(environment: Mapping[str, Any]) -> str:
    """Where the numbers are from."""
    cuda = f", CUDA {environment['cuda']}" if "cuda" in environment else ""
    code = "" if environment["bnfused_extension"] else ", REFERENCE PATH (extension not built)"
    return (
        f"{environment['device']}, torch {environment['torch']}{cuda}, bnfused {environment['bnfused']} "
        f"(commit {environment['commit'] or 'unknown'}){code}, {environment['date'][:10]}"
    )


def ratio_axis(axes: Axes) -> None:
    """A logarithmic x axis of ratios, with a line at 1."""
    axes.axvline(1.0, color="grey", lw=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in RATIO_TICKS if low <= tick <= high] or [1]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)


class Curve(NamedTuple):
    """Ratios to a peer against megabytes."""

    name: str
    points: Sequence[tuple[float, float]]


def save_predictions(curves: Mapping[str, Sequence[Curve]], title: str, path: Path) -> None:
    """Ratios that a model predicts, against the size of the activation: axes for each fusion."""
    figure, every = subplots(1, len(curves), sharey=True, figsize=(13, 4.5))
    for axes, (fusion, of_fusion) in zip(every, curves.items(), strict=True):
        for index, curve in enumerate(of_fusion):  # pairs of layouts
            style = {"ls": "--" if index % 2 else "-", "c": f"C{index // 2}", "label": curve.name}
            axes.plot(*zip(*curve.points, strict=True), **style)
        axes.set_xscale("log")
        axes.set_title(fusion)
        axes.set_xlabel("size of the activation, MB")
        axes.grid(alpha=0.3)
    every[0].set_ylabel("predicted time of torch / of bnfused")
    every[0].set_ylim(bottom=0)
    every[-1].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def save_ratios(run: Run[CellResult], path: Path) -> None:
    """A row per group: left the ratio to each peer, with targets as ticks; right the fraction of the copy's speed.

    Dots are cells, bars their quartiles, diamonds geometric means.

    Raises:
        ValueError: no cell has a ratio.
    """
    summaries = summarize(run.results)
    if not summaries:
        raise ValueError("save_ratios: expected at least one cell with a ratio, got none")
    labels = list(dict.fromkeys(summary.label for summary in summaries))
    names = [OURS, *peers_of(run.results)]
    threads = sorted({summary.threads for summary in summaries})
    series = [(name, count) for name in names for count in threads]
    height = 1.8 + len(labels) * max(0.36, 0.1 * len(series))
    figure, (left, right) = subplots(1, 2, sharey=True, figsize=(15, height), width_ratios=(3, 2))

    def row(summary: Any, name: str) -> float:
        """Where ``name`` has its dots in the row of a group."""
        position = series.index((name, summary.threads))
        return labels.index(summary.label) + 0.8 * ((position + 0.5) / len(series) - 0.5)

    def dots(axes: Axes, values: Sequence[float], y: float, name: str, count: int) -> None:
        if values:
            style = {"c": COLOURS[name], "mfc": COLOURS[name] if count == threads[-1] else "white"}
            axes.plot(values, [y] * len(values), "o", ms=3.5, alpha=0.6, **style)
            axes.plot(geometric_mean(values), y, "D", ms=5.5, c=COLOURS[name], mfc=style["mfc"], mec=COLOURS[name])

    for summary in summaries:
        members = [r for r in run.results if r.cell.group == summary.group and r.threads == summary.threads]
        y = row(summary, summary.peer)
        bands = [band for r in members if (band := r.ratio(summary.peer)) is not None]
        lows, highs = [b.low for b in bands], [b.high for b in bands]
        left.hlines([y] * len(bands), lows, highs, COLOURS[summary.peer], alpha=0.25)
        dots(left, [b.median for b in bands], y, summary.peer, summary.threads)
        for goal, style in ((summary.target.floor, ":"), (summary.target.geomean, "-")):
            if goal:
                left.vlines(goal, y - 0.2, y + 0.2, "black", linestyles=style, lw=1.2)
        for name in (summary.peer, *([OURS] if summary.peer == names[1] else [])):
            speeds = [speed for r in members if (speed := r.speed(name))]
            dots(right, speeds, row(summary, name), name, summary.threads)
    ratio_axis(left)
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.set_ylim(len(labels) - 0.5, -0.5)
    left.set_xlabel("time of the peer / time of bnfused (right of 1x: bnfused is faster)")
    right.axvline(1.0, color="grey", lw=1)
    right.set_xlim(left=0)
    right.grid(axis="x", alpha=0.3)
    right.set_xlabel("bandwidth / that of a copy (every tensor counted once)")
    for name, count in series:
        filled = COLOURS[name] if count == threads[-1] else "white"
        suffix = f", T={count}" if count else ""
        right.plot([], [], "D", c=COLOURS[name], mfc=filled, mec=COLOURS[name], label=f"{name}{suffix}")
    right.plot([], [], "o", ms=3.5, c="grey", label="a cell (bar: quartiles)")
    if any(summary.target.geomean for summary in summaries):
        right.vlines([], [], [], "black", linestyles="-", label="target, geometric mean")
        right.vlines([], [], [], "black", linestyles=":", label="target, worst cell")
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(series) + 3)
    figure.suptitle(title(run.environment) + "; diamonds: geometric means", fontsize=9)
    save(figure, path)


SWEEP_AXES = {
    "batch": ("batch size N of (N, {1}, {2}, {3})", 0),
    "channels": ("channels C of ({0}, C, {2}, {3})", 1),
    "spatial": ("height and width S of ({0}, {1}, S, S)", 2),
    "threads": ("threads, x of ({0}, {1}, {2}, {3})", None),
}
SWEEP_PANELS = list(itertools.product(("NCHW", "channels_last"), ("forward", "forward+backward")))


def save_sweeps(run: Run[CellResult], path: Path) -> None:
    """Bandwidth against size, a row per sweep, under two roofs: a copy of the same tensor, and of one in no cache.

    Raises:
        ValueError: no sweep was measured.
    """
    swept = {name: [r for r in run.results if r.family.startswith(f"{name} sweep")] for name in SWEEPS}
    swept = {name: found for name, found in swept.items() if found}
    if not swept:
        raise ValueError("save_sweeps: expected results of a sweep, got none")
    shape, size = (len(swept), len(SWEEP_PANELS)), (17, 1.2 + 3.6 * len(swept))
    figure, grid = subplots(*shape, figsize=size, squeeze=False, sharey="row")
    for (sweep, results), row in zip(swept.items(), grid, strict=True):
        for (layout, pass_name), axes in zip(SWEEP_PANELS, row, strict=True):
            draw_sweep(axes, run, sweep, [r for r in results if (r.layout, r.pass_name) == (layout, pass_name)])
            axes.set_title(f"{pass_name}, {layout}", fontsize=10)
        row[0].set_ylabel("GB/s, every tensor counted once")
    legends = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat)
    entries = {label: handle for legend in legends for handle, label in legend}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(title(run.environment) + f"; {run.results[0].dtype}", fontsize=10)
    save(figure, path)


def draw_sweep(axes: Axes, run: Run[CellResult], sweep: str, results: Sequence[CellResult]) -> None:
    label, dimension = SWEEP_AXES[sweep]

    def position(result: CellResult) -> int:
        return result.threads if dimension is None else result.shape[dimension]

    def line(name: str, some: Sequence[CellResult], **style: Any) -> None:
        points = sorted((position(r), speed / 1e9) for r in some if (speed := r.bandwidth(name)))
        if points:
            axes.plot(*zip(*points, strict=True), **style)

    fusions = dict.fromkeys(result.fusion for result in results)
    if not results:
        return
    first = [r for r in results if r.fusion == next(iter(fusions))]
    line(COPY, first, c="C7", lw=3, alpha=0.5, label="roof: a copy of x")
    roofs = sorted((position(r), run.roof.get(r.threads)) for r in results)
    known = [(x, roof / 1e9) for x, roof in roofs if roof]
    if known:
        style = {"c": "C3", "ls": "--", "lw": 1.2, "marker": ".", "label": "roof: a copy that no cache holds"}
        axes.plot(*zip(*known, strict=True), **style)
    for name in (OURS, *peers_of(results)):
        for fusion, ls in zip(fusions, ("-", ":"), strict=False):
            style = {"c": COLOURS[name], "ls": ls, "marker": "o", "ms": 3, "label": f"{name}, {FUSION_LABELS[fusion]}"}
            line(name, [r for r in results if r.fusion == fusion], **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    positions = sorted({position(result) for result in results})
    axes.set_xticks(positions, [str(x) for x in positions], fontsize=8)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [tick for tick in (m * 10**e for e in range(-2, 5) for m in (1, 2, 5)) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.grid(alpha=0.3)
    threads = f", T={results[0].threads}" if dimension is not None and results[0].threads else ""
    axes.set_xlabel(label.format(*results[0].shape) + threads, fontsize=9)


def save_networks(run: Run[NetworkResult], path: Path) -> None:
    """A column per network: images per second above, with the quartiles of a step's time, and peak memory below."""
    networks = list(dict.fromkeys(result.network for result in run.results))
    figure, (upper, lower) = subplots(2, len(networks), figsize=(2 + 4.5 * len(networks), 7.5), squeeze=False)
    for network, speed_axes, memory_axes in zip(networks, upper, lower, strict=True):
        results = [result for result in run.results if result.network == network]
        for offset, name in ((-0.2, "torch"), (0.2, OURS)):
            places = [place + offset for place in range(len(results))]
            style = {"width": 0.38, "color": COLOURS[name], "alpha": 0.8, "label": name}
            speeds = [result.images_per_second[name] or 0.0 for result in results]
            speed_axes.bar(places, speeds, **style)
            for place, result in zip(places, results, strict=True):
                if (ms := result.ms[name]) is not None:
                    speed_axes.vlines(place, 1e3 * result.batch / ms.high, 1e3 * result.batch / ms.low, "C3", lw=1.5)
            memory_axes.bar(places, [result.memory[name] / 2**20 for result in results], **style)
        for place, result in enumerate(results):
            fastest = max(result.images_per_second[name] or 0.0 for name in ("torch", OURS))
            if result.ratio is not None:
                speed_axes.text(place, 1.04 * fastest, f"{result.ratio.median:.2f}x", ha="center", fontsize=9)
            share = result.memory[OURS] / result.memory["torch"]
            largest = max(result.memory.values()) / 2**20
            memory_axes.text(place, 1.02 * largest, f"{share:.0%}", ha="center", fontsize=9)
        labels = [f"{result.dtype}\n{result.layout}\nbatch {result.batch}" for result in results]
        for axes in (speed_axes, memory_axes):
            axes.set_xticks(range(len(results)), labels, fontsize=8)
            axes.margins(y=0.12)
            axes.grid(axis="y", alpha=0.3)
        speed_axes.set_title(network, fontsize=10)
    upper[0].set_ylabel("training, images per second\n(red: quartiles; text: torch's time / bnfused's)")
    lower[0].set_ylabel("memory, MiB\n(text: bnfused's, of torch's)")
    figure.legend(*upper[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    size = run.settings["size"]
    figure.suptitle(f"{title(run.environment)}; images of {size}x{size}\nmemory: {run.settings['memory']}", fontsize=9)
    save(figure, path)
