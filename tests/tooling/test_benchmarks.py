"""The benchmarks: what they compute from samples, what they refuse, and that both scripts run from end to end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import (
    arguments,
    bench,
    cases,
    compiled,
    memory,
    models,
    networks,
    peers,
    pictures,
    report,
    steps,
    timing,
    traffic,
)
from benchmarks.cases import Cell, Configuration
from benchmarks.memory import Saved
from benchmarks.report import CellResult, PeerResult, Run
from benchmarks.timing import Band, Plan, Timed
from examples import train_digits, why_batch_norm

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark or an example as a user would, from a folder that is not the checkout's."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def result(ratio: Band | None, peer: str = "torch", pairs: int = 9, **changes: object) -> CellResult:
    fields = {
        "configuration": "8x4x2x2 NCHW float32",
        "shape": (8, 4, 2, 2),
        "layout": "NCHW",
        "dtype": "float32",
        "family": cases.FIRST_32,
        "pass_name": "forward",
        "fusion": "relu",
        "threads": 1,
        "bytes": 1024,
        "ms": Band(0.5, 1.0, 1.5),
        "copy_ms": None,
        "copy_speed": 0.25,
        "peers": {peer: PeerResult(Band(1.0, 2.0, 3.0), ratio, pairs, None)},
    }
    return CellResult(**{**fields, **changes})


ENVIRONMENT = {
    "device": "a CPU",
    "commit": "0123",
    "date": "today",
    "torch": "2",
    "bnfused": "1",
    "bnfused_extension": True,
}


def run_of(*results: CellResult) -> Run[CellResult]:
    return Run(ENVIRONMENT, {"rounds": 9}, list(results), roof={1: 1e10})


# --- numbers from samples ---


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


def test_a_chain_is_net_of_producer_and_consumer():
    """Chains of 5 and 3 around 1 without batch norm: net 4 over 2, not 5 over 3."""
    configuration = Configuration((2, 4), "NC", "float32", cases.CHAIN, ("chain",), ("plain",))
    (cell,) = configuration.cells(1)
    samples = {
        ("torch", "chain", "plain"): [5.0, 5.0],
        ("bnfused", "chain", "plain"): [3.0, 3.0],
        "no batch norm": [1.0, 1.0],
        "copy": [1.0, 1.0],
    }
    measured = bench.cell_result(cell, configuration, ["torch"], samples)
    assert measured.ratio("torch") == Band(2.0, 2.0, 2.0)
    # The least traffic of a forward is that of a copy: twice its time is half its speed.
    assert measured.copy_speed == pytest.approx(0.5)


def test_peers_are_paired_by_round_and_none_is_mixed_with_another():
    """Speed counts the fewest bytes, 3 activations where the copy moves 2; bandwidth is those over the time."""
    configuration = Configuration((8, 4), "NC", "float32", cases.TINY, ("forward",), ("add_relu",))
    (cell,) = configuration.cells(1)
    samples = {
        "copy": [2.0, 4.0, 6.0],
        ("bnfused", "forward", "add_relu"): [3.0, 6.0, 9.0],
        ("torch", "forward", "add_relu"): [6.0, 12.0, 18.0],
        ("cuDNN", "forward", "add_relu"): [1.5, 3.0, None],
    }
    measured = bench.cell_result(cell, configuration, ["torch", "cuDNN"], samples)
    assert measured.ratio("torch") == Band(2.0, 2.0, 2.0)
    assert measured.ratio("cuDNN") == Band(0.5, 0.5, 0.5)
    assert [measured.peers[name].pairs for name in ("torch", "cuDNN")] == [3, 2]
    assert [measured.speed(name) for name in ("bnfused", "torch", "cuDNN")] == pytest.approx([1.0, 0.5, 2.0])
    activation = 8 * 4 * 4
    assert measured.bytes == 3 * activation
    assert measured.bandwidth("bnfused") == pytest.approx(3 * activation / 6.0)
    assert measured.bandwidth("torch") == pytest.approx(3 * activation / 12.0)
    assert measured.bandwidth("copy") == pytest.approx(2 * activation / 4.0)
    assert measured.bandwidth("compile") is measured.ratio("compile") is None


# --- sampling ---


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
    timing.interleave(timed, clock, Plan(rounds=12), samples)
    assert {len(values) for values in samples.values()} == {12}
    rounds = [tuple(clock.calls[i : i + 4]) for i in range(0, len(clock.calls), 4)]
    assert all(set(calls) == set(timed.values()) for calls in rounds)
    assert len(set(rounds)) > 3


def test_an_interrupted_round_is_dropped_whole():
    """Ctrl-C in the third round of four functions leaves two samples of each, so pairs stay pairs."""
    samples = {}
    with pytest.raises(KeyboardInterrupt):
        timing.interleave(functions(4), CountingClock(interrupt_at=10), Plan(rounds=9), samples)
    assert [len(values) for values in samples.values()] == [2, 2, 2, 2]


def test_a_sample_that_waited_is_taken_again_and_then_given_up():
    samples = {}
    timing.interleave(functions(1), CountingClock(unclean=(1, 4, 5, 6)), Plan(rounds=3), samples)
    assert samples == {0: [2.0, 3.0, None]}


def test_time_limit_still_leaves_some_rounds():
    samples = {}
    timing.interleave(functions(2), CountingClock(), Plan(rounds=50, seconds=0.0), samples)
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


class FakeGpu:
    """Stands in for torch.cuda: a queue whose events are read when it is synchronized, a millisecond per entry."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.log.append("event")
                self.at = len(gpu.log)

            def elapsed_time(self, end: Event) -> float:
                assert gpu.log[-1] == "synchronize"
                return float(end.at - self.at)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append("head start"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: self.log.append("synchronize"))
        properties = type("Properties", (), {"L2_cache_size": 64})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


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


# --- cases ---


def every_cell() -> list[Cell]:
    dtypes = tuple(cases.DTYPE_BYTES)
    return [
        cell
        for configuration in cases.cpu_configurations(dtypes, quick=False)
        for threads in (1, 2)
        for cell in configuration.cells(threads)
    ]


def every_sweep(device: str, quick: bool = False) -> list[Configuration]:
    return [c for sweep in cases.SWEEPS for c in cases.sweep_configurations(sweep, device, "float32", quick)]


