"""Models that bnfused 0.1.0 converted and ``torch.save`` wrote: they load, compute, report, convert and revert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bnfused

FILE = Path(__file__).resolve().parents[1] / "data" / "sequences_converted_by_0_1_0.pt"


@pytest.mark.parametrize("name", ["sequential", "synchronized", "torch_sync", "swapped"])
def test_sequences(name):
    """Two ``Sequential`` models converted plainly, with ``sync``, from torch's ``SyncBatchNorm``, and without ``fuse``.

    Each was in eval, and was saved with an input ``x``, its output ``y`` and the counts of its report.
    """
    old = torch.load(FILE, weights_only=False)[name]
    model, x, y = old["model"], old["x"], old["y"]
    assert dict(bnfused.fusion_report(model).counts) == old["counts"]
    expected_kind = "sync_batch_norm" if "sync" in name else "batch_norm"
    again = bnfused.convert(model)
    assert all(count.startswith(expected_kind) for count in bnfused.fusion_report(again).counts)
    reverted = bnfused.revert(model)
    assert not any("forward" in vars(module) for module in reverted.modules())
    assert not any(type(module).__module__.startswith("bnfused") for module in reverted.modules())
    models = [model, again]
    if name != "torch_sync":
        assert any(type(module) is nn.BatchNorm2d for module in reverted.modules())
        models.append(reverted)
    with torch.no_grad():
        for network in models:
            torch.testing.assert_close(network(x), y, rtol=1e-5, atol=1e-5)
