"""torch.func transforms and forward-mode AD take the reference path, and are right."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import bnfused
from bnfused import functional
from support import cases, checks, oracle

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])


def _functions(training, activation="silu"):
    """The same function of x through bnfused and as the formula, in float64."""

    def draw():
        p = cases.make((4, 3, 2), dtype=torch.float64, training=training, running=not training, counter=None)
        return p.but(activation=activation)

    p = next(p for p in iter(draw, None) if _is_open(p))

    def fused(x):
        return checks.call(functional.batch_norm, p, x=x)

    def exact(x):
        return oracle.formula(x, p.running_mean, p.running_var, p.weight, p.bias, training, p.eps, None, activation)

    return fused, exact, p


def _is_open(p):
    """Whether each channel has a z above 0: where ReLU closes all, nothing and a right derivative are the same."""
    return (oracle.before_activation(p) > 0).any(0).any(-1).all()


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
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p.x, p.grad_y)
        actual = forward_ad.unpack_dual(fused(dual)).tangent
        wanted = forward_ad.unpack_dual(exact(dual)).tangent
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


# ------------------------------------------------------- a graph of the kernels, differentiated by a transform


def _pull_back(function, x):
    """The vector-Jacobian product of a graph that was made outside of any transform."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)

    def of(v, create_graph=False):
        return torch.autograd.grad(y, leaf, v, retain_graph=True, create_graph=create_graph)[0]

    return of, leaf


# Activations whose derivative torch can take forward.
FORWARD = pytest.mark.parametrize("activation", [None, "relu", "tanh"])


@TRAINING
@FORWARD
def test_tangent_of_the_upstream_gradient(training, activation):
    """grad_y may carry a tangent though the forward ran in the kernels. Trap: it is dropped without a word."""
    fused, exact, p = _functions(training, activation)
    tangent = torch.randn_like(p.grad_y)  # not x, which training maps to nearly 0
    results = []
    for function in (fused, exact):
        of, _ = _pull_back(function, p.x)
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(of(forward_ad.make_dual(p.grad_y, tangent))).tangent)
        results.append(torch.func.jvp(of, (p.grad_y,), (tangent,))[1])
    assert results[0] is not None
    _same(results[0], results[2])
    _same(results[1], results[3])


@TRAINING
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_transforms_of_the_pull_back(training, activation):
    """vmap, grad and jvp over it, with and without a graph of its own."""
    fused, exact, p = _functions(training, activation)
    results = []
    for function in (fused, exact):
        of, _ = _pull_back(function, p.x)
        many = torch.stack([p.grad_y, p.x, p.grad_y * p.x])
        results.append(
            [
                torch.func.vmap(of)(many),
                torch.func.grad(lambda v, of=of: of(v, True).pow(3).sum())(p.grad_y),
                torch.func.jvp(lambda v, of=of: of(v, True), (p.grad_y,), (p.x,))[1],
                torch.func.vmap(torch.func.grad(lambda v, of=of: of(v, True).pow(3).sum()))(many),
            ]
        )
    for actual, wanted in zip(*results, strict=True):
        _same(actual, wanted)


@TRAINING
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_batched_gradients(training, activation):
    """is_grads_batched=True, and a derivative through it. Trap: a Function inside vmap that returns no graph."""
    fused, exact, p = _functions(training, activation)
    many = torch.stack([p.grad_y, p.x])
    results = []
    for function in (fused, exact):
        leaf = p.x.detach().requires_grad_()
        (plain,) = torch.autograd.grad(function(leaf), leaf, many, is_grads_batched=True)
        (first,) = torch.autograd.grad(function(leaf), leaf, many, is_grads_batched=True, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), leaf, create_graph=True)
        (batched,) = torch.autograd.grad(second, leaf, many, is_grads_batched=True, create_graph=True)
        (third,) = torch.autograd.grad(batched.sum(), leaf)
        results.append((plain, first.detach(), second.detach(), batched.detach(), third))
    for actual, wanted in zip(*results, strict=True):
        _same(actual, wanted)


@TRAINING
@pytest.mark.parametrize("vectorize", [False, True])
def test_autograd_functional(training, vectorize):
    """torch.autograd.functional: its jacobian, hessian, hvp and jvp, vectorized and not."""
    fused, exact, p = _functions(training)
    api = torch.autograd.functional

    def scalar(function):
        return lambda x: (function(x) * p.grad_y).sum()

    results = []
    for function in (fused, exact):
        results.append(
            [
                api.jacobian(function, p.x, vectorize=vectorize),
                api.hessian(scalar(function), p.x, vectorize=vectorize),
                api.hvp(scalar(function), p.x, p.grad_y)[1],
                api.vhp(scalar(function), p.x, p.grad_y)[1],
                api.jvp(function, p.x, p.grad_y)[1],
            ]
        )
        if vectorize:
            results[-1].append(api.jacobian(function, p.x, vectorize=True, strategy="forward-mode"))
            results[-1].append(
                api.hessian(scalar(function), p.x, vectorize=True, outer_jacobian_strategy="forward-mode")
            )
    for actual, wanted in zip(*results, strict=True):
        _same(actual, wanted)