def test_cell_names_are_unique():
    """``--compare`` matches runs by them."""
    gpu = [cell for c in cases.gpu_configurations(cases.GPU_DTYPES, quick=False) for cell in c.cells(0)]
    swept = [cell for c in every_sweep("cpu") for cell in c.cells(1)]
    for cells in (every_cell(), gpu, swept):
        names = [cell.name for cell in cells]
        assert len(set(names)) == len(names)


def test_every_network_dtype_and_layout_is_measured_on_a_gpu():
    whole = cases.gpu_configurations(cases.GPU_DTYPES, quick=False)
    assert {c.network for c in whole} == {"ResNet-50", "MobileNetV2", "DenseNet-121", "U-Net", "MLP"}
    assert {(c.layout, c.dtype) for c in whole} == {
        (layout, dtype) for layout in ("NCHW", "channels_last", "NC") for dtype in ("bfloat16", "float16", "float32")
    }
    assert {c.network for c in whole if c.compiled} == {c.network for c in whole}
    quick = cases.gpu_configurations(cases.GPU_DTYPES, quick=True)
    assert set(quick) < set(whole) and {c.network for c in quick} == {c.network for c in whole}
    assert "T=" not in whole[0].cells(0)[0].name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_sweep_varies_one_size(device):
    """In both layouts, in growing order, and the quick one is a part of the whole."""
    for sweep, dimensions in (("batch", {0}), ("channels", {1}), ("spatial", {2, 3}), ("threads", set())):
        found = cases.sweep_configurations(sweep, device, "float32", quick=False)
        for layout in ("NCHW", "channels_last"):
            shapes = [c.shape for c in found if c.layout == layout]
            assert shapes == sorted(set(shapes))
            assert {d for d in range(4) if len({shape[d] for shape in shapes}) > 1} == dimensions
        quick = cases.sweep_configurations(sweep, device, "float32", quick=True)
        assert set(quick) < set(found) if dimensions else quick == found


def test_tiny_keeps_the_kind():
    configuration = Configuration((256, 64, 112, 112), "NCHW", "float32", cases.FIRST_32, ("eval",), network="a")
    shrunk = cases.tiny(configuration)
    assert shrunk == dataclasses.replace(configuration, shape=(4, 6, 4, 4))


def test_every_target_belongs_to_a_measured_group():
    """A target whose group is misspelt would never be shown."""
    groups = {cell.group for cell in every_cell()}
    assert set(cases.TARGETS) <= groups


def test_quick_is_a_part_of_the_whole_with_every_family_that_has_targets():
    whole = cases.cpu_configurations(cases.DEFAULT_DTYPES, quick=False)
    quick = cases.cpu_configurations(cases.DEFAULT_DTYPES, quick=True)
    assert set(quick) < set(whole)
    families = {cell.group[0] for c in quick for cell in c.cells(1)}
    assert families >= {family for family, _, _ in cases.TARGETS} - {cases.LARGE}


def test_filter_is_a_regular_expression_on_the_name():
    configuration = Configuration((2, 4), "NC", "float32", cases.TINY, ("forward", "eval"))
    names = [cell.name for cell in configuration.cells(1, "forward .*relu T=1$")]
    assert names == ["2x4 NC float32 forward relu T=1", "2x4 NC float32 forward add_relu T=1"]


@pytest.mark.parametrize(
    ("pass_name", "fusion", "activations"),
    [
        ("forward", "plain", 2),  # x, y
        ("eval", "add_relu", 3),  # x, residual, y
        ("backward", "relu", 3),  # x, grad_y, grad_x
        ("backward", "add_relu", 4),  # and grad_residual
        ("forward+backward", "add_relu", 7),
    ],
)
def test_least_traffic(pass_name, fusion, activations):
    assert cases.bytes_moved(pass_name, fusion, 100) == 100 * activations


@pytest.mark.parametrize(
    ("layout", "shape", "strides"),
    [
        ("NCHW", (2, 3, 4, 5), (60, 20, 5, 1)),
        ("channels_last", (2, 3, 4, 5), (60, 1, 15, 3)),
        ("channels_last_3d", (2, 3, 4, 5, 6), (360, 1, 90, 18, 3)),
        ("NLC view", (2, 3, 4), (12, 1, 3)),
    ],
)
def test_layouts(layout, shape, strides):
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    laid_out = peers.to_layout(tensor, layout)
    assert laid_out.stride() == strides
    assert torch.equal(laid_out, tensor)


# --- reports ---


def test_json_round_trip(tmp_path):
    run = run_of(result(Band(1.5, 2.0, 2.5), saved={"torch": Saved(3, 2, 1)}), result(None, pairs=0, threads=2))
    run.interrupted, run.failed, run.not_measured = True, ["this"], ["that"]
    run.write(tmp_path / "new" / "run.json")
    again = report.read_cells(tmp_path / "new" / "run.json")
    assert again == run
    assert isinstance(again.results[0].ratio("torch"), Band)
    assert isinstance(again.results[0].saved["torch"], Saved)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_kept_results_lie_in_a_folder_of_the_device():
    """What --json says itself is not overruled."""
    options = bench.parse_arguments(["--keep", "--json", "mine.json"])
    arguments.set_output_files(options, {"device": "NVIDIA H100 80GB HBM3"}, "bench")
    folder = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
    assert (options.json, options.picture) == (Path("mine.json"), folder / "bench.png")
    options = bench.parse_arguments(["--keep", "elsewhere"])
    arguments.set_output_files(options, {"device": "NVIDIA H100 80GB HBM3"}, "bench")
    assert options.json == Path("elsewhere/nvidia-h100-80gb-hbm3/bench.json")


def test_the_commit_where_git_is_wary(monkeypatch):
    """Of a checkout that is another user's it tells nothing unless asked to."""
    wanted = report.commit()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert report.commit() == wanted


def test_the_commit_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.commit() is None
    assert report.describe_environment(named_commit="abc")["commit"] == "abc"


def test_a_run_without_results_is_read_too(tmp_path):
    run_of().write(tmp_path / "run.json")
    assert report.read_cells(tmp_path / "run.json") == run_of()


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1, "results": []}', '{"format": 2}', "no json"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json"):
        report.read_cells(path)


def test_the_committed_run_can_be_compared_with():
    run = report.read_cells(ROOT / "benchmarks" / "results" / "cpu-amd-epyc-zen5" / "bench.json")
    names = {cell.name for cell in every_cell()}
    assert len(run.results) > 800
    assert {result.cell.name for result in run.results} <= names


