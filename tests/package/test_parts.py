"""The ops in parts, composed by hand in one process: what the parts of a batch give is what the whole of it gives."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bnfused import _extension, parts
from support import cases, checks, oracle
from support.on_device import copy_of


@pytest.fixture
def device(backend, monkeypatch):
    """Where the backend's tensors are; the reference is plain torch, which devices without kernels take."""
    if backend.name == "reference":
        monkeypatch.setattr(parts, "_has_kernel", lambda x: False)
    return torch.device("cuda" if backend.name == "cuda" else "cpu")


def moments_of(xs):
    """Of each, gathered."""
    return torch.stack([parts.batch_norm_stats(x) for x in xs])


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

    mean, var, count = parts.batch_norm_gather_stats(moments_of(xs), *state, p.momentum)
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
    all_sums = sum(sums)
    grad_bias, grad_weight = all_sums.to(p.weight.dtype)
    for g, x, invstd, forward in kept:
        grad_x, grad_residual = parts.batch_norm_backward_apply(g, x, mean, invstd, all_sums, count, **forward)
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


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (2, 3, 8), (4, 5, 3, 3), (2, 1, 5, 5), (2, 3, 1, 1), (0, 3, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "every other"])
def test_the_mask_of_plain_torch_is_that_of_the_kernel(extension, monkeypatch, shape, layout):
    """Bit for bit, padding too. Residuals in another order of memory do not change it."""
    x, residual = torch.randn(shape), torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "permuted":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "every other":
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    x[:1] = torch.nan
    mean = torch.zeros(shape[1], dtype=torch.float64)
    _, _, of_kernel = parts.batch_norm_apply(x, mean, mean + 1, residual=residual, activation="relu")
    monkeypatch.setattr(parts, "_has_kernel", lambda x: False)
    _, _, packed = parts.batch_norm_apply(x, mean, mean + 1, residual=residual, activation="relu")
    assert packed.dtype == torch.uint8 and torch.equal(packed, of_kernel)


def test_sums_over_thousands_of_parts(device):
    """4,096 parts of the same values, which add up to as many times the sums of one: a gradient as that one has it.

    Added one after the other, as a ring does. Each addition may round by half a unit in the last place of the sum, and
    equal terms round to the same side: float32 is off by up to 4096 * 2^-24 of it, float64 by 2^29 times less.
    """
    p = cases.make((2, 7, 3, 5))
    p = p.but(grad_y=p.grad_y.abs())  # of one sign, so that the sums are as large as their terms
    x, grad_y, weight = (t.to(device) for t in (p.x, p.grad_y, p.weight))
    mean, var, count = parts.batch_norm_gather_stats(moments_of([x]))
    _, invstd, _ = parts.batch_norm_apply(x, mean, var, weight, eps=p.eps)
    total = sum([parts.batch_norm_backward_reduce(grad_y, x, mean, invstd, weight)] * 4096)
    grad_x, _ = parts.batch_norm_backward_apply(grad_y, x, mean, invstd, total, 4096 * count, weight)
    truth = oracle.expected(p)
    expected = truth.values["grad_x"]
    checks.assert_within("grad_x", grad_x.cpu(), expected, cases.limit(expected, truth.scales["grad_x"], p.x.dtype))


def test_sums_that_do_not_fit_are_refused(extension):
    """float32 is what a collective of one's own may bring."""
    x, mean, count = torch.randn(4, 3), torch.zeros(3, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    for sums in (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64)):
        with pytest.raises(
            RuntimeError, match=r"batch_norm_backward_apply: expected sums of shape \[2, 3\] and float64"
        ):
            parts.batch_norm_backward_apply(x, x, mean, mean + 1, sums, count)


