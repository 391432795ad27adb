"""Accuracy in the regimes where batch norms break, in every layout and at sizes that need more than one block.

The bounds are those of cases.py: 5e-6 of the largest value in float32, and never worse than torch's own error.
"""

from __future__ import annotations

import math

import pytest
import torch

from bnfused import functional
from support import cases, checks, oracle

SHAPES = {
    "one block": ((4, 5, 7, 7), "contiguous"),
    "nchw": ((5, 2, 90, 91), "contiguous"),  # two blocks, of four planes and of one
    "nchw, planes of 49": ((33, 12, 7, 7), "contiguous"),
    "nchw, short planes": ((90, 64, 7, 7), "contiguous"),
    "channels_last": ((6, 16, 20, 21), "channels_last"),
    "channels_last, 3 channels": ((6, 3, 40, 41), "channels_last"),
    "channels_outermost": ((6, 4, 20, 21), "channels_outermost"),
    "rows": ((1030, 33), "contiguous"),
    "tall": ((20_000, 3), "contiguous"),
    "ncdhw": ((2, 4, 5, 14, 15), "contiguous"),
    "ncl, sliced": ((5, 4, 501), "holes_in_last"),
}


def numerics_problem(where, regime, **options):
    shape, layout = SHAPES[where]
    return cases.make(shape, layout=layout, regime=regime, zero_stats=True, momentum=0.3, **options)


@pytest.mark.parametrize("affine", [False, True], ids=["bare", "affine"])
@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("where", SHAPES)
def test_float32(backend, where, regime, affine):
    """y, all gradients and the running statistics within 5e-6 in every regime."""
    p = numerics_problem(where, regime, weight=affine, bias=affine)
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("where", SHAPES)
def test_float32_no_worse_than_torch(backend, where, regime):
    """The same quantities are no further from float64 than torch's own float32 batch norm."""
    checks.check_no_worse_than_torch(backend.batch_norm, lambda: numerics_problem(where, regime))


@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("where", ["nchw", "channels_last", "rows", "tall"])
def test_float32_fused(backend, where, regime):
    """The same with a residual and ReLU in the same pass."""
    p = numerics_problem(where, regime, residual=True, activation="relu")
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("where", ["nchw", "channels_last", "tall"])
def test_float32_frozen(backend, where, regime):
    """Statistics of the data handed in as running ones: x - running_mean cancels as x - mean does in training."""
    p = numerics_problem(where, regime)
    mean, var = oracle.statistics(p.x.double())
    p = p.but(training=False, running_mean=mean.float(), running_var=var.float())
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p, needs=())


@pytest.mark.parametrize("regime", ["standard", "mean_1e4_std_0.01", "outlier_first_at_1e4", "drift"])
@pytest.mark.parametrize(
    "shape, layout", [((3, 5, 90, 91), "contiguous"), ((6, 16, 28, 28), "channels_last"), ((20_000, 3), "contiguous")]
)
def test_threads_are_equally_accurate(backend, shape, layout, regime, threads):
    """Splitting the channels or the rows over threads costs no accuracy."""
    p = cases.make(shape, layout=layout, regime=regime, zero_stats=True, momentum=0.3)
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("regime", ["standard", "mean_1e4_std_0.01", "outlier_first", "drift"])
@pytest.mark.parametrize("shape, layout", [((100_000, 8), "contiguous"), ((8, 4, 160, 161), "channels_last")])
def test_many_rows(backend, shape, layout, regime):
    """1e5 and 2e5 values per channel: errors that grow with the count show."""
    p = cases.make(shape, layout=layout, regime=regime, zero_stats=True)
    checks.check_against_oracle(backend.batch_norm, p)


def test_outlier_before_constants(backend):
    """Where all values but the first are one, what it does to the shift rounds each of them alike: errors add up."""
    p = cases.make((20_000, 64), zero_stats=True)
    x = p.x[:1].expand_as(p.x).clone()
    x[0] = 1e4
    checks.check_against_oracle(backend.batch_norm, p.but(x=x))


def test_two_million_rows(backend):
    """2e6 values per channel, channels innermost, where plain float32 sums are wrong by 1.5e-3."""
    p = cases.make((8, 2, 500, 500), layout="channels_last", zero_stats=True)
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("regime", cases.REGIMES)
@pytest.mark.parametrize("where", ["one block", "channels_last", "rows"])
def test_float64(backend, where, regime):
    """float64 is computed in float64, running statistics included."""
    p = numerics_problem(where, regime, dtype=torch.float64)
    checks.check_against_oracle(backend.batch_norm, p, hard=True)


