"""The checks, as functions of the batch_norm under test: ``check_*(batch_norm, ...)`` raises AssertionError.

They run on every backend, and on the deliberately wrong implementations of test_planted_bugs.py, which shows that each
check can fail. The exception is ``check_transforms_numerically``: it is torch's gradcheck in modes that the wrong
implementations do not have. ``batch_norm`` has the signature of ``bnfused.functional.batch_norm``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import bnfused
from support import cases, oracle
from support.cases import Problem

BatchNorm = Callable[..., Tensor]
LEAVES = ("x", "weight", "bias", "residual")


@dataclass
class Outcome:
    """All results of one call."""

    values: dict[str, Tensor | None]
    num_batches_tracked: int | None


def call(batch_norm: BatchNorm, problem: Problem, **replaced: Tensor | None) -> Tensor:
    """One call with the arguments of ``problem``, some of them replaced."""
    p = problem.but(**replaced)
    return batch_norm(
        p.x,
        p.running_mean,
        p.running_var,
        p.weight,
        p.bias,
        p.training,
        p.momentum,
        p.eps,
        residual=p.residual,
        activation=p.activation,
        activation_param=p.activation_param,
        num_batches_tracked=p.num_batches_tracked,
    )


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def run(batch_norm: BatchNorm, problem: Problem, needs: Iterable[str] = LEAVES) -> Outcome:
    """Forward and backward on copies of the state, with gradients only of the arguments that ``needs`` names."""
    p = problem
    needs = [name for name in needs if getattr(p, name) is not None]
    # detach() keeps the strides and the memory of the argument, so the layout under test is what the op sees.
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in needs}
    state = {n: _copy(getattr(p, n)) for n in ("running_mean", "running_var", "num_batches_tracked")}
    before = {n: _copy(getattr(p, n)) for n in (*LEAVES, "grad_y")}
    y = call(batch_norm, p, **leaves, **state)
    values: dict[str, Tensor | None] = {f"grad_{name}": None for name in LEAVES}
    if needs:
        grads = torch.autograd.grad(y, list(leaves.values()), p.grad_y)
        values |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    for name, copy in before.items():
        assert copy is None or same_bits(getattr(p, name), copy), f"{name} was written to"
    count = state.pop("num_batches_tracked")
    return Outcome({"y": y.detach(), **values, **state}, None if count is None else int(count))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, so that NaN equals NaN and 0.0 differs from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def worst_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected).abs().max())


def assert_within(name: str, actual: Tensor, expected: Tensor, limits: Tensor, context: object = "") -> None:
    """Every element is within its limit. NaN and infinity are right only where they are expected."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    wide = actual.detach().double()
    finite = expected.isfinite()
    assert torch.equal(wide.isfinite(), finite), (
        f"{name}: {int((wide.isfinite() != finite).sum())} elements finite or not, unlike expected {context}"
    )
    error = torch.where(finite, (wide - expected).abs(), torch.zeros_like(expected))
    worst = error - limits
    if expected.numel() and float(worst.max()) > 0:
        at = int(worst.reshape(-1).argmax())
        flat = [t.reshape(-1)[at].item() for t in (actual, expected, error, limits)]
        raise AssertionError(
            f"{name}: got {flat[0]!r}, expected {flat[1]!r}: off by {flat[2]:.3g}, allowed {flat[3]:.3g}; "
            f"{int((worst > 0).sum())} of {expected.numel()} elements are off {context}"
        )


def assert_alike(name: str, actual: Tensor, wanted: Tensor, factor: float) -> None:
    """Both have one dtype, and differ by at most ``factor`` bounds of cases.py. Integers are equal.

    The bounds are relative to the largest value, or to 1 if that is smaller. ``wanted`` is another implementation's
    result, which itself may be as far from float64.
    """
    assert actual.dtype == wanted.dtype, f"{name} is {actual.dtype}, expected {wanted.dtype}"
    if not wanted.is_floating_point():
        assert torch.equal(actual, wanted), name
        return
    wide = wanted.detach().double()
    scale = max(1.0, oracle.finite_max(wide))
    assert_within(name, actual, wide, factor * cases.limit(wide, scale, actual.dtype))


