"""The tables and figures of docs/why.md."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import save, subplots
from examples.why_networks import BATCH_NORM, MLP, NOISY, PLAIN, VARIANTS, VGG, Network
from examples.why_trainings import ACCURACIES, COMPARISONS, NEVER, Comparison, Results, Trace


def count(steps: float) -> str:
    return "never" if steps == NEVER else f"{steps:g}"


def speed_table(network: Network, results: Results) -> str:
    """The best rate is chosen for every accuracy by itself."""
    headings = [f"steps to {100 * wanted:.0f} %" for wanted in ACCURACIES]
    rows = [["", *headings, "speed-up at 95 %", "best rate for 95 %", "rates that train"]]
    baseline, _ = results.speeds[network.key, PLAIN].best(0.95)
    for variant in VARIANTS:
        speed = results.speeds[network.key, variant]
        steps, rate = speed.best(0.95)
        trains = speed.rates_that_train()
        rows.append(
            [
                variant.name,
                *(count(speed.best(wanted)[0]) for wanted in ACCURACIES),
                f"{baseline / steps:.1f}x" if steps < NEVER and baseline < NEVER else "-",
                f"{rate:g}" if steps < NEVER else "-",
                f"{trains[0]:g} to {trains[-1]:g} ({trains[-1] / trains[0]:.0f}x)" if trains else "none",
            ]
        )
    return markdown(rows)


def median_of(traces: Sequence[Trace], values: Callable[[Trace], Sequence[float]], learning: bool | None) -> float:
    """Over seeds and measured steps: those while learning, those after it, or (None) all. NaN if there are none."""
    chosen = [
        value
        for trace in traces
        for value, early in zip(values(trace), trace.learning(), strict=True)
        if learning is None or early == learning
    ]
    return statistics.median(chosen) if chosen else math.nan


def shift_table(results: Results) -> str:
    """Medians over layers, steps while learning, and seeds."""
    rows = [["", "", "rate", "\\|G - G'\\| / \\|G\\|", "cosine", "rate x beta", "last loss"]]
    for comparison in COMPARISONS.values():
        for variant, traces in results.of(comparison).items():
            shifts = [shift for one in traces for shift in one.shifts if shift.step < one.trained()]
            rate = comparison.rates[variant]
            numbers = (
                statistics.median(shift.distance / shift.gradient_norm for shift in shifts),
                statistics.median(shift.cosine for shift in shifts),
                rate * median_of(traces, lambda one: one.smoothnesses, True),
            )
            last = statistics.median(one.losses[-1] for one in traces)
            where = f"{comparison.network.title}: {comparison.title}"
            rows.append([where, variant.name, f"{rate:g}", *(f"{number:.2f}" for number in numbers), f"{last:.3f}"])
    return markdown(rows)


def network_rows(results: Results, columns: Callable[[Sequence[Trace]], Sequence[str]]) -> list[list[str]]:
    """A row for each variant of the two networks that are compared at one rate; ``columns`` says what stands in it."""
    return [
        [f"{comparison.network.title}, rate {comparison.rates[variant]:g}", variant.name, *columns(traces)]
        for comparison in (COMPARISONS["vgg"], COMPARISONS["mlp"])
        for variant, traces in results.of(comparison).items()
    ]


def drift_table(results: Results) -> str:
    """Medians over units, activations, all measured steps and seeds."""

    def columns(traces: Sequence[Trace]) -> list[str]:
        drifts = zip(*(drift for one in traces for drift in one.drifts), strict=True)
        medians = [f"{statistics.median(column):.4f}" for column in drifts]
        return [*medians, count(statistics.median(one.trained() for one in traces))]

    return markdown([["", "", "mean", "scale", "quantiles", "steps to 90 %"], *network_rows(results, columns)])


def landscape_table(results: Results) -> str:
    """Medians over seeds and steps, while learning / after it."""
    pairs = functools.partial(zip, strict=True)
    columns: dict[str, Callable[[Trace], Sequence[float]]] = {
        "loss variation": lambda one: [high - low for low, high in one.loss_ranges],
        "relative to the loss": lambda one: [(b - a) / loss for (a, b), loss in pairs(one.loss_ranges, one.losses)],
        "gradient change": lambda one: [high for _, high in one.change_ranges],
        "relative to \\|g\\|": lambda one: [b / g for (_, b), g in pairs(one.change_ranges, one.gradient_norms)],
        "beta": lambda one: one.smoothnesses,
    }

    def both(traces: Sequence[Trace], values: Callable[[Trace], Sequence[float]]) -> str:
        return " / ".join(f"{median_of(traces, values, learning):.2g}" for learning in (True, False))

    rows = network_rows(results, lambda traces: [both(traces, values) for values in columns.values()])
    return markdown([["", "", *columns], *rows])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def tables(results: Results) -> dict[str, str]:
    """Markdown, by the names that stand in the marks of ``docs/why.md``."""
    return {
        "speed vgg": speed_table(VGG, results),
        "speed mlp": speed_table(MLP, results),
        "shift": shift_table(results),
        "drift": drift_table(results),
        "landscape": landscape_table(results),
    }


def fill_in(text: str, filled: Mapping[str, str]) -> str:
    """``text`` with each table put between its marks, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: marks are missing.
    """
    for name, table in filled.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"expected {begin} and {end} in the page")
        text = f"{head}{begin}\n\n{table}\n\n{end}{tail}"
    return text


def speed_figure(results: Results) -> Any:
    """Steps to 95 % over the learning rate, and accuracies over steps at the best rate; a row for each network."""
    figure, rows = subplots(2, 2, figsize=(12, 9))
    for (left, right), network in zip(rows, (VGG, MLP), strict=True):
        limit = network.steps
        never = limit * 1.35
        for variant in VARIANTS:
            speed = results.speeds[network.key, variant]
            style = {"c": variant.colour, "ls": "--" if variant.torch_init else "-"}
            rates = list(speed.curves)
            values = [min(speed.steps_to(0.95, rate), never) for rate in rates]
            left.plot(rates, values, marker="o", ms=4, label=variant.name, **style)
            steps, rate = speed.best(0.95)
            if steps < NEVER:
                curve = speed.curves[rate][0]
                right.plot(curve.steps, curve.accuracies, label=f"{variant.name}, rate {rate:g}", **style)
        left.axhline(limit, c="grey", lw=0.8, ls=":")
        left.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="steps (batches of 64)")
        ticks = [tick for tick in (10, 20, 50, 100, 200, 500) if tick < limit]
        left.set_yticks([*ticks, never], [*map(str, ticks), "never"])
        left.minorticks_off()
        title = f"{network.title}\nsteps to 95 % test accuracy, median of the seeds (limit: {limit})"
        left.set_title(title, fontsize=10)
        right.axhline(0.95, c="grey", lw=0.8, ls=":")
        right.set(xscale="log", xlabel="step", ylabel="test accuracy", ylim=(0, 1.45))
        right.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        right.set_title(f"{network.title}\neach at its best rate, first seed, until 97 %", fontsize=10)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        if right.lines[:-1]:  # the last one is the limit
            right.legend(fontsize=8, loc="upper left")
    figure.legend(*rows[0][0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    return figure


def share_limits(row: Sequence[Any]) -> None:
    limits = [axes.get_ylim() for axes in row]
    for axes in row:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def caption(axes: Any, comparison: Comparison, x: float) -> None:
    """The name of a row of axes, left of its first."""
    text = f"{comparison.network.title}, rate {comparison.rates[PLAIN]:g}"
    axes.annotate(text, (x, 0.5), xycoords="axes fraction", rotation=90, va="center", ha="right")


def shift_figure(comparisons: Sequence[Comparison], results: Results) -> Any:
    """Distance and cosine of the gradients of every layer over training; a column for each comparison."""
    figure, grid = subplots(3, len(comparisons), figsize=(4.4 * len(comparisons), 9), squeeze=False)
    for column, comparison in zip(grid.T, comparisons, strict=True):
        for variant, heat in zip((PLAIN, BATCH_NORM), column[1:], strict=True):
            first = results.of(comparison)[variant][0]
            layers = first.layers()
            relative = [[shift.distance / shift.gradient_norm for shift in first.of_layer(layer)] for layer in layers]
            middle = [statistics.median(values) for values in zip(*relative, strict=True)]
            label = f"{variant.name}, rate {comparison.rates[variant]:g}"
            column[0].plot(first.steps, middle, c=variant.colour, label=label)
            low, high = [min(v) for v in zip(*relative, strict=True)], [max(v) for v in zip(*relative, strict=True)]
            column[0].fill_between(first.steps, low, high, color=variant.colour, alpha=0.15, lw=0)
            cosines = [[shift.cosine for shift in first.of_layer(layer)] for layer in layers]
            every = first.steps[1] - first.steps[0]
            extent = (first.steps[0] - every / 2, first.steps[-1] + every / 2, 1.5, len(layers) + 1.5)
            style = {"cmap": "RdBu", "vmin": -1, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
            image = heat.imshow(cosines, origin="lower", extent=extent, **style)
            heat.set_title(f"cosine of G and G': {label}", fontsize=9)
            heat.set_ylabel("layer (the first has no shift)")
        column[0].set_yscale("log")
        column[0].set_ylabel("|G - G'| / |G|")
        column[0].set_title(f"{comparison.title}: shift (line: median layer; band: all)", fontsize=9)
        column[0].legend(fontsize=8)
        column[0].grid(alpha=0.3)
        column[-1].set_xlabel("step")
    figure.colorbar(image, ax=grid[1:, -1], label="cosine: 1 same direction, -1 reversed")
    share_limits(grid[0])
    what = "a layer's gradient before (G) and after (G') the layers before it step (first seed)"
    figure.suptitle(f"{comparisons[0].network.title}: {what}", fontsize=11)
    return figure


def drift_figure(results: Results) -> Any:
    """The input of one unit over training, and how far all units' inputs move in one step; a row for each network."""
    shown = (PLAIN, BATCH_NORM, NOISY)
    figure, rows = subplots(2, 4, figsize=(16, 7.5))
    for row, key in zip(rows, ("vgg", "mlp"), strict=True):
        comparison = COMPARISONS[key]
        for axes, variant in zip(row, shown, strict=False):
            traces = results.of(comparison)[variant]
            low, middle, high = zip(*traces[0].unit, strict=True)
            axes.fill_between(traces[0].steps, low, high, color=variant.colour, alpha=0.25, lw=0, label="15 % to 85 %")
            axes.plot(traces[0].steps, middle, c=variant.colour, label="median")
            axes.set(xlabel="step", ylabel="input of the activation")
            axes.set_title(f"{variant.name}\none unit of the last hidden layer", fontsize=9)
            moved = [statistics.median(v) for v in zip(*([d[2] for d in t.drifts] for t in traces), strict=True)]
            row[3].plot(traces[0].steps[: len(moved)], moved, c=variant.colour, label=variant.name)
        row[3].set(yscale="log", xlabel="step", ylabel="standard deviations")
        row[3].set_title("shift of the quantiles in one step,\nmedian of all hidden units", fontsize=9)
        low, high = row[3].get_ylim()
        row[3].set_ylim(low / 4, high)  # room for the legend
        row[3].legend(fontsize=8, loc="lower left")
        share_limits(row[:3])
        row[0].legend(fontsize=8, loc="lower right")
        for axes in row:
            axes.grid(alpha=0.3)
        caption(row[0], comparison, -0.22)
    return figure


