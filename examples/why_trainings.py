"""What why_batch_norm.py trains and measures: speed over a grid of learning rates, and traces along a training."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import math
import multiprocessing
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
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


class Run(NamedTuple):
    """One training; ``network`` is a key of NETWORKS."""

    network: str
    variant: Variant
    rate: float
    seed: int

    def start(self) -> tuple[Network, nn.Sequential, torch.optim.SGD]:
        network = NETWORKS[self.network]
        model = make_network(network, self.variant, self.seed)
        return network, model, torch.optim.SGD(model.parameters(), self.rate)


def first_step(steps: Iterable[int], accuracies: Iterable[float], wanted: float) -> float:
    """The first of ``steps`` after which the accuracy is at least ``wanted``; NEVER if it always stays below."""
    return next((step for step, value in zip(steps, accuracies, strict=True) if value >= wanted), NEVER)


@dataclass(frozen=True)
class Curve:
    """Test accuracies after some numbers of steps; ends where the highest of ACCURACIES is reached or the loss is not
    finite."""

    steps: tuple[int, ...]
    accuracies: tuple[float, ...]

    def first(self, wanted: float) -> float:
        return first_step(self.steps, self.accuracies, wanted)


def train_until_accurate(run: Run, steps: int) -> Curve:
    """Looks at the accuracy after every step, and from the 20th on after every 10 % more steps."""
    network, model, optimizer = run.start()
    looked: dict[int, float] = {}
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
        looked[step] = accuracy(model)
        if looked[step] >= ACCURACIES[-1]:
            break
    return Curve(tuple(looked), tuple(looked.values()))


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
        return first_step(self.steps, self.accuracies, TRAINED)

    def learning(self) -> list[bool]:
        """For each measured step, whether it is before ``trained()``: where there is much to learn."""
        return [step < self.trained() for step in self.steps]


# From half to four times the step that is taken.
STEP_FACTORS = tuple(2.0**power for power in (-1, -0.25, 0.5, 1.25, 2))


def trace(run: Run, steps: int, every: int) -> Trace:
    """Train for ``steps`` steps and measure at every ``every``-th."""
    network, model, optimizer = run.start()
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


class Effort(NamedTuple):
    """How much is run. None stands for the network's own value; a ``rate_stride`` above 1 leaves rates out."""

    seeds: int
    most_steps: int | None = None
    every: int | None = None
    rate_stride: int = 1


FULL = Effort(seeds=3)
QUICK = Effort(seeds=1, most_steps=5, every=4, rate_stride=4)


def one_thread() -> None:
    """Every core has a worker: several threads in each would wait for each other."""
    torch.set_num_threads(1)


def measure(effort: Effort, workers: int, console: Console) -> Results:
    """Run everything, the longest first; Ctrl-C gives up."""
    traced = {
        (comparison.network, variant, rate)
        for comparison in COMPARISONS.values()
        for variant, rate in comparison.rates.items()
    }
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread
    )
    traces, curves = {}, {}
    try:
        for network, variant, rate in sorted(traced, key=lambda run: (run[0].key, run[1].name, run[2])):
            steps, every = effort.most_steps or network.trace_steps, effort.every or network.every
            for seed in range(effort.seeds):
                run = Run(network.key, variant, rate, seed)
                traces[run] = pool.submit(trace, run, steps, every)
        for network, variant in itertools.product((VGG, MLP), VARIANTS):
            for rate, seed in itertools.product(network.rates[:: effort.rate_stride], range(effort.seeds)):
                run = Run(network.key, variant, rate, seed)
                curves[run] = pool.submit(train_until_accurate, run, effort.most_steps or network.steps)
        every = [*traces.values(), *curves.values()]
        ended = concurrent.futures.as_completed(every)
        for done in track(ended, "trainings", len(every), console=console, disable=not console.is_terminal):
            done.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    results = Results(collections.defaultdict(lambda: Speed(collections.defaultdict(list))), {})
    for run, future in traces.items():
        results.traces.setdefault(run[:3], []).append(future.result())
    for run, future in curves.items():
        results.speeds[run.network, run.variant].curves[run.rate].append(future.result())
    return results
