"""Benchmarks: samples, clocks, and the numbers that are computed from samples."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import timing
from benchmarks.timing import Band, Budget, Timed
from support.benchmarking import FakeGpu


def test_geometric_mean_cancels_inverse_ratios():
    """2x and 0.5x are even; the arithmetic mean would say 1.25."""
    assert timing.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert timing.geometric_mean([2.0, 4.0, 8.0]) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="at least one"):
        timing.geometric_mean([])


def test_ratios_are_paired_by_round():
    """A machine that slows down to a tenth in the middle leaves paired ratios at 2, and the ratio of means not.

    Rounds where either sample was discarded, or where a net time is not positive, do not count.
    """
    slow = [2.0, 20.0, None, 20.0, 4.0]
    fast = [1.0, 10.0, 1.0, None, 0.0]
    assert timing.paired_ratios(slow, fast) == [2.0, 2.0]
    with pytest.raises(ValueError):
        timing.paired_ratios([1.0], [1.0, 2.0])


def test_differences_keep_rounds_aligned():
    assert timing.differences([3.0, None, 5.0], [1.0, 1.0, None]) == [2.0, None, None]


def test_band_is_the_quartiles():
    assert timing.band([5.0, 1.0, 3.0, 2.0, 4.0]) == Band(2.0, 3.0, 4.0)
    assert timing.band([7.0]) == Band(7.0, 7.0, 7.0)
    assert timing.band([]) is None


class CountingClock:
    """Stands in for the clock: every call takes as long as its number says; ``unclean`` calls had to wait."""

    def __init__(self, unclean: tuple[int, ...] = (), interrupt_at: int | None = None) -> None:
        self.calls: list[object] = []
        self._unclean, self._interrupt_at = unclean, interrupt_at

    def warm_up(self, function) -> int:
        return 1

    def watch(self) -> None:
        self.calls.clear()

    def time(self, function, repeats=1) -> Timed:
        if len(self.calls) == self._interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(function)
        return Timed(float(len(self.calls)), len(self.calls) not in self._unclean)


def functions(count: int):
    return {number: (lambda number=number: number) for number in range(count)}


def test_every_round_times_each_function_once_in_another_order():
    clock, samples, timed = CountingClock(), {}, functions(4)
    timing.interleave(timed, clock, Budget(rounds=12), samples)
    assert {len(values) for values in samples.values()} == {12}
    rounds = [tuple(clock.calls[i : i + 4]) for i in range(0, len(clock.calls), 4)]
    assert all(set(calls) == set(timed.values()) for calls in rounds)
    assert len(set(rounds)) > 3


def test_an_interrupted_round_is_dropped_whole():
    """Ctrl-C in the third round of four functions leaves two samples of each, so pairs stay pairs."""
    samples = {}
    with pytest.raises(KeyboardInterrupt):
        timing.interleave(functions(4), CountingClock(interrupt_at=10), Budget(rounds=9), samples)
    assert [len(values) for values in samples.values()] == [2, 2, 2, 2]


def test_a_sample_that_waited_is_taken_again_and_then_given_up():
    samples = {}
    timing.interleave(functions(1), CountingClock(unclean=(1, 4, 5, 6)), Budget(rounds=3), samples)
    assert samples == {0: [2.0, 3.0, None]}


def test_time_limit_still_leaves_some_rounds():
    samples = {}
    timing.interleave(functions(2), CountingClock(), Budget(rounds=50, seconds=0.0), samples)
    assert [len(values) for values in samples.values()] == [timing.FEWEST_ROUNDS] * 2


def test_clock_tells_when_threads_waited_for_a_core(monkeypatch):
    clock = timing.CpuClock(threads=1)
    waited = itertools.count()
    monkeypatch.setattr(clock, "_queue", type("Queue", (), {"waited": lambda self: float(next(waited))})())
    assert not clock.time(lambda: None).clean  # a second on the run queue, for no work
    monkeypatch.setattr(clock, "_queue", type("Queue", (), {"waited": lambda self: 5.0})())
    assert clock.time(lambda: None).clean
    assert clock.unclean == 1


def test_one_thread_is_timed_by_its_cpu_time():
    """Sleeping takes wall time only: it must not count on one thread, and must on two."""
    import time

    assert timing.CpuClock(1).time(lambda: time.sleep(0.05)).seconds < 0.02
    assert timing.CpuClock(2).time(lambda: time.sleep(0.05)).seconds >= 0.05


def test_short_functions_are_called_several_times_in_a_sample():
    import time

    clock = timing.CpuClock(1)
    assert clock.warm_up(lambda: time.sleep(2 * timing.SHORTEST_SAMPLE)) == 1
    assert clock.warm_up(lambda: None) > 100


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="expected cpu or cuda, got mps"):
        timing.make_clock(torch.device("mps"), 1)


def test_kernels_are_timed_between_events_behind_a_head_start(monkeypatch):
    """Nothing but the calls is between the events, the wait is before both, and they are read after the queue ran."""
    gpu = FakeGpu(monkeypatch)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **options: empty(*size, **options))
    clock = timing.make_clock(torch.device("cuda"), 0)
    assert clock.warm_up(lambda: gpu.log.append("call")) == 1
    gpu.log.clear()
    timed = clock.time(lambda: gpu.log.append("call"), repeats=3)
    assert gpu.log == ["head start", "event", "call", "call", "call", "event", "synchronize"]
    assert timed == Timed(4e-3 / 3, clean=True)


def test_whole_steps_are_timed_from_an_idle_gpu_to_an_idle_gpu(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    clock = timing.make_clock(torch.device("cuda"), 0, kernels=False)
    assert clock.time(lambda: gpu.log.append("call")).seconds > 0
    assert gpu.log == ["synchronize", "call", "synchronize"]


def test_copy_bandwidth_counts_reading_and_writing():
    """The rounds take 1, 2, ... 31 s: the median counts."""
    clock = CountingClock()
    assert timing.copy_bandwidth(torch.device("cpu"), clock, 1000) == pytest.approx(2000 / 16)
    assert len(clock.calls) == 31
