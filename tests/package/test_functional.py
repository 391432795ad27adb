"""Every backend against the oracle: shapes, layouts, dtypes, modes, options, and traps others fell into."""

from __future__ import annotations

import inspect
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bnfused
from support import cases, checks, oracle

MODES = {"train": {"training": True}, "frozen": {"training": False}}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


def name_of(value):
    """Test ids: float32, relu, train."""
    return str(value).removeprefix("torch.")


# ----------------------------------------------------------------------- shapes, layouts and dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rank", cases.RANKS)
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(backend, mode, rank, dtype):
    """y, all four gradients and the running statistics, for every rank from (N, C) to six dimensions."""
    p = cases.make(cases.RANKS[rank], dtype=dtype, residual=True, activation="leaky_relu", **MODES[mode])
    checks.check_against_oracle(backend.batch_norm, p)
    plain = cases.make(cases.RANKS[rank], dtype=dtype, **MODES[mode])
    checks.check_against_oracle(backend.batch_norm, plain)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual-relu"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", cases.RANKS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout, rank, mode, fused):
    """Any strides give the same result, and y and grad_x lie in memory as x does, in eval and frozen mode too.

    Traps: fusion flags ignored in one layout only (NCHW); the layout of the gradient lost in eval backward. The buffers
    around a sliced x hold NaN, so reading past it shows.
    """
    options = {"residual": True, "activation": "relu"} if fused else {}
    p = cases.make(cases.RANKS[rank], layout=layout, **options, **MODES[mode])
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p, needs=())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize("grad_layout", cases.LAYOUTS)
def test_grad_layouts(backend, layout, grad_layout):
    """grad_y may come in any layout, expanded and strided ones included; grad_x still lies as x does."""
    p = cases.make((4, 6, 3, 5), layout=layout, grad_layout=grad_layout, residual=True, activation="relu")
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p.but(activation="silu", residual=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape", [(2, 16, 32), (3, 17, 4, 4), (2, 33, 3, 5), (1, 40, 1, 2), (2, 3, 7, 1, 9), (2, 1, 5)]
)
def test_residual_and_grad_y_of_another_memory_order(backend, shape, dtype):
    """As in a call in which all are in x's order: a value in the wrong place would be off by whole units.

    Sizes at and around the tiles of the copy.
    """
    x, residual, grad_y = (torch.randn(shape).to(dtype) for _ in range(3))
    innermost = [torch.movedim(torch.movedim(t, 1, -1).contiguous(), -1, 1) for t in (x, residual, grad_y)]
    weight = torch.rand(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.5

    def run(x, residual, grad_y):
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
        y = backend.batch_norm(leaves[0], None, None, leaves[2], training=True, residual=leaves[1], activation="silu")
        return y, *torch.autograd.grad(y, leaves, grad_y)

    for one, other in (((x, residual, grad_y), innermost), (innermost, (x, residual, grad_y))):
        for actual, wanted in zip(run(one[0], *other[1:]), run(*one), strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("other", ["channels_last", "holes_in_last", "expanded_batch", "offset"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_residual_in_another_layout(backend, layout, other):
    """The residual need not lie in memory as x does."""
    p = cases.make((4, 6, 3, 5), layout=layout, residual=True, activation="relu")
    p = cases.away_from_kinks(p.but(residual=cases.LAYOUTS[other](torch.randn(p.x.shape))))
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows"])
@pytest.mark.parametrize("channels", cases.CHANNELS)
def test_channel_counts(backend, channels, layout, mode):
    """Every channel is computed, whatever the count.

    Trap: a grid rounded down to a power of two leaves the last of 65, 96 or 320 channels uninitialised.
    """
    few = channels > 1000
    shape = (5, channels) if layout == "rows" else (2 if few else 3, channels, 3, 1 if few else 3)
    p = cases.make(
        shape,
        layout="contiguous" if layout == "rows" else layout,
        residual=True,
        activation="relu",
        **MODES[mode],
    )
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("spatial", cases.SPATIAL, ids=str)
def test_spatial_sizes(backend, spatial, layout, dtype):
    """Planes shorter than a vector, with every remainder, and channels that start unaligned because of it."""
    p = cases.make((4, 7, *spatial), layout=layout, dtype=dtype, residual=True, activation="relu")
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p.but(residual=None, activation=None))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("plane", [2, 9, 16, 49, 128, 129])
def test_spatial_sizes_in_groups(backend, plane, dtype, mode):
    """Channels whose short planes are computed side by side, in groups of 8, of 24 and of all 72; and planes of one
    value too many for that."""
    p = cases.make((9, 72, plane), dtype=dtype, **MODES[mode])
    checks.check_against_oracle(backend.batch_norm, p)
    for activation in ("relu", "silu"):
        checks.check_against_oracle(
            backend.batch_norm,
            cases.make((9, 72, plane), dtype=dtype, residual=True, activation=activation, **MODES[mode]),
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(7, 64, 11, 11), (100, 72, 7, 7), (40, 1280, 1, 2)], ids=str)
def test_groups_on_threads(backend, shape, mode, threads):
    """The same with groups shared out to threads, and more rows than are summed around one shift."""
    p = cases.make(shape, residual=True, activation="relu", zero_stats=mode == "train", **MODES[mode])
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("shape", [(4, 64, 7, 7), (4, 64, 14, 14), (4, 12, 7, 7), (6, 64, 31, 31)], ids=str)
def test_backward_on_another_number_of_threads(backend, shape):
    """The mask that a forward leaves means the same to a backward that is cut otherwise."""
    p = cases.make(shape, residual=True, activation="relu")
    leaves = [t.detach().requires_grad_() for t in (p.x, p.residual)]
    before = torch.get_num_threads()
    grads = []
    try:
        for forward, backward in ((1, 1), (1, 3), (3, 1), (2, 7)):
            torch.set_num_threads(forward)
            y = backend.batch_norm(leaves[0], None, None, p.weight, p.bias, True, residual=leaves[1], activation="relu")
            torch.set_num_threads(backward)
            grads.append(torch.autograd.grad(y, leaves, p.grad_y))
    finally:
        torch.set_num_threads(before)
    for other in grads[1:]:
        for wanted, actual in zip(grads[0], other, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("elements", cases.BLOCK_ELEMENTS)
def test_plane_sizes_around_blocks(backend, elements, batch):
    """A plane one short of a block of elements, a block, one more: no element is left out of a sum or counted twice."""
    p = cases.make((batch, 2, elements), zero_stats=True)
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("channels", [1, 3, 16, 33, 64, 65, 128, 1030])
@pytest.mark.parametrize("rows", cases.BLOCK_ROWS)
def test_row_counts_around_blocks(backend, rows, channels):
    """The same for rows where channels are innermost, for channel counts that fill vectors and that do not."""
    p = cases.make((rows, channels), zero_stats=True, activation="relu")
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tall(backend, layout, threads):
    """Twenty thousand rows of three channels, as features of points are."""
    shape = (20_000, 3) if layout == "contiguous" else (4, 3, 5000)
    p = cases.make(shape, layout=layout, zero_stats=True)
    checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_outermost"])
@pytest.mark.parametrize(
    "shape", [(8, 1, 70, 71), (3, 5, 64, 67), (300, 64, 2, 3), (1, 2, 40_000), (1, 1, 70_001), (2, 2051, 9)]
)
def test_large_enough_for_threads(backend, shape, layout, mode, threads):
    """Tensors that are split over threads by channel, by row, and within one channel."""
    zero_stats = mode == "train"
    p = cases.make(shape, layout=layout, residual=True, activation="relu", zero_stats=zero_stats, **MODES[mode])
    checks.check_against_oracle(backend.batch_norm, p)


EIGHT_MIB = {
    "nchw": ((8, 17, 128, 128), "contiguous"),
    "nchw, one plane cut": ((1, 3, 1024, 704), "contiguous"),
    "channels_last": ((8, 16, 128, 132), "channels_last"),
    "channels_last, wide": ((4, 96, 75, 76), "channels_last"),
    "channels_last, short last row": ((1, 96, 151, 151), "channels_last"),
    "rows of one line": ((140_000, 16), "contiguous"),
    "planes of no whole line": ((8, 20, 119, 111), "contiguous"),
    "short planes": ((43, 1024, 7, 7), "contiguous"),
}


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    "where, residual, activation, mode",
    [
        ("nchw", False, None, "frozen"),
        ("nchw", True, "relu", "train"),
        ("nchw", True, "silu", "train"),
        ("nchw, one plane cut", False, "relu", "train"),
        ("channels_last", False, None, "frozen"),
        ("channels_last", True, "relu", "train"),
        ("channels_last, wide", True, "silu", "train"),
        ("channels_last, short last row", True, "relu", "train"),
        ("channels_last, short last row", False, None, "train"),
        ("rows of one line", False, "relu", "train"),
        ("planes of no whole line", True, "relu", "train"),
        ("short planes", False, None, "train"),
        ("short planes", True, "relu", "train"),
        ("short planes", False, "silu", "frozen"),
    ],
)
def test_outputs_past_the_caches(where, residual, activation, mode):
    """From 6 MiB on, outputs that start on cache lines are stored past the caches, by loops of their own; from 8 MiB
    on, rows of 32- and 64-bit values are summed at fewer places at once."""
    shape, layout = EIGHT_MIB[where]
    p = cases.make(shape, layout=layout, residual=residual, activation=activation, **MODES[mode])
    assert p.x.nbytes >= 8 * 2**20
    checks.check_against_oracle(bnfused.functional.batch_norm, p)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
def test_outputs_past_the_caches_in_other_dtypes(dtype, layout):
    """The same, where a vector is half a line or a line holds eight values."""
    shape = (2, 128, 128, 132) if dtype == torch.bfloat16 else (2, 64, 92, 96)
    p = cases.make(shape, dtype=dtype, layout=layout, residual=True, activation="relu")
    assert p.x.nbytes >= 8 * 2**20
    checks.check_against_oracle(bnfused.functional.batch_norm, p)


@pytest.mark.usefixtures("extension")
def test_outputs_past_the_caches_on_threads(threads):
    """The same, split over threads."""
    p = cases.make(EIGHT_MIB["nchw"][0], residual=True, activation="relu")
    checks.check_against_oracle(bnfused.functional.batch_norm, p)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    "dtype, residual, activation, mode",
    [
        (torch.float32, False, None, "train"),
        (torch.float32, True, "relu", "train"),
        (torch.float32, True, "silu", "train"),
        (torch.float32, True, "relu", "frozen"),
        (torch.bfloat16, True, "relu", "train"),
        (torch.float64, True, "relu", "train"),
    ],
    ids=name_of,
)
def test_outputs_past_the_caches_in_strips(dtype, residual, activation, mode, threads):
    """Rows whose coefficients exceed L1 (kCoefficientBytes in csrc/cpu/tuning.h) are written in strips of 4 KiB; the
    last strip here is one line."""
    strip, line = 4096 // dtype.itemsize, 64 // dtype.itemsize
    columns = {torch.bfloat16: 2, torch.float32: 4, torch.float64: 4}[dtype] * strip + line
    assert 3 * columns * max(dtype.itemsize, 4) > 40 * 1024  # the coefficients of the forward
    shape = (6 * 2**20 // (columns * dtype.itemsize) + 1, columns)
    p = cases.make(shape, dtype=dtype, residual=residual, activation=activation, **MODES[mode])
    checks.check_against_oracle(bnfused.functional.batch_norm, p)


@pytest.mark.usefixtures("extension")
def test_outputs_in_huge_pages():
    """From 8 MiB on, the memory of y is asked for in huge pages."""
    p = cases.make((5, 7, 500, 501), activation="relu")
    assert p.x.nbytes >= 32 * 2**20
    y = checks.call(bnfused.functional.batch_norm, p)
    wanted = oracle.before_activation(p).clamp(min=0)
    checks.assert_within("y", y, wanted, cases.limit(wanted, oracle.finite_max(wanted), torch.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parameters", ["float32", "of x"])
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "holes_in_last"])
def test_16_bit(backend, dtype, parameters, mode, layout):
    """16-bit x with float32 parameters or its own: computed in float32 and rounded once."""
    p = cases.make(
        (6, 9, 5, 7),
        dtype=dtype,
        layout=layout,
        param_dtype=torch.float32 if parameters == "float32" else dtype,
        residual=True,
        activation="silu",
        **MODES[mode],
    )
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p.but(residual=None, activation=None))


@pytest.mark.parametrize("shape", [(4096, 16), (64, 1, 1024), (64, 64, 16)], ids=["rows", "planes", "short planes"])
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_every_16_bit_value(backend, dtype, shape):
    """Each of the 65536 is widened exactly, and its product with a weight rounded once: ties, denormals, inf and NaN.

    Statistics of mean 0 and invstd 1 leave y = x * weight, rounded to float32 as torch rounds it.
    """
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(shape)
    channels = shape[1]
    per_channel = (1, channels, *[1] * (len(shape) - 2))
    # Times 1.5, a quarter of all values lies halfway between two others, above an even one or an odd one.
    for low, high in ((1, 1), (1.5, 1.5), (0.5, 2), (2.0**-120, 2.0**-119), (2.0**100, 2.0**101)):
        weight = low + torch.rand(channels) * (high - low)
        y = backend.batch_norm(x, torch.zeros(channels), torch.ones(channels), weight, eps=1e-300)
        wanted = (x.float() * weight.view(per_channel)).to(dtype)
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("activation", [None, "relu", "residual-relu"])
@pytest.mark.parametrize(
    "shape", [(37, 33), (9, 3, 301), (5, 72, 50), (6200, 520), (2, 70, 30_000)], ids=lambda s: "x".join(map(str, s))
)
def test_one_subnormal_value(backend, shape, activation):
    """A subnormal number keeps its bits wherever it is, in y and in both gradients, among values that are none.

    Trap: the instruction for bfloat16 takes subnormals for zero. The last two shapes are written past the caches.
    """
    channels = shape[1]
    one, tiny = torch.ones(channels), 3 * 2.0**-133  # bfloat16 has no fewer bits left than 2
    places = [0, math.prod(shape) - 1, *torch.randint(math.prod(shape), (2,)).tolist()]
    for place in places:
        x, grad_y = (torch.randn(shape).abs_().clamp_(0.1).bfloat16() for _ in range(2))
        for tensor in (x, grad_y):
            tensor.view(-1)[place] = tiny
        x.requires_grad_()
        residual = torch.zeros_like(x, requires_grad=True) if activation == "residual-relu" else None
        y = backend.batch_norm(
            x,
            torch.zeros(channels),
            one,
            one,
            eps=1e-300,
            residual=residual,
            activation="relu" if activation else None,
        )
        y.backward(grad_y)
        assert checks.same_bits(y.detach(), x.detach())
        assert checks.same_bits(x.grad, grad_y)
        if residual is not None:
            assert checks.same_bits(residual.grad, grad_y)


@pytest.mark.parametrize("chosen", range(16))
def test_each_parameter_has_its_own_dtype(backend, chosen):
    """weight, bias, running_mean and running_var are each float32 or the dtype of x."""
    p = cases.make((6, 3, 5), dtype=torch.bfloat16)
    names = ("weight", "bias", "running_mean", "running_var")
    halves = {n: getattr(p, n).bfloat16() for i, n in enumerate(names) if chosen >> i & 1}
    checks.check_against_oracle(backend.batch_norm, p.but(**halves))
    checks.check_against_oracle(backend.batch_norm, p.but(**halves, training=False))


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_affine_is_optional(backend, weight, bias, activation, mode):
    """weight and bias may each be None."""
    for residual in (False, True):
        p = cases.make(
            (4, 3, 5),
            weight=weight,
            bias=bias,
            residual=residual,
            activation=activation,
            **MODES[mode],
        )
        checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("absent", [("running_mean",), ("running_var",), ("running_mean", "running_var")])
def test_running_statistics_are_optional_in_training(backend, absent):
    """Each may be None in training; the other is updated all the same."""
    p = cases.make((4, 3, 5)).but(**dict.fromkeys(absent))
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p.but(num_batches_tracked=None))


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_running_statistics_over_steps(backend, momentum, dtype):
    """Five steps from (0, 1): unbiased variance, momentum as the weight of the new batch, counter."""
    checks.check_steps(backend.batch_norm, momentum, dtype)