def check_against_oracle(
    batch_norm: BatchNorm, problem: Problem, *, hard: bool = False, needs: Iterable[str] = LEAVES
) -> Outcome:
    """Values, gradients, running statistics, dtypes and strides of one step, against float64."""
    outcome = run(batch_norm, problem, needs)
    truth = oracle.expected(problem)
    for name, expected in truth.values.items():
        actual = outcome.values[name]
        if expected is None or (name.startswith("grad_") and name[5:] not in needs):
            assert actual is None, f"{name} is {actual}, expected None {problem}"
            continue
        assert actual is not None, f"{name} is None {problem}"
        of = problem.x if name == "y" else getattr(problem, name.removeprefix("grad_"))
        assert actual.dtype == of.dtype, f"{name} is {actual.dtype}, expected {of.dtype}"
        # A variance has no cancellation, so the error of each channel is relative to its own value.
        measure = expected.abs() if name == "running_var" else truth.scales[name]
        limits = cases.limit(expected, measure, of.dtype, hard=hard)
        assert_within(name, actual, expected, limits, problem)
    assert outcome.num_batches_tracked == truth.num_batches_tracked
    check_strides(batch_norm, problem, outcome)
    return outcome


def check_no_worse_than_torch(batch_norm: BatchNorm, draw: Callable[[], Problem]) -> None:
    """The largest error, averaged over several draws, is not above torch's own on the same tensors.

    It is averaged, because the error of the few sums in one draw is luck: either of two equal implementations is often
    twice as good as the other, and in one of the hundred cases of a run three times as good. The average of six draws
    may still be above by luck, in one of thousands of runs. So a hundred draws have to confirm it.
    """
    for draws in (6, 100):
        total: dict[str, list[float]] = {}
        for _ in range(draws):
            problem = draw()
            truth = oracle.expected(problem)
            results = [run(f, problem).values for f in (batch_norm, oracle.torch_batch_norm)]
            for name, expected in truth.values.items():
                if expected is None or not truth.scales[name]:
                    continue
                pair = total.setdefault(name, [0.0, 0.0])
                for i, values in enumerate(results):
                    pair[i] += worst_error(values[name], expected) / truth.scales[name] / draws
        above = {
            name: f"{mine:.3g}, torch {theirs:.3g}"
            for name, (mine, theirs) in total.items()
            if not mine <= cases.no_worse_than_torch(theirs, torch.float32)
        }
        if not above:
            return
    raise AssertionError(f"relative errors above torch's own: {above} {problem}")


def check_strides(batch_norm: BatchNorm, problem: Problem, outcome: Outcome) -> None:
    """y and grad_x have the memory layout of x.

    The reference is plain torch, in which autograd gives grad_x the strides of grad_y. So only its y is checked.
    """
    wanted = cases.strides_that_matter(problem.x, cases.dense_strides(problem.x))
    for name in ("y",) if batch_norm is bnfused.reference.batch_norm else ("y", "grad_x"):
        value = outcome.values[name]
        if value is not None and value.numel():
            found = cases.strides_that_matter(problem.x, value.stride())
            assert found == wanted, f"{name} has strides {found}, expected {wanted} {problem}"


def check_steps(batch_norm: BatchNorm, momentum: float | None, dtype: torch.dtype = torch.float32) -> None:
    """Running statistics and the counter over five steps, from the values a module starts with.

    There are six rows, so an update with the biased variance is a sixth too small, far outside the tolerance. The same
    holds for a momentum on the wrong side, and for a cumulative average that counts from 0.
    """
    channels, own = 5, cases.parameter_dtype(dtype)
    state = [torch.zeros(channels, dtype=own), torch.ones(channels, dtype=own), torch.tensor(0)]
    mean, var = torch.zeros(channels).double(), torch.ones(channels).double()
    for step in range(1, 6):
        x = (3 + 2 * torch.randn(3, channels, 2)).to(dtype)
        batch_norm(x, *state[:2], training=True, momentum=momentum, num_batches_tracked=state[2])
        wide = x.double()
        factor = 1 / step if momentum is None else momentum
        mean = (1 - factor) * mean + factor * wide.mean((0, 2))
        var = (1 - factor) * var + factor * wide.var((0, 2), correction=1)
        for name, actual, expected in zip(("mean", "var"), state, (mean, var), strict=False):
            limits = cases.limit(expected, oracle.finite_max(expected), own)
            assert_within(f"running_{name} after step {step}", actual, expected, limits)
        assert int(state[2]) == step