@pytest.mark.parametrize("parameters", ["float32", "of x"])
@pytest.mark.parametrize("regime", cases.REGIMES_16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("where", ["nchw", "nchw, short planes", "channels_last", "rows", "ncl, sliced"])
def test_16_bit(backend, where, dtype, regime, parameters):
    """y and grad_x are the float32 result rounded once; statistics are as accurate as float32, or rounded once."""
    if regime == "mean_1e4_std_100" and dtype == torch.float16 and parameters == "of x":
        regime = "mean_100_std_10"  # the running variance of the other, 1e4 squared, is past float16
    p = numerics_problem(
        where,
        cases.REGIMES_16[regime],
        dtype=dtype,
        param_dtype=torch.float32 if parameters == "float32" else dtype,
    )
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("value", [10_000.1, -3e-5, 1e15])
def test_constant_channel_is_exactly_bias(backend, where, value, dtype):
    """x - mean is exactly 0 and nothing is multiplied into a cancelling sum: y is bias, to the bit.

    torch's own channels_last path returns -0.9999 for a constant 10000.1.
    """
    shape, layout = SHAPES[where]
    p = cases.make(shape, layout=layout, dtype=dtype, regime=lambda x: torch.full_like(x, value))
    checks.check_constant_channels(backend.batch_norm, p)
    checks.check_constant_channels(backend.batch_norm, p.but(bias=None, weight=None))


@pytest.mark.parametrize("where", SHAPES)
@pytest.mark.parametrize("value", [-1.1e160, 1.7e200], ids=str)
def test_constant_channel_past_the_root_of_the_range(backend, where, value):
    """The squares of a float64 of this size are infinite, those of its deviations are 0."""
    shape, layout = SHAPES[where]
    p = cases.make(shape, layout=layout, dtype=torch.float64, regime=lambda x: torch.full_like(x, value))
    checks.check_constant_channels(backend.batch_norm, p)


@pytest.mark.parametrize("where", ["nchw", "nchw, planes of 49", "channels_last", "rows"])
def test_constant_at_the_end_of_the_range(backend, where):
    """The same where a sum of two values is infinite. Trap: a mean that starts from 0, and with the sum is given up."""
    shape, layout = SHAPES[where]
    p = cases.make(shape, layout=layout, regime=lambda x: torch.full_like(x, 3e38))
    checks.check_constant_channels(backend.batch_norm, p)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "shape, layout",
    [
        ((3, 5, 4, 6), "contiguous"),
        ((3, 5, 4, 6), "channels_last"),
        ((30, 5), "contiguous"),
        ((1030, 16), "contiguous"),
        ((3, 64, 7), "contiguous"),
    ],
    ids=["nchw", "channels_last", "rows", "many rows", "short planes"],
)
def test_nonfinite_stays_in_its_channel(backend, shape, layout, value, mode, activation):
    """One Inf or NaN changes no bit of any other channel, whose values may share a vector with it."""
    p = cases.make(
        shape,
        layout=layout,
        training=mode,
        activation=activation,
        residual=activation is not None,
    )
    checks.check_nonfinite_stays(backend.batch_norm, p, value)


@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_nan_goes_through_activations(backend, activation, residual):
    """Frozen, a NaN in x or in the residual comes out as NaN where torch's activation has it, and only there."""
    p = cases.make((3, 2, 40), training=False, residual=residual, activation=activation)
    for name in ("x", "residual") if residual else ("x",):
        tensor = getattr(p, name).clone()
        for i, value in enumerate((math.nan, math.inf, -math.inf)):
            tensor[i, 1, 7 * i] = value
        spoiled = p.but(**{name: tensor})
        y = checks.run(backend.batch_norm, spoiled, needs=()).values["y"]
        # In float64: torch's vectorised float32 gelu makes NaN of +inf.
        wanted = oracle.expected(spoiled).values["y"]
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y.isinf(), wanted.isinf())
        assert torch.equal(y[wanted.isinf()].double(), wanted[wanted.isinf()])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_frozen_gradient_does_not_depend_on_x(backend, value, layout):
    """grad_x is grad_y * weight * invstd. Trap: 0 * NaN, of the terms that only training has."""
    p = cases.make((3, 2, 40), training=False, layout=layout)
    x = p.x.clone()
    x[0, 1, 3] = value
    checks.check_against_oracle(backend.batch_norm, p.but(x=x), needs=("x", "bias"))


@pytest.mark.parametrize("where", ["nchw", "channels_last", "rows", "tall"])
def test_infinity_behind_finite_values(backend, where):
    """At the end of its channel. Trap: a run of values whose squares overflow is added up again, smaller, for ever."""
    shape, layout = SHAPES[where]
    p = cases.make(shape, layout=layout)
    x = p.x.clone()
    x[(-1, 1, *[-1] * (x.dim() - 2))] = math.inf
    y = checks.run(backend.batch_norm, p.but(x=x), needs=()).values["y"]
    assert y[:, 1].isnan().all() and y[:, 0].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_running_mean(backend, value, layout):
    """Frozen, all of its channel is infinite. Trap: the mean as two floats, the second infinity less infinity."""
    p = cases.make((3, 2, 40), training=False, layout=layout)
    p = p.but(running_mean=torch.tensor([0, value]))
    y = checks.run(backend.batch_norm, p, needs=()).values["y"]
    wanted = oracle.expected(p).values["y"]
    assert wanted[:, 1].isinf().all() and torch.equal(y[:, 1].double(), wanted[:, 1])