def test_a_peer_that_is_measured_later_joins_its_cell():
    """Its ratio stays that of its own rounds; bnfused's time stays that of the first."""
    results = [result(Band(2.0, 2.0, 2.0), saved={"torch": Saved(1, 1, 1)})]
    report.merge(
        results, [result(Band(3.0, 3.0, 3.0), peer="compile", ms=None), result(None, peer="compile", threads=2)]
    )
    first, second = results
    assert (first.ratio("torch").median, first.ratio("compile").median) == (2.0, 3.0)
    assert first.ms is not None and first.saved
    assert second.threads == 2


def test_summary_has_geomean_worst_and_target():
    (summary,) = report.summarize(
        [
            result(Band(2.0, 2.0, 2.0), configuration="slow"),
            result(Band(8.0, 8.0, 8.0), configuration="fast"),
            result(None, configuration="not measured"),
        ]
    )
    assert summary.count == 2
    assert summary.geomean == pytest.approx(4.0)
    assert summary.worst.configuration == "slow"
    assert summary.target == cases.TARGETS[cases.FIRST_32, "forward", "relu"][0]
    (of_gpu,) = report.summarize([result(Band(2.0, 2.0, 2.0), threads=0)])
    assert of_gpu.target == cases.Target()


def test_summaries_and_closing_lines_keep_peers_apart():
    """A fast peer must not hide behind a slow one; targets are those against eager torch."""
    results = [
        result(Band(2.0, 2.0, 2.0)),
        result(Band(8.0, 8.0, 8.0), configuration="fast"),
        result(Band(0.5, 0.5, 0.5), peer="cuDNN", configuration="slow"),
    ]
    summaries = report.summarize(results)
    assert [(s.peer, s.count, s.geomean) for s in summaries] == [("torch", 2, pytest.approx(4.0)), ("cuDNN", 1, 0.5)]
    assert summaries[1].target == cases.Target()
    assert report.closing_lines(results) == [
        "torch, all 2 cells: geometric mean 4.00, worst 2.00: 8x4x2x2 NCHW float32 forward relu T=1",
        "cuDNN, all 1 cells: geometric mean 0.50, worst 0.50: slow forward relu T=1",
    ]
    assert report.closing_lines([]) == []


def test_eval_of_all_layouts_is_one_group_but_tiny_ones_stay_apart():
    evals = [
        result(Band(1.0, 1.0, 1.0), pass_name="eval", family=family)
        for family in (cases.FIRST_32, cases.LAST_16, cases.TINY)
    ]
    assert [summary.count for summary in report.summarize(evals)] == [2, 1]


def test_compare_says_what_is_beyond_noise():
    """Bands that touch or stand on few pairs are noise, whatever the medians say; cells of one run are left out."""
    before = run_of(
        result(Band(1.8, 2.0, 2.2)),
        result(Band(1.8, 2.0, 2.2), fusion="plain"),
        result(Band(2.0, 2.0, 2.0), fusion="add_relu"),
        result(Band(1.0, 1.0, 1.0), threads=2),
    )
    after = run_of(
        result(Band(2.1, 2.5, 2.9)),
        result(Band(2.3, 2.5, 2.7), fusion="plain"),
        result(Band(2.5, 2.5, 2.5), fusion="add_relu", pairs=1),
        result(None, threads=2),
    )
    changes = report.compare(before, after)
    assert [change.factor for change in changes] == [1.25, 1.25, 1.25]
    assert [change.verdict for change in changes] == ["within noise", "faster", "within noise"]
    assert [change.verdict for change in report.compare(after, before)] == ["within noise", "slower", "within noise"]
    assert report.comparison_line(changes) == (
        "3 cells: 1 faster, 0 slower, 2 within noise; geometric mean of the change 1.250"
    )
    console = report.make_console()
    with console.capture() as captured:
        for table in report.comparison_tables(changes):
            console.print(table)
    shown = [line.split() for line in captured.get().splitlines()]
    assert [line[-1] for line in shown if line[-2:-1] == ["1.25"]] == ["faster"]
    assert shown[-1][-3:] == ["0", "0", "1"]  # by group, add_relu comes last: within noise


def test_compare_takes_each_peer_by_itself():
    before = run_of(
        dataclasses.replace(result(None), peers=result(Band(1, 1, 1)).peers | result(Band(2, 2, 2), "cuDNN").peers)
    )
    after = run_of(result(Band(4.0, 4.0, 4.0), peer="cuDNN"))
    (change,) = report.compare(before, after)
    assert (change.peer, change.factor) == ("cuDNN", 2.0)


def test_tables_print_what_was_not_measured_as_a_dash():
    console = report.make_console()
    with console.capture() as captured:
        console.print(report.cell_table("a title", [result(None, pairs=0), result(Band(1.5, 2.0, 2.5))]))
    lines = [line for line in captured.get().splitlines() if "forward" in line]
    assert "2.00x" not in lines[0] and " - " in lines[0]
    assert "2.00x" in lines[1] and "1.50-2.50" in lines[1] and "25%" in lines[1]
    assert lines[1].split()[2:5] == ["0.000977", "1", "0.00102"]  # 1024 B in 1 ms


# --- memory ---


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_what_is_kept_for_the_backward(extension, layout):
    """In sizes of x: both keep x, torch's ReLU keeps its output too; the rest is per channel, or a bit per value.

    The sum per channel: weight, bias, statistics and what is computed of them, at most 8 values of 8 bytes.
    """
    configuration = Configuration((8, 16, 28, 28), layout, "float32", cases.FIRST_32, ("forward",))
    tensors = peers.Tensors(configuration, torch.device("cpu"), seed=0)
    per_channel = 8 * 8 * 16
    for fusion in cases.FUSIONS:
        saved = {
            name: memory.saved_for_backward(peers.forward_function(name, tensors, True, fusion), tensors.inputs(fusion))
            for name in ("torch", "bnfused")
        }
        activation = configuration.activation_bytes
        assert saved["torch"].output == (activation if fusion != "plain" else 0)
        assert saved["bnfused"].output == 0
        mask = activation // 32 if fusion == "add_relu" else 0
        assert mask <= saved["bnfused"].other <= mask + per_channel
        assert saved["torch"].other <= per_channel
        assert activation <= saved["torch"].inputs <= activation + per_channel
        # x; where it is added, the residual may be kept too
        assert activation <= saved["bnfused"].inputs <= (1 + (fusion == "add_relu")) * activation + per_channel