def check_constant_channels(batch_norm: BatchNorm, problem: Problem) -> None:
    """Where x is constant over a channel, its y is exactly ``bias`` and no gradient reaches its weight."""
    outcome = run(batch_norm, problem)
    y = outcome.values["y"]
    assert y is not None
    bias = torch.zeros(problem.x.shape[1]) if problem.bias is None else problem.bias
    wanted = oracle.per_channel(bias.to(y.dtype), y).expand_as(y)
    wrong = (y != wanted).sum()
    worst = worst_error(y, wanted.double())
    assert wrong == 0, f"{int(wrong)} values are not bias, off by up to {worst} {problem}"
    grad_weight = outcome.values["grad_weight"]
    if grad_weight is not None:
        assert grad_weight.count_nonzero() == 0, f"grad_weight is {grad_weight} {problem}"


def check_nonfinite_stays(batch_norm: BatchNorm, problem: Problem, value: float, channel: int = 1) -> None:
    """One Inf or NaN in one channel leaves every other channel's values, gradients and statistics as they were.

    It is the first value of its channel, or the last. Trap: code for infinities that also changes the channels in the
    same vector.
    """
    clean = run(batch_norm, problem)
    others = [c for c in range(problem.x.shape[1]) if c != channel]
    for place in (0, -1):
        x = problem.x.clone()
        x[(place, channel, *[place] * (x.dim() - 2))] = value
        spoiled = run(batch_norm, problem.but(x=x))
        for name, before in clean.values.items():
            after = spoiled.values[name]
            if before is None or after is None:
                continue
            dim = 1 if before.dim() > 1 else 0
            before, after = (t.movedim(dim, 0)[others] for t in (before, after))
            assert same_bits(before, after), f"{value} in channel {channel}, at {place}, changed {name} of others"
        y = spoiled.values["y"]
        assert y is not None
        if problem.training and problem.activation is None:
            assert y[:, channel].isnan().all(), "a channel with a NaN or Inf has no statistics"
        if problem.training and problem.running_var is not None:
            assert not spoiled.values["running_var"][channel].isfinite()


def check_mask_matches_output(batch_norm: BatchNorm, problem: Problem) -> None:
    """ReLU passes the gradient exactly where the returned y is above 0."""
    assert problem.activation == "relu"
    ones = torch.ones_like(problem.x)
    passed_by = "residual"
    if problem.residual is None:
        # The statistics are frozen, so that grad_x is grad_z times a constant that is not 0.
        assert not problem.training
        passed_by = "x"
    outcome = run(batch_norm, problem.but(grad_y=ones))
    y, grad = outcome.values["y"], outcome.values[f"grad_{passed_by}"]
    assert y is not None
    assert grad is not None
    wrong = (grad != 0) != (y > 0)
    assert not wrong.any(), (
        f"{int(wrong.sum())} gradients do not fit y, first where y is {y[wrong][0]} and the gradient {grad[wrong][0]}"
    )


