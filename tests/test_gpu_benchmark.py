"""benchmarks/gpu.py without a GPU: what it computes from samples, what it leaves behind, and a whole run on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu

pytestmark = pytest.mark.usefixtures("extension")

ARGUMENTS = ["--device", "cpu", "--tiny", "--rounds", "5", "--seconds", "0.01"]
RESNET = ["--filter", "^ResNet-50 .*channels_last bfloat16", "--no-compile"]
INPUT = gpu.Input(gpu.Layer("MLP", (8, 4)), "NC", "float32")


def run(folder: Path, *arguments: str) -> tuple[int, dict]:
    status = gpu.main([*ARGUMENTS, "--out", str(folder), *arguments])
    return status, json.loads((folder / "gpu.json").read_text())


def test_row() -> None:
    """Ratios are paired by round; speed counts the fewest bytes: 3 activations where the copy moves 2."""
    key = ("forward", "add_relu")
    samples = {"copy": [2.0, 4.0, 6.0], (gpu.OURS, *key): [3.0, 6.0, 9.0], ("torch native", *key): [6.0, 12.0, 18.0]}
    samples[gpu.OURS, "forward", "plain"] = [100.0, 100.0, 100.0]
    row = gpu.row(INPUT, *key, samples)
    assert row["microseconds"][gpu.OURS] == (4.5, 6.0, 7.5)
    assert row["ratio"] == {"torch native": (2.0, 2.0, 2.0)}
    assert row["of_copy_speed"] == pytest.approx({gpu.OURS: 1.0, "torch native": 0.5})


def result(peer: str, ratio: float, **changes: str) -> dict:
    names = {"network": "a", "configuration": "b", "layout": "NC", "pass": "forward", "fusion": "relu", **changes}
    return {**names, "ratio": {peer: (ratio, ratio, ratio)}, "of_copy_speed": {gpu.OURS: 0.5}}


def test_closing_lines_end_with_each_peers_mean_and_worst_cell() -> None:
    """Peers are not mixed: a fast one must not hide behind a slow one."""
    results = [
        result("torch native", 2.0),
        result("torch native", 8.0, network="fast"),
        result("cuDNN", 0.5, network="slow"),
        result("torch native", 4.0, layout="NCHW"),
    ]
    lines = gpu.closing_lines(results)
    assert [line.split() for line in lines if line.startswith("torch native: forward +ReLU NC ")] == [
        ["torch", "native:", "forward", "+ReLU", "NC", "2", "4.00", "2.00", "a", "b", "forward", "+ReLU"]
    ]
    assert lines[-2:] == [
        "torch native, all 3 cells: geometric mean 4.00, worst 2.00: a b forward +ReLU",
        "cuDNN, all 1 cells: geometric mean 0.50, worst 0.50: slow b forward +ReLU",
    ]
    assert gpu.closing_lines([]) == ["nothing was measured"]


def test_every_network_dtype_and_layout_is_there() -> None:
    inputs = list(gpu.inputs(gpu.LAYERS, gpu.DTYPES))
    assert {what.layer.network for what in inputs} == {"ResNet-50", "MobileNetV2", "DenseNet-121", "U-Net", "MLP"}
    assert {(what.layout, what.dtype) for what in inputs} == {
        (layout, dtype) for layout in ("NCHW", "channels_last", "NC") for dtype in ("bfloat16", "float16", "float32")
    }
    assert len({what.name for what in inputs}) == len(inputs)
    assert {what.layer.network for what in inputs if what.layer.compiled} == {what.layer.network for what in inputs}


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers, picture, versions and commit; the last lines are the summary."""
    status, found = run(tmp_path, *RESNET)
    assert status == 0
    layers = [layer for layer in gpu.LAYERS if layer.network == "ResNet-50"]
    assert len(found["results"]) == len(layers) * len(gpu.PASSES) * len(gpu.FUSIONS)
    assert found["environment"]["torch"] == torch.__version__
    assert {"commit", "date", "device", "bnfused_build"} <= set(found["environment"])
    assert found["wrong"] == found["not_measured"] == []
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert "geometric mean" in lines[-2] and str(tmp_path) in lines[-1]


def test_compiled_peers_run_the_unfused_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch.compile, which takes seconds: each mode, each fusion, and only where asked for."""
    modes: list[str] = []

    def stand_in(function, *, mode, **_):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", stand_in)
    status, found = run(tmp_path, "--filter", "^MLP .* NC float32")
    assert status == 0
    assert modes == [mode for mode in gpu.COMPILE_MODES.values() for _ in gpu.FUSIONS]
    compiled = [row for row in found["results"] if set(row["ratio"]) & set(gpu.COMPILE_MODES)]
    assert len(compiled) == len(gpu.COMPILE_MODES) * len(gpu.FUSIONS) * len(gpu.PASSES)


def test_what_fails_is_named_and_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong result gets no time, and the exit status tells."""
    right = gpu.bench.bnfused.functional.batch_norm

    def wrong_on_mlp(x, mean, var, weight, bias, *rest, **keywords):
        return right(x, mean, var, weight, bias + (0.1 if x.dim() == 2 else 0), *rest, **keywords)

    monkeypatch.setattr(gpu.bench.bnfused.functional, "batch_norm", wrong_on_mlp)
    status, found = run(tmp_path, "--filter", "^(MLP|U-Net).* float32", "--no-compile")
    assert status == 1
    assert {message.split()[0] for message in found["wrong"]} == {"MLP"}
    assert all("differ" in message for message in found["wrong"])
    assert {row["network"] for row in found["results"]} == {"U-Net"}


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole after every tensor, and names what is missing after a limit or Ctrl-C."""
    measured = gpu.measure_eager
    seen: list[int] = []

    def killed_at_the_third(*arguments):
        if len(seen) == 2:
            assert len(json.loads((tmp_path / "gpu.json").read_text())["results"]) == 12
            raise KeyboardInterrupt
        seen.append(1)
        return measured(*arguments)

    monkeypatch.setattr(gpu, "measure_eager", killed_at_the_third)
    status, found = run(tmp_path, *RESNET)
    assert status == 130
    assert len(found["results"]) == 12
    assert len(found["not_measured"]) == sum(layer.network == "ResNet-50" for layer in gpu.LAYERS) - 2

    status, found = run(tmp_path, *RESNET, "--limit", "0")
    assert status == 1
    assert found["results"] == [] and found["not_measured"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is visible" in capsys.readouterr().err