def test_a_storage_is_counted_once_and_whole():
    """A view and its base are one; what the graph does not keep does not count."""
    x = torch.randn(100, requires_grad=True)
    weight = torch.randn(10)

    def forward():
        part = torch.exp(x)  # keeps its result
        return (part[:10] * weight).sum() + part[10:20].square().sum() + x.mean()

    assert memory.saved_for_backward(forward, [x, weight]) == Saved(inputs=40, output=0, other=400)
    assert memory.saved_for_backward(lambda: torch.exp(x), [x]) == Saved(0, 400, 0)


# --- pictures ---


def drawn(monkeypatch) -> list:
    """The figures that are saved from now on."""
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    return figures


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in axes.get_lines()}


def test_a_sweep_is_drawn_under_its_roofs(monkeypatch):
    """GB/s of each fusion against the size, the copy of the same tensor above it, and the copy that no cache holds."""
    swept = [
        result(
            Band(2.0, 2.0, 2.0),
            configuration=f"{n}",
            shape=(n, 4, 2, 2),
            family=f"batch sweep, {layout}",
            layout=layout,
            copy_ms=Band(1e-4, 1e-4, 1e-4),
            pass_name=pass_name,
        )
        for n in (8, 2)
        for layout, pass_name in pictures.SWEEP_PANELS
    ]
    figures = drawn(monkeypatch)
    pictures.save_sweeps(run_of(*swept), Path("unused.png"))
    (figure,) = figures
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [
        f"{pass_name}, {layout}" for layout, pass_name in pictures.SWEEP_PANELS
    ]
    for axes in panels:
        lines = lines_of(axes)
        wanted = {
            "bnfused, +ReLU": (1024 / 1e-3, 1024 / 1e-3),
            "torch, +ReLU": (1024 / 2e-3, 1024 / 2e-3),
            "roof: a copy of x": (2 * 128 / 1e-7, 2 * 512 / 1e-7),
            "roof: a copy that no cache holds": (10e9, 10e9),
        }
        for label, speeds in wanted.items():
            sizes, shown = zip(*lines[label], strict=True)
            assert sizes == (2, 8) and shown == pytest.approx([speed / 1e9 for speed in speeds]), label
        assert axes.get_xlabel() == "batch size N of (N, 4, 2, 2), T=1"
    assert panels[0].get_ylabel().startswith("GB/s")
    with pytest.raises(ValueError, match="results of a sweep"):
        pictures.save_sweeps(run_of(result(Band(1.0, 1.0, 1.0))), Path("unused.png"))


def test_ratios_and_speeds_are_drawn_by_group(monkeypatch):
    figures = drawn(monkeypatch)
    pictures.save_ratios(run_of(result(Band(1.5, 2.0, 2.5))), Path("unused.png"))
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["channels first float32, forward +ReLU"]
    assert 2.0 in [x for line in left.get_lines() for x in line.get_xdata()]
    assert 0.25 in [x for line in right.get_lines() for x in line.get_xdata()]
    with pytest.raises(ValueError, match="at least one cell"):
        pictures.save_ratios(run_of(result(None)), Path("unused.png"))


# --- networks ---


@pytest.mark.parametrize(
    ("make", "parameters", "fused"),
    [
        (models.resnet18, 11_689_512, {"batch_norm+relu": 9, "batch_norm+add+relu": 8, "batch_norm": 3}),
        (models.resnet50, 25_557_032, {"batch_norm+relu": 33, "batch_norm+add+relu": 16, "batch_norm": 4}),
        (models.MobileNetV2, 3_504_872, {"batch_norm+relu6": 35, "batch_norm+add": 10, "batch_norm": 7}),
        (models.DenseNet121, 7_978_856, {"batch_norm+relu": 121}),
    ],
)
def test_networks_are_those_of_the_papers(extension, make, parameters, fused):
    """As many parameters as torchvision's, and as much to fuse (tests/conversion/test_networks.py)."""
    model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert peers.bnfused.fusion_report(peers.bnfused.convert(model)).counts == fused


def test_a_network_that_converts_wrongly_is_not_timed(extension, tmp_path, monkeypatch, capsys):
    """It is named, once for each case, and the exit status tells."""

    def wrong(model):
        converted = convert(model)
        with torch.no_grad():
            next(m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)).bias += 1e-3
        return converted

    convert = steps.bnfused.convert
    monkeypatch.setattr(steps.bnfused, "convert", wrong)
    monkeypatch.setattr(networks, "CHECKED_SIZE", 33)
    numbers = tmp_path / "run.json"
    assert networks.main([*NETWORKS, "--networks", "MobileNetV2", "--json", str(numbers)]) == 1
    found = json.loads(numbers.read_text())
    assert found["results"] == []
    assert len(found["failed"]) == 1 and "in float64" in found["failed"][0]


NETWORKS = ["--size", "33", "--batch-size", "2", "--rounds", "1", "--threads", "1", "--dtypes", "float32"]


def network_result(**changes: object) -> networks.NetworkResult:
    samples = {"torch": [0.4, 0.8, None], "bnfused": [0.2, 0.2, 0.1]}
    case = networks.Case("ResNet-50", "bfloat16", "channels_last")
    made = networks.network_result(case, 8, 64, samples, {"torch": 200, "bnfused": 150})
    return dataclasses.replace(made, **changes)


def test_images_per_second_are_of_the_median_step_and_ratios_of_pairs():
    made = network_result()
    assert made.images_per_second == pytest.approx({"torch": 8 / 0.6, "bnfused": 8 / 0.2})
    assert (made.ratio.median, made.pairs) == (3.0, 2)
    console = report.make_console()
    with console.capture() as captured:
        console.print(networks.results_table([made]))
    (row,) = (line for line in captured.get().splitlines() if line.startswith("ResNet-50"))
    shown = "ResNet-50 bfloat16 channels_last 8 600.0 200.0 3.00x 2.50-3.50 2 (few) 13.3 40 0.000191 0.000143 75%"
    assert " ".join(row.split()) == shown


def test_networks_are_drawn_with_speed_and_memory(monkeypatch):
    figures = drawn(monkeypatch)
    run = Run(ENVIRONMENT, {"size": 64, "memory": "bytes"}, [network_result(), network_result(ratio=None)])
    pictures.save_networks(run, Path("unused.png"))
    speed, kept = figures[0].axes
    assert sorted({round(bar.get_height(), 3) for bar in speed.patches}) == [13.333, 40.0]
    assert {round(bar.get_height() * 2**20) for bar in kept.patches} == {200, 150}
    assert {"3.00x"} == {text.get_text() for text in speed.texts}


