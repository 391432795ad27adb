"""Train one small residual network twice, with torch's batch norm and with bnfused: ``make demo``.

Two copies start from the same weights and see the same batches of scikit-learn's digits in the same order. They take
their steps in turns, so that losses can be compared step by step and step times are paired. The script fails if the two
trainings differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks.arguments import check_least
from benchmarks.environment import describe_environment, missing_packages, print_environment
from benchmarks.pictures import save, subplots
from benchmarks.report import FEW_PAIRS, PAIRED_COLUMNS, make_console, paired_columns, plain_table, progress_bar
from benchmarks.timing import CpuClock, make_clock, using_threads
from examples.digits import load_digits
from examples.digits_network import WIDTH, Network, Site, SiteTimer

IMPLEMENTATIONS = ("torch", "bnfused")
IMAGE_SIZE = 32
LEARNING_RATE = 0.05
# Every fourth step times the batch norm sites. The other steps do not pay for that and give the step times.
SITE_STEPS = 4
FIRST_STEPS = 3
# The accuracy of a shorter training depends on chance: running statistics settle over many steps.
SETTLED_EPOCHS = 8


class Tolerance(NamedTuple):
    """The largest relative error of the first gradient (all parameters as one vector) and error of the first
    FIRST_STEPS losses against float64, and the largest difference from torch in an epoch's mean loss and in the last
    test accuracy."""

    gradient: float
    first_loss: float
    epoch_loss: float = 0.3
    accuracy: float = 0.03


# A rounding difference grows up to tenfold per step until it saturates: training is chaotic. So only the start can be
# held to rounding, and only against float64: torch's own channels_last batch norm sums in plain float32, and its first
# gradient is off by 3e-2 here (NCHW: up to 2e-3, bnfused the same). Measured with torch against itself, once
# channels_last and once NCHW, over several seeds: the losses are apart by 0.23 in the worst step, by 0.1 in the mean
# of an epoch, the last accuracies by 0.8 %. The bounds leave a factor of three to five. In float64 the same growth
# starts at 1e-15.
TOLERANCES = {
    "float32": Tolerance(gradient=1e-2, first_loss=1e-3),
    "float64": Tolerance(gradient=1e-9, first_loss=1e-9),
}


class StepTime(NamedTuple):
    """Seconds of one step; ``sites`` of them in the batch norm sites, None if that was not timed."""

    seconds: float
    clean: bool
    sites: float | None


@dataclass
class Trainee:
    """One copy of the network with everything that was measured on it."""

    network: Network
    dtype: str = "float32"
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    times: list[StepTime] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.network is not None:
            self.optimizer = torch.optim.SGD(
                self.network.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4
            )

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.precision():
            return F.cross_entropy(self.network(images), labels)

    def step(self, images: Tensor, labels: Tensor, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def timed_step(self, images: Tensor, labels: Tensor, rate: float, clock: CpuClock, time_sites: bool) -> None:
        Site.timer = timer = SiteTimer(clock.now) if time_sites else None
        try:
            timed = clock.time(lambda: self.step(images, labels, rate))
        finally:
            Site.timer = None
        self.times.append(StepTime(*timed, None if timer is None else timer.seconds))

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """The gradient of all parameters as one float64 vector. The network stays as it is."""
        model = Trainee(copy.deepcopy(self.network), self.dtype)
        grads = torch.autograd.grad(model.loss(images, labels), list(model.network.parameters()))
        return torch.cat([grad.double().flatten() for grad in grads])

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        self.network.eval()
        with self.precision():
            self.accuracies.append((self.network(images).argmax(1) == labels).double().mean().item())
        self.network.train()


def make_trainees(seed: int, dtype: str, width: int = WIDTH) -> dict[str, Trainee]:
    """Two networks with the same weights: the second loads the first one's state_dict."""
    torch.manual_seed(seed)
    networks = {name: Network(name, width) for name in IMPLEMENTATIONS}
    networks["bnfused"].load_state_dict(networks["torch"].state_dict())
    options = {"dtype": torch.float64 if dtype == "float64" else torch.float32, "memory_format": torch.channels_last}
    return {name: Trainee(network.to(**options), dtype) for name, network in networks.items()}


