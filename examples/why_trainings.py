"""What why_batch_norm.py trains and measures: speed over a grid of learning rates, and traces along a training."""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn import functional as F

from bnfused import diagnostics
from examples.why_networks import (
    BATCH_NORM,
    LINEAR,
    MLP,
    NETWORKS,
    NOISY,
    PLAIN,
    VARIANTS,
    VGG,
    Batch,
    Network,
    Variant,
    accuracy,
    batches,
    digits,
    make_network,
)

ACCURACIES = (0.80, 0.90, 0.95, 0.97)
# A training counts as one, and its learning rate as one that trains, where it gets this far.
TRAINED = 0.90
NEVER = math.inf


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