def test_cumulative_average_without_counter(backend):
    """momentum=None with nothing that counts leaves the statistics alone, as torch's modules do."""
    p = cases.make((4, 3, 5), momentum=None, counter=None)
    checks.check_against_oracle(backend.batch_norm, p)


def test_cumulative_average_reads_the_counter(backend):
    """Trap: a count incremented on the host and passed by value."""
    checks.check_momentum_reads_counter(backend.batch_norm)


def test_settings_are_not_remembered(backend):
    """Trap: a plan cached by shape without eps, momentum or activation."""
    checks.check_settings_not_remembered(backend.batch_norm)


def test_state_is_used_where_it_is(backend):
    """Trap: strides of the running statistics or parameters ignored; ``.data`` rebound."""
    checks.check_state_in_place(backend.batch_norm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 0), (4, 0, 3), (4, 3, 0), (2, 3, 5, 0, 2), (0, 0)])
def test_empty(backend, shape, mode):
    """Nothing in, nothing out; the running statistics keep still, the batch is counted, and gradients are 0."""
    p = cases.make(shape, residual=True, activation="relu", **MODES[mode])
    outcome = checks.check_against_oracle(backend.batch_norm, p)
    for name in ("running_mean", "running_var"):
        assert checks.same_bits(outcome.values[name], getattr(p, name))
    assert outcome.values["grad_weight"].count_nonzero() == 0
    checks.check_against_oracle(backend.batch_norm, p.but(residual=None, activation=None))