def test_statistics_from_elsewhere_need_not_be_finite_where_they_have_no_weight(device):
    """A part without values has no say, whatever its mean is."""
    moments = parts.batch_norm_stats(torch.randn(6, 3, device=device))
    empty = torch.full_like(moments, float("nan"))
    empty[-2:] = 0  # the count
    merged = parts.batch_norm_gather_stats(torch.stack([empty, moments]))
    for actual, wanted in zip(merged, parts.unpack_moments(moments), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=4 * torch.finfo(torch.float64).eps, atol=0)


DTYPES_OF_MOMENTS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@DTYPES_OF_MOMENTS
def test_packed_and_unpacked(dtype):
    """Every count and 48 bits of a mean survive float32, and deviations wherever it holds values; infinities too."""
    mean = torch.randn(2, 4, dtype=torch.float64) * torch.tensor([1e-30, 1.0, 1e4, 1e30], dtype=torch.float64)
    var = torch.rand(2, 4, dtype=torch.float64) * torch.tensor([1e-60, 0.0, 1e-4, 1e60], dtype=torch.float64)
    count = torch.tensor([2**24 + 1, 2**48 - 1], dtype=torch.float64)
    moments = parts.pack_moments(mean, var, count, dtype)
    assert (moments.dtype, moments.shape) == (dtype, (2, 9 if dtype == torch.float64 else 14))
    found = parts.unpack_moments(moments)
    exact = dtype == torch.float64
    # Of 1e-30 the second half is among the smallest that float32 has, 2**-149 apart.
    torch.testing.assert_close(found[0], mean, rtol=0 if exact else 2.0**-48, atol=0 if exact else 2.0**-150)
    # A deviation is rounded once, and its square is off by twice that; float64 has the rounding of the root too.
    torch.testing.assert_close(found[1], var, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(found[2], count)
    special = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=torch.float64)
    assert checks.same_bits(parts.unpack_moments(parts.pack_moments(special, special * 0, count[0], dtype))[0], special)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_stats_are_packed_as_said(device, dtype):
    """The op, and the function for what comes from elsewhere, of moments that both dtypes can hold.

    Without values, and without channels, whose count may need more than float32 all the same.
    """
    mean, var = 64 * torch.arange(3, dtype=torch.float64), torch.full((3,), 9, dtype=torch.float64)
    x = (mean + torch.tensor([[3.0], [-3.0]]).repeat(4, 1)).to(dtype)
    none = torch.zeros(0, dtype=torch.float64)
    for values, *wanted in (
        (x, mean, var),
        (x[:0], mean * 0, var * 0),
        (torch.empty(2**24 + 1, 0, 1, dtype=dtype), none, none),
    ):
        count = torch.tensor(len(values), dtype=torch.float64)
        packed = parts.pack_moments(*wanted, count, torch.float64 if dtype == torch.float64 else torch.float32)
        found = parts.batch_norm_stats(values.to(device)).cpu()
        assert (found.dtype, found.shape) == (packed.dtype, packed.shape)
        for name, actual, expected in zip(
            ("mean", "var", "count"), *map(parts.unpack_moments, (found, packed)), strict=True
        ):
            # Sums of eight differences of 3, or of their squares, in the arithmetic of the dtype; merged in float64.
            bound = 8 * 9 * torch.finfo(found.dtype).eps + 8 * 131 * torch.finfo(torch.float64).eps
            checks.assert_within(name, actual, expected, torch.full_like(expected, 0 if name == "count" else bound))


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1.0])
def test_values_whose_squares_leave_float32(device, scale):
    """Sums of squared deviations would be 1e60 and 1e-60: a variance that travelled as one would be infinite, or 0."""
    x = torch.randn(12, 3, device=device) * scale
    _, var, _ = parts.batch_norm_gather_stats(moments_of(x.split([5, 7])))
    torch.testing.assert_close(var.cpu(), x.cpu().double().var(0, correction=0), rtol=1e-6, atol=0)


