"""The ops in parts, composed by hand in one process: what the parts of a batch give is what the whole of it gives."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import checks
import oracle
from bnfused import _extension, parts
from moved import copy_of


@pytest.fixture
def device(backend, monkeypatch):
    """Where the backend's tensors are; the reference is plain torch, which devices without kernels take."""
    if backend.name == "reference":
        monkeypatch.setattr(parts, "_has_kernel", lambda x: False)
    return torch.device("cuda" if backend.name == "cuda" else "cpu")


def moments_of(xs):
    """Mean, m2 and count of each, gathered: (parts, C) twice and (parts,)."""
    return [torch.stack(values) for values in zip(*[parts.batch_norm_stats(x) for x in xs], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation, residual", [(None, False), ("relu", True), ("silu", True), ("relu", False)])
def test_composed_by_hand(device, layout, dtype, activation, residual):
    """Forward and backward of three parts, one of them empty."""
    p = cases.make((7, 5, 3, 6), dtype=dtype, activation=activation, residual=residual)
    truth = oracle.expected(p)
    place = cases.LAYOUTS[layout]
    sizes = (2, 0, 5)

    def split(whole):
        return [copy_of(place(t) if len(t) else t, device) for t in whole.split(sizes)]

    xs, upstream = split(p.x), split(p.grad_y)
    residuals = split(p.residual) if p.residual is not None else [None] * 3
    weight, bias = p.weight.to(device), p.bias.to(device)
    state = [t.to(device, copy=True) for t in (p.running_mean, p.running_var, p.num_batches_tracked)]

    mean, var, count = parts.batch_norm_gather_stats(*moments_of(xs), *state, p.momentum)
    assert count == p.rows
    assert int(state[2]) == truth.num_batches_tracked

    found = {"y": [], "grad_x": [], "grad_residual": []}
    kept, sums = [], []
    for x, r, g in zip(xs, residuals, upstream, strict=True):
        y, invstd, mask = parts.batch_norm_apply(
            *(x, mean, var, weight, bias, p.eps), residual=r, activation=activation
        )
        forward = {"weight": weight, "bias": bias, "residual": r, "mask": mask, "activation": activation}
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
            checks.assert_within(
                name, results[name].cpu(), expected, cases.limit(expected, measure, results[name].dtype)
            )


def test_statistics_from_elsewhere_need_not_be_finite_where_they_have_no_weight(device):
    """A part without values has no say, whatever its mean is."""
    x = torch.randn(6, 3, device=device)
    mean, m2, count = parts.batch_norm_stats(x)
    nan = torch.full_like(mean, float("nan"))
    merged = parts.batch_norm_gather_stats(
        torch.stack([nan, mean]), torch.stack([nan, m2]), torch.stack([count * 0, count])
    )
    assert torch.equal(merged[0], mean)
    assert torch.allclose(merged[1], x.double().var(0, correction=0), rtol=1e-6, atol=0)  # x is float32


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_kernel_merges_as_plain_torch(device, monkeypatch, momentum):
    """Of many parts, some empty, and more channels than a thread takes at once; running statistics of any dtype."""
    mean, m2 = torch.randn(37, 700, dtype=torch.float64) * 100, torch.rand(37, 700, dtype=torch.float64)
    count = torch.randint(0, 5, (37,)).double()
    mean[count == 0] = torch.nan
    found = []
    for plain_torch in (False, True):
        if plain_torch:
            monkeypatch.setattr(parts, "_has_kernel", lambda x: False)
        running = (torch.arange(1400.0, device=device)[::2], torch.ones(700, dtype=torch.bfloat16, device=device))
        tracked = torch.tensor(6, device=device)
        merged = parts.batch_norm_gather_stats(*(t.to(device) for t in (mean, m2, count)), *running, tracked, momentum)
        found.append((*merged, *running, tracked))
    for actual, wanted in zip(*found, strict=True):
        # Sums of 37 terms, each rounded by float64 a few times; then once to the dtype of the running statistics.
        rounding = 4000 * torch.finfo(torch.float64).eps
        rounding += torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0
        torch.testing.assert_close(actual, wanted, rtol=rounding, atol=1e-11)
    assert int(found[0][-1]) == 7


@pytest.mark.parametrize("count_of_parts", [1, 7, 100])
@pytest.mark.parametrize("channels", [0, 1, 70])
def test_merge(device, count_of_parts, channels):
    """Of what one collective gathered: a mean, an m2 and a count of each part, one behind the other.

    Means that lie 1e6 standard deviations from 0, and parts of very different sizes. All arithmetic is float64. The
    mean gains one rounding of its own size with each part; a deviation from it, of about 1, is off by as much, 1e6 *
    2^-53 a part, and so is, relatively and twice, its square.
    """
    counts = torch.randint(0, 10**6, (count_of_parts, 1)).double()
    counts[-1] = 2
    means = 1e6 + torch.randn(count_of_parts, channels, dtype=torch.float64)
    m2s = torch.rand(count_of_parts, channels, dtype=torch.float64) * counts
    gathered = torch.cat([means, m2s, counts], 1).to(device)
    old = [torch.randn(channels), torch.rand(channels).half(), torch.tensor(4)]
    state = [t.to(device, copy=True) for t in old]
    mean, var, total = parts.batch_norm_gather_stats(
        gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1], *state, None
    )

    shift = means - 1e6  # exact, as is what follows to 1e-15 of the deviations
    expected_mean = (shift * counts).sum(0) / counts.sum()
    expected_m2 = (m2s + counts * (shift - expected_mean).square()).sum(0)
    rounding = 1e6 * count_of_parts * 2.0**-53
    assert total == counts.sum()
    torch.testing.assert_close(mean.cpu() - 1e6, expected_mean, rtol=0, atol=2 * rounding)
    torch.testing.assert_close(var.cpu(), expected_m2 / counts.sum(), rtol=20 * rounding, atol=0)
    assert int(state[2]) == 5
    new = (mean.cpu(), expected_m2 / (counts.sum() - 1))
    for name, kept, moved, of_batch in zip(("running_mean", "running_var"), old, state, new, strict=False):
        wanted = 0.8 * kept.double() + 0.2 * of_batch
        limits = torch.finfo(kept.dtype).eps * wanted.abs() + 1e-12
        checks.assert_within(name, moved.cpu(), wanted, limits)


def test_equal_means_have_their_own_mean(device):
    """And a variance of exactly 0, so that constant channels are normalized to exactly the bias."""
    mean = torch.full((5, 40), 0.1, dtype=torch.float64, device=device)
    counts = torch.tensor([3.0, 1, 7, 0, 11], dtype=torch.float64, device=device)
    merged, var, _ = parts.batch_norm_gather_stats(mean, torch.zeros_like(mean), counts)
    assert torch.equal(merged, mean[0])
    assert not var.any()


@pytest.mark.parametrize("counts", [[0.0, 0.0], [0.0, 1.0]], ids=["none", "one"])
def test_too_few_values_are_counted_and_nothing_is_learned(device, counts):
    mean = torch.randn(2, 3, dtype=torch.float64, device=device)
    running, tracked = torch.ones(2, 3, device=device), torch.tensor(4, device=device)
    _, var, total = parts.batch_norm_gather_stats(
        mean, torch.zeros_like(mean), torch.tensor(counts, dtype=torch.float64, device=device), *running, tracked
    )
    assert (int(total), int(tracked)) == (sum(counts), 5)
    assert torch.equal(running, torch.ones_like(running)) and not var.any()


def test_merge_is_what_its_schema_and_its_fake_kernel_say(extension):
    """What it writes to, shapes and strides of what it returns, for parts that lie apart from each other."""
    gathered = torch.rand(3, 11, dtype=torch.float64)
    state = (torch.zeros(5), torch.ones(5), torch.tensor(3))
    torch.library.opcheck(
        torch.ops.bnfused.batch_norm_gather_stats.default,
        (gathered[:, :5], gathered[:, 5:10], gathered[:, 10], *state, None),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_build_without_cuda_takes_plain_torch_and_says_so_once(extension, monkeypatch):
    monkeypatch.setattr(parts, "_has_cuda", False)
    monkeypatch.setattr(_extension, "_warned", set())
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.empty(4, 3, 5, device="cuda")
        mean, m2, _ = parts.batch_norm_stats(x)
        y, invstd, _ = parts.batch_norm_apply(x, mean, m2)
        parts.batch_norm_backward_reduce(y, x, mean, invstd)
    assert y.device.type == "cuda"
    (warning,) = caught
    for part in ("batch norm in parts on cuda tensors", "plain torch", f"BNFUSED_CUDA=1 {_extension.REBUILD}"):
        assert part in str(warning.message)


def test_a_build_with_cuda_takes_cuda_tensors(extension, monkeypatch):
    """After it has looked at the GPU that they are on, and only for CUDA."""
    asked = []
    monkeypatch.setattr(parts, "_has_cuda", True)
    monkeypatch.setattr(_extension, "_warned", set())
    monkeypatch.setattr(_extension, "check_gpu", asked.append)
    with FakeTensorMode():
        assert parts._has_kernel(torch.empty(4, 3, device="cuda"))
        with pytest.warns(RuntimeWarning, match="in parts on mps tensors"):
            assert not parts._has_kernel(torch.empty(4, 3, device="mps"))
    assert asked == [0]


def test_running_statistics_that_nothing_counts_do_not_move(device):
    """As torch has it: momentum None without a counter is a momentum of 0."""
    mean, running = torch.randn(2, 3, dtype=torch.float64, device=device), torch.ones(2, 3, device=device)
    parts.batch_norm_gather_stats(mean, mean.square(), mean[:, 0] * 0 + 3, *running, None, None)
    assert torch.equal(running, torch.ones_like(running))


def test_shapes_that_do_not_fit_are_refused_before_anything_is_written(device):
    mean = torch.zeros(2, 3, dtype=torch.float64, device=device)
    running, count = torch.ones(3, device=device), torch.tensor(4, device=device)
    for wrong in ({"m2": mean[:, :2]}, {"count": mean[0]}, {"running_var": running[:2]}, {"m2": mean.float()}):
        arguments = {"m2": mean, "count": mean[:, 0] + 2, "running_mean": running, "running_var": running} | wrong
        with pytest.raises(RuntimeError, match=f"batch_norm_gather_stats: expected {next(iter(wrong))} of"):
            parts.batch_norm_gather_stats(mean, num_batches_tracked=count, **arguments)
    assert torch.equal(running, torch.ones_like(running))
    assert int(count) == 4
