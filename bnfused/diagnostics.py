"""Measurements of how a network trains, to see what batch norm does to it. They work for any model in plain torch.

They tell two explanations apart. Ioffe & Szegedy ("Batch Normalization", 2015) say that batch norm keeps the
distributions of the layers' inputs from moving while the layers before them learn: ``input_distributions`` and
``drift``. Santurkar et al. ("How Does Batch Normalization Help Optimization?", 2018) restate that shift in terms of
gradients, ``internal_covariate_shift``, find it no smaller with batch norm, and say that batch norm makes the loss
smoother: ``landscape``. Their control, ``ShiftingNoise`` after each batch norm, moves the distributions again.

A measurement leaves the model as it found it: parameters, gradients, buffers (so the running statistics) and the random
generators of the CPU and of the CUDA devices that hold parameters. Models are measured in the mode that they are in,
which should be ``train()``: eval mode has another loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CovariateShift:
    """One layer at one step: ``|G - G'|``, ``cos(G, G')`` and ``|G|``; see ``internal_covariate_shift``.

    ``distance`` has the unit of the gradient, so it also differs between networks if their gradients differ in size.
    To compare networks, use ``distance / gradient_norm`` and ``cosine``. If G or G' is 0, ``cosine`` is NaN.
    """

    step: int
    layer: str
    distance: float
    cosine: float
    gradient_norm: float


def internal_covariate_shift(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    layers: Sequence[str] | None = None,
    every: int = 1,
) -> list[CovariateShift]:
    """Train ``model`` and measure how much each layer's gradient changes when only the layers before it are updated.

    For the layer with weight ``W_i`` at step t, on the batch ``(x, y)`` of that step::

        G  = grad of L(W_1,   ..., W_i-1,   W_i, W_i+1, ..., W_k; x, y) with respect to W_i
        G' = grad of L(W_1^+, ..., W_i-1^+, W_i, W_i+1, ..., W_k; x, y) with respect to W_i

    where ``^+`` is after the optimizer's step. The shift is ``|G - G'|`` in the l2 norm. Dropout and noise draw the
    same numbers for both. Bit for bit, the training is the same as without the measurement.

    Args:
        model: the model to train. Its parameters must be in the order of the forward, as in ``nn.Sequential``.
        loss_fn: scalar loss of ``(model(input), target)``.
        batches: ``(input, target)`` for each step; the training ends with the last one.
        optimizer: makes the steps; it holds the parameters of ``model``.
        layers: names of the parameters to measure, as in ``model.named_parameters()``. None means every trainable one
            of two or more dimensions, which leaves out biases and the parameters of batch norm. Those belong to the
            layers before the next weight.
        every: measure at steps 0, ``every``, 2 ``every``, ... A measurement costs one forward and backward per layer.

    Returns:
        One entry for each measured step and layer. The model's first parameter has none, as no layer precedes it.

    Raises:
        ValueError: a name is not the name of a trainable parameter, or ``every`` is below 1.

    Source: Santurkar et al., 2018, definition 2.1.
    """
    trainable = _trainable(model)
    names = list(trainable)
    if every < 1:
        raise ValueError(f"internal_covariate_shift: expected every of at least 1, got {every}")
    if layers is None:
        layers = [name for name, parameter in trainable.items() if parameter.dim() >= 2]
    for name in layers:
        if name not in trainable:
            raise ValueError(f"internal_covariate_shift: expected layers among {names}, got {name!r}")
    shifts = []
    for step, (input, target) in enumerate(batches):
        measured = step % every == 0
        if measured:
            draws = _Draws(model)
            before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        optimizer.zero_grad()
        loss_fn(model(input), target).backward()
        if measured:
            gradients = {name: trainable[name].grad for name in layers}
            gradients = {name: None if grad is None else grad.clone() for name, grad in gradients.items()}
        optimizer.step()
        if not measured:
            continue
        for layer in layers:
            position = names.index(layer)
            if position == 0:
                continue
            parameters = {name: trainable[name] if i < position else before[name] for i, name in enumerate(names)}
            _, (after,) = _gradient(model, loss_fn, (input, target), parameters, buffers, [layer], draws)
            gradient = gradients[layer]
            gradient = torch.zeros_like(after) if gradient is None else gradient
            shifts.append(
                CovariateShift(step, layer, _norm([after - gradient]), _cosine(gradient, after), _norm([gradient]))
            )
    return shifts


@dataclass(frozen=True)
class Landscape:
    """The loss and its gradient on a line from the parameters w along ``-g``, ``g`` the gradient at w.

    ``losses`` and ``gradient_changes`` are float64 of shape ``(len(step_sizes),)``: ``L(w - s g)`` and
    ``|grad L(w - s g) - g|`` for each step size s.
    """

    step_sizes: Tensor
    loss: float
    gradient_norm: float
    losses: Tensor
    gradient_changes: Tensor

    @property
    def loss_range(self) -> tuple[float, float]:
        """Lowest and highest loss on the line, NaN if any is NaN. Their difference is the loss variation."""
        return self.losses.min().item(), self.losses.max().item()

    @property
    def predictiveness_range(self) -> tuple[float, float]:
        """Smallest and largest change of the gradient on the line. The smaller, the better g predicts the gradient."""
        return self.gradient_changes.min().item(), self.gradient_changes.max().item()

    @property
    def smoothness(self) -> float:
        """Effective beta-smoothness: ``max over s of |grad L(w - s g) - g| / |s g|``; NaN where g is 0.

        It is a lower bound of the Lipschitz constant of the gradient, along one direction. A gradient step of size s
        can be trusted to lower the loss if ``s * smoothness < 2``.
        """
        return (self.gradient_changes / (self.step_sizes * self.gradient_norm)).max().item()


def landscape(model: nn.Module, loss_fn: LossFunction, batch: Batch, step_sizes: Sequence[float]) -> Landscape:
    """Loss and gradient of ``model`` on one batch, along the direction of the gradient.

    Dropout and noise draw the same numbers at every point, so that all points belong to one function.

    Args:
        model: the model to measure; all of its trainable parameters move.
        loss_fn: scalar loss of ``(model(input), target)``.
        batch: ``(input, target)``.
        step_sizes: positive multiples of the gradient, in the unit of a learning rate.

    Raises:
        ValueError: there is no step size, or one is not positive.

    Source: Santurkar et al., 2018, section 3.1, figure 4: loss landscape, gradient predictiveness and "effective"
    beta-smoothness.
    """
    if not step_sizes or not all(size > 0 for size in step_sizes):
        raise ValueError(f"landscape: expected positive step_sizes, got {step_sizes}")
    start = _trainable(model)
    names = list(start)
    buffers = dict(model.named_buffers())
    draws = _Draws(model)
    loss, gradients = _gradient(model, loss_fn, batch, start, buffers, names, draws)
    losses, changes = [], []
    for size in step_sizes:
        moved = {name: start[name].detach() - size * grad for name, grad in zip(names, gradients, strict=True)}
        there, others = _gradient(model, loss_fn, batch, moved, buffers, names, draws)
        losses.append(there)
        changes.append(_norm([other - grad for other, grad in zip(others, gradients, strict=True)]))
    return Landscape(
        torch.tensor(step_sizes, dtype=torch.float64),
        loss,
        _norm(gradients),
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(changes, dtype=torch.float64),
    )


@dataclass(frozen=True)
class InputDistribution:
    """The input of each of C units: ``mean`` and biased ``variance`` (C,), ``quantiles`` (Q, C); all float64."""

    mean: Tensor
    variance: Tensor
    quantiles: Tensor


def input_distributions(
    model: nn.Module,
    input: Tensor,
    modules: Sequence[str],
    quantiles: Sequence[float] = (0.15, 0.5, 0.85),
) -> dict[str, InputDistribution]:
    """The distribution of the input of each unit of ``modules``, over the samples and positions of ``input``.

    Args:
        model: it is run forward once, without gradients.
        input: the input of ``model``. Use the same one in every call, so that only the model changes in between.
        modules: names as in ``model.named_modules()``. Each module takes one tensor ``(N, C, *)``, and its channels are
            the units. If a module is called more than once, the last call counts.
        quantiles: the quantiles to take, from 0 to 1; the default is the choice of the source.

    Returns:
        The distribution for each name.

    Raises:
        ValueError: a name is not the name of a module, or the model does not call that module.

    Source: Ioffe & Szegedy, 2015, section 4.1, figure 1 (b, c).
    """
    known = dict(model.named_modules())
    for name in modules:
        if name not in known:
            raise ValueError(f"input_distributions: expected modules among {list(known)}, got {name!r}")
    given: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            given[name] = arguments[0].detach().clone()  # the module may work in place

        return known[name].register_forward_pre_hook(keep)

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with contextlib.ExitStack() as stack:
        for name in modules:
            stack.callback(watch(name).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Draws(model).repeated())
        torch.func.functional_call(model, buffers, (input,))
    missing = [name for name in modules if name not in given]
    if missing:
        raise ValueError(f"input_distributions: expected modules that the model calls, got {missing}")
    return {name: _distribution(given[name], quantiles) for name in modules}


def _distribution(x: Tensor, quantiles: Sequence[float]) -> InputDistribution:
    units = x.transpose(0, 1).flatten(1).double()
    variance, mean = torch.var_mean(units, dim=1, correction=0)
    # torch.quantile refuses more than 2^24 values.
    ranked = units.sort(dim=1).values
    positions = torch.tensor(quantiles, dtype=torch.float64, device=x.device) * (units.shape[1] - 1)
    low, high = ranked[:, positions.floor().long()], ranked[:, positions.ceil().long()]
    return InputDistribution(mean, variance, torch.lerp(low, high, positions.frac()).T)


@dataclass(frozen=True)
class Drift:
    """How far the input distribution of each of C units has moved: float64 (C,), in standard deviations of ``before``.

    ``mean`` is ``|mean' - mean| / sd``, ``scale`` is ``|log(sd' / sd)|``, and ``quantiles`` the average of
    ``|q' - q| / sd`` over the quantiles q. They are infinite or NaN for a unit that was constant, since sd is 0.
    """

    mean: Tensor
    scale: Tensor
    quantiles: Tensor


def drift(before: InputDistribution, after: InputDistribution) -> Drift:
    """Compare two distributions of the same units, from two times of a training.

    Ioffe & Szegedy, 2015, section 2, define the quantity informally, as a change in the distribution of the
    activations. These three numbers for it are a choice made here; they do not change if a unit is shifted or scaled.
    """
    deviation = before.variance.sqrt()
    return Drift(
        (after.mean - before.mean).abs() / deviation,
        (after.variance / before.variance).log().abs() / 2,
        (after.quantiles - before.quantiles).abs().mean(0) / deviation,
    )


class ShiftingNoise(nn.Module):
    """Noise whose mean and variance are drawn anew in every call, which moves what batch norm holds still.

    In training, for sample i and channel j of an input ``(N, C, *)``::

        y_ij = s_ij x_ij + m_ij,   m_ij ~ U(mu_j - spread, mu_j + spread),   s_ij ~ N(sigma_j, spread^2)
        mu_j ~ U(-shift, shift),   sigma_j ~ U(1, scale)                     once per call

    In eval it returns the average, ``x (1 + scale) / 2``.

    Source: Santurkar et al., 2018, section 2.1 and the appendix on it, which injects this after batch norm. They draw
    per activation; here the positions of a channel share the noise, as they share batch norm's statistics.
    """

    def __init__(self, shift: float = 0.5, scale: float = 1.25, spread: float = 0.1) -> None:
        super().__init__()
        self.shift, self.scale, self.spread = shift, scale, spread

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input * ((1 + self.scale) / 2)
        samples, channels = input.shape[:2]
        mean = input.new_empty(channels).uniform_(-self.shift, self.shift)
        deviation = input.new_empty(channels).uniform_(1, self.scale)
        means = mean + input.new_empty(samples, channels).uniform_(-self.spread, self.spread)
        scales = deviation + self.spread * torch.randn_like(means)
        shape = (samples, channels, *[1] * (input.dim() - 2))
        return torch.addcmul(means.view(shape), scales.view(shape), input)

    def extra_repr(self) -> str:
        return f"shift={self.shift}, scale={self.scale}, spread={self.spread}"


class _Draws:
    """The state of the random generators, to draw the same numbers any number of times."""

    def __init__(self, model: nn.Module) -> None:
        self._devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gradient(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    wanted: Sequence[str],
    draws: _Draws,
) -> tuple[float, list[Tensor]]:
    """Loss and its gradient with respect to ``wanted``, with these parameters and copies of these buffers."""
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in parameters.items()}
    state = {**leaves, **{name: buffer.clone() for name, buffer in buffers.items()}}
    input, target = batch
    with draws.repeated(), torch.enable_grad():
        loss = loss_fn(torch.func.functional_call(model, state, (input,)), target)
        gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted], materialize_grads=True)
    return loss.item(), list(gradients)


def _norm(tensors: Sequence[Tensor]) -> float:
    """l2 norm of all tensors as one vector, in float64, because float32 overflows if a training diverges."""
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).norm().item()


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return (a.dot(b) / (a.norm() * b.norm())).item()