def test_squares_that_vanish(device):
    """Values 2^-75 apart: their squares are below the smallest float32, and the square of their sum is not.

    Trap: a sum of squared deviations below 0, and its root.
    """
    x = torch.randint(2, (24000, 3), device=device) * 2.0**-75
    _, var, _ = parts.batch_norm_gather_stats(moments_of(x.split(12000)))
    torch.testing.assert_close(var.cpu(), torch.zeros_like(var.cpu()), rtol=0, atol=2.0**-149)


@DTYPES_OF_MOMENTS
def test_merged_in_levels(device, dtype):
    """Nodes first, and then their moments: the same but for what packing rounds once more, an empty node included."""
    sizes = (3, 4, 0, 0, 6, 1)
    x = 100 + torch.randn(sum(sizes), 70, dtype=dtype, device=device)
    moments = moments_of(x.split(sizes))
    flat = parts.batch_norm_gather_stats(moments)
    merged = torch.stack([parts.merge_moments(node) for node in moments.split(2)])
    assert (merged.dtype, merged.shape) == (dtype, (3, moments.shape[1]))
    mean, var, _ = flat = [t.cpu() for t in flat]
    # A mean has a rounding in each merge, or packed in two float32 the last of 48 bits. The variance has a few of the
    # packed deviation; and of the distance between two means, which are that far off, it has the square.
    eps = torch.finfo(dtype).eps
    of_mean, of_deviation = (2**-48, 2**-22) if dtype == torch.float32 else (4 * eps, 64 * eps)
    off = of_mean * mean.abs()
    limits = (off, of_deviation * var + 2 * off * var.sqrt(), torch.zeros(()))
    names = ("mean", "variance", "count")
    for name, actual, wanted, limit in zip(names, parts.batch_norm_gather_stats(merged), flat, limits, strict=True):
        checks.assert_within(name, actual.cpu(), wanted, limit)


@DTYPES_OF_MOMENTS
@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_kernel_merges_as_plain_torch(device, monkeypatch, momentum, dtype):
    """Of many parts, some empty, and more channels than a thread takes at once; running statistics of any dtype."""
    mean, var = torch.randn(37, 700, dtype=torch.float64) * 100, torch.rand(37, 700, dtype=torch.float64)
    count = torch.randint(0, 5, (37,)).double()
    mean[count == 0] = torch.nan
    moments = parts.pack_moments(mean, var, count, dtype).to(device)
    found = []
    for plain_torch in (False, True):
        if plain_torch:
            monkeypatch.setattr(parts, "_has_kernel", lambda x: False)
        running = (torch.arange(1400.0, device=device)[::2], torch.ones(700, dtype=torch.bfloat16, device=device))
        tracked = torch.tensor(6, device=device)
        merged = parts.batch_norm_gather_stats(moments, *running, tracked, momentum)
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
    """Of what one collective gathered.

    Means that lie 1e6 standard deviations from 0, and parts of very different sizes. All arithmetic is float64. The
    mean gains one rounding of its own size with each part; a deviation from it, of about 1, is off by as much, 1e6 *
    2^-53 a part, and so is, relatively and twice, its square.
    """
    counts = torch.randint(0, 10**6, (count_of_parts, 1)).double()
    counts[-1] = 2
    means = 1e6 + torch.randn(count_of_parts, channels, dtype=torch.float64)
    variances = torch.rand(count_of_parts, channels, dtype=torch.float64)
    gathered = parts.pack_moments(means, variances, counts[:, 0], torch.float64).to(device)
    old = [torch.randn(channels), torch.rand(channels).half(), torch.tensor(4)]
    state = [t.to(device, copy=True) for t in old]
    mean, var, total = parts.batch_norm_gather_stats(gathered, *state, None)

    shift = means - 1e6  # exact, as is what follows to 1e-15 of the deviations
    expected_mean = (shift * counts).sum(0) / counts.sum()
    expected_m2 = (counts * (variances + (shift - expected_mean).square())).sum(0)
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


