"""Why batch norm works, on handwritten digits: train with and without it, measure, and draw ``docs/why.md``'s figures.

Three networks are trained by plain SGD, in one process per core. Speed: every variant over a grid of learning rates
until it is accurate. Traces: some variants at one rate each, with the measures of ``bnfused.diagnostics`` taken along
the way. Figures and tables are written to ``docs/``; the text around the tables is kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from examples.digits import Digits, load_digits
from benchmarks.report import backend_line, make_console
from bnfused import diagnostics

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 64
ACCURACIES = (0.80, 0.90, 0.95, 0.97)
# A training counts as one, and its learning rate as one that trains, where it gets this far.
TRAINED = 0.90
NEVER = math.inf
Batch = tuple[Tensor, Tensor]


# --- networks ---


@dataclass(frozen=True)
class Variant:
    """How a network normalizes. ``norm`` is None, "before" or "after" the activation; noise follows batch norm.

    Weights start with unit gain (He et al., 2015, before ReLU; Glorot & Bengio, 2010, otherwise) and biases with 0, or
    all as ``torch.nn`` has it, from U(-1, 1) / sqrt(fan in), where ``torch_init``.
    """

    name: str
    colour: str
    norm: str | None = None
    noise: bool = False
    torch_init: bool = False


PLAIN = Variant("no batch norm", "C3")
PLAIN_TORCH = Variant("no batch norm, torch's initial weights", "C1", torch_init=True)
BATCH_NORM = Variant("batch norm", "C0", "before")
BATCH_NORM_TORCH = Variant("batch norm, torch's initial weights", "C9", "before", torch_init=True)
AFTER = Variant("batch norm after the activation", "C4", "after")
NOISY = Variant("batch norm, then shifting noise", "C2", "before", noise=True)
VARIANTS = (PLAIN, BATCH_NORM, NOISY, AFTER, PLAIN_TORCH, BATCH_NORM_TORCH)


def normalized(layer: nn.Linear | nn.Conv2d, activation: nn.Module, variant: Variant) -> list[nn.Module]:
    """``layer`` and ``activation`` with batch norm where ``variant`` has it.

    Before the activation is the default of Ioffe & Szegedy, 2015, section 3.2; the bias of the layer is dropped then,
    as batch norm would subtract it.
    """
    units = layer.weight.shape[0]
    if variant.norm is None:
        return [layer, activation]
    norm = bnfused.BatchNorm2d(units) if isinstance(layer, nn.Conv2d) else bnfused.BatchNorm1d(units)
    norms = [norm, diagnostics.ShiftingNoise()] if variant.noise else [norm]
    if variant.norm == "after":
        return [layer, activation, *norms]
    layer.bias = None
    return [layer, *norms, activation]


def vgg(variant: Variant) -> nn.Sequential:
    """Nine 3x3 convolutions with ReLU, a max pooling after every third (Simonyan & Zisserman, 2015, in small)."""
    modules: list[nn.Module] = []
    channels = 1
    for width in (16, 32, 64):
        for _ in range(3):
            modules += normalized(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), variant)
            channels = width
        modules.append(nn.MaxPool2d(2))
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels, 10))


def mlp(variant: Variant) -> nn.Sequential:
    """Three layers of 100 sigmoids: the network of Ioffe & Szegedy, 2015, section 4.1."""
    modules: list[nn.Module] = [nn.Flatten()]
    inputs = 64
    for _ in range(3):
        modules += normalized(nn.Linear(inputs, 100), nn.Sigmoid(), variant)
        inputs = 100
    return nn.Sequential(*modules, nn.Linear(inputs, 10))


def deep_linear(variant: Variant) -> nn.Sequential:
    """25 linear layers without activations: the second network of Santurkar et al., 2018, section 2.2."""
    modules: list[nn.Module] = [nn.Flatten()]
    for _ in range(24):
        modules += normalized(nn.Linear(64, 64), nn.Identity(), variant)
    return nn.Sequential(*modules, nn.Linear(64, 10))


@dataclass(frozen=True)
class Network:
    """What is trained.

    A trace makes ``trace_steps`` steps and measures at every ``every``-th. A speed run makes at most ``steps``, at each
    of ``rates``.
    """

    key: str
    title: str
    make: Callable[[Variant], nn.Sequential]
    activation: type[nn.Module]
    trace_steps: int
    every: int
    steps: int = 0
    rates: tuple[float, ...] = ()
    full_batch: bool = False


def half_decades(low: int, high: int) -> tuple[float, ...]:
    """1 and 3 times the powers of ten from ``10 ** low`` on; the last is ``10 ** high``."""
    return (*(float(f"{factor}e{exponent}") for exponent in range(low, high) for factor in (1, 3)), 10.0**high)


VGG = Network("vgg", "VGG-like, 9 convolutions, ReLU", vgg, nn.ReLU, 150, 10, 250, half_decades(-3, 1))
MLP = Network("mlp", "MLP, 3 x 100 sigmoids", mlp, nn.Sigmoid, 500, 5, 500, half_decades(-3, 2))
LINEAR = Network("linear", "25 linear layers, full batch", deep_linear, nn.Identity, 100, 20, full_batch=True)
NETWORKS = {network.key: network for network in (VGG, MLP, LINEAR)}


def make_network(network: Network, variant: Variant, seed: int) -> nn.Sequential:
    """The weights depend on ``seed`` and on how they are initialized, and not on where batch norm is."""
    model = network.make(variant)
    layers = [module for module in model if isinstance(module, (nn.Linear, nn.Conv2d))]
    for index, layer in enumerate(layers):
        torch.manual_seed(1000 * seed + index)  # for each layer, as some have no bias to draw
        if variant.torch_init:
            layer.reset_parameters()
            continue
        if network.activation is nn.ReLU:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


@functools.cache
def digits() -> Digits:
    """8x8 pixels, of unit variance over the training images, so that unit gain keeps it."""
    data = load_digits(torch.float32, 8)
    deviation = data.train_images.std()
    data.train_images /= deviation
    data.test_images /= deviation
    return data


def batches(network: Network, seed: int, steps: int) -> Iterator[Batch]:
    images, labels = digits().train_images, digits().train_labels
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if network.full_batch:
            yield images, labels
            continue
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        yield images[chosen], labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Of the test images, by the running statistics."""
    model.eval()
    right = model(digits().test_images).argmax(1) == digits().test_labels
    model.train()
    return right.double().mean().item()