@pytest.mark.parametrize("mode", MODES)
def test_residual_may_be_the_input(backend, mode):
    """act(bn(x) + x): both gradients arrive at the one x."""
    p = cases.make((4, 3, 5), activation="silu", **MODES[mode])
    x = p.x.detach().requires_grad_()
    y = checks.call(backend.batch_norm, p, x=x, residual=x)
    (grad,) = torch.autograd.grad(y, x, p.grad_y)
    truth = oracle.expected(p.but(residual=p.x))
    wanted = truth.values["grad_x"] + truth.values["grad_residual"]
    scale = truth.scales["grad_x"] + truth.scales["grad_residual"]
    checks.assert_within("y", y, truth.values["y"], cases.limit(truth.values["y"], truth.scales["y"], torch.float32))
    checks.assert_within("grad", grad, wanted, cases.limit(wanted, scale, torch.float32))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_same_result_with_and_without_gradients(backend, activation):
    """no_grad, frozen and eval take other ops than training a graph does; they return the same y."""
    for training in (True, False):
        p = cases.make((4, 6, 5, 3), residual=True, activation=activation, training=training)
        with_graph = checks.run(backend.batch_norm, p)
        without = checks.run(backend.batch_norm, p, needs=())
        with torch.no_grad():
            leaf = p.x.detach().requires_grad_()
            under_no_grad = checks.call(backend.batch_norm, p, x=leaf)
        assert checks.same_bits(with_graph.values["y"], without.values["y"])
        assert checks.same_bits(with_graph.values["y"], under_no_grad)
        assert not under_no_grad.requires_grad