def tie_problem(activation: str | None, dtype: torch.dtype, *, residual: bool, param: float | None = None) -> Problem:
    """Frozen statistics make z exactly x (+ residual). x has every tie, its neighbours, and values far away."""
    ties = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1.0, -1.0], dtype=dtype)
    info = torch.finfo(dtype)
    away = ties.abs() * info.eps + (ties == 0) * info.smallest_normal
    up, down = ties + away, ties - away
    far = torch.tensor([20.0, -20.0, 100.0, -100.0, 1e-3, -1e-3, 0.5, -2.5], dtype=dtype)
    z = torch.cat([ties, up, down, far]).view(4, 2, 4)
    channels = z.shape[1]
    stats = cases.parameter_dtype(dtype)
    x, rest = z, None
    if residual:
        x = rest = z / 2  # exact, so that x + residual is z again
    return Problem(
        x=x,
        residual=rest,
        grad_y=torch.full_like(z, 0.5),
        running_mean=torch.zeros(channels, dtype=stats),
        running_var=torch.ones(channels, dtype=stats),
        training=False,
        eps=0.0,
        activation=activation,
        activation_param=cases.PARAMS.get(activation or "") if param is None else param,
    )


def check_ties(batch_norm: BatchNorm, problem: Problem) -> None:
    """Value and gradient of the activation at its ties are torch's in the same dtype."""
    outcome = run(batch_norm, problem)
    z = problem.x if problem.residual is None else problem.x + problem.residual
    # torch computes 16-bit activations in float32 too, and rounds once.
    z = z.detach().requires_grad_()
    y = oracle.activate(z, problem.activation, problem.activation_param)
    (grad,) = torch.autograd.grad(y, z, problem.grad_y)
    for name, wanted in (("y", y.detach()), ("grad_x", grad), ("grad_residual", grad)):
        actual = outcome.values[name]
        if actual is None:
            continue
        # A wrong side at a tie is off by 0.1 or more. Piecewise linear activations have two roundings. The exp, erf and
        # tanh of two libraries differ in the last places of their results, which far out is not small compared with y.
        eps = torch.finfo(wanted.dtype).eps
        if problem.activation in oracle.SMOOTH:
            limits = 4 * eps * z.detach().double().abs().clamp(min=1.0)
        else:
            limits = 2 * eps * wanted.double().abs()
        assert_within(name, actual, wanted.double(), limits, problem)


def check_only_needed(batch_norm: BatchNorm, problem: Problem) -> None:
    """Any subset of the arguments may ask for its gradient: it gets the same one, and the others none."""
    everything, scales = run(batch_norm, problem), oracle.expected(problem).scales
    present = [name for name in LEAVES if getattr(problem, name) is not None]
    for bits in range(2 ** len(present)):
        needs = [name for i, name in enumerate(present) if bits >> i & 1]
        outcome = run(batch_norm, problem, needs)
        truth = everything.values
        for name in ("y", "running_mean", "running_var", *(f"grad_{n}" for n in needs)):
            wanted, actual = truth[name], outcome.values[name]
            if wanted is None:
                continue
            assert actual is not None, f"{name} with only {needs} asked for"
            limits = cases.limit(wanted.double(), scales[name], wanted.dtype)
            assert_within(name, actual, wanted.double(), limits, f"with only {needs} asked for")


def check_repeatable(batch_norm: BatchNorm, problem: Problem) -> None:
    """The same inputs give the same bits."""
    first, second = run(batch_norm, problem), run(batch_norm, problem)
    for name, value in first.values.items():
        again = second.values[name]
        assert (value is None) == (again is None)
        assert value is None or same_bits(value, again), f"{name} differs between two equal calls"


def check_calls_interleaved(batch_norm: BatchNorm, problems: list[Problem]) -> None:
    """Forward of every problem, then backward of every problem, last first: each as if it were alone.

    Trap: statistics saved on the module or in a plan, so that the second forward overwrites the first one's.
    """
    alone = [run(batch_norm, p) for p in problems]
    pending = []
    for p in problems:
        leaves = {n: getattr(p, n).detach().requires_grad_() for n in LEAVES if getattr(p, n) is not None}
        state = {n: _copy(getattr(p, n)) for n in ("running_mean", "running_var")}
        pending.append((leaves, call(batch_norm, p, **leaves, **state)))
    for p, (leaves, y), wanted in reversed(list(zip(problems, pending, alone, strict=True))):
        grads = torch.autograd.grad(y, list(leaves.values()), p.grad_y)
        for name, grad in zip(leaves, grads, strict=True):
            assert same_bits(grad, wanted.values[f"grad_{name}"]), f"grad_{name} of {p}"