def landscape_figure(results: Results) -> Any:
    """Loss variation, gradient predictiveness and effective smoothness over training; a row for each network."""
    figure, rows = subplots(2, 4, figsize=(17, 8))
    for row, key in zip(rows, ("vgg", "mlp"), strict=True):
        comparison = COMPARISONS[key]
        rate = comparison.rates[PLAIN]
        for variant, traces in results.of(comparison).items():
            steps, style = traces[0].steps, {"color": variant.colour, "alpha": 0.25, "lw": 0}

            def middle(values: Callable[[Trace], Sequence[float]], traces: Sequence[Trace] = traces) -> list[float]:
                return [statistics.median(at) for at in zip(*map(values, traces), strict=True)]

            for axes, kind in zip(row, ("loss_ranges", "change_ranges"), strict=False):
                low, high = (middle(lambda t, k=kind, i=i: [r[i] for r in getattr(t, k)]) for i in (0, 1))
                axes.fill_between(steps, low, high, label=variant.name, **style)
            row[0].plot(steps, middle(lambda t: t.losses), c=variant.colour, lw=1)
            parts = middle(lambda t: [b / n for (_, b), n in zip(t.change_ranges, t.gradient_norms, strict=True)])
            row[2].plot(steps, parts, c=variant.colour, label=variant.name)
            row[3].plot(steps, middle(lambda t: t.smoothnesses), c=variant.colour, label=variant.name)
        row[3].axhline(2 / rate, c="grey", lw=1, ls=":", label="2 / rate: the edge of stability")
        titles = (
            ("loss (line: at the parameters)", "loss variation: range of the loss\n1/2 to 4 gradient steps ahead"),
            (
                "|change of gradient|",
                "gradient predictiveness: range of the\nchange of the gradient (less is better)",
            ),
            ("|change of gradient| / |gradient|", "the largest change,\nin units of the gradient"),
            ("beta", "effective beta-smoothness\n(less is smoother)"),
        )
        for axes, (label, title) in zip(row, titles, strict=True):
            axes.set(xlabel="step", ylabel=label)
            axes.set_title(title, fontsize=9)
            axes.grid(alpha=0.3)
        for axes in row[:2]:
            axes.set_yscale("log")
        for axes in row[2:]:
            axes.set_ylim(bottom=0)
        caption(row[0], comparison, -0.2)
    figure.legend(*rows[0][3].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4)
    return figure


def save_figures(results: Results, folder: Path) -> list[Path]:
    sizes = ("{} small", "{}", "{} large")
    figures = {
        "speed": speed_figure(results),
        **{
            f"shift_{key}": shift_figure([COMPARISONS[size.format(key)] for size in sizes], results)
            for key in ("vgg", "linear")
        },
        "drift": drift_figure(results),
        "landscape": landscape_figure(results),
    }
    paths = {name: folder / f"why_{name}.png" for name in figures}
    for name, figure in figures.items():
        save(figure, paths[name], dpi=90)
    return list(paths.values())
