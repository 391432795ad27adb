"""The measures of training, on problems whose answers are known, and that measuring changes nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import bnfused
from bnfused import diagnostics

# Every known answer is computed in float64 from the same numbers, in a different order of some hundred roundings at
# most. A wrong formula is off by a tenth and more.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-13}


def close(actual: float | Tensor, wanted: float | Tensor) -> None:
    actual, wanted = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, wanted))
    torch.testing.assert_close(actual, wanted, **TOLERANCE)


def exact(values: float | list[float]) -> Tensor:
    """Trap: ``torch.tensor([0.1]).double()`` is 0.1 rounded to float32."""
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 2


class Quadratic(nn.Module):
    """``w' A w / 2``, whatever the input is: its gradient is ``A w`` and beta the largest eigenvalue of ``A``."""

    def __init__(self, matrix: Tensor, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.weight = nn.Parameter(start)

    def forward(self, input: Tensor) -> Tensor:
        return self.weight @ self.matrix @ self.weight / 2


def value(output: Tensor, target: Tensor) -> Tensor:
    """The loss of a model that computes its own."""
    return output


NOTHING = (torch.zeros(()), torch.zeros(()))


def network(*, noise: bool = True) -> nn.Sequential:
    """Batch norm, noise and dropout: running statistics and random draws for a measurement to disturb."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        bnfused.BatchNorm2d(4),
        *([diagnostics.ShiftingNoise()] if noise else []),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 5, bias=False),
        bnfused.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def image_batches(count: int) -> list[diagnostics.Batch]:
    return [(torch.randn(8, 2, 6, 6), torch.randint(3, (8,))) for _ in range(count)]


# --- landscape ---


def quadratic(*eigenvalues: float) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    vectors, _ = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues)))
    return vectors @ torch.diag(exact(list(eigenvalues))) @ vectors.T, vectors


def test_landscape_of_a_quadratic():
    """Losses are those of the parabola; the gradient changes by ``s A g``, whose length over that of ``s g`` is the
    same at every step size and at most the largest eigenvalue."""
    matrix, _ = quadratic(0.1, 1.0, 7.0)
    start = random(3)
    sizes = [0.05, 0.2, 0.3, 1.0]
    found = diagnostics.landscape(Quadratic(matrix, start), value, NOTHING, sizes)
    gradient = matrix @ start
    close(found.loss, start @ matrix @ start / 2)
    close(found.gradient_norm, gradient.norm())
    points = [start - size * gradient for size in sizes]
    losses = torch.stack([point @ matrix @ point / 2 for point in points])
    close(found.losses, losses)
    close(exact(list(found.loss_range)), torch.stack([losses.min(), losses.max()]))
    close(found.gradient_changes, exact(sizes) * (matrix @ gradient).norm())
    close(exact(list(found.predictiveness_range)), found.gradient_changes[[0, -1]])
    close(found.smoothness, (matrix @ gradient).norm() / gradient.norm())
    assert 0.1 < found.smoothness < 7.0


def test_smoothness_is_beta_along_the_steepest_direction():
    """From the eigenvector of the largest eigenvalue the bound is reached. At a step of 2 / beta the loss is what it
    was, and beyond it is higher."""
    matrix, vectors = quadratic(0.5, 2.0, 40.0)
    found = diagnostics.landscape(Quadratic(matrix, vectors[:, 2].clone()), value, NOTHING, [0.01, 2 / 40, 0.06])
    close(found.smoothness, 40.0)
    close(found.losses[1], found.loss)
    assert found.losses[0] < found.loss < found.losses[2]


def test_smoothness_is_the_largest_over_the_step_sizes():
    """``w^4 / 4`` at 1: the gradient 1 becomes ``(1 - s)^3``, so the ratios are ``(1 - (1 - s)^3) / s``: 1.75 at 0.5,
    1 at 1, 3.5 at -1 if the step went up the gradient."""

    class Quartic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, input: Tensor) -> Tensor:
            return self.weight**4 / 4

    found = diagnostics.landscape(Quartic(), value, NOTHING, [1.0, 0.5])
    close(found.smoothness, 1.75)
    close(found.gradient_changes, exact([1.0, 0.875]))


def test_landscape_moves_all_parameters_but_frozen_ones():
    """A product of two: with one frozen it is linear in the other and perfectly smooth."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(exact(3.0))
            self.b = nn.Parameter(exact(2.0))

        def forward(self, input: Tensor) -> Tensor:
            return self.a * self.b

    model = Product()
    # At (3, 2) the gradient is (2, 3), and at (3 - 2 s, 2 - 3 s) it is (2 - 3 s, 3 - 2 s).
    found = diagnostics.landscape(model, value, NOTHING, [0.1])
    close(found.losses, exact([2.8 * 1.7]))
    close(found.smoothness, 1.0)
    model.b.requires_grad_(False)
    found = diagnostics.landscape(model, value, NOTHING, [0.1])
    close(found.losses, exact([2.8 * 2.0]))
    close(found.smoothness, 0.0)


def test_landscape_says_where_the_loss_is_not_a_number():
    """Trap: Python's min and max drop a NaN or keep it by the order of the values."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, input: Tensor) -> Tensor:
            return self.weight.sqrt()

    for sizes in ([0.5, 9.0, 0.1], [9.0, 0.5], [0.5, 9.0]):
        found = diagnostics.landscape(Root(), value, NOTHING, sizes)
        assert all(math.isnan(bound) for bound in (*found.loss_range, *found.predictiveness_range, found.smoothness))
        assert found.losses.isfinite().sum() == len(sizes) - 1


def test_landscape_without_a_gradient_has_no_smoothness():
    matrix, _ = quadratic(1.0, 2.0)
    found = diagnostics.landscape(Quadratic(matrix, random(2) * 0), value, NOTHING, [0.1])
    assert found.gradient_norm == 0
    assert math.isnan(found.smoothness)


@pytest.mark.parametrize("sizes", [[], [0.1, 0.0], [-0.1], [math.nan]])
def test_landscape_refuses_step_sizes(sizes):
    with pytest.raises(ValueError, match="landscape: expected positive step_sizes"):
        diagnostics.landscape(nn.Linear(1, 1), squared, NOTHING, sizes)


def test_landscape_draws_the_same_noise_at_every_point(extension):
    """At a step of nearly 0 the loss is the loss: with other noise it would differ by a tenth."""
    (batch,) = image_batches(1)
    found = diagnostics.landscape(network(), nn.functional.cross_entropy, batch, [1e-9, 1e-9])
    # float32 roundings of a loss of about 1
    assert found.losses.tolist() == pytest.approx([found.loss] * 2, rel=1e-5)


def test_landscape_uses_the_statistics_of_the_batch(extension):
    """The loss is invariant to the scale of a weight before batch norm, whose gradient is then orthogonal to it and
    shrinks as it grows: the loss on the line is that of the model moved there."""
    model = network(noise=False).double()
    model[3] = nn.Identity()  # no dropout
    batch = (random(8, 2, 6, 6), torch.randint(3, (8,)))
    found = diagnostics.landscape(model, nn.functional.cross_entropy, batch, [0.3])
    moved = copy.deepcopy(model)
    nn.functional.cross_entropy(moved(batch[0]), batch[1]).backward()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter -= 0.3 * parameter.grad
    close(found.losses[0], nn.functional.cross_entropy(moved(batch[0]), batch[1]).detach())


# --- internal covariate shift ---


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_shift_of_a_linear_network_by_hand(momentum):
    """``W2 W1 x`` with the squared error: ``G = (W2 W1 x - t) (W1 x)'``, and G' has the new W1 and the old W2.

    Momentum makes the update another one than the gradient times the rate from the second step on.
    """
    model = two_layers()
    batches = [(random(5, 3), random(5, 2)) for _ in range(3)]
    w1, w2 = (parameter.detach().clone() for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=momentum)
    shifts = diagnostics.internal_covariate_shift(model, squared, batches, optimizer)
    assert [(shift.step, shift.layer) for shift in shifts] == [(step, "1.weight") for step in range(3)]
    velocity1, velocity2 = torch.zeros_like(w1), torch.zeros_like(w2)
    for (x, target), shift in zip(batches, shifts, strict=True):
        error = x @ w1.T @ w2.T - target
        gradient1, gradient2 = w2.T @ error.T @ x, error.T @ (x @ w1.T)
        velocity1, velocity2 = momentum * velocity1 + gradient1, momentum * velocity2 + gradient2
        w1 = w1 - 0.05 * velocity1
        hidden = x @ w1.T
        after = (hidden @ w2.T - target).T @ hidden
        w2 = w2 - 0.05 * velocity2
        close(shift.distance, (after - gradient2).norm())
        close(shift.gradient_norm, gradient2.norm())
        close(shift.cosine, (after * gradient2).sum() / (after.norm() * gradient2.norm()))


def test_only_the_layers_before_are_updated():
    """Three layers: for the second, the third keeps its old weight."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3))).double()
    x, target = random(4, 2), random(4, 2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    second, third = diagnostics.internal_covariate_shift(model, squared, [(x, target)], optimizer)
    for shift, updated in ((second, 1), (third, 2)):
        mixed = nn.Sequential(*(model[i] if i < updated else before[i] for i in range(3)))
        wanted, old = (torch.autograd.grad(squared(at(x), target), at[updated].weight)[0] for at in (mixed, before))
        assert shift.layer == f"{updated}.weight"
        close(shift.distance, (wanted - old).norm())


def test_biases_and_batch_norms_count_as_the_layers_before(extension):
    """Frozen weights: what shifts the next layer is the update of batch norm's bias, and it is measured."""
    model = nn.Sequential(nn.Linear(3, 4), bnfused.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (shift,) = diagnostics.internal_covariate_shift(model, squared, [(random(6, 3), random(6, 2))], optimizer)
    assert shift.layer == "2.weight"
    assert shift.distance > 1e-3 * shift.gradient_norm > 0


def test_no_update_no_shift(extension):
    """A rate of 0 moves nothing: G' is G bit for bit, running statistics, noise and dropout notwithstanding."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    shifts = diagnostics.internal_covariate_shift(model, nn.functional.cross_entropy, image_batches(2), optimizer)
    assert len(shifts) == 4
    assert all(shift.distance == 0 and shift.gradient_norm > 0 for shift in shifts)


def test_optimizer_may_change_the_gradients():
    """One that clears them in its step: G is what it was given."""

    class Clearing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.zero_grad(set_to_none=False)

    model = two_layers()
    x, target = random(5, 3), random(5, 2)
    wanted = torch.autograd.grad(squared(model(x), target), model[1].weight)[0].norm()
    optimizer = Clearing(model.parameters(), 0.05)
    (shift,) = diagnostics.internal_covariate_shift(model, squared, [(x, target)], optimizer)
    close(shift.gradient_norm, wanted)


def test_layers_and_steps_that_are_asked_for():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(random(5, 3), random(5, 2)) for _ in range(5)]
    shifts = diagnostics.internal_covariate_shift(
        model, squared, batches, optimizer, layers=["0.weight", "0.bias", "1.bias"], every=2
    )
    wanted = [(step, layer) for step in (0, 2, 4) for layer in ("0.bias", "1.bias")]
    assert [(shift.step, shift.layer) for shift in shifts] == wanted


@pytest.mark.parametrize("arguments", [{"layers": ["2.weight"]}, {"layers": ["0.weight"], "every": 0}])
def test_shift_refuses(arguments):
    """Before anything is trained."""
    model = two_layers()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="internal_covariate_shift: expected (layers among|every of at least 1)"):
        diagnostics.internal_covariate_shift(model, squared, [(random(5, 3), random(5, 2))], optimizer, **arguments)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


# --- input distributions ---


def test_distribution_of_known_values():
    """Unit c of the second layer is given ``c + 1`` times 0, 1, ..., 8 and an offset."""
    model = nn.Sequential(nn.Linear(1, 3), nn.Sigmoid()).double()
    scale, offset = exact([1.0, 2.0, 3.0]), exact([0.0, 5.0, -5.0])
    with torch.no_grad():
        model[0].weight.copy_(scale[:, None])
        model[0].bias.copy_(offset)
    values = torch.arange(9.0).double()[torch.randperm(9), None]
    found = diagnostics.input_distributions(model, values, ["1"], quantiles=[0.0, 0.5, 0.9, 1.0])["1"]
    close(found.mean, 4 * scale + offset)
    close(found.variance, scale.square() * 60 / 9)
    close(found.quantiles, exact([0.0, 4.0, 7.2, 8.0])[:, None] * scale + offset)


def test_units_are_channels_over_samples_and_positions():
    x = random(4, 3, 2, 5)
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    found = diagnostics.input_distributions(model, x.clone(), ["0", "1"])
    units = x.transpose(0, 1).reshape(3, -1)
    for name in ("0", "1"):  # what the ReLU is given, not what it made of it
        close(found[name].mean, units.mean(1))
        close(found[name].variance, units.var(1, correction=0))
        close(found[name].quantiles, units.quantile(exact([0.15, 0.5, 0.85]), dim=1))


@pytest.mark.parametrize("name", ["2", "unused"])
def test_distributions_of_modules_that_are_not_there(name):
    class Model(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return self[0](input)

    model = Model(nn.Identity())
    model.add_module("unused", nn.Identity())
    with pytest.raises(ValueError, match=f"input_distributions: expected modules .*{name}"):
        diagnostics.input_distributions(model, random(2, 3), [name])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_drift_is_in_standard_deviations():
    """Unit 0 moves by one and a half deviations, unit 1 gets twice as wide about its median, unit 2 stays."""
    deviation = exact([2.0, 3.0, 4.0])
    quantiles = exact([-1.0, 0.0, 1.0])[:, None] * deviation
    before = diagnostics.InputDistribution(torch.zeros(3).double(), deviation.square(), quantiles)
    factor, offset = exact([1.0, 2.0, 1.0]), exact([3.0, 0.0, 0.0])
    after = diagnostics.InputDistribution(offset, (factor * deviation).square(), quantiles * factor + offset)
    found = diagnostics.drift(before, after)
    close(found.mean, exact([1.5, 0.0, 0.0]))
    close(found.scale, exact([0.0, math.log(2), 0.0]))
    close(found.quantiles, exact([1.5, 2 / 3, 0.0]))


# --- noise ---


def test_noise_has_the_moments_it_says():
    """Over many calls. Eight standard errors of each estimate, which chance exceeds once in 1e15 runs; a wrong constant
    is off by twenty and more.

    ``mu`` of U(-0.5, 0.5) has variance 1/12, ``sigma`` of U(1, 1.25) has 1/192, and m about mu 0.01 / 3.
    """
    noise = diagnostics.ShiftingNoise()
    calls, samples = 1600, 40
    offsets = torch.stack([noise(torch.zeros(samples, 5, 2, dtype=torch.float64)) for _ in range(calls)])
    assert torch.equal(offsets[..., 0], offsets[..., 1])  # the positions share it
    per_call = offsets[..., 0].mean(1)
    count = per_call.numel()
    assert abs(per_call.mean()) < 8 * math.sqrt(1 / 12 / count)
    # The variance of the square of U(-0.5, 0.5) is 1/80 - 1/144, the mean over the samples adds 0.01 / 3 / samples.
    assert abs(per_call.var() - 1 / 12 - 0.01 / 3 / samples) < 8 * math.sqrt((1 / 80 - 1 / 144) / count)
    within = offsets[..., 0].var(1)
    assert abs(within.mean() - 0.01 / 3) < 8 * (within.std() / math.sqrt(count))
    scales = torch.stack(
        [noise(torch.ones(samples, 5, dtype=torch.float64)) - noise(torch.zeros(samples, 5)) for _ in range(calls)]
    ).mean(1)
    # The offsets of the two calls do not cancel: 2/12 is theirs.
    assert abs(scales.mean() - 1.125) < 8 * math.sqrt((1 / 6 + 1 / 192 + 0.02 / samples) / count)


def test_noise_scales_the_input():
    """With ``shift`` and ``spread`` 0 what is left is one factor in [1, scale] for each channel, drawn in each call."""
    noise = diagnostics.ShiftingNoise(shift=0.0, scale=3.0, spread=0.0)
    x = random(6, 200, 2)  # of 200 factors, none lies in a given fifth of the range once in 1e19 draws
    first, second = (noise(x) / x for _ in range(2))
    for factors in (first, second):
        close(factors, factors[:1, :, :1].expand_as(factors).contiguous())
        assert 1 <= factors.min() < 1.4 and 2.6 < factors.max() <= 3
    assert not torch.allclose(first, second)


def test_noise_in_eval_is_its_average():
    x = random(3, 4)
    close(diagnostics.ShiftingNoise(scale=1.5).eval()(x), 1.25 * x)


# --- measuring changes nothing ---


def test_training_is_the_same_with_measurements(extension):
    """Bit for bit: parameters, running statistics, counters and the random generator, though the measurement runs the
    network, draws noise and makes gradients."""
    model = network()
    twin = copy.deepcopy(model)
    batches = image_batches(4)
    loss_fn = nn.functional.cross_entropy
    state = torch.get_rng_state()

    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for input, target in batches:
        optimizer.zero_grad()
        loss_fn(twin(input), target).backward()
        optimizer.step()
    wanted, wanted_state = twin.state_dict(), torch.get_rng_state()

    def measured():
        for batch in batches:
            gradients = [parameter.grad for parameter in model.parameters()]
            diagnostics.landscape(model, loss_fn, batch, [0.1, 1.0])
            diagnostics.input_distributions(model, batch[0], ["1", "4"])
            assert all(a is b for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True))
            yield batch

    torch.set_rng_state(state)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    assert diagnostics.internal_covariate_shift(model, loss_fn, measured(), optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), f"{name} differs"
    assert torch.equal(torch.get_rng_state(), wanted_state)
    assert not any(module._forward_pre_hooks for module in model.modules())