def test_peak_memory_of_a_gpu_is_that_of_a_second_step(monkeypatch):
    """The first allocates what stays; the peak is forgotten after it and read when the second has run."""
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: gpu.log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.log.append("read") or 123)
    monkeypatch.setattr(networks, "step_of", lambda *_: lambda: gpu.log.append("step"))
    case = networks.Case("ResNet-50", "float32", "NCHW")
    assert networks.peak_memory(nn.Identity(), case, 2, 33, torch.device("cuda")) == 123
    assert gpu.log == ["step", "reset", "step", "synchronize", "read"]


def test_memory_on_a_cpu_leaves_the_parameters_out(extension):
    """Of a linear layer under cross entropy's input, only its own input is kept."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 33 * 33, 10))
    case = networks.Case("a", "float32", "NCHW")
    assert networks.peak_memory(model, case, 2, 33, torch.device("cpu")) == 2 * 3 * 33 * 33 * 4


def test_what_is_most_used_is_measured_first():
    found = networks.all_cases(networks.NETWORKS, networks.DTYPES, networks.LAYOUTS)
    assert len(set(found)) == len(found) == 12
    assert [case.name for case in found[:4]] == [
        "ResNet-50 bfloat16 channels_last",
        "MobileNetV2 bfloat16 channels_last",
        "DenseNet-121 bfloat16 channels_last",
        "ResNet-50 bfloat16 NCHW",
    ]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    """Until it fits, and down to one image; other errors are not swallowed."""
    tried = []

    def measure(case, batch, *_):
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("no")
        return network_result(batch=batch), False

    monkeypatch.setattr(networks, "measure", measure)
    options = networks.parse_arguments(["--batch-size", "12"])
    case = networks.Case("ResNet-50", "float32", "NCHW")
    made, interrupted = networks.measure_what_fits(case, options, None, lambda done: None)
    assert (tried, made.batch, interrupted) == ([12, 6, 3], 3, False)

    def never_fits(case, batch, *_):
        tried.append(batch)
        raise torch.OutOfMemoryError("no")

    tried.clear()
    monkeypatch.setattr(networks, "measure", never_fits)
    with pytest.raises(torch.OutOfMemoryError):
        networks.measure_what_fits(case, options, None, lambda done: None)
    assert tried == [12, 6, 3, 1]


# --- refusing to time what is wrong ---


def test_wrong_results_are_not_timed(extension, monkeypatch):
    """An implementation that is a little off must not get a number, however fast it is."""
    right = peers.bnfused.functional.batch_norm

    def wrong(x, mean, var, weight, bias, *rest, **keywords):
        return right(x, mean, var, weight, bias + 0.01, *rest, **keywords)

    configuration = Configuration((8, 4), "NC", "float32", cases.TINY, ("forward", "backward"))
    tensors = peers.Tensors(configuration, torch.device("cpu"), seed=0)
    cells = configuration.cells(1)
    peers.check_agreement(configuration, cells, tensors)
    monkeypatch.setattr(peers.bnfused.functional, "batch_norm", wrong)
    with pytest.raises(ValueError, match="y of torch and bnfused differ"):
        peers.check_agreement(configuration, cells, tensors)


def test_every_small_cell_agrees(extension):
    """Every pass, fusion and layout of the benchmark on shapes small enough for a test."""
    small = {2: (32, 4), 3: (4, 6, 8), 4: (4, 6, 5, 5), 5: (2, 3, 4, 5, 5)}
    for configuration in cases.cpu_configurations(cases.DTYPE_BYTES, quick=False):
        shrunk = dataclasses.replace(configuration, shape=small[len(configuration.shape)])
        tensors = peers.Tensors(shrunk, torch.device("cpu"), seed=1)
        peers.check_agreement(shrunk, shrunk.cells(1), tensors)


# --- the training demo ---


def training(theirs: list[float], ours: list[float], error: float = 1e-4) -> train_digits.Training:
    """Two trainings of one epoch each with these losses; the exact ones are 2.0, 1.9, 1.8."""
    trainees = {
        name: train_digits.Trainee(None, None, losses, [0.5])
        for name, losses in zip(train_digits.IMPLEMENTATIONS, (theirs, ours), strict=True)
    }
    errors = {"torch": 1e-2, "bnfused": error}
    return train_digits.Training(trainees, len(theirs), errors, [2.0, 1.9, 1.8])


@pytest.mark.parametrize(
    ("theirs", "ours", "error", "expected"),
    [
        ([2.0, 1.9, 1.8, 1.7], [2.0, 1.9, 1.8, 1.75], 1e-4, []),  # later steps may differ
        ([2.0, 1.91, 1.8, 1.7], [2.0, 1.9, 1.8, 1.7], 1e-4, []),  # it is torch that is off
        ([2.0, 1.9, 1.8, 1.7], [2.0, 1.91, 1.8, 1.7], 1e-4, ["step 2"]),
        ([2.0, 1.9, 1.8, 1.7], [2.0, 1.9, math.nan, 1.7], 1e-4, ["step 3", "epoch 1"]),
        ([2.0, 1.9, 1.8, 1.0], [2.0, 1.9, 1.8, 3.0], 1e-4, ["epoch 1"]),
        ([2.0], [2.0], 0.5, ["first gradient"]),
        ([2.0], [2.0], math.nan, ["first gradient"]),
    ],
)
def test_divergence(theirs, ours, error, expected):
    found = train_digits.divergence(training(theirs, ours, error), train_digits.TOLERANCES["float32"])
    assert [message.split(":")[0] for message in found] == expected


@pytest.mark.parametrize(
    ("clean", "count", "all_clean"),
    [
        ([True] * 12, 10, True),  # the first two warm up
        ([True, False] * 8, 7, True),
        ([True, False] * 3, 4, False),  # hardly any clean: all of them, and it is said
        ([True] * 4, 2, True),  # few, but not because of others
    ],
)
def test_step_times_that_count(clean, count, all_clean):
    trial = training([2.0], [2.0])
    for trainee in trial.trainees.values():
        trainee.times = [train_digits.StepTime(0.1, value, None) for value in clean]
    pairs, are_clean = trial.timed_steps(with_sites=False)
    assert (len(pairs), are_clean) == (count, all_clean)
    assert trial.timed_steps(with_sites=True) == ([], True)


def test_site_nodes_are_those_between_input_and_output():
    """The unfused site is three nodes; neither the convolution before it nor the parameters' own nodes are in."""
    convolution, norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    x = convolution(torch.randn(2, 1, 6, 6))
    identity = x * 2
    y = F.relu_(norm(x).add_(identity))
    names = {node.name() for node in train_digits.nodes_between(y, (x, identity))}
    assert names == {"ReluBackward0", "AddBackward0", "NativeBatchNormBackward0"}