# --- speed ---


@dataclass(frozen=True)
class SpeedRun:
    network: str
    variant: Variant
    rate: float
    seed: int


@dataclass(frozen=True)
class Curve:
    """Test accuracies after some numbers of steps; ends where the highest of ACCURACIES is reached or the loss is not
    finite."""

    steps: tuple[int, ...]
    accuracies: tuple[float, ...]

    def first(self, wanted: float) -> float:
        """The first step of those looked at where the accuracy is at least ``wanted``; NEVER if there is none."""
        reached = (step for step, value in zip(self.steps, self.accuracies, strict=True) if value >= wanted)
        return next(reached, NEVER)


def train_until_accurate(run: SpeedRun, steps: int) -> Curve:
    """Looks at the accuracy after every step, and from the 20th on after every 10 % more steps."""
    network = NETWORKS[run.network]
    model = make_network(network, run.variant, run.seed)
    optimizer = torch.optim.SGD(model.parameters(), run.rate)
    looked: list[int] = []
    accuracies: list[float] = []
    look_at = 1
    for step, (images, labels) in enumerate(batches(network, run.seed, steps), start=1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            break
        if step < look_at and step < steps:
            continue
        look_at = step + max(1, step // 10)
        looked.append(step)
        accuracies.append(accuracy(model))
        if accuracies[-1] >= ACCURACIES[-1]:
            break
    return Curve(tuple(looked), tuple(accuracies))


@dataclass(frozen=True)
class Speed:
    """One variant of one network over the grid: for every rate, the curves of all seeds."""

    curves: Mapping[float, Sequence[Curve]]

    def steps_to(self, wanted: float, rate: float) -> float:
        """Median over seeds."""
        return statistics.median(curve.first(wanted) for curve in self.curves[rate])

    def best(self, wanted: float) -> tuple[float, float]:
        """(fewest steps to ``wanted``, at which rate)."""
        return min((self.steps_to(wanted, rate), rate) for rate in self.curves)

    def rates_that_train(self) -> list[float]:
        return [rate for rate in self.curves if self.steps_to(TRAINED, rate) < NEVER]


# --- traces ---


@dataclass(frozen=True)
class TraceRun:
    network: str
    variant: Variant
    rate: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.variant.name}, rate {self.rate:g}"


@dataclass
class Trace:
    """What was measured along one training, an entry for each measured step; see ``bnfused.diagnostics``.

    ``drifts`` are of one step, as (mean, scale, quantiles), each the median over the units of all activations' inputs.
    ``unit`` is the (15, 50, 85) % quantiles of the input of one unit in the last activation.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    loss_ranges: list[tuple[float, float]] = field(default_factory=list)
    change_ranges: list[tuple[float, float]] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    smoothnesses: list[float] = field(default_factory=list)
    drifts: list[tuple[float, float, float]] = field(default_factory=list)
    unit: list[tuple[float, ...]] = field(default_factory=list)
    shifts: list[diagnostics.CovariateShift] = field(default_factory=list)

    def layers(self) -> list[str]:
        return list(dict.fromkeys(shift.layer for shift in self.shifts))

    def of_layer(self, layer: str) -> list[diagnostics.CovariateShift]:
        return [shift for shift in self.shifts if shift.layer == layer]

    def trained(self) -> float:
        """The first measured step with the accuracy TRAINED, or NEVER."""
        reached = (step for step, value in zip(self.steps, self.accuracies, strict=True) if value >= TRAINED)
        return next(reached, NEVER)

    def learning(self) -> list[bool]:
        """For each measured step, whether it is before ``trained()``: where there is much to learn."""
        return [step < self.trained() for step in self.steps]


# From half to four times the step that is taken.
STEP_FACTORS = tuple(2.0**power for power in (-1, -0.25, 0.5, 1.25, 2))


def trace(run: TraceRun, steps: int, every: int) -> Trace:
    """Train for ``steps`` steps and measure at every ``every``-th."""
    network = NETWORKS[run.network]
    model = make_network(network, run.variant, run.seed)
    optimizer = torch.optim.SGD(model.parameters(), run.rate)
    activations = [name for name, module in model.named_modules() if isinstance(module, network.activation)]
    step_sizes = [run.rate * factor for factor in STEP_FACTORS]
    result = Trace()
    before: dict[str, diagnostics.InputDistribution] = {}

    def measured_batches() -> Iterator[Batch]:
        for step, batch in enumerate(batches(network, run.seed, steps)):
            if step % every in (0, 1):
                now = diagnostics.input_distributions(model, digits().test_images, activations)
                if step % every == 1:
                    result.drifts.append(median_drift(before, now))
                before.update(now)
            if step % every == 0:
                result.steps.append(step)
                result.accuracies.append(accuracy(model))
                result.unit.append(tuple(before[activations[-1]].quantiles[:, 0].tolist()))
                surroundings = diagnostics.landscape(model, F.cross_entropy, batch, step_sizes)
                result.losses.append(surroundings.loss)
                result.loss_ranges.append(surroundings.loss_range)
                result.change_ranges.append(surroundings.predictiveness_range)
                result.gradient_norms.append(surroundings.gradient_norm)
                result.smoothnesses.append(surroundings.smoothness)
            yield batch

    result.shifts = diagnostics.internal_covariate_shift(
        model, F.cross_entropy, measured_batches(), optimizer, every=every
    )
    return result


def median_drift(
    before: Mapping[str, diagnostics.InputDistribution], after: Mapping[str, diagnostics.InputDistribution]
) -> tuple[float, float, float]:
    drifts = [diagnostics.drift(before[name], after[name]) for name in after]
    mean, scale, quantiles = (
        torch.cat([getattr(drift, kind) for drift in drifts]).nanmedian().item()
        for kind in ("mean", "scale", "quantiles")
    )
    return mean, scale, quantiles


# --- what is run ---


@dataclass(frozen=True)
class Comparison:
    """Variants of one network that are traced side by side, each at its rate."""

    title: str
    network: Network
    rates: Mapping[Variant, float]


# At the small rate no variant is near the edge of stability (rate x beta = 2) for most of its learning; at the same
# rate the VGG-like and the linear network without batch norm are; at the large rates all are.
COMPARISONS = {
    "vgg small": Comparison("small rate", VGG, {PLAIN: 0.003, BATCH_NORM: 0.003}),
    "vgg": Comparison("the same rate", VGG, {PLAIN: 0.03, BATCH_NORM: 0.03, NOISY: 0.03}),
    "vgg large": Comparison("each at a large rate", VGG, {PLAIN: 0.1, BATCH_NORM: 0.3}),
    "mlp": Comparison("the same rate", MLP, {PLAIN: 1.0, BATCH_NORM: 1.0, NOISY: 1.0}),
    "linear small": Comparison("small rate", LINEAR, {PLAIN: 0.003, BATCH_NORM: 0.003}),
    "linear": Comparison("the same rate", LINEAR, {PLAIN: 0.01, BATCH_NORM: 0.01}),
    "linear large": Comparison("each at a large rate", LINEAR, {PLAIN: 0.01, BATCH_NORM: 0.1}),
}


@dataclass
class Results:
    speeds: dict[tuple[str, Variant], Speed]
    traces: dict[tuple[str, Variant, float], list[Trace]]

    def of(self, comparison: Comparison) -> dict[Variant, list[Trace]]:
        """The traces of all seeds."""
        return {
            variant: self.traces[comparison.network.key, variant, rate] for variant, rate in comparison.rates.items()
        }


@dataclass(frozen=True)
class Effort:
    """How much is run: None is what the network says, a ``rate_stride`` above 1 leaves rates out."""

    seeds: int
    most_steps: int | None = None
    every: int | None = None
    rate_stride: int = 1


FULL = Effort(seeds=3)
QUICK = Effort(seeds=1, most_steps=5, every=4, rate_stride=4)


def one_thread() -> None:
    """For a worker: there is one for each core, and they would wait for each other's threads."""
    torch.set_num_threads(1)


def measure(effort: Effort, workers: int, console: Console) -> Results:
    """Run everything, the longest first; Ctrl-C gives up."""
    traced = {
        (comparison.network.key, variant, rate)
        for comparison in COMPARISONS.values()
        for variant, rate in comparison.rates.items()
    }
    progress = Progress(
        TextColumn("trainings"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread
    )
    try:
        with progress:
            traces = {}
            for key, variant, rate in sorted(traced, key=lambda run: (run[0], run[1].name, run[2])):
                network = NETWORKS[key]
                for seed in range(effort.seeds):
                    run = TraceRun(key, variant, rate, seed)
                    every = effort.every or network.every
                    traces[run] = pool.submit(trace, run, effort.most_steps or network.trace_steps, every)
            curves = {}
            for network in (VGG, MLP):
                for variant in VARIANTS:
                    for rate in network.rates[:: effort.rate_stride]:
                        for seed in range(effort.seeds):
                            speed_run = SpeedRun(network.key, variant, rate, seed)
                            steps = effort.most_steps or network.steps
                            curves[speed_run] = pool.submit(train_until_accurate, speed_run, steps)
            task = progress.add_task("", total=len(traces) + len(curves))
            for done in concurrent.futures.as_completed([*traces.values(), *curves.values()]):
                done.result()
                progress.advance(task)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    results = Results({}, {})
    for run, future in traces.items():
        results.traces.setdefault((run.network, run.variant, run.rate), []).append(future.result())
    by_variant: dict[tuple[str, Variant], dict[float, list[Curve]]] = {}
    for speed_run, curve in curves.items():
        rates = by_variant.setdefault((speed_run.network, speed_run.variant), {})
        rates.setdefault(speed_run.rate, []).append(curve.result())
    results.speeds = {key: Speed(rates) for key, rates in by_variant.items()}
    return results


# --- tables ---


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
            distances, cosines = [], []
            for one in traces:
                learning = dict(zip(one.steps, one.learning(), strict=True))
                measured = [shift for shift in one.shifts if learning[shift.step]]
                distances += [shift.distance / shift.gradient_norm for shift in measured]
                cosines += [shift.cosine for shift in measured]
            rate = comparison.rates[variant]
            rows.append(
                [
                    f"{comparison.network.title}: {comparison.title}",
                    variant.name,
                    f"{rate:g}",
                    f"{statistics.median(distances):.2f}",
                    f"{statistics.median(cosines):.2f}",
                    f"{rate * median_of(traces, lambda one: one.smoothnesses, True):.2f}",
                    f"{statistics.median(one.losses[-1] for one in traces):.3f}",
                ]
            )
    return markdown(rows)


def drift_table(results: Results) -> str:
    """Medians over units, activations, all measured steps and seeds."""
    rows = [["", "", "mean", "scale", "quantiles", "steps to 90 %"]]
    for comparison in (COMPARISONS["vgg"], COMPARISONS["mlp"]):
        for variant, traces in results.of(comparison).items():
            drifts = [drift for one in traces for drift in one.drifts]
            rows.append(
                [
                    f"{comparison.network.title}, rate {comparison.rates[variant]:g}",
                    variant.name,
                    *(f"{statistics.median(column):.4f}" for column in zip(*drifts, strict=True)),
                    count(statistics.median(one.trained() for one in traces)),
                ]
            )
    return markdown(rows)


def landscape_table(results: Results) -> str:
    """Medians over seeds and steps, while learning / after it."""

    def both(traces: Sequence[Trace], values: Callable[[Trace], Sequence[float]]) -> str:
        return " / ".join(f"{median_of(traces, values, learning):.2g}" for learning in (True, False))

    rows = [["", "", "loss variation", "relative to the loss", "gradient change", "relative to \\|g\\|", "beta"]]
    for comparison in (COMPARISONS["vgg"], COMPARISONS["mlp"]):
        for variant, traces in results.of(comparison).items():
            rows.append(
                [
                    f"{comparison.network.title}, rate {comparison.rates[variant]:g}",
                    variant.name,
                    both(traces, lambda one: [high - low for low, high in one.loss_ranges]),
                    both(
                        traces,
                        lambda one: [
                            (high - low) / loss for (low, high), loss in zip(one.loss_ranges, one.losses, strict=True)
                        ],
                    ),
                    both(traces, lambda one: [high for _, high in one.change_ranges]),
                    both(
                        traces,
                        lambda one: [
                            high / norm for (_, high), norm in zip(one.change_ranges, one.gradient_norms, strict=True)
                        ],
                    ),
                    both(traces, lambda one: one.smoothnesses),
                ]
            )
    return markdown(rows)


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


# --- figures ---


def speed_figure(results: Results, pyplot: Any) -> Any:
    """Steps to 95 % over the learning rate, and accuracies over steps at the best rate; a row for each network."""
    figure, rows = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
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
        left.set_title(
            f"{network.title}\nsteps to 95 % test accuracy, median of the seeds (limit: {limit})", fontsize=10
        )
        right.axhline(0.95, c="grey", lw=0.8, ls=":")
        right.set(
            xscale="log", xlabel="step", ylabel="test accuracy", ylim=(0, 1.45), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1]
        )
        right.set_title(f"{network.title}\neach at its best rate, first seed, until 97 %", fontsize=10)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        if right.lines[:-1]:  # the last one is the limit
            right.legend(fontsize=8, loc="upper left")
    figure.legend(*rows[0][0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    return figure


def shift_figure(comparisons: Sequence[Comparison], results: Results, pyplot: Any) -> Any:
    """Distance and cosine of the gradients of every layer over training; a column for each comparison."""
    network = comparisons[0].network
    figure, grid = pyplot.subplots(
        3, len(comparisons), figsize=(4.4 * len(comparisons), 9), layout="constrained", squeeze=False
    )
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
            image = heat.imshow(
                cosines,
                cmap="RdBu",
                vmin=-1,
                vmax=1,
                aspect="auto",
                origin="lower",
                interpolation="nearest",
                extent=(first.steps[0] - every / 2, first.steps[-1] + every / 2, 1.5, len(layers) + 1.5),
            )
            heat.set_title(f"cosine of G and G': {label}", fontsize=9)
            heat.set_ylabel("layer (the first has no shift)")
        column[0].set_yscale("log")
        column[0].set_ylabel("|G - G'| / |G|")
        column[0].set_title(f"{comparison.title}: shift (line: median layer; band: all)", fontsize=9)
        column[0].legend(fontsize=8)
        column[0].grid(alpha=0.3)
        column[-1].set_xlabel("step")
    figure.colorbar(image, ax=grid[1:, -1], label="cosine: 1 same direction, -1 reversed")
    for row in grid[:1]:
        limits = [axes.get_ylim() for axes in row]
        for axes in row:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.suptitle(
        f"{network.title}: a layer's gradient before (G) and after (G') the layers before it step (first seed)",
        fontsize=11,
    )
    return figure


def drift_figure(results: Results, pyplot: Any) -> Any:
    """The input of one unit over training, and how far all units' inputs move in one step; a row for each network."""
    shown = (PLAIN, BATCH_NORM, NOISY)
    figure, rows = pyplot.subplots(2, 4, figsize=(16, 7.5), layout="constrained")
    for row, key in zip(rows, ("vgg", "mlp"), strict=True):
        comparison = COMPARISONS[key]
        rate = comparison.rates[PLAIN]
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
        limits = [axes.get_ylim() for axes in row[:3]]
        for axes in row[:3]:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        row[0].legend(fontsize=8, loc="lower right")
        for axes in row:
            axes.grid(alpha=0.3)
        row[0].annotate(
            f"{comparison.network.title}, rate {rate:g}",
            (-0.22, 0.5),
            xycoords="axes fraction",
            rotation=90,
            va="center",
            ha="right",
        )
    return figure


def landscape_figure(results: Results, pyplot: Any) -> Any:
    """Loss variation, gradient predictiveness and effective smoothness over training; a row for each network."""
    figure, rows = pyplot.subplots(2, 4, figsize=(17, 8), layout="constrained")
    for row, key in zip(rows, ("vgg", "mlp"), strict=True):
        comparison = COMPARISONS[key]
        rate = comparison.rates[PLAIN]
        for variant, traces in results.of(comparison).items():
            steps, style = traces[0].steps, {"color": variant.colour, "alpha": 0.25, "lw": 0}

            def middle(values: Callable[[Trace], Sequence[float]], traces: Sequence[Trace] = traces) -> list[float]:
                return [statistics.median(at) for at in zip(*map(values, traces), strict=True)]

            low, high = middle(lambda t: [a for a, _ in t.loss_ranges]), middle(lambda t: [b for _, b in t.loss_ranges])
            row[0].fill_between(steps, low, high, label=variant.name, **style)
            row[0].plot(steps, middle(lambda t: t.losses), c=variant.colour, lw=1)
            low, high = (
                middle(lambda t: [a for a, _ in t.change_ranges]),
                middle(lambda t: [b for _, b in t.change_ranges]),
            )
            row[1].fill_between(steps, low, high, label=variant.name, **style)
            parts = middle(lambda t: [b / n for (_, b), n in zip(t.change_ranges, t.gradient_norms, strict=True)])
            row[2].plot(steps, parts, c=variant.colour, label=variant.name)
            row[3].plot(steps, middle(lambda t: t.smoothnesses), c=variant.colour, label=variant.name)
        row[3].axhline(2 / rate, c="grey", lw=1, ls=":", label="2 / rate: the edge of stability")
        row[0].set_ylabel("loss (line: at the parameters)")
        row[0].set_title("loss variation: range of the loss\n1/2 to 4 gradient steps ahead", fontsize=9)
        row[1].set_ylabel("|change of gradient|")
        row[1].set_title("gradient predictiveness: range of the\nchange of the gradient (less is better)", fontsize=9)
        row[2].set_ylabel("|change of gradient| / |gradient|")
        row[2].set_title("the largest change,\nin units of the gradient", fontsize=9)
        row[3].set_ylabel("beta")
        row[3].set_title("effective beta-smoothness\n(less is smoother)", fontsize=9)
        for axes in row:
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        for axes in row[:2]:
            axes.set_yscale("log")
        for axes in row[2:]:
            axes.set_ylim(bottom=0)
        row[0].annotate(
            f"{comparison.network.title}, rate {rate:g}",
            (-0.2, 0.5),
            xycoords="axes fraction",
            rotation=90,
            va="center",
            ha="right",
        )
    figure.legend(*rows[0][3].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=4)
    return figure


def save_figures(results: Results, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = {
        "speed": speed_figure(results, pyplot),
        "shift_vgg": shift_figure([COMPARISONS[key] for key in ("vgg small", "vgg", "vgg large")], results, pyplot),
        "shift_linear": shift_figure(
            [COMPARISONS[key] for key in ("linear small", "linear", "linear large")], results, pyplot
        ),
        "drift": drift_figure(results, pyplot),
        "landscape": landscape_figure(results, pyplot),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"why_{name}.png")
        figure.savefig(paths[-1], dpi=90)
        pyplot.close(figure)
    return paths


# --- command ---


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="why_batch_norm.py",
        description="Train small networks on handwritten digits with and without batch norm, measure what batch norm "
        "changes, and write the figures and tables of docs/why.md.",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="holds why.md, whose tables are replaced, and figures/ (default: docs; with --quick: build/why)",
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    if options.output is None:
        options.output = ROOT / "build" / "why" if options.quick else ROOT / "docs"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    needed = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for name, package in needed.items() if not importlib.util.find_spec(name)]
    if missing:
        console.print(f"This needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        return 2
    console.print(backend_line(), markup=False, soft_wrap=True)
    effort = QUICK if options.quick else FULL
    try:
        results = measure(effort, options.workers, console)
    except KeyboardInterrupt:
        console.print("Interrupted: nothing was written.")
        return 130
    filled = tables(results)
    page = options.output / "why.md"
    text = page.read_text() if page.exists() else (ROOT / "docs" / "why.md").read_text()
    paths = save_figures(results, options.output / "figures")
    page.write_text(fill_in(text, filled))
    for path in (page, *paths):
        console.print(f"written: {path}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
