"""Random shapes, strides, dtypes and options against float64, and relations that hold whatever the data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from support import cases, checks, oracle

SETTINGS = settings(
    max_examples=150,
    deadline=None,
    derandomize=False,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def tensors(draw, shape, dtype, seed_offset=0):
    """A view of ``shape`` in any memory order, perhaps with holes, an offset, or a dimension of stride 0."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    offset = draw(st.integers(0, 3))
    expanded = draw(st.sampled_from([None, None, None, *range(len(shape))]))
    sizes = [shape[d] * steps[d] for d in order]
    buffer = torch.full((math.prod(sizes) + offset,), math.nan, dtype=dtype)
    view = buffer[offset:].view(sizes)
    view = view.permute([order.index(d) for d in range(len(shape))])
    view = view[tuple(slice(None, None, step) for step in steps)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)) + seed_offset)
    view.copy_(torch.randn(shape, generator=generator, dtype=torch.float64))
    if expanded is not None and shape[expanded] > 1:
        view = view.narrow(expanded, 0, 1).expand(shape)
    return view


@st.composite
def problems(draw):
    """Any call that batch_norm must answer."""
    rank = draw(st.integers(2, 6))
    sizes = st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, 9 if rank < 5 else 4)
    shape = [draw(sizes) for _ in range(rank)]
    shape[1] = draw(st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 72]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    own = dtype if draw(st.booleans()) else cases.parameter_dtype(dtype)
    training = draw(st.booleans())
    rows = math.prod([shape[0], *shape[2:]])
    if training and rows == 1:
        shape[0] = 2
    loc = draw(st.sampled_from([0.0, 1.0, -30.0, 1e3]))
    scale = draw(st.sampled_from([1.0, 0.1, 10.0]))

    def per_channel(positive=False):
        values = draw(tensors((shape[1],), own))
        return values.abs() + 0.1 if positive else values

    def maybe(value):
        return value if draw(st.booleans()) else None

    stats = draw(st.booleans()) or not training
    activation = draw(st.sampled_from([None, *cases.ACTIVATIONS]))
    x = draw(tensors(tuple(shape), dtype))
    if 0 in x.stride():
        x = (x.double() * scale + loc).to(dtype)[..., :1].expand(x.shape) if x.shape[-1] else x
    else:
        x.mul_(scale).add_(loc)
    problem = cases.Problem(
        x=x,
        # Its seeds are others than those of x. The gradient for grad_y = x cancels, and what is left of it is rounding.
        grad_y=draw(tensors(tuple(shape), dtype, seed_offset=2**32)),
        weight=maybe(per_channel()),
        bias=maybe(per_channel()),
        running_mean=per_channel() if stats else None,
        running_var=per_channel(positive=True) if stats else None,
        num_batches_tracked=maybe(torch.tensor(draw(st.integers(0, 5)))),
        residual=maybe(draw(tensors(tuple(shape), dtype))),
        training=training,
        momentum=draw(st.sampled_from([None, 0.0, 0.1, 1.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        activation=activation,
        activation_param=cases.PARAMS.get(activation or ""),
    )
    return cases.away_from_kinks(problem)


@SETTINGS
@given(problem=problems(), needs=st.sets(st.sampled_from(checks.LEAVES)))
def test_any_call(backend, problem, needs):
    """Whatever the shape, strides, dtype and options: float64's values, gradients, statistics, and x's strides."""
    note(repr(problem))
    checks.check_against_oracle(backend.batch_norm, problem, needs=sorted(needs), hard=True)


@SETTINGS
@given(problem=problems())
def test_layout_does_not_matter(backend, problem):
    """The same values, contiguous: the same results, up to the order of the sums."""
    dense = problem.but(
        **{
            name: getattr(problem, name).contiguous()
            for name in ("x", "grad_y", "residual")
            if getattr(problem, name) is not None
        }
    )
    scales = oracle.expected(problem).scales
    first, second = (checks.run(backend.batch_norm, p) for p in (problem, dense))
    for name, value in first.values.items():
        other = second.values[name]
        if value is None:
            assert other is None
            continue
        wanted = other.double()
        limits = 2 * cases.limit(wanted, scales[name], other.dtype, hard=True)
        checks.assert_within(name, value, wanted, limits)


@settings(SETTINGS, max_examples=40)
@given(seed=st.integers(0, 2**31), training=st.booleans())
def test_relations(backend, seed, training):
    """Facts that need no oracle.

    In training y does not change with the sign-preserving scale or the shift of x, the sum of grad_x over a channel is
    0, and so is the sum of grad_x * x_hat; a permutation of the batch permutes y.
    """
    torch.manual_seed(seed)
    p = cases.make((5, 3, 4, 2), dtype=torch.float64, eps=1e-12, training=training)
    order = torch.randperm(5)
    plain = checks.run(backend.batch_norm, p).values
    permuted = checks.run(backend.batch_norm, p.but(x=p.x[order], grad_y=p.grad_y[order])).values
    assert torch.allclose(permuted["y"], plain["y"][order], rtol=1e-10, atol=1e-12)
    assert torch.allclose(permuted["grad_x"], plain["grad_x"][order], rtol=1e-8, atol=1e-10)
    if not training:
        return
    scaled = checks.run(backend.batch_norm, p.but(x=3 * p.x + 7)).values
    assert torch.allclose(scaled["y"], plain["y"], rtol=1e-8, atol=1e-8)
    assert torch.allclose(3 * scaled["grad_x"], plain["grad_x"], rtol=1e-7, atol=1e-8)
    assert plain["grad_x"].sum((0, 2, 3)).abs().max() < 1e-10
    mean, var = oracle.statistics(p.x)
    centred = p.x - oracle.per_channel(mean, p.x)
    assert (plain["grad_x"] * centred).sum((0, 2, 3)).abs().max() < 1e-8
    assert torch.allclose(plain["y"].mean((0, 2, 3)), p.bias, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_each_channel_is_its_own_problem(backend, layout):
    """All channels at once are the channels one at a time: nothing leaks between neighbours."""
    p = cases.make((4, 19, 5, 3), layout=layout, residual=True, activation="silu")
    together = checks.run(backend.batch_norm, p).values
    for c in (0, 1, 15, 16, 18):
        own = slice(c, c + 1)
        alone = checks.run(
            backend.batch_norm,
            p.but(
                **{n: getattr(p, n)[:, own] for n in ("x", "grad_y", "residual")},
                **{n: getattr(p, n)[own] for n in ("weight", "bias", "running_mean", "running_var")},
            ),
        ).values
        for name, value in alone.items():
            wanted = together[name].double()
            wanted = wanted[:, own] if wanted.dim() > 1 else wanted[own]
            limits = 2 * cases.limit(wanted, max(1.0, oracle.finite_max(wanted)), torch.float32)
            checks.assert_within(name, value, wanted, limits)
