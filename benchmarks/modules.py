"""Subjects of bench.py that are modules: one call on a tiny tensor, and a residual block under torch.compile.

On tiny tensors a call costs what Python, the dispatcher, autograd and the allocator cost. A network of many small
layers, or one that runs at batch size 1, pays that for every batch norm.

A compiler fuses torch's batch norm with its neighbours. It fuses nothing into ours, which is one node. So the block is
compiled with torch's batch norm, with ours, and with ours fused with the ReLU and the add. Memory formats matter:
Inductor makes the convolutions of a contiguous network channels_last, and it copies next to an op with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfused
from benchmarks.cases import CALLS, COMPILED, Cell, Configuration
from benchmarks.peers import COMPILE_MODES, OURS, Tensors, gradients


class Calls(Tensors):
    """One module of each implementation, called as a network would call it. They share their weight and bias."""

    # The grad mode is set once for so many calls, so that switching it is not part of the measurement.
    calls = 50

    def __init__(self, configuration: Configuration, device: torch.device, seed: int) -> None:
        super().__init__(configuration, device, seed)
        self.weight, self.bias = nn.Parameter(self.weight.detach()), nn.Parameter(self.bias.detach())
        self.modules = {
            (name, training): self._module(package, training)
            for name, package in (("torch", nn), (OURS, bnfused))
            for training in (True, False)
        }

    def _module(self, package: object, training: bool) -> nn.Module:
        kind = "BatchNorm2d" if self.x.dim() == 4 else "BatchNorm1d"
        module: nn.Module = getattr(package, kind)(len(self.weight), device=self.x.device)
        module.weight, module.bias = self.weight, self.bias
        return module.train(training)

    def forward(self, name: str, training: bool, fusion: str) -> Callable[[], Tensor]:
        module, x, residual = self.modules[name, training], self.x, self.residual

        def unfused() -> Tensor:
            y = module(x)
            if fusion == "add_relu":
                y = y.add_(residual)
            return y if fusion == "plain" else F.relu_(y)

        def fused() -> Tensor:
            if fusion == "plain":
                return module(x)
            if fusion == "relu":
                return module(x, activation="relu")
            return module(x, residual=residual, activation="relu")

        return fused if name == OURS else unfused


class Block(nn.Module):
    """Two convolutions, each with its batch norm; a ReLU between them, an add and a ReLU at the end.

    Without the convolutions, which take most of the block's time, only the rest is left.
    """

    def __init__(self, channels: int, batch_norm: type[nn.Module], fused: bool, convolutions: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) if convolutions else nn.Identity() for _ in range(2)
        )
        self.norms = nn.ModuleList(batch_norm(channels) for _ in range(2))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        (conv1, conv2), (norm1, norm2) = self.convs, self.norms
        if self.fused:
            return norm2(conv2(norm1(conv1(x), activation="relu")), residual=x, activation="relu")
        return F.relu(norm2(conv2(F.relu(norm1(conv1(x))))) + x)


class Blocks(Tensors):
    """A Block of each implementation, all with the same parameters. All are compiled except the peer "torch"."""

    def __init__(self, configuration: Configuration, device: torch.device, seed: int) -> None:
        super().__init__(configuration, device, seed)
        torch.manual_seed(seed)
        self._convolutions = configuration.network == "Block"
        self._first = self._block(nn.BatchNorm2d, False)
        self._blocks: dict[tuple[str, bool, bool], Callable[[Tensor], Tensor]] = {}

    def _block(self, batch_norm: type[nn.Module], fused: bool) -> nn.Module:
        channels_last = self.x.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        block = Block(self.x.shape[1], batch_norm, fused, self._convolutions)
        return block.to(device=self.x.device, memory_format=memory_format)

    def inputs(self, fusion: str) -> list[Tensor]:
        return [self.x, *self._first.parameters()]

    def forward(self, name: str, training: bool, fusion: str) -> Callable[[], Tensor]:
        fused = name == OURS and fusion != "plain"
        key = name, training, fused
        if key not in self._blocks:
            block = self._block(bnfused.BatchNorm2d if name == OURS else nn.BatchNorm2d, fused).train(training)
            for own, first in zip(block.modules(), self._first.modules(), strict=True):
                for parameter_name, parameter in first.named_parameters(recurse=False):
                    setattr(own, parameter_name, parameter)
            mode = COMPILE_MODES.get(name, "default")
            self._blocks[key] = block if name == "torch" else torch.compile(block, fullgraph=True, mode=mode)
        call, x = self._blocks[key], self.x
        return lambda: call(x)


SUBJECTS: dict[str, type[Tensors]] = {CALLS: Calls, COMPILED: Blocks}


def subject_of(configuration: Configuration, device: torch.device, seed: int) -> Tensors:
    """What is timed in a configuration: the op on tensors, or modules on them."""
    return SUBJECTS.get(configuration.family, Tensors)(configuration, device, seed)


def check_same(
    configuration: Configuration, cells: Sequence[Cell], tensors: Tensors, names: Iterable[str] = ("torch",)
) -> None:
    """Compile all blocks, and compare y and the gradients of the peers with bnfused's.

    The gradients of the parameters are compared as one vector, because the gradient of a weight before another batch
    norm is 0 except for rounding. A few of 4e5 values fall to the other side of a ReLU, and each of them moves a
    gradient by 1/600 of its norm.

    Raises:
        ValueError: one is off by more than a twentieth of its norm.
    """
    for pass_name, fusion in sorted({(cell.pass_name, cell.fusion) for cell in cells}):
        ours = _vectors(tensors, OURS, pass_name, fusion)
        for name in names:
            for result, theirs in _vectors(tensors, name, pass_name, fusion).items():
                error = float((ours[result] - theirs).norm() / theirs.norm())
                if not error < 0.05:
                    raise ValueError(
                        f"{configuration.name} {pass_name} {fusion}: bnfused differs from {name} in {result}: "
                        f"by {error:.2g} of its norm"
                    )


def _vectors(tensors: Tensors, name: str, pass_name: str, fusion: str) -> dict[str, Tensor]:
    training = pass_name != "eval"
    with torch.set_grad_enabled(training):
        y = tensors.forward(name, training, fusion)()
    results = {"y": y.detach().reshape(-1)}
    if training:
        grad_x, *others = [grad.reshape(-1) for grad in gradients(tensors, y, fusion, retain=False)]
        results |= {"the gradient of x": grad_x, "the gradients of the parameters": torch.cat(others)}
    return results