def test_site_timer_counts_forward_and_backward():
    """With a clock that ticks at every look, forward counts one tick and each of the backward's nodes one."""
    ticks = itertools.count()
    timer = train_digits.SiteTimer(lambda: float(next(ticks)))
    x = torch.randn(2, 4, 3, 3, requires_grad=True) * 1
    site = train_digits.Site("torch", 4)
    y = timer.run(site.normalize, x, None)
    assert timer.seconds == 1.0
    y.sum().backward()
    assert timer.seconds == 3.0  # ReLU and batch norm


def test_both_networks_start_alike(extension):
    trainees = train_digits.make_trainees(seed=3, dtype=torch.float64, width=8)
    images = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    theirs, ours = (trainees[name].network(images) for name in train_digits.IMPLEMENTATIONS)
    torch.testing.assert_close(ours, theirs)
    assert trainees["bnfused"].network.blocks[0].site1.fused
    assert not trainees["torch"].network.blocks[0].site1.fused


# --- why batch norm works ---


def curve(**accuracies: float) -> why_batch_norm.Curve:
    """``curve(s3=0.5, s7=0.9)``: these accuracies after 3 and after 7 steps."""
    return why_batch_norm.Curve(tuple(int(name[1:]) for name in accuracies), tuple(accuracies.values()))


def test_steps_to_an_accuracy_are_the_first_ones():
    """A later fall below it does not count, and what is never reached is infinitely far."""
    one = curve(s1=0.1, s3=0.95, s7=0.2, s9=0.97)
    assert [one.first(wanted) for wanted in (0.05, 0.95, 0.96, 0.98)] == [1, 3, 9, math.inf]
    assert curve().first(0.5) == math.inf  # the loss was not finite in the first step


def test_speed_is_the_median_of_seeds_at_the_best_rate():
    """At 0.1 one lucky seed of three does not make the rate one that trains."""
    speed = why_batch_norm.Speed(
        {
            0.1: [curve(s2=0.99), curve(s90=0.5), curve(s90=0.5)],
            0.3: [curve(s5=0.92, s50=0.97), curve(s6=0.91, s40=0.97), curve(s70=0.4)],
            1.0: [curve(s8=0.93), curve(s9=0.93), curve(s10=0.93)],
            3.0: [curve(s8=0.2)] * 3,
        }
    )
    assert speed.best(0.90) == (6, 0.3)
    assert speed.best(0.95) == (50, 0.3)
    assert speed.best(0.98)[0] == math.inf
    assert speed.rates_that_train() == [0.3, 1.0]


def test_while_learning_ends_where_it_is_first_trained():
    trace = why_batch_norm.Trace(steps=[0, 10, 20, 30], accuracies=[0.1, 0.92, 0.5, 0.95], losses=[4.0, 3.0, 2.0, 1.0])
    assert trace.trained() == 10
    losses = [why_batch_norm.median_of([trace], lambda one: one.losses, when) for when in (True, False, None)]
    assert losses == [4.0, 2.0, 2.5]


@pytest.mark.parametrize("network", why_batch_norm.NETWORKS.values(), ids=lambda network: network.key)
def test_variants_differ_in_their_norms_alone(network):
    """The same seed gives the same weights, and no layer before a batch norm has a bias."""
    weights = {}
    for variant in why_batch_norm.VARIANTS:
        model = why_batch_norm.make_network(network, variant, seed=5)
        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        weights.setdefault(variant.torch_init, []).append([layer.weight for layer in layers])
        assert len(norms) == (0 if variant.norm is None else len(layers) - 1)
        assert all(type(norm).__module__ == "bnfused.modules" for norm in norms)
        assert [layer.bias is None for layer in layers] == [variant.norm == "before"] * (len(layers) - 1) + [False]
        noises = [module for module in model if isinstance(module, why_batch_norm.diagnostics.ShiftingNoise)]
        assert len(noises) == (len(norms) if variant.noise else 0)
    for first, *others in weights.values():
        assert others
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_unit_gain_keeps_the_variance():
    """Through 24 linear layers the signal keeps its size within a factor of 3; with torch's weights it loses
    ``sqrt(3)`` per layer, 2e-6 in all."""
    x = torch.randn(64, 1, 8, 8)
    plain, shrunk = (
        why_batch_norm.make_network(why_batch_norm.LINEAR, variant, seed=0)[:-1](x).std().item()
        for variant in (why_batch_norm.PLAIN, why_batch_norm.PLAIN_TORCH)
    )
    assert 1 / 3 < plain < 3
    # The biases, of standard deviation 1 / 8 / sqrt(3), stay, and are the same for every x.
    assert shrunk < 0.15


def test_tables_go_between_their_marks():
    page = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n"
    once = why_batch_norm.fill_in(page, {"a": "| new |"})
    assert once == "before\n<!-- begin a -->\n\n| new |\n\n<!-- end a -->\nafter\n"
    assert why_batch_norm.fill_in(once, {"a": "| new |"}) == once
    with pytest.raises(ValueError, match="begin b"):
        why_batch_norm.fill_in(page, {"b": ""})


# --- from end to end ---


