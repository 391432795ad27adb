"""Benchmarks: what is measured, and that what is wrong is not timed."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import cases, measurement, memory, modules, peers
from benchmarks.cases import Configuration
from benchmarks.memory import Saved
from benchmarks.timing import Band
from support.benchmarking import every_cell


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
    measured = measurement.cell_result(cell, configuration, ["torch"], samples)
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
    measured = measurement.cell_result(cell, configuration, ["torch", "cuDNN"], samples)
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
            name: memory.saved_for_backward(tensors.forward(name, True, fusion), tensors.inputs(fusion))
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


def test_compiled_blocks_are_one(extension, monkeypatch):
    """All blocks that are timed are the same network. Without the compiler here, which test_compile.py tests."""
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph, mode: module)
    whole = cases.block_configurations()
    assert len(whole) == 8
    for configuration in whole:
        small = dataclasses.replace(configuration, shape=(2, 8, 5, 7))
        blocks = modules.subject_of(small, torch.device("cpu"), seed=0)
        modules.check_same(small, small.cells(1), blocks, ("torch", "compile"))
        forward = blocks.forward
        monkeypatch.setattr(
            blocks, "forward", lambda name, *rest, f=forward: lambda: f(name, *rest)() * (1.1 if name == "torch" else 1)
        )
        with pytest.raises(ValueError, match="bnfused differs from torch in y"):
            modules.check_same(small, small.cells(1), blocks)


def test_calls_are_timed_many_at_once_and_agree(extension, monkeypatch):
    """The time of a cell is that of one call, and the grad mode is that of its pass."""
    modes = []
    for configuration in cases.call_configurations():
        calls = modules.subject_of(configuration, torch.device("cpu"), seed=0)
        peers.check_agreement(configuration, configuration.cells(1), calls)
    forward = calls.forward
    monkeypatch.setattr(
        calls, "forward", lambda *which: lambda: modes.append(torch.is_grad_enabled()) or forward(*which)()
    )
    for pass_name, with_grad in (("forward, no grad", False), ("forward", True), ("eval", False)):
        modes.clear()
        peers.make_function("bnfused", pass_name, "relu", calls)()
        assert modes == [with_grad] * calls.calls