@dataclass
class Training:
    """What a run of the demo produced."""

    trainees: dict[str, Trainee]
    steps_per_epoch: int
    gradient_errors: dict[str, float]
    exact_losses: list[float]
    interrupted: bool = False

    def of_both(self, what: str) -> tuple[list, list]:
        return tuple(getattr(self.trainees[name], what) for name in IMPLEMENTATIONS)

    def epochs(self) -> list[slice]:
        """The steps of every epoch that both have completed."""
        size = self.steps_per_epoch
        return [slice(i * size, (i + 1) * size) for i in range(min(map(len, self.of_both("accuracies"))))]

    def epoch_losses(self) -> list[tuple[float, float]]:
        """The mean losses of both in every epoch."""
        return [tuple(statistics.fmean(losses[epoch]) for losses in self.of_both("losses")) for epoch in self.epochs()]

    def differences(self) -> list[float]:
        """Absolute difference of the two losses, step by step."""
        return [abs(a - b) for a, b in zip(*self.of_both("losses"), strict=False)]

    def first_loss_errors(self, implementation: str) -> list[float]:
        """Absolute error of the first losses against float64."""
        return [abs(a - b) for a, b in zip(self.trainees[implementation].losses, self.exact_losses, strict=False)]

    def timed_steps(self, with_sites: bool) -> tuple[list[tuple[StepTime, StepTime]], bool]:
        """The steps to compare times by, as (torch, bnfused), and whether all of them are clean.

        The first two steps warm up. If hardly a step is clean, all are returned.
        """
        pairs = list(zip(*self.of_both("times"), strict=False))[2:]
        pairs = [(a, b) for a, b in pairs if (a.sites is not None) == with_sites]
        clean = [(a, b) for a, b in pairs if a.clean and b.clean]
        return (clean, True) if len(clean) >= FEW_PAIRS or len(clean) == len(pairs) else (pairs, False)


