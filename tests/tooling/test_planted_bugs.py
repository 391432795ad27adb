"""The checks can fail: wrong batch norms, one bug each, are put through the functions that every backend passes.

``Planted()`` without a bug is right and passes them all, so that a failure is the bug's doing and not the stand-in's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from support import cases, checks, oracle

# ---------------------------------------------------------------------------- a batch norm to spoil


class _Relu(torch.autograd.Function):
    """relu whose mask is decided by ``passes(z, y)``."""

    @staticmethod
    def forward(ctx, z, dtype, passes):
        y = z.clamp(min=0).to(dtype)
        ctx.save_for_backward(passes(z, y))
        return y

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return (grad * mask).double(), None, None


class _LikeX(torch.autograd.Function):
    """The identity, whose gradient gets the strides of x."""

    @staticmethod
    def forward(ctx, x):
        ctx.like = torch.empty_like(x, device="meta")
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        like = torch.empty_strided(ctx.like.shape, ctx.like.stride(), dtype=grad.dtype)
        return like.copy_(grad)


class _OnceDifferentiable(torch.autograd.Function):
    """The right gradient, with nothing behind it: what ``once_differentiable`` gives a second path to x."""

    @staticmethod
    def forward(ctx, function, x, *rest):
        ctx.function = function
        ctx.save_for_backward(x, *rest)
        with torch.no_grad():
            return function(x, *rest)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.function(*leaves), leaves, grad.detach())


class _TwiceDifferentiable(torch.autograd.Function):
    """Right second derivatives and a third that is silently 0, as torch's own batch norm backward had it."""

    @staticmethod
    def forward(ctx, function, x, *rest):
        ctx.function = function
        ctx.save_for_backward(x, *rest)
        with torch.no_grad():
            return function(x, *rest)

    @staticmethod
    def backward(ctx, grad):
        def gradient(grad, *tensors):
            with torch.enable_grad():
                leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
                return torch.autograd.grad(ctx.function(*leaves), leaves, grad, create_graph=True)

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, grad, *tensors):
                ctx.save_for_backward(grad, *tensors)
                return tuple(g.detach() for g in gradient(grad.detach(), *(t.detach() for t in tensors)))

            @staticmethod
            def backward(ctx, *upstream):
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                    first = gradient(*leaves)
                    return torch.autograd.grad(first, leaves, [u.detach() for u in upstream], materialize_grads=True)

        return None, *Backward.apply(grad, *ctx.saved_tensors)


