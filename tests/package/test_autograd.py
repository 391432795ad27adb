"""Derivatives of every order: finite differences, gradient penalties, third order, and who owns the graph."""

from __future__ import annotations

import pytest
import torch

import bnfused
from support import cases, checks, oracle

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])


@TRAINING
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_gradcheck_and_gradgradcheck(backend, activation, residual, training):
    """First and second derivatives in x, weight, bias and residual against finite differences."""
    checks.check_gradients_numerically(backend.batch_norm, activation, residual, training)


@pytest.mark.parametrize("layout", ["channels_last", "channels_outermost", "holes_in_last"])
@TRAINING
def test_second_derivatives_in_other_layouts(backend, layout, training):
    """The backward of the backward reads strides too."""
    p = cases.make((3, 2, 2, 2), dtype=torch.float64, layout=layout, training=training, counter=None)
    p = p.but(activation="silu", running_mean=None, running_var=None) if training else p

    def function(x, weight, bias):
        return checks.call(backend.batch_norm, p, x=x, weight=weight, bias=bias)

    leaves = [t.detach().requires_grad_() for t in (p.x, p.weight, p.bias)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@TRAINING
@pytest.mark.parametrize("through", ["backward", "grad"])
def test_gradient_penalty(backend, through, training):
    """Trap: ``once_differentiable``, silently wrong where a second path leads to x."""
    checks.check_gradient_penalty(backend.batch_norm, training, through)


@TRAINING
@pytest.mark.parametrize("through", ["backward", "grad"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_penalty_in_float32(backend, layout, through, training):
    """The WGAN-GP pattern with a fused activation, in float32, against the formula in float64."""
    p = cases.make((6, 3, 4, 5), layout=layout, training=training, activation="silu", counter=None)
    own = [p.x, p.weight, p.bias]
    wide = [t.double().contiguous() for t in own]
    each = [wide[0], *(oracle.per_channel(t, p.x).expand(p.x.shape) for t in wide[1:])]

    def penalty(function, arguments):
        leaves = [t.detach().requires_grad_() for t in arguments]
        y = function(*leaves)
        (grad,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
        loss = (grad.square().sum((1, 2, 3)).sqrt() - 1).square().mean() + (y * leaves[0]).mean()
        if through == "backward":
            loss.backward()
            return [leaf.grad for leaf in leaves]
        return torch.autograd.grad(loss, leaves)

    def fused(x, weight, bias):
        return checks.call(backend.batch_norm, p, x=x, weight=weight, bias=bias)

    stats = (p.running_mean.double(), p.running_var.double())

    def exact(x, weight, bias):
        return oracle.formula(x, *stats, weight, bias, training, p.eps, None, "silu")

    fixed = oracle.statistics(wide[0]) if training else stats

    def separate(x, weight, bias):
        """With statistics that do not depend on x, and a weight and a bias for each value: the terms of what is summed,
        before they cancel."""
        return oracle.activate(oracle.formula(x, *fixed, None, None, False, p.eps) * weight + bias, "silu")

    results = (penalty(fused, own), penalty(exact, wide), penalty(separate, each))
    for name, actual, wanted, terms in zip(checks.LEAVES, *results, strict=False):
        sums = terms if name == "x" else terms.square().sum((0, 2, 3)).sqrt()
        # Twice the depth of a first derivative, whose bound is 5e-6.
        scale = max(oracle.finite_max(wanted), oracle.finite_max(sums))
        checks.assert_within(name, actual, wanted, 2 * cases.limit(wanted, scale, torch.float32))


@TRAINING
@pytest.mark.parametrize("activation", [None, "relu", "silu", "tanh"])
def test_third_order(backend, activation, training):
    """torch's own fused batch norm has a wrong third derivative, without an error; ours is the formula's."""
    checks.check_third_order(backend.batch_norm, activation, training)


def test_nothing_needs_grad(backend):
    """Without an input that requires grad, y has no graph; running statistics never get one."""
    p = cases.make((4, 3, 5), residual=True, activation="relu")
    assert not checks.call(backend.batch_norm, p).requires_grad
    x = p.x.detach().requires_grad_()
    checks.call(backend.batch_norm, p, x=x)
    assert not p.running_mean.requires_grad
    assert p.running_mean.grad_fn is None
    assert p.running_var.grad_fn is None


class _NoGradient(torch.autograd.Function):
    """A copy that sends nothing back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_y):
        return None


@TRAINING
def test_an_upstream_gradient_that_is_missing(backend, training):
    """It stays missing, as with torch's: by zeros an optimizer with weight decay would step."""
    p = cases.make((4, 3, 5), residual=True, training=training).but(activation="relu")
    leaves = {name: getattr(p, name).detach().requires_grad_() for name in ("x", "weight", "bias", "residual")}
    y = checks.call(backend.batch_norm, p, **leaves)
    other = torch.ones((), requires_grad=True)
    (_NoGradient.apply(y).sum() + other).backward()
    assert other.grad is not None
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == []


def test_running_statistics_that_were_in_a_graph(backend):
    """The update of the statistics is not recorded, also where grad mode is on and everything requires grad."""
    p = cases.make((4, 3, 5))
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in ("x", "weight", "bias")}
    for _ in range(3):
        checks.call(backend.batch_norm, p, **leaves)
    assert p.running_var.is_leaf
    assert not p.running_var.requires_grad


@pytest.mark.usefixtures("extension")
def test_saved_for_backward_is_small():
    """x, weight and 16 bytes a channel are kept, with a ReLU on a residual one bit an element; never y or the residual.

    Trap: a mask buffer sized by elements times channels.
    """
    saved: list[torch.Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    p = cases.make((8, 64, 14, 14), residual=True, activation="relu")
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in checks.LEAVES}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = checks.call(bnfused.functional.batch_norm, p, **leaves)
    theirs = {t.data_ptr() for t in leaves.values()}
    own = sum(t.nbytes for t in saved if t.data_ptr() not in theirs)
    elements = p.x.numel()
    # A bit an element, padded to bytes in each of the 512 planes; then mean and invstd, float64.
    assert own <= elements / 8 + 512 + 2 * 8 * 64, [tuple(t.shape) for t in saved]
    assert all(t.data_ptr() not in (y.data_ptr(), p.residual.data_ptr()) for t in saved)


@TRAINING
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "holes_in_last", "batch_innermost"])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (5, 3), (2, 1, 17), (0, 3, 4)], ids=str)
def test_higher_derivatives_of_relu_from_its_mask(backend, shape, layout, training):
    """Of add and ReLU the mask is kept, and nothing of the residual: second derivatives in every order of its bits.

    Trap: the order of another backend or layout, or the padding at the end of a plane, read as values.
    """
    p = cases.make(shape, dtype=torch.float64, layout=layout, residual=True, activation="relu", training=training)

    def penalty(function):
        leaves = {name: getattr(p, name).detach().requires_grad_() for name in checks.LEAVES}
        y = checks.call(function, p, **leaves, running_mean=p.running_mean.clone(), running_var=p.running_var.clone())
        grads = torch.autograd.grad(y, list(leaves.values()), p.grad_y, create_graph=True)
        scalar = sum((grad.square() * leaf).sum() for grad, leaf in zip(grads, leaves.values(), strict=True))
        return [*grads, *torch.autograd.grad(scalar, list(leaves.values()))]

    actual = penalty(backend.batch_norm)
    for ours, theirs in zip(actual, penalty(oracle.torch_batch_norm), strict=True):
        wanted = theirs.detach()
        limits = torch.full_like(wanted, 1e-9 * max(1.0, oracle.finite_max(wanted)))
        checks.assert_within("penalty", ours.detach(), wanted, limits)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_checkpointing(backend, activation):
    """Recomputed in backward, the gradients are bit for bit those without checkpointing."""
    from torch.utils.checkpoint import checkpoint

    p = cases.make((4, 3, 5), residual=True, activation=activation, running=False, counter=None)
    plain = checks.run(backend.batch_norm, p)
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in checks.LEAVES}

    def block(*tensors):
        return checks.call(backend.batch_norm, p, **dict(zip(leaves, tensors, strict=True)))

    y = checkpoint(block, *leaves.values(), use_reentrant=False)
    grads = torch.autograd.grad(y, list(leaves.values()), p.grad_y)
    for name, grad in zip(leaves, grads, strict=True):
        assert checks.same_bits(grad, plain.values[f"grad_{name}"]), name


def test_anomaly_mode(backend):
    """torch.autograd.detect_anomaly finds nothing to complain of."""
    p = cases.make((4, 3, 5), residual=True, activation="relu")
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        checks.check_against_oracle(backend.batch_norm, p)
