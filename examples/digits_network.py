"""The residual network that train_digits.py trains, and a timer of its batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfused

WIDTH = 64


class Site(nn.Module):
    """Where a network normalizes: batch norm, the residual if one is given, and a ReLU if the site has one."""

    timer: SiteTimer | None = None  # of the class: one network runs at a time

    def __init__(self, implementation: str, channels: int, relu: bool = True) -> None:
        super().__init__()
        self.fused = implementation == "bnfused"
        self.norm = (bnfused if self.fused else nn).BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.normalize(x, residual) if Site.timer is None else Site.timer.run(self.normalize, x, residual)

    def normalize(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.fused:
            return self.norm(x, residual=residual, activation="relu" if self.relu else None)
        # In place, as in torchvision's networks: less traffic than a new tensor for each.
        y = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return F.relu_(y) if self.relu else y


class Bottleneck(nn.Module):
    """ResNet-50's block: 1x1, 3x3 and 1x1 convolution, each with BN+ReLU, the last with BN+add+ReLU."""

    def __init__(self, implementation: str, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        middle = channels // 4
        self.conv1 = nn.Conv2d(channels_in, middle, 1, bias=False)
        self.site1 = Site(implementation, middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.site2 = Site(implementation, middle)
        self.conv3 = nn.Conv2d(middle, channels, 1, bias=False)
        self.site3 = Site(implementation, channels)
        self.project: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.project = nn.Sequential(convolution, Site(implementation, channels, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.project is None else self.project(x)
        return self.site3(self.conv3(self.site2(self.conv2(self.site1(self.conv1(x))))), identity)


class Network(nn.Module):
    """A residual network for one-channel images: stem, five blocks, average, classifier."""

    def __init__(self, implementation: str, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width // 2, 3, padding=1, bias=False)
        self.site = Site(implementation, width // 2)
        sizes = [width // 2, width, width, 2 * width, 2 * width, 4 * width]
        blocks = zip(sizes, sizes[1:], (1, 1, 2, 1, 2), strict=False)
        self.blocks = nn.Sequential(*(Bottleneck(implementation, *block) for block in blocks))
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.site(self.stem(x))).mean((2, 3)))


class SiteTimer:
    """Adds up the time inside the batch norm sites of one step, forward and backward."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.seconds = 0.0

    def run(self, normalize: Callable[..., Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
        begin = self._now()
        y = normalize(x, residual)
        self.seconds += self._now() - begin
        for node in nodes_between(y, (x, residual)):
            self._watch(node)
        return y

    def _watch(self, node: torch.autograd.graph.Node) -> None:
        def add(sign: int) -> None:
            self.seconds += sign * self._now()

        node.register_prehook(lambda grad_outputs: add(-1))
        node.register_hook(lambda grad_inputs, grad_outputs: add(1))


def nodes_between(y: Tensor, inputs: Sequence[Tensor | None]) -> Iterator[torch.autograd.graph.Node]:
    """The autograd nodes from ``y`` down to ``inputs``, whatever operations lie between."""
    done = [None, *(tensor.grad_fn for tensor in inputs if tensor is not None)]
    pending = [y.grad_fn]
    while pending:
        node = pending.pop()
        if node in done or "AccumulateGrad" in node.name():
            continue
        done.append(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)
