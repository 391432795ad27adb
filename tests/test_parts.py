"""The ops in parts, composed by hand in one process: what the parts of a batch give is what the whole of it gives."""

from __future__ import annotations

import pytest
import torch

import cases
import checks
import oracle
from bnfused import parts

pytestmark = pytest.mark.usefixtures("extension")


@pytest.fixture(params=["kernel", "plain torch"])
def path(request, monkeypatch):
    """Plain torch is what tensors take that are not on the CPU."""
    if request.param == "plain torch":
        monkeypatch.setattr(parts, "_has_kernel", lambda x: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation, residual", [(None, False), ("relu", True), ("silu", True), ("relu", False)])
@pytest.mark.usefixtures("path")
def test_composed_by_hand(layout, dtype, activation, residual):
    """Forward and backward of three parts, one of them empty."""
    p = cases.make((7, 5, 3, 6), dtype=dtype, activation=activation, residual=residual)
    truth = oracle.expected(p)
    place = cases.LAYOUTS[layout]
    sizes = (2, 0, 5)
    xs, upstream = ([place(t) if len(t) else t for t in whole.split(sizes)] for whole in (p.x, p.grad_y))
    residuals = p.residual.split(sizes) if p.residual is not None else [None] * 3

    moments = [parts.batch_norm_stats(x) for x in xs]
    gathered = [torch.stack(values) for values in zip(*moments, strict=True)]
    state = (p.running_mean.clone(), p.running_var.clone(), p.num_batches_tracked.clone())
    mean, var, count = parts.batch_norm_gather_stats(*gathered, *state, p.momentum)
    assert count == p.rows
    assert int(state[2]) == truth.num_batches_tracked

    found = {"y": [], "grad_x": [], "grad_residual": []}
    kept, sums = [], []
    for x, r, g in zip(xs, residuals, upstream, strict=True):
        y, invstd, mask = parts.batch_norm_apply(
            *(x, mean, var, p.weight, p.bias, p.eps), residual=r, activation=activation
        )
        forward = {"weight": p.weight, "bias": p.bias, "residual": r, "mask": mask, "activation": activation}
        sums.append(parts.batch_norm_backward_reduce(g, x, mean, invstd, **forward))
        kept.append((g, x, invstd, forward))
        found["y"].append(y)
    grad_bias, grad_weight = (sum(s) for s in zip(*sums, strict=True))
    for g, x, invstd, forward in kept:
        grad_x, grad_residual = parts.batch_norm_backward_apply(
            g, x, mean, invstd, grad_bias, grad_weight, count, **forward
        )
        found["grad_x"].append(grad_x)
        found["grad_residual"].append(grad_residual)

    results = {name: torch.cat(values) for name, values in found.items()}
    results |= {"running_mean": state[0], "running_var": state[1], "grad_weight": grad_weight, "grad_bias": grad_bias}
    for name, expected in truth.values.items():
        if expected is not None:
            measure = expected.abs() if name == "running_var" else truth.scales[name]
            checks.assert_within(name, results[name], expected, cases.limit(expected, measure, results[name].dtype))


def test_statistics_from_elsewhere_need_not_be_finite_where_they_have_no_weight():
    """A part without values has no say, whatever its mean is."""
    x = torch.randn(6, 3)
    mean, m2, count = parts.batch_norm_stats(x)
    nan = torch.full_like(mean, float("nan"))
    merged = parts.batch_norm_gather_stats(
        torch.stack([nan, mean]), torch.stack([nan, m2]), torch.stack([count * 0, count])
    )
    assert torch.equal(merged[0], mean)
    assert torch.allclose(merged[1], x.double().var(0, correction=0), rtol=1e-6, atol=0)  # x is float32


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_kernel_merges_as_plain_torch(monkeypatch, momentum):
    """Of many parts, some empty, and more channels than a thread takes at once; running statistics of any dtype."""
    mean, m2 = torch.randn(37, 700, dtype=torch.float64) * 100, torch.rand(37, 700, dtype=torch.float64)
    count = torch.randint(0, 5, (37,)).double()
    mean[count == 0] = torch.nan
    found = []
    for kernel in (True, False):
        monkeypatch.setattr(parts, "_has_kernel", lambda x, kernel=kernel: kernel)
        running = (torch.arange(1400.0)[::2], torch.ones(700, dtype=torch.bfloat16))
        tracked = torch.tensor(6)
        merged = parts.batch_norm_gather_stats(mean, m2, count, *running, tracked, momentum)
        found.append((*merged, *running, tracked))
    for actual, wanted in zip(*found, strict=True):
        # Sums of 37 terms, each rounded by float64 a few times; then once to the dtype of the running statistics.
        rounding = 4000 * torch.finfo(torch.float64).eps
        rounding += torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0
        torch.testing.assert_close(actual, wanted, rtol=rounding, atol=1e-11)
    assert int(found[0][-1]) == 7


def test_shapes_that_do_not_fit_are_refused_before_anything_is_written():
    mean = torch.zeros(2, 3, dtype=torch.float64)
    running, count = torch.ones(3), torch.tensor(4)
    for wrong in ({"m2": mean[:, :2]}, {"count": mean[0]}, {"running_var": torch.ones(4)}, {"m2": mean.float()}):
        arguments = {"m2": mean, "count": mean[:, 0] + 2, "running_mean": running, "running_var": torch.ones(3)} | wrong
        with pytest.raises(RuntimeError, match=f"batch_norm_gather_stats: expected {next(iter(wrong))} of"):
            parts.batch_norm_gather_stats(mean, num_batches_tracked=count, **arguments)
    assert torch.equal(running, torch.ones(3))
    assert int(count) == 4
