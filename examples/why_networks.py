"""The networks that why_batch_norm.py trains, how each variant normalizes, and the images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnfused
from bnfused import diagnostics
from examples.digits import Digits, load_digits

BATCH_SIZE = 64
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """How a network normalizes. ``norm`` is None, "before" or "after" the activation; noise follows batch norm.

    Weights start with unit gain (He et al., 2015, before ReLU; Glorot & Bengio, 2010, otherwise) and biases with 0, or
    all as ``torch.nn`` has it, from U(-1, 1) / sqrt(fan in), where ``torch_init``.
    """

    name: str
    colour: str
    norm: str | None = None
    noise: bool = False
    torch_init: bool = False


PLAIN = Variant("no batch norm", "C3")
PLAIN_TORCH = Variant("no batch norm, torch's initial weights", "C1", torch_init=True)
BATCH_NORM = Variant("batch norm", "C0", "before")
BATCH_NORM_TORCH = Variant("batch norm, torch's initial weights", "C9", "before", torch_init=True)
AFTER = Variant("batch norm after the activation", "C4", "after")
NOISY = Variant("batch norm, then shifting noise", "C2", "before", noise=True)
VARIANTS = (PLAIN, BATCH_NORM, NOISY, AFTER, PLAIN_TORCH, BATCH_NORM_TORCH)


def normalized(layer: nn.Linear | nn.Conv2d, activation: nn.Module, variant: Variant) -> list[nn.Module]:
    """``layer`` and ``activation`` with batch norm where ``variant`` has it.

    Before the activation is the default of Ioffe & Szegedy, 2015, section 3.2; the bias of the layer is dropped then,
    as batch norm would subtract it.
    """
    if variant.norm is None:
        return [layer, activation]
    norm = bnfused.BatchNorm2d if isinstance(layer, nn.Conv2d) else bnfused.BatchNorm1d
    norms = [norm(layer.weight.shape[0]), *([diagnostics.ShiftingNoise()] if variant.noise else [])]
    if variant.norm == "after":
        return [layer, activation, *norms]
    layer.bias = None
    return [layer, *norms, activation]


def vgg(variant: Variant) -> nn.Sequential:
    """Nine 3x3 convolutions with ReLU, a max pooling after every third (Simonyan & Zisserman, 2015, in small)."""
    modules: list[nn.Module] = []
    channels = 1
    for width in (16, 32, 64):
        for _ in range(3):
            modules += normalized(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), variant)
            channels = width
        modules.append(nn.MaxPool2d(2))
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels, 10))


def mlp(variant: Variant) -> nn.Sequential:
    """Three layers of 100 sigmoids: the network of Ioffe & Szegedy, 2015, section 4.1."""
    modules: list[nn.Module] = [nn.Flatten()]
    inputs = 64
    for _ in range(3):
        modules += normalized(nn.Linear(inputs, 100), nn.Sigmoid(), variant)
        inputs = 100
    return nn.Sequential(*modules, nn.Linear(inputs, 10))


def deep_linear(variant: Variant) -> nn.Sequential:
    """25 linear layers without activations: the second network of Santurkar et al., 2018, section 2.2."""
    modules: list[nn.Module] = [nn.Flatten()]
    for _ in range(24):
        modules += normalized(nn.Linear(64, 64), nn.Identity(), variant)
    return nn.Sequential(*modules, nn.Linear(64, 10))


@dataclass(frozen=True)
class Network:
    """What is trained.

    A trace makes ``trace_steps`` steps and measures at every ``every``-th. A speed run makes at most ``steps``, at each
    of ``rates``.
    """

    key: str
    title: str
    make: Callable[[Variant], nn.Sequential]
    activation: type[nn.Module]
    trace_steps: int
    every: int
    steps: int = 0
    rates: tuple[float, ...] = ()
    full_batch: bool = False


def half_decades(low: int, high: int) -> tuple[float, ...]:
    """1 and 3 times the powers of ten from ``10 ** low`` on; the last is ``10 ** high``."""
    return (*(float(f"{factor}e{exponent}") for exponent in range(low, high) for factor in (1, 3)), 10.0**high)


VGG = Network("vgg", "VGG-like, 9 convolutions, ReLU", vgg, nn.ReLU, 150, 10, 250, half_decades(-3, 1))
MLP = Network("mlp", "MLP, 3 x 100 sigmoids", mlp, nn.Sigmoid, 500, 5, 500, half_decades(-3, 2))
LINEAR = Network("linear", "25 linear layers, full batch", deep_linear, nn.Identity, 100, 20, full_batch=True)
NETWORKS = {network.key: network for network in (VGG, MLP, LINEAR)}


def make_network(network: Network, variant: Variant, seed: int) -> nn.Sequential:
    """The weights depend on ``seed`` and on how they are initialized, and not on where batch norm is."""
    model = network.make(variant)
    layers = [module for module in model if isinstance(module, (nn.Linear, nn.Conv2d))]
    for index, layer in enumerate(layers):
        torch.manual_seed(1000 * seed + index)  # for each layer, as some have no bias to draw
        if variant.torch_init:
            layer.reset_parameters()
            continue
        he = functools.partial(nn.init.kaiming_normal_, nonlinearity="relu")
        (he if network.activation is nn.ReLU else nn.init.xavier_normal_)(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


@functools.cache
def digits() -> Digits:
    """8x8 pixels, of unit variance over the training images, so that unit gain keeps it."""
    data = load_digits(torch.float32, 8)
    deviation = data.train_images.std()
    data.train_images /= deviation
    data.test_images /= deviation
    return data


def batches(network: Network, seed: int, steps: int) -> Iterator[Batch]:
    images, labels = digits().train_images, digits().train_labels
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if network.full_batch:
            yield images, labels
            continue
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        yield images[chosen], labels[chosen]


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The accuracy on the test images, with the running statistics."""
    model.eval()
    right = model(digits().test_images).argmax(1) == digits().test_labels
    model.train()
    return right.double().mean().item()