def train(options: argparse.Namespace, clock: CpuClock, console: Console) -> Training:
    """Train both networks, one step each in turn. Ctrl-C ends the training and keeps what was done."""
    digits = load_digits(torch.float64 if options.dtype == "float64" else torch.float32, IMAGE_SIZE)
    trainees = make_trainees(options.seed, options.dtype, options.width)
    size = options.batch_size
    steps = len(digits.train_labels) // size
    total = options.epochs * steps

    def batch(number: int) -> tuple[Tensor, Tensor, float]:
        """Images, labels, and the rate: a linear warm-up over the first epoch, half a cosine over all steps."""
        epoch, step = divmod(number, steps)
        order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(options.seed + epoch))
        chosen = order[step * size : (step + 1) * size]
        rate = LEARNING_RATE * min(1.0, (number + 1) / steps) * 0.5 * (1 + math.cos(math.pi * number / total))
        return digits.train_images[chosen], digits.train_labels[chosen], rate

    console.print("Computing the first steps in float64, to compare with ...")
    images, labels, _ = batch(0)
    exact = Trainee(copy.deepcopy(trainees["torch"].network).double(), "float64")
    gradient = exact.gradient(images.double(), labels)
    errors = {
        name: ((trainee.gradient(images, labels) - gradient).norm() / gradient.norm()).item()
        for name, trainee in trainees.items()
    }
    for images, labels, rate in map(batch, range(min(FIRST_STEPS, steps))):
        exact.step(images.double(), labels, rate)
    training = Training(trainees, steps, errors, exact.losses)
    clock.watch()  # the worker threads exist from here on
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=total)
            for number in range(total):
                # The first of the two finds other data in the cache than the second, so they take turns.
                for name in IMPLEMENTATIONS if number % 2 else IMPLEMENTATIONS[::-1]:
                    trainees[name].timed_step(*batch(number), clock, number // 2 % SITE_STEPS == SITE_STEPS - 1)
                losses = ", ".join(f"{name} {trainee.losses[-1]:.3f}" for name, trainee in trainees.items())
                progress.update(task, completed=number + 1, description=f"epoch {number // steps + 1}, loss: {losses}")
                progress.refresh()
                if (number + 1) % steps == 0:
                    for trainee in trainees.values():
                        trainee.test(digits.test_images, digits.test_labels)
    except KeyboardInterrupt:
        training.interrupted = True
    return training


def divergence(training: Training, tolerance: Tolerance) -> list[str]:
    """What the two runs differ in by more than ``tolerance``; empty if all is well.

    Comparisons are written so that a value that is not a number fails.
    """
    found = []
    error = training.gradient_errors["bnfused"]
    if not error <= tolerance.gradient:
        found.append(f"first gradient: relative error {error:.3g}, above {tolerance.gradient:g}")
    for step, error in enumerate(training.first_loss_errors("bnfused"), 1):
        if not error <= tolerance.first_loss:
            found.append(f"step {step}: the loss is off from float64 by {error:.3g}, above {tolerance.first_loss:g}")
    for epoch, (a, b) in enumerate(training.epoch_losses(), 1):
        if not abs(a - b) <= tolerance.epoch_loss:
            found.append(f"epoch {epoch}: mean losses {a:.4f} and {b:.4f} differ by more than {tolerance.epoch_loss:g}")
    if len(training.epochs()) >= SETTLED_EPOCHS:
        a, b = (accuracies[-1] for accuracies in training.of_both("accuracies"))
        if abs(a - b) > tolerance.accuracy:
            found.append(f"last accuracies {a:.1%} and {b:.1%} differ by more than {tolerance.accuracy:.0%}")
    return found


def report_losses(training: Training, console: Console) -> None:
    headings = ["epoch", "loss: torch", "bnfused", "largest difference in a step", "test accuracy: torch", "bnfused"]
    table = plain_table("", [], headings)
    differences = training.differences()
    rows = zip(training.epochs(), training.epoch_losses(), *training.of_both("accuracies"), strict=False)
    for number, (epoch, (a, b), *accuracies) in enumerate(rows, 1):
        columns = f"{a:.4f}", f"{b:.4f}", f"{max(differences[epoch]):.1e}"
        table.add_row(str(number), *columns, *(f"{value:.1%}" for value in accuracies))
    console.print(table)
    console.print(f"\nLargest difference of the two losses in one step: {max(differences):.2g}")
    table = plain_table("", ["error against the same training in float64"], IMPLEMENTATIONS)
    table.add_row("first gradient, relative", *(f"{training.gradient_errors[name]:.1e}" for name in IMPLEMENTATIONS))
    for step, errors in enumerate(zip(*map(training.first_loss_errors, IMPLEMENTATIONS), strict=True), 1):
        table.add_row(f"loss in step {step}", *(f"{error:.1e}" for error in errors))
    console.print(table, "")


def report_times(training: Training, console: Console) -> None:
    (steps, quiet), (timed, quiet_too) = (training.timed_steps(with_sites) for with_sites in (False, True))
    table = plain_table("", ["median per step"], PAIRED_COLUMNS)
    for label, pairs, what in (
        ("whole training step", steps, "seconds"),
        ("in the batch norm sites, forward + backward", timed, "sites"),
    ):
        table.add_row(label, *paired_columns(*([getattr(pair[i], what) for pair in pairs] for i in (0, 1))))
    console.print(table)
    if timed:
        shares = [statistics.median(t.sites / t.seconds for t in times) for times in zip(*timed, strict=True)]
        console.print(
            f"\nThe batch norm sites (with ReLU and add) are {shares[0]:.0%} of torch's step and {shares[1]:.0%} of "
            f"bnfused's.\nThe rest, mostly convolutions, is the same code in both. Every {SITE_STEPS}th pair of steps "
            "times the sites,\nthe others time whole steps."
        )
    if not (quiet and quiet_too):
        console.print("Other processes had the cores in most steps: run again on a quiet machine.", style="yellow")


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
            f"first {FIRST_STEPS} losses within {tolerance.first_loss:g}.\nThe mean losses of every epoch are within "
            f"{tolerance.epoch_loss:g} of torch's. (Rounding differences grow up to tenfold per step. So two correct\n"
            "implementations drift apart, and so does torch from itself when only the memory layout changes.)"
        )
    return bool(found)