@DTYPES_OF_MOMENTS
def test_equal_means_have_their_own_mean(device, dtype):
    """And a variance of exactly 0, so that constant channels are normalized to exactly the bias."""
    mean = torch.full((5, 40), 0.1, dtype=dtype).double()
    counts = torch.tensor([3.0, 1, 7, 0, 11], dtype=torch.float64)
    moments = parts.pack_moments(mean, torch.zeros_like(mean), counts, dtype).to(device)
    merged, var, _ = parts.batch_norm_gather_stats(moments)
    assert torch.equal(merged.cpu(), mean[0])
    assert not var.any()


@pytest.mark.parametrize("counts", [[0.0, 0.0], [0.0, 1.0]], ids=["none", "one"])
def test_too_few_values_are_counted_and_nothing_is_learned(device, counts):
    mean = torch.randn(2, 3, dtype=torch.float64)
    running, tracked = torch.ones(2, 3, device=device), torch.tensor(4, device=device)
    moments = parts.pack_moments(mean, torch.zeros_like(mean), torch.tensor(counts, dtype=torch.float64)).to(device)
    _, var, total = parts.batch_norm_gather_stats(moments, *running, tracked)
    assert (int(total), int(tracked)) == (sum(counts), 5)
    assert torch.equal(running, torch.ones_like(running)) and not var.any()


def test_merge_is_what_its_schema_and_its_fake_kernel_say(extension):
    """What it writes to, shapes and strides of what it returns; in both forms of moments."""
    for gathered in (torch.rand(3, 11, dtype=torch.float64), torch.rand(3, 17)):
        state = (torch.zeros(5), torch.ones(5), torch.tensor(3))
        torch.library.opcheck(
            torch.ops.bnfused.batch_norm_gather_stats.default,
            (gathered, *state, torch.empty_like(gathered[0]), None),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    for dtype in (torch.float64, torch.float16):
        torch.library.opcheck(torch.ops.bnfused.batch_norm_stats.default, (torch.rand(3, 5, 2, dtype=dtype),))


def test_a_build_without_cuda_takes_plain_torch_and_says_so_once(extension, monkeypatch):
    monkeypatch.setattr(_extension, "_has_cuda", False)
    monkeypatch.setattr(_extension, "_warned", set())
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.empty(4, 3, 5, device="cuda")
        mean, var, _ = parts.unpack_moments(parts.batch_norm_stats(x))
        y, invstd, _ = parts.batch_norm_apply(x, mean, var)
        parts.batch_norm_backward_reduce(y, x, mean, invstd)
    assert y.device.type == "cuda"
    (warning,) = caught
    for part in ("no kernels for cuda tensors", "reference path", f"BNFUSED_CUDA=1 {_extension.REBUILD}"):
        assert part in str(warning.message)


def test_running_statistics_that_nothing_counts_do_not_move(device):
    """As torch has it: momentum None without a counter is a momentum of 0."""
    moments, running = moments_of(torch.randn(2, 4, 3, device=device)), torch.ones(2, 3, device=device)
    parts.batch_norm_gather_stats(moments, *running, None, None)
    assert torch.equal(running, torch.ones_like(running))


def test_shapes_that_do_not_fit_are_refused_before_anything_is_written(device):
    moments = moments_of(torch.randn(2, 4, 3, device=device))
    running, count = torch.ones(3, device=device), torch.tensor(4, device=device)
    for wrong in (
        *({"moments": moments[:, :-1]}, {"moments": moments[:, :0]}, {"moments": moments.half()}),
        *({"moments": moments.double()[:, 1:]}, {"running_mean": running[:2]}, {"running_var": running[:2]}),
    ):
        arguments = {"moments": moments, "running_mean": running, "running_var": running} | wrong
        with pytest.raises(RuntimeError, match=f"batch_norm_gather_stats: expected {next(iter(wrong))} of"):
            parts.batch_norm_gather_stats(num_batches_tracked=count, **arguments)
    assert torch.equal(running, torch.ones_like(running))
    assert int(count) == 4