# -------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "holes_in_last"])
@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_activations(backend, activation, layout, residual, dtype, mode):
    """Each activation, alone and on top of a residual, in every kind of layout, with torch's values and gradients.

    Trap: a fusion flag that only one layout's kernel looks at.
    """
    shape = (17, 11) if layout == "rows" else (3, 11, 5, 7)
    p = cases.make(
        shape,
        dtype=dtype,
        layout="contiguous" if layout == "rows" else layout,
        residual=residual,
        activation=activation,
        **MODES[mode],
    )
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p, needs=())


@pytest.mark.parametrize("activation, params", [("leaky_relu", (None, 0.0, 0.5, 2.0)), ("elu", (None, 0.5, 3.0))])
def test_activation_param(backend, activation, params):
    """activation_param is the slope or alpha, and torch's default where it is None."""
    for param in params:
        p = cases.make((4, 3, 5), activation=activation, activation_param=param)
        p = cases.away_from_kinks(p.but(activation_param=param))
        checks.check_against_oracle(backend.batch_norm, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_ties(backend, activation, residual, dtype):
    """At 0, -0, 3, -3, 6, -6, beside them and far out: torch's values and torch's gradients."""
    checks.check_ties(backend.batch_norm, checks.tie_problem(activation, dtype, residual=residual))


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ties_in_training(backend, activation, layout):
    """A constant channel makes z exactly bias: what residual and bias get is the activation's gradient at a tie."""
    bias = torch.tensor([0.0, 3.0, -3.0, 6.0, -6.0, 1.0])
    shape = (4, 6, 5)
    x = torch.randn(6).view(1, 6, 1).expand(shape).clone()
    p = cases.make(shape, layout=layout)
    p = p.but(
        x=cases.LAYOUTS[layout](x),
        grad_y=torch.randint(-2, 3, shape).float(),
        bias=bias,
        residual=cases.LAYOUTS[layout](torch.zeros(shape)),
        activation=activation,
        activation_param=cases.PARAMS.get(activation),
    )
    checks.check_against_oracle(backend.batch_norm, p)
    checks.check_against_oracle(backend.batch_norm, p.but(residual=None))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_relu_lets_the_gradient_of_nan_pass(backend, layout, dtype):
    """As torch's: it is held back where z <= 0, which NaN is not. The mask of a residual has it so too."""
    p = cases.make((2, 19, 3, 5), layout=layout, dtype=dtype, residual=True, activation="relu", training=False)
    nan = torch.rand_like(p.x) < 0.3
    p = p.but(residual=p.residual.masked_fill(nan, math.nan))
    values = checks.run(backend.batch_norm, p).values
    assert values["y"][nan].isnan().all()
    assert torch.equal(values["grad_residual"][nan], p.grad_y[nan])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows"])
def test_relu_mask_is_that_of_y(backend, layout, dtype, mode):
    """The gradient passes exactly where y > 0, without any exception near 0.

    Trap: the mask of the forward pass and of the backward pass disagree at y == 0. A third of z is exactly 0 or within
    a rounding of it here.
    """
    shape = (40, 9) if layout == "rows" else (4, 9, 3, 5)
    p = cases.make(
        shape,
        dtype=dtype,
        layout="contiguous" if layout == "rows" else layout,
        residual=True,
        **MODES[mode],
    )
    # y without the residual, negated where chance says so: x and residual cancel to the last bit or nearly.
    y = checks.run(backend.batch_norm, p.but(residual=None), needs=()).values["y"]
    some = torch.rand(shape) < 1 / 3
    relu = p.but(activation="relu", residual=torch.where(some, -y, p.residual))
    checks.check_mask_matches_output(backend.batch_norm, relu)
    if mode == "frozen":
        # Exactly 0: x is the running mean and the residual is -bias; without a residual, bias is 0.
        mean, bias = (t.to(dtype).to(t.dtype) for t in (p.running_mean, p.bias))
        x = torch.where(some, oracle.per_channel(mean, y).to(dtype), p.x)
        residual = torch.where(some, -oracle.per_channel(bias, y).to(dtype), p.residual)
        exact = relu.but(x=x, running_mean=mean, bias=bias, residual=residual)
        checks.check_mask_matches_output(backend.batch_norm, exact)
        alone = exact.but(residual=None, bias=None)
        checks.check_mask_matches_output(backend.batch_norm, alone)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_relu_mask_where_float16_underflows(backend, residual):
    """z of 1e-9 is positive in float32 and 0 in float16: y is 0, so the gradient does not pass."""
    x = torch.randn(4, 3, 5).half()
    p = cases.Problem(
        x=x,
        grad_y=torch.ones_like(x),
        weight=torch.tensor([1e-9, 1.0, 1e-7]),
        running_mean=torch.zeros(3),
        running_var=torch.ones(3),
        residual=torch.zeros_like(x) if residual else None,
        training=False,
        activation="relu",
    )
    if residual:
        checks.check_mask_matches_output(backend.batch_norm, p)
        return
    # grad_x itself underflows with a weight of 1e-9, so look at what reaches bias.
    p = p.but(bias=torch.zeros(3))
    outcome = checks.run(backend.batch_norm, p)
    passed = (outcome.values["y"] > 0).sum((0, 2))
    assert outcome.values["grad_bias"].tolist() == passed.tolist()


# --------------------------------------------------------------------------------- calling patterns


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_only_needed_gradients(backend, residual, activation, mode):
    """All subsets of x, weight, bias and residual that may require a gradient."""
    p = cases.make((4, 3, 5), residual=residual, activation=activation, **MODES[mode])
    checks.check_only_needed(backend.batch_norm, p)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sum_backward(backend, layout):
    """y.sum().backward() sends an expanded scalar: gradients arrive in .grad, twice as much after a second call."""
    p = cases.make((4, 3, 5, 2), layout=layout, activation="silu")
    truth = oracle.expected(p.but(grad_y=torch.ones_like(p.x)))
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in ("x", "weight", "bias")}
    for times in (1, 2):
        checks.call(backend.batch_norm, p, **leaves).sum().backward()
        for name, leaf in leaves.items():
            wanted = times * truth.values[f"grad_{name}"]
            scale = times * truth.scales[f"grad_{name}"]
            checks.assert_within(name, leaf.grad, wanted, cases.limit(wanted, scale, torch.float32))