class Planted:
    """Batch norm in float64 by autograd, right but for ``bug``."""

    def __init__(self, bug: str | None = None):
        self.bug = bug
        self.plans: dict[tuple[int, ...], float] = {}
        self.saved: list[Tensor] = []
        self.calls = 0

    def __call__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        activation_param: float | None = None,
        num_batches_tracked: Tensor | None = None,
    ) -> Tensor:
        bug, x = self.bug, input
        self.calls += 1
        if bug == "counts before it checks" and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        rows = math.prod([x.shape[0], *x.shape[2:]])
        if training and rows == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        if weight is not None and weight.shape != (x.shape[1],):
            raise RuntimeError(f"batch_norm: expected weight of shape [{x.shape[1]}], got {list(weight.shape)}")
        if bug == "eps of the first call with this shape":
            eps = self.plans.setdefault(tuple(x.shape), eps)
        if bug == "strides ignored":
            contiguous = torch.empty(x.shape, device="meta").stride()
            x = x.as_strided(x.shape, contiguous, x.storage_offset())
        if bug == "activation ignored where channels are innermost" and x.dim() > 2 and x.stride(1) == 1:
            activation = None

        def transform(x, weight, bias, residual, mean=None, var=None):
            values = x.double()
            if training:
                mean, var = self._statistics(values)
            invstd = var.rsqrt() if bug == "invstd without eps" else (var + eps).rsqrt()
            if bug == "invstd of 20 bits":
                invstd = invstd * (1 + 2**-20)
            if bug == "float32 mean":
                mean = mean.float().double()
            if bug == "mean(g) missing":
                mean = mean.detach()
            if bug == "mean(g * xhat) missing":
                invstd = invstd.detach()
            if bug == "statistics overwritten by the next call":
                mean, invstd = self._overwritten(mean, invstd)
            z = (values - oracle.per_channel(mean, x)) * oracle.per_channel(invstd, x)
            if weight is not None:
                if bug == "weight's gradient twice where bias has none" and bias is not None and not bias.requires_grad:
                    weight = 2 * weight - weight.detach()
                z = z * oracle.per_channel(weight.double(), x)
            if bug == "shift folded into the bias in float32":
                scale = invstd if weight is None else invstd * weight.double()
                shift = -(mean * scale).float() + (0 if bias is None else bias.float())
                z = values * oracle.per_channel(scale.float().double(), x)
                z = z + oracle.per_channel(shift.double(), x)
            elif bias is not None:
                z = z + oracle.per_channel(bias.double(), x)
            if bug == "activation before the residual":
                z = self._activate(z, activation, activation_param, x.dtype)
                return (z if residual is None else z + residual).to(x.dtype)
            if residual is not None:
                r = residual.double()
                z = z + (r.detach() if bug == "residual gradient not masked" else r)
            y = self._activate(z, activation, activation_param, x.dtype).to(x.dtype)
            if residual is not None and bug == "residual gradient not masked":
                y = y + (residual - residual.detach())
            return y

        if training and x.numel():
            self._update(x, running_mean, running_var, num_batches_tracked, momentum, rows)
        elif training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        stats = () if training else (running_mean.double(), running_var.double())
        if bug in ("once differentiable", "third derivative 0"):
            kind = _OnceDifferentiable if bug == "once differentiable" else _TwiceDifferentiable
            present = [t for t in (weight, bias, residual) if t is not None]

            def function(x, *rest):
                rest = iter(rest)
                return transform(x, *(None if t is None else next(rest) for t in (weight, bias, residual)), *stats)

            return kind.apply(function, x, *present)
        y = transform(_LikeX.apply(x), weight, bias, residual, *stats)
        if bug == "layout lost":
            y = y.contiguous()
        if bug == "last channels not computed":
            done = 2 ** int(math.log2(x.shape[1]))
            y = torch.cat([y[:, :done], torch.zeros_like(y[:, done:])], 1)
        if bug == "NaN leaks into the neighbour":
            y = y + 0 * y.roll(1, 1).detach()
        if bug == "not repeatable":
            y = y * (1 + 1e-6 * self.calls)
        return y

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if values.numel() == 0:
            return values.new_zeros(values.shape[1]), values.new_ones(values.shape[1])
        dims = [0, *range(2, values.dim())]
        if self.bug == "E[x^2] - E[x]^2 in float32":
            x = values.float()
            mean = x.mean(dims)
            return mean.double(), (x.square().mean(dims) - mean.square()).clamp(min=0).double()
        if self.bug == "float32 sums around the first sample":
            first = values.movedim(1, 0).flatten(1)[:, :1].float()
            x = values.movedim(1, 0).flatten(1).float() - first
            mean, square = (torch.cumsum(t, 1)[:, -1] / t.shape[1] for t in (x, x.square()))
            return (first[:, 0] + mean).double(), (square - mean.square()).clamp(min=0).double()
        if self.bug == "last row left out":
            values = values[:-1] if values.shape[0] > 1 else values
        return oracle.statistics(values)

    def _overwritten(self, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
        planted = self

        class Late(torch.autograd.Function):
            """Hands out the statistics of whichever call came last, at the time of backward."""

            @staticmethod
            def forward(ctx, values):
                planted.saved = [invstd.detach()]
                ctx.own = invstd.detach()
                return values.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad * (planted.saved[0].mean() / ctx.own.mean())

        return mean, Late.apply(invstd)

    def _activate(self, z: Tensor, activation: str | None, param: float | None, dtype) -> Tensor:
        if activation == "relu" and self.bug == "relu passes the gradient at 0":
            return _Relu.apply(z, dtype, lambda z, y: z >= 0)
        if activation == "relu" and self.bug == "relu's mask from before rounding":
            return _Relu.apply(z, dtype, lambda z, y: z > 0)
        if activation == "relu" and self.bug == "relu makes 0 of NaN":
            return torch.where(z > 0, z, torch.zeros_like(z))
        if activation == "relu":
            return oracle.activate(z.to(dtype), activation)
        if activation == "hardswish" and self.bug == "hardswish's gradient at 3":
            return torch.where(z > 3, z, torch.where(z < -3, 0 * z, z * (z + 3) / 6))
        if activation == "gelu" and self.bug == "gelu by tanh":
            return torch.nn.functional.gelu(z, approximate="tanh")
        if self.bug == "activation_param ignored":
            param = None
        return oracle.activate(z, activation, param)

    @torch.no_grad()
    def _update(self, x, running_mean, running_var, num_batches_tracked, momentum, rows) -> None:
        bug = self.bug
        if num_batches_tracked is not None and bug not in ("counts before it checks", "never counts"):
            num_batches_tracked.add_(1)
        if momentum is None:
            count = 0 if num_batches_tracked is None else int(num_batches_tracked)
            if bug == "count kept on the host":
                count = self.calls
            momentum = 1.0 / count if count else 0.0
        mean, var = self._statistics(x.double())
        if bug == "running_var from invstd":
            var = (1 / (var + 1e-5).rsqrt().float() ** 2 - 1e-5).double()
        if bug == "count in the dtype of the statistics" and running_var is not None:
            rows = float(torch.tensor(float(rows)).to(running_var.dtype))
        unbiased = var if bug == "running_var is biased" else var * rows / (rows - 1)
        if bug == "momentum on the wrong side":
            momentum = 1 - momentum
        for state, batch in ((running_mean, mean), (running_var, unbiased)):
            if state is not None:
                value = (1 - momentum) * state.double() + momentum * batch
                if bug == "state rebound":
                    state.data = value.to(state.dtype)
                else:
                    state.copy_(value)


# ------------------------------------------------------------------------ bugs, and what finds them


def _against_oracle(**options) -> Callable[[Planted], object]:
    shape = options.pop("shape", (6, 5, 4, 3))
    return lambda bn: checks.check_against_oracle(bn, cases.make(shape, **options))


def _constant(bn):
    regime = {"regime": lambda x: torch.full_like(x, 10_000.1)}
    checks.check_constant_channels(bn, cases.make((6, 5, 7), **regime))


def _nan(bn):
    checks.check_nonfinite_stays(bn, cases.make((3, 5, 4)), math.nan)


def _nan_through_relu(bn):
    p = cases.make((3, 5, 4), training=False, activation="relu")
    p.x[1, 2, 3] = math.nan
    checks.check_against_oracle(bn, p, needs=())


def _underflow(bn):
    x = torch.randn(4, 3, 5).half()
    p = cases.Problem(
        x=x,
        grad_y=torch.ones_like(x),
        weight=torch.full((3,), 1e-9),
        running_mean=torch.zeros(3),
        running_var=torch.ones(3),
        residual=torch.zeros_like(x),
        training=False,
        activation="relu",
    )
    checks.check_mask_matches_output(bn, p)


def _mask_at_zero(bn):
    p = cases.make((4, 3, 5), residual=True, training=False, activation="relu")
    x = torch.where(p.x > 0, oracle.per_channel(p.running_mean, p.x), p.x)
    residual = torch.where(p.x > 0, -oracle.per_channel(p.bias, p.x), p.residual)
    checks.check_mask_matches_output(bn, p.but(x=x, residual=residual))


def _kept_on_error(bn):
    p = cases.make((4, 3, 5)).but(weight=torch.ones(2))
    checks.check_state_kept_on_error(bn, p, RuntimeError, "weight")


def _interleaved(bn):
    checks.check_calls_interleaved(bn, [cases.make((4, 3, 5)), cases.make((4, 3, 5), regime="scale_1e4")])


FOUND_BY = {
    "running_var is biased": lambda bn: checks.check_steps(bn, 0.1),
    "momentum on the wrong side": lambda bn: checks.check_steps(bn, 0.1),
    "never counts": lambda bn: checks.check_steps(bn, 0.1),
    "count kept on the host": checks.check_momentum_reads_counter,
    "count in the dtype of the statistics": _against_oracle(
        shape=(70_000, 2), dtype=torch.float16, param_dtype=torch.float16, momentum=1.0
    ),
    "running_var from invstd": _against_oracle(regime=lambda x: 3e-5 * x, zero_stats=True),
    "state rebound": checks.check_state_in_place,
    "counts before it checks": _kept_on_error,
    "invstd without eps": _against_oracle(regime="scale_1e-4"),
    "eps of the first call with this shape": checks.check_settings_not_remembered,
    "E[x^2] - E[x]^2 in float32": _against_oracle(regime="mean_1e4_std_0.1"),
    "float32 sums around the first sample": _against_oracle(
        shape=(20_000, 3), regime="outlier_first_at_1e4", zero_stats=True
    ),
    "float32 mean": _against_oracle(regime="mean_1e4_std_0.01"),
    "invstd of 20 bits": lambda bn: checks.check_no_worse_than_torch(bn, lambda: cases.make((6, 5, 4, 3))),
    "shift folded into the bias in float32": _constant,
    "last row left out": _against_oracle(shape=(300, 5)),
    "last channels not computed": _against_oracle(shape=(4, 65)),
    "strides ignored": _against_oracle(layout="channels_last"),
    "layout lost": _against_oracle(layout="channels_last"),
    "activation ignored where channels are innermost": _against_oracle(layout="channels_last", activation="relu"),
    "activation before the residual": _against_oracle(activation="relu", residual=True),
    "activation_param ignored": _against_oracle(activation="leaky_relu"),
    "gelu by tanh": _against_oracle(activation="gelu"),
    "hardswish's gradient at 3": lambda bn: checks.check_ties(
        bn, checks.tie_problem("hardswish", torch.float32, residual=False)
    ),
    "mean(g) missing": _against_oracle(),
    "mean(g * xhat) missing": _against_oracle(),
    "weight's gradient twice where bias has none": lambda bn: checks.check_only_needed(bn, cases.make((4, 3, 5))),
    "residual gradient not masked": _against_oracle(activation="relu", residual=True),
    "relu passes the gradient at 0": _mask_at_zero,
    "relu's mask from before rounding": _underflow,
    "relu makes 0 of NaN": _nan_through_relu,
    "NaN leaks into the neighbour": _nan,
    "not repeatable": lambda bn: checks.check_repeatable(bn, cases.make((4, 3, 5))),
    "statistics overwritten by the next call": _interleaved,
    "once differentiable": lambda bn: checks.check_gradient_penalty(bn, True, "grad"),
    "third derivative 0": lambda bn: checks.check_third_order(bn, None, True),
}


@pytest.mark.parametrize("bug", FOUND_BY)
def test_bug_is_found(bug):
    """The check named beside the bug fails for it."""
    with pytest.raises(AssertionError):
        FOUND_BY[bug](Planted(bug))


@pytest.mark.parametrize("bug", FOUND_BY)
def test_the_same_check_passes_without_the_bug(bug):
    """So it was the bug that the check saw."""
    FOUND_BY[bug](Planted())


@pytest.mark.parametrize(
    "bug", ["mean(g) missing", "mean(g * xhat) missing", "relu passes the gradient at 0", "layout lost"]
)
def test_forward_alone_does_not_show_it(bug):
    """These are right in y and in the statistics: only the gradients and strides are looked at for them."""
    p = cases.make((6, 5, 4, 3), activation="relu", residual=True)
    checks.check_against_oracle(Planted(bug), p, needs=())


def test_once_differentiable_is_right_once():
    """The first derivative of that bug is right: the gradient penalty is what finds it."""
    checks.check_against_oracle(Planted("once differentiable"), cases.make((6, 5, 4)))
    with pytest.raises(AssertionError):
        checks.check_gradients_numerically(Planted("once differentiable"), None, False, True)


def test_third_derivative_of_torch_is_found():
    """torch's own batch norm passes the second order and fails the third."""
    checks.check_gradient_penalty(oracle.torch_batch_norm, True, "grad")
    with pytest.raises(AssertionError, match="third order"):
        checks.check_third_order(oracle.torch_batch_norm, None, True)


@pytest.mark.parametrize("where", ["channels_last", "rows"])
def test_torch_fails_the_hard_regimes(where):
    """torch's own channels_last path at mean 1e4 and std 0.01 is far outside the tolerance: the regime bites."""
    shape, layout = ((6, 16, 20, 21), "channels_last") if where == "channels_last" else ((1030, 33), "contiguous")
    p = cases.make(shape, layout=layout, regime="mean_1e4_std_0.01")
    with pytest.raises(AssertionError, match="y: got"):
        checks.check_against_oracle(oracle.torch_batch_norm, p)