def test_bench_from_end_to_end(extension, tmp_path):
    """Measures, prints, writes JSON and picture; a second call compares the run with itself."""
    numbers, picture = tmp_path / "new" / "run.json", tmp_path / "run.png"
    done = run_script(
        "benchmarks/bench.py",
        *("--filter", "64x256 NC float32 (forward|backward|eval) (plain|relu) T=1"),
        *("--threads", "1", "--rounds", "4", "--json", numbers, "--picture", picture),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64x256 NC float32, T=1" in done.stdout
    run = report.read_cells(numbers)
    assert [cell.cell.fusion for cell in run.results] == ["plain", "relu"] * 3
    assert all(cell.peers["torch"].pairs <= 4 and cell.bytes > 0 for cell in run.results)
    assert {name for cell in run.results for name in cell.saved} == {"torch", "bnfused"}
    assert str(tmp_path) not in numbers.read_text()  # what is kept speaks of no folder of this machine
    assert picture.read_bytes().startswith(b"\x89PNG")

    compared = run_script("benchmarks/bench.py", "--compare", numbers, numbers, cwd=tmp_path)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "64x256 NC float32 forward relu T=1" in compared.stdout
    assert re.search(r"^\d cells: 0 faster, 0 slower, \d within noise", compared.stdout, re.MULTILINE)


def bench_run(folder: Path, *arguments: str) -> tuple[int, Run[CellResult]]:
    """bench.py here, on a CPU, with the tensors of a GPU made small."""
    numbers = folder / "bench.json"
    every = ["--cases", "cuda", "--tiny", "--threads", "1", "--rounds", "1", "--json", str(numbers), *arguments]
    return bench.main(every), report.read_cells(numbers)


RESNET = ("--filter", "^ResNet-50 .*channels_last bfloat16", "--peers", "torch")


def test_a_gpus_run_on_the_cpu(extension, tmp_path, capsys):
    """The same script and file; the last lines are each peer's mean and worst cell."""
    status, found = bench_run(tmp_path, *RESNET, "--picture", str(tmp_path / "bench.png"))
    assert status == 0
    assert [(r.pass_name, r.fusion) for r in found.results] == [
        (pass_name, fusion) for pass_name in ("forward", "forward+backward") for fusion in cases.FUSIONS
    ]
    assert found.environment["torch"] == torch.__version__
    assert {"commit", "date", "device", "bnfused_build"} <= set(found.environment)
    assert found.failed == found.not_measured == []
    assert "geometric mean" in capsys.readouterr().out.splitlines()[-1]


def test_compiled_peers_run_the_unfused_forward(extension, tmp_path, monkeypatch):
    """With a stand-in for torch.compile, which takes seconds: each mode, each fusion, and where they are meant to."""
    modes = []

    def stand_in(function, *, mode, **_):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", stand_in)
    status, found = bench_run(tmp_path, "--filter", "^MLP .* NC float32")
    assert status == 0
    # Once for each fusion of the one tensor, whatever is done with it.
    assert Counter(modes) == dict.fromkeys(peers.COMPILE_MODES.values(), len(cases.FUSIONS))
    assert {(r.pass_name, r.fusion) for r in found.results} == {
        (pass_name, fusion) for pass_name in ("forward", "forward+backward") for fusion in cases.FUSIONS
    }
    assert all(set(peers.COMPILE_MODES) < set(r.peers) for r in found.results)


def test_what_is_compiled_comes_after_all_that_is_not():
    """cuDNN and torch share a measurement, each compile has its own, and no backward of a kept graph; the first dtype
    comes first, in one mode and then in the other."""
    some = [
        Configuration((size, 4), "NC", dtype, cases.TINY, ("forward", "backward"), ("plain", "relu"), compiled=compiled)
        for dtype in ("float32", "bfloat16")
        for size, compiled in ((2, True), (3, False), (4, True))
    ]
    work = bench.plan_measurements(some, [1, 2], "", peers.PEERS, every=False)
    assert [what.peers for what in work[:12]] == [("torch", "cuDNN")] * 12
    assert [what.threads for what in work[:4]] == [1, 2, 1, 2]
    compiled = work[12:]
    modes = [("compile",)] * 8 + [("max-autotune",)] * 8
    assert [what.peers for what in compiled] == modes * 2
    assert [what.configuration.dtype for what in compiled] == ["float32"] * 16 + ["bfloat16"] * 16
    assert [what.configuration.shape[0] for what in compiled] == ([2] * 4 + [4] * 4) * 4
    assert all(cell.pass_name == "forward" for what in compiled for cell in what.cells)
    everything = bench.plan_measurements(some[:2], [1], "", ("compile",), every=True)
    assert [what.configuration.compiled for what in everything] == [True, True, False, False]


def test_what_fails_is_named_and_the_rest_is_measured(extension, tmp_path, monkeypatch):
    """A wrong result gets no time, and the exit status tells."""
    right = peers.bnfused.functional.batch_norm

    def wrong_on_mlp(x, mean, var, weight, bias, *rest, **keywords):
        return right(x, mean, var, weight, bias + (0.1 if x.dim() == 2 else 0), *rest, **keywords)

    monkeypatch.setattr(peers.bnfused.functional, "batch_norm", wrong_on_mlp)
    status, found = bench_run(tmp_path, "--filter", "^(MLP|U-Net).* float32", "--peers", "torch")
    assert status == 1
    assert {message.split()[0] for message in found.failed} == {"MLP"}
    assert all("differ" in message for message in found.failed)
    assert {r.configuration.split()[0] for r in found.results} == {"U-Net"}


def test_a_run_that_is_cut_off_keeps_what_it_has(extension, tmp_path, monkeypatch):
    """The file is whole after every tensor, and names what is missing after a limit or Ctrl-C."""
    measured = bench.measure
    seen = []

    def interrupted_at_the_third(*arguments):
        if len(seen) == 2:
            assert len(report.read_cells(tmp_path / "bench.json").results) == 12
            raise KeyboardInterrupt
        seen.append(1)
        return measured(*arguments)

    monkeypatch.setattr(bench, "measure", interrupted_at_the_third)
    status, found = bench_run(tmp_path, "--filter", " channels_last bfloat16", "--peers", "torch")
    assert status == 130
    assert found.interrupted and len(found.results) == 12
    assert len(found.not_measured) == 2  # of the four networks with images

    status, found = bench_run(tmp_path, *RESNET, "--limit", "0")
    assert status == 1
    assert found.results == [] and len(found.not_measured) == 1


def test_a_sweep_from_end_to_end(extension, tmp_path):
    picture = tmp_path / "sweep.png"
    arguments = [
        "--sweep",
        "batch,threads",
        "--filter",
        "channels_last float32 .*forward plain",
        "--picture",
        str(picture),
    ]
    assert bench.main([*arguments, "--tiny", "--quick", "--rounds", "1", "--json", str(tmp_path / "a.json")]) == 0
    swept = report.read_cells(tmp_path / "a.json").results
    assert {r.family for r in swept} == {"batch sweep, channels_last", "threads sweep, channels_last"}
    assert len({r.threads for r in swept if r.family.startswith("batch")}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_networks_from_end_to_end(extension, tmp_path):
    """One network in one layout; Ctrl-C and the limit are the bench's."""
    numbers, picture = tmp_path / "networks.json", tmp_path / "networks.png"
    arguments = [*NETWORKS, "--networks", "MobileNetV2", "--layouts", "channels_last", "--json", numbers]
    done = run_script("benchmarks/networks.py", *arguments, "--picture", picture, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(numbers.read_text())
    (row,) = found["results"]
    assert (row["network"], row["dtype"], row["layout"]) == ("MobileNetV2", "float32", "channels_last")
    assert set(row["memory"]) == {"torch", "bnfused"} and min(row["memory"].values()) > 0
    assert "what the graph keeps" in found["settings"]["memory"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_networks_that_are_cut_off_are_named(extension, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "check", lambda *_: None)
    results = iter([(network_result(), False)])
    monkeypatch.setattr(networks, "measure_what_fits", lambda *_: next(results, None) or interrupt())
    numbers = tmp_path / "networks.json"
    assert networks.main([*NETWORKS, "--layouts", "NCHW", "--json", str(numbers)]) == 130
    found = json.loads(numbers.read_text())
    assert found["interrupted"] and len(found["results"]) == 1
    assert found["not_measured"] == ["MobileNetV2 float32 NCHW", "DenseNet-121 float32 NCHW"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ("--device", "cuda"),
            "no GPU is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
        (("--device", "cuda", "--threads", "2"), "are for a CPU"),
        (("--sweep", "depth"), "expected some of batch"),
        (("--peers", "apex"), "expected some of torch"),
        (("--picture", "x.gif"), "ends in .png"),
        (("--filter", "nothing has this name"), "No cell matches"),
        (("--compare", "missing.json", "missing.json"), "missing.json"),
        (("--dtypes", "int8"), "expected some of float32"),
        (("--threads", "0"), "at least one thread"),
        (("--rounds", "0"), "expected at least 1"),
    ],
)
def test_bench_refuses_with_a_reason(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = bench.main(arguments)
    except SystemExit as refused:
        status = refused.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.out + captured.err


def test_training_demo_from_end_to_end(extension, tmp_path):
    """One short epoch of a narrow network: both train alike, the table and the picture are there."""
    done = run_script(
        "examples/train_digits.py",
        *("--epochs", "1", "--batch-size", "128", "--width", "8", "--threads", "1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Same training" in done.stdout
    assert "whole training step" in done.stdout
    picture = tmp_path / "benchmarks" / "results" / "train_digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_conversion_demo_from_end_to_end(extension, tmp_path):
    """The report, the comparison in float64 and a row for each layout."""
    arguments = ("--batch-size", "2", "--size", "33", "--rounds", "1", "--threads", "1")
    done = run_script("examples/convert_resnet18.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 batch norms: 9 batch_norm+relu, 8 batch_norm+add+relu, 3 batch_norm\n" in done.stdout
    assert "in float64:" in done.stdout
    assert re.search(r"^channels_last .*\d", done.stdout, re.MULTILINE)


def test_overhead_from_end_to_end(extension, tmp_path):
    done = run_script("benchmarks/overhead.py", "--rounds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch/bnfused" in done.stdout


def test_traffic_is_counted_per_layer(extension):
    """A layer that stays on chip is the least there is; Apex's kernels read again what they do not keep."""
    device = traffic.DEVICES["h100"]
    size = 2 * 64 * 256 * 28 * 28
    for layout in traffic.LAYOUTS:
        layer = traffic.Layer(256, 28, traffic.ADD_RELU)
        own = traffic.ours(traffic.plan_of(layer, 64, layout, device))
        assert (own.bytes, own.launches) == (7 * size + 2 * size / 16, 2)
        assert traffic.torchs(layer, 64, layout).bytes == 16 * size
    # 50,176 pixels of the 120,960 and 64,512 that the two kernels of Apex keep on an H100; and twice as many.
    assert traffic.apexs(layer, 64, device).bytes == own.bytes
    assert traffic.apexs(layer, 128, device).bytes / (2 * size) == pytest.approx(7.125 + 2 * (1 - 64_512 / 100_352))


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_traffic_has_the_layers_of_the_networks(name):
    """The list of a network's batch norms is what its modules see of a 224 x 224 image."""
    seen = Counter()
    model = networks.NETWORKS[name]().to("meta")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, y: seen.update([tuple(y.shape[1:])]))
    model(torch.empty(2, 3, 224, 224, device="meta"))
    listed = Counter()
    for layer in traffic.NETWORKS[name]():
        listed[layer.shape(1)[1:]] += layer.count
    assert listed == seen


def test_traffic_from_end_to_end(extension, tmp_path):
    picture = tmp_path / "traffic.png"
    done = run_script("benchmarks/traffic.py", "--batch", "32", "--device", "a100", "--picture", picture, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("A100 80GB") == 2 * len(traffic.NETWORKS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    done = run_script("benchmarks/traffic.py", "--network", "ResNet-50", "--batch", "128", cwd=tmp_path)
    assert "| 4 x 512 x 28 x 28 | add, ReLU | resident | resident | 7.12A | 16.00A | 7.84A |" in done.stdout


def test_why_batch_norm_from_end_to_end(extension, tmp_path):
    """A few steps of everything, in two processes: the page has every table, and the figures it shows are there."""
    done = run_script("examples/why_batch_norm.py", "--quick", "--workers", "2", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "why.md").read_text()
    assert page.count("| batch norm |") == page.count("| no batch norm |") == 2 + 7 + 2 + 2
    shown = re.findall(r"\]\((figures/\S+)\)", page)
    assert len(shown) == 5
    assert all((tmp_path / figure).read_bytes().startswith(b"\x89PNG") for figure in shown)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {Path(figure).name for figure in shown}


@pytest.mark.usefixtures("extension")
def test_compiled_networks_are_one(monkeypatch):
    """What compiled.py times is the same network four times; without the compiler here, which test_compile.py tests."""
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: module)
    for network, mode in itertools.product((compiled.Norms, compiled.Block), ("train", "eval")):
        functions = {
            name: compiled.make_function(network, name, (2, 8, 5, 7), torch.channels_last, mode)
            for name in (compiled.COMPILED, *compiled.OTHERS)
        }
        compiled.check_same(functions)
        functions["bnfused"] = lambda wanted=functions["torch"]: [1.1 * value for value in wanted()]
        with pytest.raises(SystemExit, match="bnfused differs from torch in y"):
            compiled.check_same(functions)