def test_retained_graph(backend):
    """Backward twice through one graph gives the same bits: nothing saved is consumed or written to."""
    p = cases.make((4, 3, 5), residual=True, activation="relu")
    leaves = [getattr(p, n).detach().requires_grad_() for n in checks.LEAVES]
    y = checks.call(backend.batch_norm, p, **dict(zip(checks.LEAVES, leaves, strict=True)))
    first = torch.autograd.grad(y, leaves, p.grad_y, retain_graph=True)
    second = torch.autograd.grad(y, leaves, p.grad_y)
    assert all(checks.same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_calls_do_not_share_saved_statistics(backend):
    """Trap: saved mean and invstd in an attribute that a second forward overwrites before the first backward."""
    problems = [
        cases.make((4, 3, 5)),
        cases.make((4, 3, 5), regime="scale_1e4", residual=True, activation="relu"),
        cases.make((4, 3, 5), training=False),
        cases.make((7, 3, 2), activation="tanh"),
    ]
    checks.check_calls_interleaved(backend.batch_norm, problems)


@pytest.mark.parametrize("overwritten", ["x", "y"])
def test_in_place_change_between_forward_and_backward(backend, overwritten):
    """Overwriting x or y before backward raises, or does not matter: the gradient is never wrong.

    The kernels keep a mask and not y, so y may be overwritten (by an in-place activation, say).
    """
    p = cases.make((4, 3, 5), residual=True, activation="relu")
    x = p.x.clone().requires_grad_()
    copy = x * 1.0
    y = checks.call(backend.batch_norm, p, x=copy)
    with torch.no_grad():
        (copy if overwritten == "x" else y).mul_(2)
    try:
        (grad,) = torch.autograd.grad(y, x, p.grad_y)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert overwritten == "x" or backend.name == "reference"
    else:
        truth = oracle.expected(p)
        limits = cases.limit(truth.values["grad_x"], truth.scales["grad_x"], torch.float32)
        checks.assert_within("grad_x", grad, truth.values["grad_x"], limits)


def test_running_statistics_change_between_frozen_forward_and_backward(backend):
    """The gradient is that of the statistics that were used, or an error: never that of the newer ones."""
    p = cases.make((4, 3, 5), training=False)
    mean, var = p.running_mean.clone(), p.running_var.clone()
    x = p.x.detach().requires_grad_()
    y = checks.call(backend.batch_norm, p, x=x, running_mean=mean, running_var=var)
    backend.batch_norm(3 * p.x, mean, var, training=True, momentum=0.9)
    truth = oracle.expected(p)
    try:
        (grad,) = torch.autograd.grad(y, x, p.grad_y)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        limits = cases.limit(truth.values["grad_x"], truth.scales["grad_x"], torch.float32)
        checks.assert_within("grad_x", grad, truth.values["grad_x"], limits)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 5, 7, 3), (40, 33, 8, 9)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_bitwise_repeatable(backend, shape, layout, activation, threads):
    """The same call twice gives the same bits, with one thread and with two."""
    p = cases.make(shape, layout=layout, residual=True, activation=activation)
    checks.check_repeatable(backend.batch_norm, p)
    checks.check_repeatable(backend.batch_norm, p.but(training=False))


