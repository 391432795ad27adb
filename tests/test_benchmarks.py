"""The benchmarks: what they compute from samples, what they refuse, and that both scripts run from end to end."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench, cases, report, timing, train_digits, why_batch_norm
from benchmarks.cases import Cell, Configuration
from benchmarks.report import CellResult, Run
from benchmarks.timing import Band, Plan, Timed

ROOT = Path(__file__).resolve().parents[1]


def run_script(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark as a user would, from a folder that is not the checkout's."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def result(ratio: Band | None, **changes: object) -> CellResult:
    fields = {
        "configuration": "8x4x2x2 NCHW float32",
        "family": cases.FIRST_32,
        "pass_name": "forward",
        "fusion": "relu",
        "threads": 1,
        "pairs": 9,
        "bytes": 1024,
        "ratio": ratio,
        "torch_ms": Band(1.0, 2.0, 3.0),
        "bnfused_ms": Band(0.5, 1.0, 1.5),
        "copy_ms": None,
        "copy_speed_torch": 0.25,
        "copy_speed_bnfused": None,
    }
    return CellResult(**{**fields, **changes})


def run_of(*results: CellResult) -> Run:
    environment = {
        "cpu": "a CPU",
        "commit": "0123",
        "date": "today",
        "torch": "2",
        "bnfused": "1",
        "bnfused_extension": True,
    }
    return Run(environment, {"rounds": 9}, list(results))


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
    measured = bench.cell_result(cell, configuration, samples)
    assert measured.ratio == Band(2.0, 2.0, 2.0)
    # The least traffic of a forward is that of a copy: twice its time is half its speed.
    assert measured.copy_speed_bnfused == pytest.approx(0.5)


# --- sampling ---


class CountingClock:
    """Stands in for the clock: every call takes as long as its number says; ``unclean`` calls had to wait."""

    def __init__(self, unclean: tuple[int, ...] = (), interrupt_at: int | None = None) -> None:
        self.calls: list[object] = []
        self._unclean, self._interrupt_at = unclean, interrupt_at

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


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="benchmarks/gpu.py"):
        timing.make_clock(torch.device("cuda"), 1)


# --- cases ---


def every_cell() -> list[Cell]:
    dtypes = tuple(cases.DTYPE_BYTES)
    return [
        cell
        for configuration in cases.configurations(dtypes, quick=False)
        for threads in (1, 2)
        for cell in configuration.cells(threads)
    ]


def test_cell_names_are_unique():
    """``--compare`` matches runs by them."""
    names = [cell.name for cell in every_cell()]
    assert len(set(names)) == len(names)


def test_every_target_belongs_to_a_measured_group():
    """A target whose group is misspelt would never be shown."""
    groups = {cell.group for cell in every_cell()}
    assert set(cases.TARGETS) <= groups


def test_quick_is_a_part_of_the_whole_with_every_family_that_has_targets():
    whole = cases.configurations(cases.DEFAULT_DTYPES, quick=False)
    quick = cases.configurations(cases.DEFAULT_DTYPES, quick=True)
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
    laid_out = bench.to_layout(tensor, layout)
    assert laid_out.stride() == strides
    assert torch.equal(laid_out, tensor)


# --- reports ---


def test_json_round_trip():
    run = run_of(result(Band(1.5, 2.0, 2.5)), result(None, pairs=0))
    run.interrupted = True
    again = Run.from_json(run.to_json())
    assert again == run
    assert isinstance(again.results[0].ratio, Band)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 99}', "no json"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json"):
        Run.read(path)


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
    assert [change.clear for change in changes] == [False, True, False]


def test_tables_print_what_was_not_measured_as_a_dash():
    console = report.make_console()
    with console.capture() as captured:
        console.print(report.cell_table("a title", [result(None, pairs=0), result(Band(1.5, 2.0, 2.5))]))
    lines = [line for line in captured.get().splitlines() if "forward" in line]
    assert "2.00x" not in lines[0] and " - " in lines[0]
    assert "2.00x" in lines[1] and "1.50-2.50" in lines[1] and "25%" in lines[1]


# --- refusing to time what is wrong ---


def test_wrong_results_are_not_timed(extension, monkeypatch):
    """An implementation that is a little off must not get a number, however fast it is."""
    right = bench.bnfused.functional.batch_norm

    def wrong(x, mean, var, weight, bias, *rest, **keywords):
        return right(x, mean, var, weight, bias + 0.01, *rest, **keywords)

    configuration = Configuration((8, 4), "NC", "float32", cases.TINY, ("forward", "backward"))
    tensors = bench.Tensors(configuration, torch.device("cpu"), seed=0)
    cells = configuration.cells(1)
    bench.check_agreement(configuration, cells, tensors)
    monkeypatch.setattr(bench.bnfused.functional, "batch_norm", wrong)
    with pytest.raises(ValueError, match="y of torch and bnfused differ"):
        bench.check_agreement(configuration, cells, tensors)


def test_every_small_cell_agrees(extension):
    """Every pass, fusion and layout of the benchmark on shapes small enough for a test."""
    small = {2: (32, 4), 3: (4, 6, 8), 4: (4, 6, 5, 5), 5: (2, 3, 4, 5, 5)}
    for configuration in cases.configurations(cases.DTYPE_BYTES, quick=False):
        shrunk = dataclasses.replace(configuration, shape=small[len(configuration.shape)])
        tensors = bench.Tensors(shrunk, torch.device("cpu"), seed=1)
        bench.check_agreement(shrunk, shrunk.cells(1), tensors)


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
        "bench.py",
        *("--filter", "64x256 NC float32 (forward|backward|eval) (plain|relu) T=1"),
        *("--threads", "1", "--rounds", "4", "--json", numbers, "--picture", picture),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64x256 NC float32, T=1" in done.stdout
    run = Run.read(numbers)
    assert [cell.cell.fusion for cell in run.results] == ["plain", "relu"] * 3
    assert all(cell.pairs <= 4 and cell.bytes > 0 for cell in run.results)
    assert picture.read_bytes().startswith(b"\x89PNG")

    compared = run_script("bench.py", "--compare", numbers, numbers, cwd=tmp_path)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "64x256 NC float32 forward relu T=1" in compared.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda"), "no benchmark on cuda here"),
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
        "train_digits.py",
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
    done = run_script("convert_resnet18.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 batch norms: 9 batch_norm+relu, 8 batch_norm+add+relu, 3 batch_norm\n" in done.stdout
    assert "in float64:" in done.stdout
    assert re.search(r"^channels_last .*\d", done.stdout, re.MULTILINE)


def test_overhead_from_end_to_end(extension, tmp_path):
    done = run_script("overhead.py", "--rounds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch/bnfused" in done.stdout


def test_why_batch_norm_from_end_to_end(extension, tmp_path):
    """A few steps of everything, in two processes: the page has every table, and the figures it shows are there."""
    done = run_script("why_batch_norm.py", "--quick", "--workers", "2", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "why.md").read_text()
    assert page.count("| batch norm |") == page.count("| no batch norm |") == 2 + 7 + 2 + 2
    shown = re.findall(r"\]\((figures/\S+)\)", page)
    assert len(shown) == 5
    assert all((tmp_path / figure).read_bytes().startswith(b"\x89PNG") for figure in shown)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {Path(figure).name for figure in shown}