@TRAINING
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_every_mode_numerically(activation, residual, training):
    """Forward mode, batched gradients and forward over reverse of every epilogue, against finite differences."""
    checks.check_transforms_numerically(functional.batch_norm, activation, residual, training)


def test_nested_jvp_of_third_order():
    """Three tangents. torch's own is wrong from the second on, without an error."""
    fused, exact, p = _functions(True, "tanh")

    def jvp(function):
        return lambda x: torch.func.jvp(function, (x,), (p.grad_y,))[1]

    _same(jvp(jvp(jvp(fused)))(p.x), jvp(jvp(jvp(exact)))(p.x))


# -------------------------------------------------------------------------------------------- modules


def _pair(count=1, **options):
    """Ours and torch's, ``count`` times, with the same random state."""
    pairs = []
    for _ in range(count):
        pair = [cls(3, **options).double() for cls in (bnfused.BatchNorm2d, torch.nn.BatchNorm2d)]
        with torch.no_grad():
            pair[0].weight.normal_()
            pair[0].bias.normal_()
            if pair[0].running_mean is not None:
                pair[0].running_mean.normal_()
                pair[0].running_var.uniform_(0.5, 2)
        pair[1].load_state_dict(pair[0].state_dict())
        pairs.append(pair)
    return [list(kind) for kind in zip(*pairs, strict=True)]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_ensemble(training, momentum):
    """vmap over stacked modules: each with its parameters, statistics and counter, which it updates."""
    ours, theirs = _pair(3, momentum=momentum)
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    for module in ours + theirs:
        module.train(training)
    parameters, buffers = torch.func.stack_module_state(ours)

    def call(parameters, buffers):
        return torch.func.functional_call(ours[0], (parameters, buffers), (x,))

    _same(torch.func.vmap(call)(parameters, buffers).detach(), torch.stack([m(x) for m in theirs]).detach())
    for name, stacked in buffers.items():
        _same(stacked.double(), torch.stack([m.get_buffer(name) for m in theirs]).double())


@pytest.mark.parametrize("training", [True, False], ids=["train, no statistics", "eval"])
def test_per_sample_gradients(training):
    """vmap(grad(functional_call)) over a batch, as torch's own modules give them."""
    (ours,), (theirs,) = _pair(track_running_stats=not training)
    x = torch.randn(6, 3, 5, 2, dtype=torch.float64)
    results = []
    for module in (ours.train(training), theirs.train(training)):
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters, sample, module=module):
            return torch.func.functional_call(module, parameters, (sample[None],)).pow(3).sum()

        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
    for name, wanted in results[1].items():
        assert wanted.shape[0] == 6
        _same(results[0][name], wanted)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_statistics_that_a_transform_may_not_write(transform, momentum):
    """Refused, as by torch's module; and here nothing has changed then, where torch has counted a batch."""
    (ours,), (theirs,) = _pair(momentum=momentum)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    calls = {
        "vmap": lambda m: torch.func.vmap(m)(x),
        "grad": lambda m: torch.func.grad(lambda v: m(v).sum())(x[0]),
        "jvp": lambda m: torch.func.jvp(m, (x[0],), (x[1],)),
    }
    with pytest.raises(RuntimeError):
        calls[transform](theirs)
    message = "expected running_mean and running_var with the batch dimension" if transform == "vmap" else "captured"
    with pytest.raises(RuntimeError, match=message):
        calls[transform](ours)
    for name, value in ours.state_dict().items():
        assert checks.same_bits(value, before[name]), name


def test_replace_all_batch_norm_modules():
    """torch.func's patch finds ours and turns their statistics off."""
    (ours,), _ = _pair()
    network = torch.nn.Sequential(ours)
    torch.func.replace_all_batch_norm_modules_(network)
    assert ours.running_mean is None
    x = torch.randn(2, 4, 3, 5, 2, dtype=torch.float64)
    wanted = torch.stack([torch.nn.functional.batch_norm(v, None, None, ours.weight, ours.bias, True) for v in x])
    _same(torch.func.vmap(network)(x).detach(), wanted.detach())