def test_concurrent_callers(backend, threads):
    """Four Python threads at once, each with its own shape: no shared scratch, and no barrier that waits for ever.

    Trap: a spin barrier that assumes all its workers run.
    """
    problems = [
        cases.make((9 + i, 16 + i, 33, 31), layout=layout, residual=True, activation="relu")
        for i in range(4)
        for layout in ("contiguous", "channels_last")
    ]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(checks.check_against_oracle, backend.batch_norm, p) for p in problems]
        for job in jobs:
            job.result(timeout=120)


def test_offsets_past_32_bits(backend):
    """Rows 2^31 elements apart. Trap: ``n * stride`` in int. The memory between them is never touched."""
    far = 2**31 - 8
    buffer = torch.empty(far + 64, dtype=torch.bfloat16)
    p = cases.make((2, 3, 4), dtype=torch.bfloat16)
    x = buffer.as_strided((2, 3, 4), (far, 4, 1), 16).copy_(p.x)
    checks.check_against_oracle(backend.batch_norm, p.but(x=x))
    checks.check_against_oracle(backend.batch_norm, p.but(x=x, training=False))


def test_every_element_is_written(backend):
    """Fresh memory is filled with NaN in torch's deterministic mode: what the op leaves unwritten shows.

    Trap: channels that no block covers keep uninitialised mean, variance and output.
    """
    torch.use_deterministic_algorithms(True)
    try:
        for layout in ("contiguous", "channels_last", "holes_in_last"):
            for shape in ((3, 65, 5, 7), (70, 33), (2, 3, 4097)):
                for training in (True, False):
                    p = cases.make(shape, layout=layout, residual=True, activation="relu", training=training)
                    checks.check_against_oracle(backend.batch_norm, p)
    finally:
        torch.use_deterministic_algorithms(False)