def _double_problem(activation: str | None, residual: bool, training: bool) -> Problem:
    shape = (3, 2, 2, 2)
    problem = cases.make(
        shape,
        dtype=torch.float64,
        residual=residual,
        activation=activation,
        training=training,
        running=not training,
        counter=None,
    )
    return problem


def _as_function(batch_norm: BatchNorm, p: Problem) -> tuple[Callable[..., Tensor], list[Tensor], list[str]]:
    names = [name for name in LEAVES if getattr(p, name) is not None]

    def function(*tensors: Tensor) -> Tensor:
        return call(batch_norm, p, **dict(zip(names, tensors, strict=True)))

    return function, [getattr(p, n).detach().requires_grad_() for n in names], names


def _far_from_kinks(p: Problem) -> bool:
    """Whether finite differences of 1e-6 in x cannot cross a kink; 1e-3 leaves room for the change of z."""
    kinks = cases.KINKS.get(p.activation or "", ())
    z = oracle.before_activation(p)
    return all(bool(((z - kink).abs() > 1e-3).all()) for kink in kinks)


def check_gradients_numerically(batch_norm: BatchNorm, activation: str | None, residual: bool, training: bool) -> None:
    """First and second derivatives of every argument against finite differences, in float64."""
    p = next(p for p in iter(lambda: _double_problem(activation, residual, training), None) if _far_from_kinks(p))
    function, leaves, _ = _as_function(batch_norm, p)
    try:
        torch.autograd.gradcheck(function, leaves)
        torch.autograd.gradgradcheck(function, leaves)
    except GradcheckError as error:
        raise AssertionError(f"{error} {p}") from error


def check_transforms_numerically(batch_norm: BatchNorm, activation: str | None, residual: bool, training: bool) -> None:
    """Forward mode, gradients under vmap, and forward over reverse, against finite differences in float64."""
    p = next(p for p in iter(lambda: _double_problem(activation, residual, training), None) if _far_from_kinks(p))
    function, leaves, _ = _as_function(batch_norm, p)
    modes = {"check_batched_grad": True, "fast_mode": True}
    try:
        torch.autograd.gradcheck(
            function, leaves, check_forward_ad=True, check_batched_forward_grad=True, fast_mode=True
        )
        torch.autograd.gradcheck(function, leaves, **modes)
        torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, **modes)
    except GradcheckError as error:
        raise AssertionError(f"{error} {p}") from error


def check_gradient_penalty(batch_norm: BatchNorm, training: bool, through: str) -> None:
    """A penalty on grad_x, where x reaches the loss by two paths, equals torch's own: through .backward and through
    autograd.grad.

    Trap: ``once_differentiable`` raises only under .backward. Under torch.autograd.grad it silently gives a wrong
    gradient when there is a second path to x.
    """
    p = _double_problem(None, False, training)

    def penalty(function: BatchNorm) -> list[Tensor]:
        x, weight, bias = (getattr(p, n).detach().requires_grad_() for n in LEAVES[:3])
        y = call(function, p, x=x, weight=weight, bias=bias)
        (grad_x,) = torch.autograd.grad((y * y * p.grad_y).sum(), x, create_graph=True)
        loss = (grad_x.square() * x).sum() + (x * y).sum()
        if through == "backward":
            loss.backward()
            return [leaf.grad for leaf in (x, weight, bias)]
        return list(torch.autograd.grad(loss, [x, weight, bias]))

    for name, actual, wanted in zip(LEAVES, penalty(batch_norm), penalty(oracle.torch_batch_norm), strict=False):
        limits = torch.full_like(wanted, 1e-9 * oracle.finite_max(wanted))
        assert_within(f"penalty's grad_{name}", actual, wanted, limits)


