"""Benchmarks of whole networks: training steps, memory, and the model of their traffic."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import models, networks, peers, pictures, report, steps, traffic
from benchmarks.results import Run
from support.benchmarking import ENVIRONMENT, NETWORKS, FakeGpu, drawn, network_result, run_script


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
    assert [case.title for case in found[:4]] == [
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