def test_negative_view(backend):
    """A view with the lazy negation bit: its memory holds -x. Trap: the data pointer read as it is."""
    p = cases.make((4, 3, 5), residual=True, activation="relu")
    x, residual = (torch.complex(torch.zeros_like(t), -t).conj().imag for t in (p.x, p.residual))
    assert x.is_neg()
    assert torch.equal(x, p.x)
    checks.check_against_oracle(backend.batch_norm, p.but(x=x, residual=residual))
    checks.check_against_oracle(backend.batch_norm, p.but(x=x, residual=residual, training=False))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inference_mode(backend, training):
    """Inside torch.inference_mode, with buffers from outside and with buffers from inside."""
    p = cases.make((4, 3, 5), training=training, residual=True, activation="relu")
    wanted = checks.run(backend.batch_norm, p, needs=()).values
    with torch.inference_mode():
        for buffers in (
            {n: getattr(p, n) for n in ("running_mean", "running_var", "num_batches_tracked")},
            {n: getattr(p, n).clone() for n in ("running_mean", "running_var", "num_batches_tracked")},
        ):
            start = {n: t.clone() for n, t in buffers.items()}
            y = checks.call(backend.batch_norm, p, **buffers)
            assert checks.same_bits(y, wanted["y"])
            assert checks.same_bits(buffers["running_var"], wanted["running_var"])
            for name, value in start.items():
                buffers[name].copy_(value)


