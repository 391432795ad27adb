"""How the benchmarks time, on a CPU and on a GPU: interleaved samples, paired ratios, a check that we had the cores."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

# A sample whose threads waited for a core for more than this part of its wall time is discarded. On a busy machine one
# parallel region can cost a whole scheduler slice, and that says nothing about the code.
MAX_WAITED = 0.01
# Shorter functions are called several times per sample: the clocks and the check cost some microseconds themselves.
SHORTEST_SAMPLE = 0.5e-3
TRIES = 3
# Cycles that the GPU waits before a sample, while the CPU queues it: 0.5 ms at 2 GHz. To queue an eager forward and
# backward takes a CPU 0.1 to 0.2 ms.
HEAD_START = 1_000_000
# What a plain copy is called among the functions that are timed.
COPY = "copy"
# Large enough that no cache holds it: the roof that achieved bandwidths stand under.
ROOF_BYTES = {"cpu": 2**28, "cuda": 2**30}


class Timed(NamedTuple):
    """One measurement; ``clean`` is False where our threads had to wait for a core."""

    seconds: float
    clean: bool


class Band(NamedTuple):
    """Median with the quartiles around it."""

    low: float
    median: float
    high: float


def band(values: Sequence[float]) -> Band | None:
    """Quartiles of ``values``; None of nothing."""
    if len(values) < 2:
        return Band(*values * 3) if values else None
    return Band(*statistics.quantiles(values, n=4, method="inclusive"))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean for ratios: 2x and 0.5x cancel. All values must be positive."""
    values = list(values)
    if not values:
        raise ValueError("geometric_mean: expected at least one value, got none")
    return statistics.geometric_mean(values)


def paired_ratios(numerator: Sequence[float | None], denominator: Sequence[float | None]) -> list[float]:
    """Ratio per round, over the rounds where both samples count and are positive.

    Both samples of a ratio come from the same round, so that slow drift of the machine cancels.
    """
    return [
        above / below
        for above, below in zip(numerator, denominator, strict=True)
        if above is not None and below is not None and above > 0 and below > 0
    ]


def differences(whole: Sequence[float | None], part: Sequence[float | None]) -> list[float | None]:
    """``whole - part`` per round; None where either sample does not count."""
    return [None if a is None or b is None else a - b for a, b in zip(whole, part, strict=True)]