def save_picture(training: Training, path: Path, title: str) -> None:
    """Loss curves with their difference, and step times."""
    figure, (left, right) = subplots(1, 2, figsize=(12, 4.5))
    for name, style in zip(IMPLEMENTATIONS, ("-", "--"), strict=True):
        left.plot(training.trainees[name].losses, style, lw=1.5, label=f"loss, {name}")
    left.plot(training.differences(), ":", c="grey", lw=1, label="|difference|")
    left.set(yscale="log", xlabel="step", title="training loss: same weights, same batches")
    pairs, _ = training.timed_steps(with_sites=False)
    for name, times in zip(IMPLEMENTATIONS, zip(*pairs, strict=True), strict=False):
        points = [1e3 * time.seconds for time in times]
        (dots,) = right.plot(points, ".", ms=4, alpha=0.6)
        middle = statistics.median(points)
        right.axhline(middle, c=dots.get_color(), lw=1, label=f"{name}, median {middle:.1f} ms")
    right.set(xlabel="timed step", ylabel="ms", title="time of a whole training step")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.legend()
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_digits.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a small residual network on handwritten digits twice, with torch's batch norm and with "
        "bnfused, and compare losses and times.",
    )
    picture = Path("benchmarks/results/train_digits.png")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the first block")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that torch uses")
    dtypes = ("float32", "bfloat16", "float64")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="bfloat16 trains under autocast")
    parser.add_argument("--picture", type=Path, default=picture, metavar="FILE.png", help="where the plot goes")
    options = parser.parse_args(arguments)
    check_least(parser, options, epochs=1, threads=1, batch_size=2, width=4)
    if options.batch_size > 1024:
        parser.error(f"--batch-size: expected 2 to 1024, got {options.batch_size}")
    if options.width % 4:
        parser.error(f"--width: expected a multiple of 4, got {options.width}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = make_console()
    if missing_packages(console, sklearn="scikit-learn", matplotlib="matplotlib"):
        return 2
    clock = make_clock(torch.device("cpu"), options.threads)
    environment = describe_environment()
    print_environment(console, environment)
    console.print(
        f"\nA residual network on {IMAGE_SIZE}x{IMAGE_SIZE} digits, {options.dtype}, channels_last, batch "
        f"{options.batch_size}, width {options.width}, {options.threads} thread(s),\n"
        f"trained twice from the same weights on the same batches. Times: {clock.what}.\n",
        markup=False,
    )
    with using_threads(options.threads):
        training = train(options, clock, console)
    if training.interrupted:
        console.print("Interrupted: the numbers are from what was trained until then.")
    if not training.differences():
        return 130
    report_losses(training, console)
    report_times(training, console)
    title = f"{environment['cpu']}, torch {environment['torch']}, {options.threads} thread(s), {options.dtype}"
    if not bnfused.is_available():
        title += ", bnfused's REFERENCE PATH (extension not built)"
    save_picture(training, options.picture, title)
    console.print(f"\npicture: {options.picture}", markup=False, soft_wrap=True)
    failed = report_verdict(training, options.dtype, console)
    return 1 if failed else 130 if training.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