@pytest.mark.parametrize("activation", ["elu", "gelu", "hardswish", "sigmoid", "silu", "tanh"])
def test_nan_in_the_residual_reaches_the_gradients(backend, activation):
    """Of an activation whose derivative at NaN is NaN: all of grad_x in that channel, which is a sum over it."""
    p = cases.make((3, 2, 40), residual=True, activation=activation)
    residual = p.residual.clone()
    residual[0, 1, 3] = math.nan
    outcome = checks.check_against_oracle(backend.batch_norm, p.but(residual=residual))
    assert outcome.values["grad_x"].isnan().sum() == 3 * 40


@pytest.mark.parametrize("where", ["nchw", "channels_last", "rows"])
@pytest.mark.parametrize("scale", [1e18, 1e-30])
def test_extreme_scales(backend, where, scale):
    """Squares past the float32 range, where torch's own y is wrong by its own size."""
    shape, layout = SHAPES[where]
    p = cases.make(shape, layout=layout, regime=lambda x: scale * x, running=False)
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("where", ["nchw", "channels_last", "rows"])
def test_largest_scale(backend, where):
    """At 1e30 y is right; grad_x, of 1e-30, has terms below the float32 range, and is no worse than torch's own."""
    shape, layout = SHAPES[where]

    def draw():
        return cases.make(shape, layout=layout, regime=lambda x: 1e30 * x, running=False)

    checks.check_against_oracle(backend.batch_norm, draw(), needs=())
    checks.check_no_worse_than_torch(backend.batch_norm, draw)


@pytest.mark.parametrize("where", ["nchw", "nchw, short planes", "channels_last", "rows"])
def test_sums_past_the_range(backend, where):
    """At 5e37 eight differences of one sign leave float32, and such sums of either sign make NaN of finite values."""
    shape, layout = SHAPES[where]
    p = cases.make(shape, layout=layout, regime=lambda x: 5e37 * x.sign(), running=False)
    checks.check_against_oracle(backend.batch_norm, p, needs=())


@pytest.mark.parametrize("where", ["nchw", "nchw, short planes", "channels_last", "rows"])
def test_sums_past_the_range_beside_ordinary_values(backend, where):
    """The same in one channel of many.

    Traps: an infinite sum makes an infinite shift, and that squares of NaN, which are not past the range; what is then
    done to the channels that share a vector with it, whose squares leave the range at its other end.
    """
    shape, layout = SHAPES[where]
    p = cases.make(shape, layout=layout, running=False)
    x = p.x.clone()
    x[:, 1] = 8e37 * x[:, 1].sign()
    checks.check_against_oracle(backend.batch_norm, p.but(x=x), needs=())


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_silu_far_out(backend, residual):
    """Its gradient has z times what the sigmoid lacks of 1: not z times the error of a sigmoid next to 1."""
    z = torch.linspace(-50, 1000, 4 * 5 * 77).view(4, 5, 77)
    p = checks.tie_problem("silu", torch.float32, residual=residual)
    stats = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    x = z / 2 if residual else z
    p = p.but(x=x, residual=x.clone() if residual else None, grad_y=torch.randn_like(z), **stats)
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
def test_eps_is_inside_the_root(backend, eps):
    """From negligible to dominating."""
    p = cases.make((8, 3, 5), regime=lambda x: 0.5 * x, eps=eps)
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p.but(training=False))


# Outputs without a sum over values, where the statistics are given: the same expression for every element.
ELEMENTWISE = ("y", "grad_x", "grad_residual")
# 7 x 9 planes of 21 channels have a remainder in every vector width, and 8 x 16 of 16 have none in any.
PLANES = pytest.mark.parametrize("shape", [(3, 21, 7, 9), (2, 16, 8, 16)], ids=str)


@pytest.mark.usefixtures("extension")
@PLANES
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layouts_agree_bitwise_without_batch_statistics(dtype, activation, residual, shape):
    """Eval and frozen: an element depends on no other, and not on where in a vector it lies.

    Trap: another formula, or another exp, for what is left over at the end of a row.
    """
    p = cases.make(shape, dtype=dtype, training=False, residual=residual, activation=activation)
    wanted = checks.run(functional.batch_norm, p).values
    for layout in ("channels_last", "channels_outermost", "batch_innermost", "last_two_swapped", "offset"):
        moved = {n: cases.LAYOUTS[layout](getattr(p, n)) for n in ("x", *(["residual"] if residual else []))}
        values = checks.run(functional.batch_norm, p.but(**moved)).values
        values["y without gradients"] = checks.run(functional.batch_norm, p.but(**moved), needs=()).values["y"]
        for name in (*ELEMENTWISE, "y without gradients"):
            if values[name] is not None:
                assert checks.same_bits(values[name], wanted[name.split()[0]]), f"{name} in {layout}"


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_threads_agree_bitwise_without_batch_statistics(activation, layout):
    """Eval and frozen: where the work is cut changes no bit of an elementwise result."""
    p = cases.make((8, 21, 40, 41), layout=layout, training=False, residual=True, activation=activation)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(checks.run(functional.batch_norm, p).values)
    finally:
        torch.set_num_threads(1)
    for values in results[1:]:
        for name in ELEMENTWISE:
            assert checks.same_bits(values[name], results[0][name]), name
