"""A training step of a network as it is and converted: what it is, and whether both do the same."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfused

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Rounding differences of float64, 1e-16, as the network amplifies them: 1e-12 was seen.
TOLERANCE = 1e-9


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss and its gradient for all parameters, as one vector."""
    loss = F.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients)])


def random_batch(size: int, image: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images (size, 3, image, image) and labels of 1000 classes."""
    images = torch.randn(size, 3, image, image, dtype=dtype, device=device)
    return images, torch.randint(0, 1000, (size,), device=device)


def largest_difference(original: nn.Module, size: int) -> float:
    """Relative difference of loss and gradients, converted from original, in float64; both stay as they are."""
    device = next(original.parameters()).device
    original = copy.deepcopy(original).double()
    images, labels = random_batch(4, size, device, torch.float64)
    wanted = gradient(original, images, labels)
    return ((gradient(bnfused.convert(original), images, labels) - wanted).norm() / wanted.norm()).item()


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Forward, backward and one step of SGD; under autocast unless ``dtype`` is float32."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with precision(images.device, dtype):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to ``dtype``; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
