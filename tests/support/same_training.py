"""Compares the training of a network and its converted copy: losses, gradients, running statistics, eval outputs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnfused import functional

# In float64 two right implementations differ by rounding, 1e-16 in each operation, which the network amplifies. The
# largest difference seen was 1e-10. A wrong activation, a lost add or a stale statistic is off by 1e-2 or more.
TOLERANCE = 1e-6


def _outputs(value: object) -> list[Tensor]:
    """The tensors that a network returns, from nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for element in value.values() for tensor in _outputs(element)]
    if isinstance(value, (list, tuple)):
        return [tensor for element in value for tensor in _outputs(element)]
    return []


def loss_and_gradients(model: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A random projection of the outputs, and its gradient for each parameter; ``seed`` also seeds dropout."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = _outputs(model(x))
    assert outputs, "the network returned no tensor"
    loss = sum(((y * torch.randn_like(y)).sum() / y.numel() ** 0.5 for y in outputs), start=x.new_zeros(()))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, x: Tensor, seed: int, rate: float = 0.01) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of gradient descent; the loss and the gradients before it."""
    loss, gradients = loss_and_gradients(model, x, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter -= rate * gradients[name]
    return loss, gradients


def assert_near(name: str, actual: Tensor, wanted: Tensor, scale: float) -> None:
    assert actual.shape == wanted.shape, name
    error = (actual.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
    assert error <= TOLERANCE * scale, f"{name}: off by {error:.2e}, of values up to {scale:.2e}"


def largest(tensor: Tensor) -> float:
    return tensor.detach().double().abs().max().item() if tensor.numel() else 0.0


def assert_same_training(converted: nn.Module, original: nn.Module, x: Tensor, steps: int = 2) -> None:
    """Both models take the same steps from the same state, and then have the same outputs in eval."""
    for number in range(steps):
        loss, gradients = step(converted, x, seed=number)
        wanted_loss, wanted = step(original, x, seed=number)
        assert_near(f"loss of step {number}", loss, wanted_loss, largest(wanted_loss))
        assert gradients.keys() == wanted.keys()
        # If the next batch norm removes the effect of a bias, its gradient is zero, computed as a sum of terms that
        # cancel. The other gradients set how far it may be off.
        floor = 1e-3 * max(map(largest, wanted.values()))
        for name, gradient in wanted.items():
            assert_near(f"gradient of {name}", gradients[name], gradient, max(largest(gradient), floor))
    buffers = dict(original.named_buffers())
    for name, buffer in converted.named_buffers():
        scale = largest(buffers[name])
        if name.endswith("running_mean"):  # it may be zero, so it is relative to the standard deviation
            scale = max(scale, largest(buffers[name.replace("running_mean", "running_var")]) ** 0.5)
        assert_near(name, buffer, buffers[name], scale)
    assert_same_outputs(converted.eval(), original.eval(), x)


@torch.no_grad()
def assert_same_outputs(converted: nn.Module, original: nn.Module, x: Tensor) -> None:
    torch.manual_seed(0)
    actual = _outputs(converted(x.clone()))
    torch.manual_seed(0)
    wanted = _outputs(original(x.clone()))
    assert len(actual) == len(wanted)
    for a, b in zip(actual, wanted, strict=True):
        assert_near("output", a, b, largest(b))


@contextlib.contextmanager
def ops_that_run() -> Iterator[Counter[str]]:
    """Counts the calls of batch_norm within, named as in a fusion report."""
    counts: Counter[str] = Counter()
    batch_norm = functional.batch_norm

    def counting(*args: object, residual: object = None, activation: str | None = None, **options: object) -> Tensor:
        parts = ["batch_norm", *["add"] * (residual is not None), *[activation] * (activation is not None)]
        counts["+".join(str(part) for part in parts)] += 1
        return batch_norm(*args, residual=residual, activation=activation, **options)

    functional.batch_norm = counting
    try:
        yield counts
    finally:
        functional.batch_norm = batch_norm