class RunQueue:
    """How long threads of this process were ready to run but had no core, as Linux counts it."""

    def __init__(self) -> None:
        self._files: list[int] = []
        self.watch()
        self.available = bool(self._files)

    def watch(self) -> None:
        """List the threads anew; call after the ones to be measured have been started."""
        for file in self._files:
            os.close(file)
        self._files = []
        for path in Path("/proc/self/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # the thread may have ended meanwhile
                self._files.append(os.open(path, os.O_RDONLY))

    def waited(self) -> float:
        """Seconds on the run queue so far, over all threads; 0 where the system does not say."""
        nanoseconds = 0
        for file in self._files:
            with contextlib.suppress(OSError, IndexError):
                nanoseconds += int(os.pread(file, 128, 0).split()[1])
        return nanoseconds * 1e-9


class Clock:
    """Times calls. ``unclean`` counts the samples that were thrown away."""

    unclean = 0
    description: str

    def warm_up(self, function: Callable[[], object]) -> int:
        """Start threads, fill caches, compile; returns how many calls make a sample."""
        raise NotImplementedError

    def watch(self) -> None:
        """Call when every thread that will work has started: after all warm-ups."""

    def time(self, function: Callable[[], object], repeats: int = 1) -> Timed:
        """Seconds per call, over ``repeats`` calls."""
        raise NotImplementedError


class CpuClock(Clock):
    """Times calls on the CPU.

    On one thread it reads the CPU time of the calling thread (autograd runs CPU graphs there too), which leaves out
    what other processes do; on several threads, wall time.
    """

    def __init__(self, threads: int) -> None:
        self.now = time.thread_time if threads == 1 else time.perf_counter
        self.what = "CPU time of the calling thread" if threads == 1 else "wall time"
        self._queue = RunQueue()
        discarded = f"samples that waited more than {MAX_WAITED:.0%} for a core are discarded"
        unknown = "how long threads wait for a core is not known here: nothing is discarded"
        self.description = f"{self.what}; {discarded if self._queue.available else unknown}"

    def warm_up(self, function: Callable[[], object]) -> int:
        function()
        once = math.inf
        for _ in range(2):
            begin = time.perf_counter()
            function()
            once = min(once, time.perf_counter() - begin)
        return max(1, math.ceil(SHORTEST_SAMPLE / max(once, 1e-7)))

    def watch(self) -> None:
        self._queue.watch()

    def time(self, function: Callable[[], object], repeats: int = 1) -> Timed:
        calls = range(repeats)
        waited = self._queue.waited()
        wall = time.perf_counter()
        begin = self.now()
        for _ in calls:
            function()
        elapsed = self.now() - begin
        wall = time.perf_counter() - wall
        waited = self._queue.waited() - waited
        clean = waited <= MAX_WAITED * wall
        if not clean:
            self.unclean += 1
        return Timed(elapsed / repeats, clean)


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads for a while; 0 stands for a GPU, where the CPU's threads stay as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class GpuClock(Clock):
    """Times calls on a GPU.

    ``kernels``: the time of the GPU between two events around the call, L2 cold (a buffer of twice its size is written
    before), the queue filled ahead, so that launches cost what they cost in a full queue. Otherwise the wall time from
    an idle GPU to an idle GPU, in which a CPU that is too slow to keep the GPU busy shows: for whole training steps.
    """

    def __init__(self, device: torch.device, kernels: bool) -> None:
        self.kernels = kernels
        self.description = "wall time, GPU idle before and after"
        if kernels:
            self.description = "events on the GPU, L2 cold, queue filled ahead"
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def warm_up(self, function: Callable[[], object]) -> int:
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        return 1

    def time(self, function: Callable[[], object], repeats: int = 1) -> Timed:
        calls = range(repeats)
        if not self.kernels:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in calls:
                function()
            torch.cuda.synchronize()
            return Timed((time.perf_counter() - begin) / repeats, clean=True)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        torch.cuda._sleep(HEAD_START)
        first.record()
        for _ in calls:
            function()
        last.record()
        torch.cuda.synchronize()
        return Timed(1e-3 * first.elapsed_time(last) / repeats, clean=True)


def make_clock(device: torch.device, threads: int, kernels: bool = True) -> Clock:
    """The clock for a device; ``threads`` are the CPU's, ``kernels`` a GPU's (see GpuClock).

    Raises:
        NotImplementedError: a device that is neither the CPU nor CUDA.
        RuntimeError: no GPU is there.
    """
    if device.type == "cpu":
        return CpuClock(threads)
    if device.type != "cuda":
        raise NotImplementedError(f"make_clock: expected cpu or cuda, got {device.type}")
    if not torch.cuda.is_available():
        raise RuntimeError("make_clock: no GPU is visible to torch")
    return GpuClock(device, kernels)


def copy_bandwidth(device: torch.device, clock: Clock, size: int) -> float | None:
    """Bytes read and written per second by a copy of ``size`` bytes; None where no sample counted."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    samples: dict[Hashable, list[float | None]] = {}
    interleave({COPY: lambda: target.copy_(source)}, clock, Budget(rounds=31, seconds=1.0), samples)
    found = band([value for value in samples[COPY] if value is not None])
    return None if found is None else 2 * size / found.median


@dataclass
class Budget:
    """How long to measure: ``rounds`` samples per function, fewer (but FEWEST_ROUNDS) in ``seconds``."""

    rounds: int
    seconds: float = math.inf
    seed: int = 0


FEWEST_ROUNDS = 5  # below that, a median says little


def interleave(
    functions: Mapping[Hashable, Callable[[], object]],
    clock: Clock,
    budget: Budget,
    samples: dict[Hashable, list[float | None]],
    on_round: Callable[[int], None] = lambda done: None,
) -> None:
    """Time every function once per round, in an order reshuffled every round, into ``samples``.

    The samples of an interrupted round are dropped, so that the lists stay paired and a caller who catches
    KeyboardInterrupt keeps every whole round.

    torch.utils.benchmark is not used because it times one statement to its end before the next: what the machine did
    meanwhile would go into the ratio, and each function would find its own data in the cache.
    """
    repeats = {name: clock.warm_up(function) for name, function in functions.items()}
    clock.watch()
    for name in functions:
        samples[name] = []
    shuffled = list(functions)
    generator = random.Random(budget.seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    begin = time.perf_counter()  # on a busy machine, collecting can take a second
    try:
        for done in range(budget.rounds):
            if done >= FEWEST_ROUNDS and time.perf_counter() - begin > budget.seconds:
                break
            generator.shuffle(shuffled)
            current = {name: _sample(functions[name], clock, repeats[name]) for name in shuffled}
            for name, sample in current.items():
                samples[name].append(sample)
            on_round(done + 1)
    finally:
        if collecting:
            gc.enable()


def _sample(function: Callable[[], object], clock: Clock, repeats: int) -> float | None:
    for _ in range(TRIES):
        sample = clock.time(function, repeats)
        if sample.clean:
            return sample.seconds
    return None
