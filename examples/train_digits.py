"""Train one small residual network twice, with torch's batch norm and with bnfused: ``make demo``.

Two copies start from the same weights and see the same batches of scikit-learn's digits in the same
order. They are trained side by side, one step each in turn, so that losses can be compared step by
step and step times are paired. The script fails if the two part by more than rounding explains.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from examples.digits import load_digits
from benchmarks.report import (
    FEW_PAIRS,
    describe_environment,
    make_console,
    plain_table,
    print_environment,
    progress_bar,
)
from benchmarks.timing import CpuClock, band, make_clock

IMPLEMENTATIONS = ("torch", "bnfused")
IMAGE_SIZE = 32
WIDTH = 64
LEARNING_RATE = 0.05
# Every fourth step times the batch norm sites; the others are free of that and give the step times.
SITE_STEPS = 4

Autocast = contextlib.AbstractContextManager[object]


@dataclass(frozen=True)
class Tolerance:
    """How far bnfused may be from the same training in float64, and from torch's.

    ``gradient``: relative error of the first gradient, all parameters as one vector. ``first_loss``: error of the
    losses of the first FIRST_STEPS steps. ``epoch_loss``, ``accuracy``: difference from torch in the mean loss of
    every epoch and in the last test accuracy.
    """

    gradient: float
    first_loss: float
    epoch_loss: float
    accuracy: float


FIRST_STEPS = 3
# Accuracies of shorter trainings are a matter of luck: running statistics settle over many steps.
SETTLED_EPOCHS = 8
# A rounding difference grows up to tenfold per step until it saturates: training is chaotic. So only the start can be
# held to rounding, and only against float64: torch's own channels_last batch norm sums in plain float32, and its first
# gradient is off by 3e-2 here (NCHW: up to 2e-3, bnfused the same). Measured with torch against itself, once
# channels_last and once NCHW, over several seeds: the losses are apart by 0.23 in the worst step, by 0.1 in the mean
# of an epoch, the last accuracies by 0.8 %. The bounds leave a factor of three to five. In float64 the same growth
# starts at 1e-15.
TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(gradient=1e-2, first_loss=1e-3, epoch_loss=0.3, accuracy=0.03),
    "float64": Tolerance(gradient=1e-9, first_loss=1e-9, epoch_loss=0.3, accuracy=0.03),
}


class Site(nn.Module):
    """Where a network normalizes: batch norm, a residual where one is given, ReLU if asked for."""

    timer: SiteTimer | None = None  # of the class: one network runs at a time

    def __init__(self, implementation: str, channels: int, relu: bool = True) -> None:
        super().__init__()
        self.fused = implementation == "bnfused"
        self.norm = (bnfused if self.fused else nn).BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if Site.timer is None:
            return self.normalize(x, residual)
        return Site.timer.run(self.normalize, x, residual)

    def normalize(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.fused:
            return self.norm(x, residual=residual, activation="relu" if self.relu else None)
        # In place, as torchvision's networks do it: less traffic than a new tensor for each.
        y = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return F.relu_(y) if self.relu else y


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3 and 1x1 convolution, each with BN+ReLU, the last with BN+add+ReLU."""

    def __init__(self, implementation: str, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        middle = channels // 4
        self.conv1 = nn.Conv2d(channels_in, middle, 1, bias=False)
        self.site1 = Site(implementation, middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.site2 = Site(implementation, middle)
        self.conv3 = nn.Conv2d(middle, channels, 1, bias=False)
        self.site3 = Site(implementation, channels)
        self.project: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.project = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                Site(implementation, channels, relu=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.project is None else self.project(x)
        x = self.site1(self.conv1(x))
        x = self.site2(self.conv2(x))
        return self.site3(self.conv3(x), identity)


class Network(nn.Module):
    """A residual network for one-channel images: stem, five blocks, average, classifier."""

    def __init__(self, implementation: str, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width // 2, 3, padding=1, bias=False)
        self.site = Site(implementation, width // 2)
        self.blocks = nn.Sequential(
            Bottleneck(implementation, width // 2, width, 1),
            Bottleneck(implementation, width, width, 1),
            Bottleneck(implementation, width, 2 * width, 2),
            Bottleneck(implementation, 2 * width, 2 * width, 1),
            Bottleneck(implementation, 2 * width, 4 * width, 2),
        )
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.site(self.stem(x))).mean((2, 3)))


class SiteTimer:
    """Adds up the time inside the batch norm sites of one step, forward and backward."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.seconds = 0.0

    def run(self, normalize: Callable[..., Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
        begin = self._now()
        y = normalize(x, residual)
        self.seconds += self._now() - begin
        for node in nodes_between(y, (x, residual)):
            self._watch(node)
        return y

    def _watch(self, node: torch.autograd.graph.Node) -> None:
        begin = 0.0

        def before(grad_outputs: object) -> None:
            nonlocal begin
            begin = self._now()

        def after(grad_inputs: object, grad_outputs: object) -> None:
            self.seconds += self._now() - begin

        node.register_prehook(before)
        node.register_hook(after)


def nodes_between(y: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[torch.autograd.graph.Node]:
    """The autograd nodes from ``y`` down to ``inputs``, whatever operations lie between."""
    done = [None, *(tensor.grad_fn for tensor in inputs if tensor is not None)]
    pending = [y.grad_fn]
    while pending:
        node = pending.pop()
        if node in done or "AccumulateGrad" in node.name():
            continue
        done.append(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; ``sites`` of them in the batch norm sites, where that was timed."""

    seconds: float
    clean: bool
    sites: float | None


@dataclass
class Trainee:
    """One copy of the network with everything that was measured on it."""

    network: Network
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    times: list[StepTime] = field(default_factory=list)


def make_trainees(seed: int, dtype: torch.dtype, width: int = WIDTH) -> dict[str, Trainee]:
    """Two networks with the same weights: the second loads the first one's state_dict."""
    torch.manual_seed(seed)
    trainees: dict[str, Trainee] = {}
    for implementation in IMPLEMENTATIONS:
        network = Network(implementation, width)
        if trainees:
            network.load_state_dict(trainees["torch"].network.state_dict())
        network.to(dtype=dtype, memory_format=torch.channels_last)
        trainees[implementation] = Trainee(network, make_optimizer(network))
    return trainees


def learning_rate(step: int, steps_per_epoch: int, steps: int) -> float:
    """Linear warm-up over the first epoch, half a cosine over all steps."""
    warm_up = min(1.0, (step + 1) / steps_per_epoch)
    return LEARNING_RATE * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def gradient(network: Network, images: Tensor, labels: Tensor, autocast: Autocast) -> Tensor:
    """The loss gradient of all parameters as one float64 vector; ``network`` stays as it is."""
    network = copy.deepcopy(network)
    with autocast:
        loss = F.cross_entropy(network(images), labels)
    grads = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([grad.double().flatten() for grad in grads])


def gradient_errors(
    trainees: dict[str, Trainee], images: Tensor, labels: Tensor, autocast: Autocast
) -> dict[str, float]:
    """Relative error of each network's first gradient against torch in float64."""
    exact_network = copy.deepcopy(trainees["torch"].network).double()
    exact = gradient(exact_network, images.double(), labels, contextlib.nullcontext())
    return {
        name: ((gradient(trainee.network, images, labels, autocast) - exact).norm() / exact.norm()).item()
        for name, trainee in trainees.items()
    }


def exact_losses(network: Network, batches: Sequence[tuple[Tensor, Tensor]], rates: Sequence[float]) -> list[float]:
    """The losses of the first steps in float64; ``network`` stays as it is."""
    network = copy.deepcopy(network).double()
    trainee = Trainee(network, make_optimizer(network))
    for (images, labels), rate in zip(batches, rates, strict=True):
        trainee.losses.append(sgd_step(trainee, images.double(), labels, rate, contextlib.nullcontext()).item())
    return trainee.losses


def make_optimizer(network: Network) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4)


def sgd_step(trainee: Trainee, images: Tensor, labels: Tensor, rate: float, autocast: Autocast) -> Tensor:
    """One step at learning rate ``rate``; returns the loss before it."""
    for parameters in trainee.optimizer.param_groups:
        parameters["lr"] = rate
    trainee.optimizer.zero_grad()
    with autocast:
        loss = F.cross_entropy(trainee.network(images), labels)
    loss.backward()
    trainee.optimizer.step()
    return loss.detach()


def timed_step(
    trainee: Trainee,
    images: Tensor,
    labels: Tensor,
    rate: float,
    autocast: Autocast,
    clock: CpuClock,
    time_sites: bool,
) -> None:
    """One step; appends its loss and its time."""
    losses: list[Tensor] = []
    timer = SiteTimer(clock.now) if time_sites else None
    Site.timer = timer
    try:
        timed = clock.time(lambda: losses.append(sgd_step(trainee, images, labels, rate, autocast)))
    finally:
        Site.timer = None
    trainee.losses.append(losses[0].item())
    sites = None if timer is None else timer.seconds
    trainee.times.append(StepTime(timed.seconds, timed.clean, sites))


@torch.no_grad()
def accuracy(network: Network, images: Tensor, labels: Tensor, autocast: Autocast) -> float:
    network.eval()
    with autocast:
        right = (network(images).argmax(1) == labels).double().mean().item()
    network.train()
    return right


@dataclass
class Training:
    """What a run of the demo produced."""

    trainees: dict[str, Trainee]
    steps_per_epoch: int
    gradient_errors: dict[str, float]
    exact_losses: list[float]
    interrupted: bool = False

    def epochs(self) -> int:
        """Whole epochs of both."""
        return min(len(trainee.accuracies) for trainee in self.trainees.values())

    def epoch_losses(self, implementation: str) -> list[float]:
        losses, size = self.trainees[implementation].losses, self.steps_per_epoch
        return [statistics.fmean(losses[epoch * size : (epoch + 1) * size]) for epoch in range(self.epochs())]

    def differences(self) -> list[float]:
        """Absolute difference of the two losses, step by step."""
        theirs, ours = (self.trainees[name].losses for name in IMPLEMENTATIONS)
        return [abs(a - b) for a, b in zip(theirs, ours, strict=False)]

    def first_loss_errors(self, implementation: str) -> list[float]:
        """Absolute error of the first losses against float64."""
        losses = self.trainees[implementation].losses
        return [abs(a - b) for a, b in zip(losses, self.exact_losses, strict=False)]

    def timed_steps(self, with_sites: bool) -> tuple[list[tuple[StepTime, StepTime]], bool]:
        """The steps to compare times by, as (torch, bnfused), and whether all of them are clean.

        The first two steps warm up. Where hardly a step is clean, all are returned.
        """
        theirs, ours = (self.trainees[name].times for name in IMPLEMENTATIONS)
        pairs = [(a, b) for a, b in list(zip(theirs, ours, strict=False))[2:] if (a.sites is not None) == with_sites]
        clean = [(a, b) for a, b in pairs if a.clean and b.clean]
        enough = len(clean) >= FEW_PAIRS or len(clean) == len(pairs)
        return (clean, True) if enough else (pairs, False)


def train(options: argparse.Namespace, clock: CpuClock, console: Console) -> Training:
    """Train both networks, a step each in turn; Ctrl-C ends it and keeps what was done."""
    dtype = torch.float64 if options.dtype == "float64" else torch.float32
    low = options.dtype == "bfloat16"
    autocast: Autocast = torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext()
    digits = load_digits(dtype, IMAGE_SIZE)
    trainees = make_trainees(options.seed, dtype, options.width)
    size = options.batch_size
    steps = len(digits.train_labels) // size
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.empty(0, dtype=torch.int64)
    total = options.epochs * steps
    rates = [learning_rate(step, steps, total) for step in range(total)]

    def batch(number: int) -> tuple[Tensor, Tensor]:
        nonlocal order
        epoch, step = divmod(number, steps)
        if step == 0:
            order = torch.randperm(len(digits.train_labels), generator=generator.manual_seed(options.seed + epoch))
        chosen = order[step * size : (step + 1) * size]
        return digits.train_images[chosen], digits.train_labels[chosen]

    console.print("Computing the first steps in float64, to compare with ...")
    first = [batch(number) for number in range(min(FIRST_STEPS, steps))]
    training = Training(
        trainees,
        steps,
        gradient_errors(trainees, *first[0], autocast),
        exact_losses(trainees["torch"].network, first, rates[: len(first)]),
    )
    clock.watch()  # the worker threads exist from here on
    progress = progress_bar(console)
    try:
        with progress:
            task = progress.add_task("", total=total)
            for number in range(total):
                epoch, step = divmod(number, steps)
                images, labels = batch(number)
                time_sites = number // 2 % SITE_STEPS == SITE_STEPS - 1
                # Who goes first finds other data in the cache than who goes second: take turns.
                for name in IMPLEMENTATIONS if number % 2 else IMPLEMENTATIONS[::-1]:
                    timed_step(trainees[name], images, labels, rates[number], autocast, clock, time_sites)
                progress.update(task, completed=number + 1, description=live(epoch, training))
                progress.refresh()
                if step == steps - 1:
                    for trainee in trainees.values():
                        score = accuracy(trainee.network, digits.test_images, digits.test_labels, autocast)
                        trainee.accuracies.append(score)
    except KeyboardInterrupt:
        training.interrupted = True
    return training


def live(epoch: int, training: Training) -> str:
    """The progress bar's text: the last loss and the recent step time of both."""
    parts = []
    for name, trainee in training.trainees.items():
        recent = statistics.median(time.seconds for time in trainee.times[-9:])
        parts.append(f"{name}: loss {trainee.losses[-1]:.3f}, {1e3 * recent:.0f} ms")
    return f"epoch {epoch + 1}  " + "  |  ".join(parts)


def epoch_table(training: Training) -> Table:
    table = plain_table(
        "",
        [],
        ["epoch", "loss: torch", "bnfused", "largest difference in a step", "test accuracy: torch", "bnfused"],
    )
    theirs, ours = (training.epoch_losses(name) for name in IMPLEMENTATIONS)
    differences, size = training.differences(), training.steps_per_epoch
    for epoch in range(training.epochs()):
        accuracies = [training.trainees[name].accuracies[epoch] for name in IMPLEMENTATIONS]
        table.add_row(
            str(epoch + 1),
            f"{theirs[epoch]:.4f}",
            f"{ours[epoch]:.4f}",
            f"{max(differences[epoch * size : (epoch + 1) * size]):.1e}",
            *(f"{value:.1%}" for value in accuracies),
        )
    return table


@dataclass(frozen=True)
class Comparison:
    """Seconds of both networks in the same steps, as (torch, bnfused) pairs."""

    label: str
    pairs: list[tuple[float, float]]

    def row(self) -> list[str]:
        """Medians, and the median and quartiles of the ratios step by step."""
        ratio = band([theirs / ours for theirs, ours in self.pairs if ours > 0])
        if ratio is None:
            return [self.label, "-", "-", "-", "-", "0"]
        theirs, ours = (statistics.median(column) for column in zip(*self.pairs, strict=True))
        return [
            self.label,
            f"{1e3 * theirs:.1f}",
            f"{1e3 * ours:.1f}",
            f"{ratio.median:.2f}x",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            str(len(self.pairs)),
        ]


def time_table(training: Training) -> Table:
    table = plain_table("", ["median per step"], ["torch ms", "bnfused ms", "torch/bnfused", "25-75 %", "steps"])
    steps, _ = training.timed_steps(with_sites=False)
    sites, _ = training.timed_steps(with_sites=True)
    whole = Comparison("whole training step", [(a.seconds, b.seconds) for a, b in steps])
    inside = Comparison(
        "in the batch norm sites, forward + backward",
        [(a.sites, b.sites) for a, b in sites if a.sites is not None and b.sites is not None],
    )
    table.add_row(*whole.row())
    table.add_row(*inside.row())
    return table


def site_shares(training: Training) -> dict[str, float]:
    """Part of the step that the batch norm sites take, in the steps where both are timed."""
    pairs, _ = training.timed_steps(with_sites=True)
    shares = {}
    for name, times in zip(IMPLEMENTATIONS, zip(*pairs, strict=True), strict=False):
        parts = [time.sites / time.seconds for time in times if time.sites is not None]
        shares[name] = statistics.median(parts)
    return shares


def divergence(training: Training, tolerance: Tolerance) -> list[str]:
    """What the two runs differ in by more than ``tolerance``; empty if all is well.

    Comparisons are written so that a value that is not a number fails.
    """
    found = []
    error = training.gradient_errors["bnfused"]
    if not error <= tolerance.gradient:
        found.append(f"first gradient: relative error {error:.3g}, above {tolerance.gradient:g}")
    for step, error in enumerate(training.first_loss_errors("bnfused")):
        if not error <= tolerance.first_loss:
            found.append(
                f"step {step + 1}: the loss is off from float64 by {error:.3g}, above {tolerance.first_loss:g}"
            )
    theirs, ours = (training.epoch_losses(name) for name in IMPLEMENTATIONS)
    for epoch, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if not abs(a - b) <= tolerance.epoch_loss:
            found.append(
                f"epoch {epoch + 1}: mean losses {a:.4f} and {b:.4f} differ by more than {tolerance.epoch_loss:g}"
            )
    if len(theirs) >= SETTLED_EPOCHS:
        a, b = (training.trainees[name].accuracies[-1] for name in IMPLEMENTATIONS)
        if abs(a - b) > tolerance.accuracy:
            found.append(f"last accuracies {a:.1%} and {b:.1%} differ by more than {tolerance.accuracy:.0%}")
    return found


def save_picture(training: Training, path: Path, title: str) -> None:
    """Loss curves with their difference, and step times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, style in zip(IMPLEMENTATIONS, ("-", "--"), strict=True):
        left.plot(training.trainees[name].losses, style, lw=1.5, label=f"loss, {name}")
    left.plot(training.differences(), ":", c="grey", lw=1, label="|difference|")
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_title("training loss: same weights, same batches")
    left.legend()
    pairs, _ = training.timed_steps(with_sites=False)
    for name, times in zip(IMPLEMENTATIONS, zip(*pairs, strict=True), strict=False):
        points = [1e3 * time.seconds for time in times]
        (dots,) = right.plot(points, ".", ms=4, alpha=0.6, label=name)
        middle = statistics.median(points)
        right.axhline(middle, c=dots.get_color(), lw=1)
        right.text(0, middle, f"{middle:.1f} ms", c=dots.get_color(), va="bottom", weight="bold")
    right.set_ylim(bottom=0)
    right.set_xlabel("timed step")
    right.set_ylabel("ms")
    right.set_title("time of a whole training step")
    right.legend()
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_digits.py",
        description="Train a small residual network on handwritten digits twice, with torch's "
        "batch norm and with bnfused, and compare losses and times.",
    )
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the first block (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        default="float32",
        help="bfloat16 trains under autocast (default: %(default)s)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("benchmarks/results/train_digits.png"),
        metavar="FILE.png",
        help="default: %(default)s",
    )
    parser.add_argument("--no-picture", action="store_true", help="draw nothing")
    options = parser.parse_args(arguments)
    for name in ("epochs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if not 2 <= options.batch_size <= 1024:
        parser.error(f"--batch-size: expected 2 to 1024, got {options.batch_size}")
    if options.width < 4 or options.width % 4:
        parser.error(f"--width: expected a multiple of 4, got {options.width}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    needed = {"sklearn": "scikit-learn"}
    if not options.no_picture:
        needed["matplotlib"] = "matplotlib"
    missing = [package for name, package in needed.items() if not importlib.util.find_spec(name)]
    if missing:
        console.print(f"The demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        return 2
    clock = make_clock(torch.device("cpu"), options.threads)
    environment = describe_environment()
    print_environment(console, environment)
    console.print(
        f"\nA residual network on {IMAGE_SIZE}x{IMAGE_SIZE} digits, {options.dtype}, "
        f"channels_last, batch {options.batch_size}, width {options.width}, {options.threads} thread(s),\n"
        f"trained twice from the same weights on the same batches. Times: "
        f"{'CPU time of the calling thread' if options.threads == 1 else 'wall time'}.\n",
        markup=False,
    )
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        training = train(options, clock, console)
    finally:
        torch.set_num_threads(usual_threads)
    if training.interrupted:
        console.print("Interrupted: the numbers are of what was trained until then.")
    if not training.differences():
        return 130
    report_losses(training, console)
    report_times(training, console)
    if not options.no_picture:
        title = f"{environment['cpu']}, torch {environment['torch']}, {options.threads} thread(s), {options.dtype}"
        if not bnfused.is_available():
            title += ", bnfused's REFERENCE PATH (extension not built)"
        save_picture(training, options.picture, title)
        console.print(f"\npicture: {options.picture}", markup=False, soft_wrap=True)
    failed = report_verdict(training, options.dtype, console)
    return 1 if failed else 130 if training.interrupted else 0


def report_losses(training: Training, console: Console) -> None:
    console.print(epoch_table(training))
    console.print(f"\nLargest difference of the two losses in one step: {max(training.differences()):.2g}")
    table = plain_table("", ["error against the same training in float64"], IMPLEMENTATIONS)
    gradients, losses = training.gradient_errors, [training.first_loss_errors(name) for name in IMPLEMENTATIONS]
    table.add_row("first gradient, relative", *(f"{gradients[name]:.1e}" for name in IMPLEMENTATIONS))
    for step, errors in enumerate(zip(*losses, strict=True)):
        table.add_row(f"loss in step {step + 1}", *(f"{error:.1e}" for error in errors))
    console.print(table)
    console.print()


def report_times(training: Training, console: Console) -> None:
    console.print(time_table(training))
    shares = site_shares(training)
    if shares:
        console.print(
            f"\nThe batch norm sites (with ReLU and add) are {shares['torch']:.0%} of torch's step "
            f"and {shares['bnfused']:.0%} of bnfused's;\nthe rest, mostly convolutions, is the same "
            f"code in both. Sites are timed in every {SITE_STEPS}th pair of steps,\nwhole steps in "
            "the others.",
            markup=False,
        )
    if not all(training.timed_steps(with_sites)[1] for with_sites in (False, True)):
        console.print(
            "Other processes had the cores in most steps, which distorts these times: run again on a quiet machine.",
            style="yellow",
        )


def report_verdict(training: Training, dtype: str, console: Console) -> bool:
    """Print whether the two trainings agree; returns whether they failed to."""
    if dtype not in TOLERANCES:
        console.print(f"\n{dtype}: every layer rounds to 8 bits; losses are shown, not checked.")
        return False
    tolerance = TOLERANCES[dtype]
    found = divergence(training, tolerance)
    for message in found:
        console.print(f"FAILED: {message}", style="bold red", markup=False)
    if not found:
        console.print(
            f"\n[green]Same training:[/] bnfused's first gradient is within {tolerance.gradient:g} of float64 and its "
            f"first {FIRST_STEPS} losses within {tolerance.first_loss:g};\nthe mean losses of every epoch are within "
            f"{tolerance.epoch_loss:g} of torch's. (Rounding differences grow up to tenfold per step: two right\n"
            "implementations part, and torch parts from itself as far when only the memory layout changes.)"
        )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