def check_third_order(batch_norm: BatchNorm, activation: str | None, training: bool) -> None:
    """The third derivative is that of the formula. torch's own batch norm is wrong here, without an error."""
    p = _double_problem(activation, False, training)

    def third(function: BatchNorm) -> list[Tensor]:
        x, weight, bias = (getattr(p, n).detach().requires_grad_() for n in LEAVES[:3])
        grad = (call(function, p, x=x, weight=weight, bias=bias).square() * p.grad_y).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(grad, x, create_graph=True)
            grad = (grad * p.grad_y * p.x).sum()
        return list(torch.autograd.grad(grad, [x, weight]))

    def plain(x: Tensor, mean: Tensor, var: Tensor, w: Tensor, b: Tensor, *args, **kwargs) -> Tensor:
        return oracle.formula(x, mean, var, w, b, p.training, p.eps, None, p.activation, p.activation_param)

    for name, actual, wanted in zip(LEAVES, third(batch_norm), third(plain), strict=False):
        limits = torch.full_like(wanted, 1e-9 * max(1.0, oracle.finite_max(wanted)))
        assert_within(f"third order grad_{name}", actual, wanted, limits)


def check_state_kept_on_error(
    batch_norm: BatchNorm,
    problem: Problem,
    error: type[Exception] | tuple[type[Exception], ...],
    message: str,
) -> None:
    """The call raises ``error`` with ``message``, and does not change the running statistics and the counter."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = {n: _copy(getattr(problem, n)) for n in names}
    try:
        with pytest.raises(error, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a sparse or nested tensor warns when it is made
            call(batch_norm, problem)
    except pytest.fail.Exception as missing:
        raise AssertionError(f"{missing} {problem}") from None
    for name, copy in before.items():
        after = getattr(problem, name)
        if copy is None or copy.is_sparse or copy.device.type != "cpu":
            continue
        assert same_bits(after, copy), f"{name} changed although the call raised"


def check_momentum_reads_counter(batch_norm: BatchNorm) -> None:
    """momentum=None follows the counter tensor, also if somebody has set it between two calls.

    Trap: a count kept on the host and passed by value.
    """
    for count in (0, 4, 9, 1):
        p = cases.make((4, 3, 2), momentum=None, counter=count)
        check_against_oracle(batch_norm, p)


def check_settings_not_remembered(batch_norm: BatchNorm) -> None:
    """The same tensors with another eps, momentum, activation or mode give another result.

    Trap: a plan cached by shape, with the eps and momentum of the first call baked in.
    """
    p = cases.make((6, 3, 4), regime="scale_1e-4", residual=True)
    for changes in (
        {},
        {"eps": 1e-3},
        {"momentum": 0.7},
        {"activation": "relu"},
        {"activation": "elu", "activation_param": 0.3},
        {"activation": "elu", "activation_param": 1.3},
        {"training": False},
        {"training": False, "eps": 1e-2, "activation": "silu"},
        {"weight": None},
        {"residual": None},
        {},
    ):
        check_against_oracle(batch_norm, cases.away_from_kinks(p.but(**changes)))


def check_state_in_place(batch_norm: BatchNorm) -> None:
    """Strided running statistics, weight and bias are read and written in place, and their neighbours stay.

    Trap: a rebound ``.data``, or a pointer taken without the stride.
    """
    p = cases.make((6, 3, 4))
    names = ("running_mean", "running_var", "weight", "bias")
    buffers = {n: torch.full((7,), 77.0) for n in names}
    views = {n: buffers[n][1:7:2].copy_(getattr(p, n)) for n in names}
    counters = torch.tensor([5, 3, 5])
    call(batch_norm, p, **views, num_batches_tracked=counters[1])
    truth = oracle.expected(p)
    for name in names:
        assert (buffers[name][::2] == 77).all(), f"neighbours of {name} were written to"
        wanted = truth.values.get(name, getattr(p, name)).double()
        limits = cases.limit(wanted, oracle.finite_max(wanted), torch.float32)
        assert_within(name, buffers[name][1::2], wanted, limits)
    assert counters.tolist() == [5, 4, 5]
