"""torch.func transforms and forward-mode AD take the reference path, and are right."""

from __future__ import annotations

import pytest
import torch

import cases
import checks
import oracle
from bnfused import functional

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])


def _functions(training, activation="silu"):
    """The same function of x through bnfused and as the formula, in float64."""
    p = cases.make((4, 3, 2), dtype=torch.float64, training=training, counter=None)
    p = p.but(activation=activation)
    if training:
        p = p.but(running_mean=None, running_var=None)

    def fused(x):
        return checks.call(functional.batch_norm, p, x=x)

    def exact(x):
        return oracle.formula(x, p.running_mean, p.running_var, p.weight, p.bias, training, p.eps, None, activation)

    return fused, exact, p


def _same(actual, wanted):
    limits = torch.full_like(wanted, 1e-10 * max(1.0, oracle.finite_max(wanted)))
    checks.assert_within("transformed", actual, wanted, limits)


@TRAINING
def test_grad(training):
    """torch.func.grad, once and three times."""
    fused, exact, p = _functions(training)

    def loss(function):
        return lambda x: (function(x) * p.grad_y).sum()

    _same(torch.func.grad(loss(fused))(p.x), torch.func.grad(loss(exact))(p.x))

    def higher(function):
        first = torch.func.grad(loss(function))
        second = torch.func.grad(lambda x: (first(x) * p.grad_y).sum())
        return torch.func.grad(lambda x: (second(x) * p.grad_y).sum())

    _same(higher(fused)(p.x), higher(exact)(p.x))


@TRAINING
def test_jvp(training):
    """A tangent that is not silently 0, and one of a tangent."""
    fused, exact, p = _functions(training)
    tangent = p.grad_y

    def jvp(function):
        return lambda x: torch.func.jvp(function, (x,), (tangent,))[1]

    _same(jvp(fused)(p.x), jvp(exact)(p.x))
    _same(jvp(jvp(fused))(p.x), jvp(jvp(exact))(p.x))


@TRAINING
def test_forward_mode_ad(training):
    """torch.autograd.forward_ad, without torch.func."""
    fused, exact, p = _functions(training)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.x, p.grad_y)
        actual = torch.autograd.forward_ad.unpack_dual(fused(dual)).tangent
        wanted = torch.autograd.forward_ad.unpack_dual(exact(dual)).tangent
    assert actual is not None
    _same(actual, wanted)


@TRAINING
def test_vmap(training):
    """vmap over a batch of problems: each with its own statistics."""
    fused, exact, p = _functions(training)
    xs = torch.randn(5, *p.x.shape, dtype=torch.float64)
    _same(torch.func.vmap(fused)(xs), torch.stack([exact(x) for x in xs]))


@TRAINING
def test_vmap_of_grad(training):
    """Per-sample gradients."""
    fused, exact, p = _functions(training)
    xs = torch.randn(5, *p.x.shape, dtype=torch.float64)

    def gradient(function):
        return torch.func.grad(lambda x: (function(x) * p.grad_y).sum())

    wanted = torch.stack([gradient(exact)(x) for x in xs])
    _same(torch.func.vmap(gradient(fused))(xs), wanted)


@TRAINING
def test_jacobian_and_hessian(training):
    """jacrev, jacfwd and their composition."""
    fused, exact, p = _functions(training)
    _same(torch.func.jacrev(fused)(p.x), torch.func.jacrev(exact)(p.x))
    _same(torch.func.jacfwd(fused)(p.x), torch.func.jacrev(exact)(p.x))

    def scalar(function):
        return lambda x: (function(x) * p.grad_y).sum()

    _same(torch.func.hessian(scalar(fused))(p.x), torch.func.hessian(scalar(exact))(p.x))


def test_residual_is_transformed_too():
    """The transform may be over the residual alone."""
    p = cases.make((4, 3, 2), dtype=torch.float64, residual=True, activation="silu", running=False)
    p = p.but(num_batches_tracked=None)

    def loss(residual):
        return (checks.call(functional.batch_norm, p, residual=residual) * p.grad_y).sum()

    _same(torch.func.grad(loss)(p.residual), oracle.expected(p).values["grad_residual"])


def test_functional_call_on_module():
    """torch.func.functional_call with grad over the parameters of a module in eval mode."""
    import bnfused

    module = bnfused.BatchNorm2d(3).double().eval()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters)
    twin = torch.nn.BatchNorm2d(3).double().eval()
    twin(x).square().sum().backward()
    _same(grads["weight"], twin.weight.grad)
    _same(grads["bias"], twin.bias.grad)