def test_signature_is_torchs():
    """The first eight parameters are torch's, by name, order and default; the rest are keyword-only."""
    own = list(inspect.signature(bnfused.functional.batch_norm).parameters.values())
    theirs = list(inspect.signature(torch.nn.functional.batch_norm).parameters.values())
    assert [(p.name, p.default) for p in own[:8]] == [(p.name, p.default) for p in theirs]
    assert {p.name for p in own[8:]} == {"residual", "activation", "activation_param", "num_batches_tracked"}
    assert all(p.kind is p.KEYWORD_ONLY for p in own[8:])
    assert inspect.signature(bnfused.reference.batch_norm) == inspect.signature(bnfused.functional.batch_norm)


def test_tensor_subclasses_are_asked():
    """A subclass with __torch_function__ sees the call as one function, as it does torch's."""

    class Logged(torch.Tensor):
        seen: list = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(4, 3, 5).as_subclass(Logged)
    y = bnfused.functional.batch_norm(x, None, None, training=True, activation="relu")
    assert bnfused.functional.batch_norm in Logged.seen
    assert torch.equal(
        y.as_subclass(torch.Tensor),
        bnfused.functional.batch_norm(x.as_subclass(torch.Tensor), None, None, training=True, activation="relu"),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(backend, layout, request):
    """A dense tensor past 2^31 elements, all 0 but its last row. Trap: element counts and offsets in int."""
    if not request.config.getoption("--large"):
        pytest.skip("takes 13 GB of memory and minutes; run with --large")
    rows = 2**27 + 3
    x = torch.zeros((1, 16, rows) if layout == "contiguous" else (rows, 16), dtype=torch.bfloat16)
    last = x[..., -1] if layout == "contiguous" else x[-1:]
    last.copy_(torch.arange(1, 17).unsqueeze(0))
    running_mean, running_var = torch.zeros(16), torch.ones(16)
    y = backend.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
    value = torch.arange(1, 17).double()
    mean = value / rows
    var = (value - mean).square() / rows + mean.square() * (rows - 1) / rows
    invstd = (var + 1e-5).rsqrt()
    wanted = (value - mean) * invstd
    # Rounding to bfloat16 is off by 1/512 of a value at most, and float32 is good to 5e-6 (cases.py): with room, since
    # an offset that wrapped leaves all of a value out.
    tail = (y[0, :, -1] if layout == "contiguous" else y[-1]).double()
    assert ((tail - wanted).abs() <= wanted.abs() / 128).all()
    head = (y[0, :, 0] if layout == "contiguous" else y[0]).double()
    assert ((head + mean * invstd).abs() <= (mean * invstd) / 128).all()
    assert torch.allclose(running_mean.double(), mean, rtol=1e-5)
    assert torch.allclose(running_var.double(), var * rows / (rows - 1), rtol=1e-5)


@pytest.mark.parametrize(
    "dtype, own, rows",
    [
        (torch.float16, torch.float16, 70_000),
        (torch.float16, torch.float32, 70_000),
        (torch.bfloat16, torch.float32, 12_545),
    ],
    ids=str,
)
def test_row_count_past_the_16_bit_range(backend, dtype, own, rows):
    """Trap: the count in a 16-bit dtype: 70000 is inf in float16, 12545 is 12544 in bfloat16."""
    p = cases.make((rows, 2), dtype=dtype, param_dtype=own, zero_stats=True, momentum=1.0)
    checks.check_against_oracle(backend.batch_norm, p)


def test_variance_is_not_recovered_from_invstd(backend):
    """Trap: running_var as 1 / invstd^2 - eps is off by 1e-3 where the variance is 1e-9 and eps 1e-5."""
    p = cases.make((64, 3, 5), regime=lambda x: 3e-5 * x, zero_stats=True, momentum=1.0)
    checks.check_against_oracle(backend.batch_norm, p)


def test_infinite_upstream_gradient(backend):
    """An Inf in grad_y of one channel stays in that channel of every gradient."""
    p = cases.make((4, 3, 5))
    clean = checks.run(backend.batch_norm, p)
    grad_y = p.grad_y.clone()
    grad_y[0, 1, 0] = math.inf
    spoiled = checks.run(backend.batch_norm, p.but(grad_y=grad_y))
    for name in ("grad_x", "grad_weight", "grad_bias"):
        before, after = clean.values[name], spoiled.values[name]
        dim = 1 if before.dim() > 1 else 0
        assert checks.same_bits(before.select(dim, 0), after.select(dim, 0))
        assert checks.same_bits(before.select(dim, 2), after.select(dim, 2))
        assert not after.select(dim, 1).isfinite().all()
