"""The examples: what they check and compute, and that they run from end to end."""

from __future__ import annotations

import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))

from examples import digits_network, train_digits, why_networks, why_pictures, why_trainings
from support.benchmarking import run_script


def training(theirs: list[float], ours: list[float], error: float = 1e-4) -> train_digits.Training:
    """Two trainings of one epoch each with these losses; the exact ones are 2.0, 1.9, 1.8."""
    trainees = {
        name: train_digits.Trainee(None, losses=losses, accuracies=[0.5])
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
    names = {node.name() for node in digits_network.nodes_between(y, (x, identity))}
    assert names == {"ReluBackward0", "AddBackward0", "NativeBatchNormBackward0"}


def test_site_timer_counts_forward_and_backward():
    """With a clock that ticks at every look, forward counts one tick and each of the backward's nodes one."""
    ticks = itertools.count()
    timer = digits_network.SiteTimer(lambda: float(next(ticks)))
    x = torch.randn(2, 4, 3, 3, requires_grad=True) * 1
    site = digits_network.Site("torch", 4)
    y = timer.run(site.normalize, x, None)
    assert timer.seconds == 1.0
    y.sum().backward()
    assert timer.seconds == 3.0  # ReLU and batch norm


def test_both_networks_start_alike(extension):
    trainees = train_digits.make_trainees(seed=3, dtype="float64", width=8)
    images = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    theirs, ours = (trainees[name].network(images) for name in train_digits.IMPLEMENTATIONS)
    torch.testing.assert_close(ours, theirs)
    assert trainees["bnfused"].network.blocks[0].site1.fused
    assert not trainees["torch"].network.blocks[0].site1.fused


def curve(**accuracies: float) -> why_trainings.Curve:
    """``curve(s3=0.5, s7=0.9)``: these accuracies after 3 and after 7 steps."""
    return why_trainings.Curve(tuple(int(name[1:]) for name in accuracies), tuple(accuracies.values()))


def test_steps_to_an_accuracy_are_the_first_ones():
    """A later fall below it does not count, and what is never reached is infinitely far."""
    one = curve(s1=0.1, s3=0.95, s7=0.2, s9=0.97)
    assert [one.first(wanted) for wanted in (0.05, 0.95, 0.96, 0.98)] == [1, 3, 9, math.inf]
    assert curve().first(0.5) == math.inf  # the loss was not finite in the first step


def test_speed_is_the_median_of_seeds_at_the_best_rate():
    """At 0.1 one lucky seed of three does not make the rate one that trains."""
    speed = why_trainings.Speed(
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
    trace = why_trainings.Trace(steps=[0, 10, 20, 30], accuracies=[0.1, 0.92, 0.5, 0.95], losses=[4.0, 3.0, 2.0, 1.0])
    assert trace.trained() == 10
    losses = [why_pictures.median_of([trace], lambda one: one.losses, when) for when in (True, False, None)]
    assert losses == [4.0, 2.0, 2.5]


@pytest.mark.parametrize("network", why_networks.NETWORKS.values(), ids=lambda network: network.key)
def test_variants_differ_in_their_norms_alone(network):
    """The same seed gives the same weights, and no layer before a batch norm has a bias."""
    weights = {}
    for variant in why_networks.VARIANTS:
        model = why_networks.make_network(network, variant, seed=5)
        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        weights.setdefault(variant.torch_init, []).append([layer.weight for layer in layers])
        assert len(norms) == (0 if variant.norm is None else len(layers) - 1)
        assert all(type(norm).__module__ == "bnfused.modules" for norm in norms)
        assert [layer.bias is None for layer in layers] == [variant.norm == "before"] * (len(layers) - 1) + [False]
        noises = [module for module in model if isinstance(module, why_networks.diagnostics.ShiftingNoise)]
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
        why_networks.make_network(why_networks.LINEAR, variant, seed=0)[:-1](x).std().item()
        for variant in (why_networks.PLAIN, why_networks.PLAIN_TORCH)
    )
    assert 1 / 3 < plain < 3
    # The biases, of standard deviation 1 / 8 / sqrt(3), stay, and are the same for every x.
    assert shrunk < 0.15


def test_tables_go_between_their_marks():
    page = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n"
    once = why_pictures.fill_in(page, {"a": "| new |"})
    assert once == "before\n<!-- begin a -->\n\n| new |\n\n<!-- end a -->\nafter\n"
    assert why_pictures.fill_in(once, {"a": "| new |"}) == once
    with pytest.raises(ValueError, match="begin b"):
        why_pictures.fill_in(page, {"b": ""})


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
