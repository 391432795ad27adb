"""What is timed: the same function by bnfused and by its peers, on the same buffers, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import bnfused
from benchmarks.cases import WITHOUT_GRAD, Cell, Configuration

OURS = "bnfused"
# torch: eager torch, its own kernels on a GPU too. The last two are modes of torch.compile.
PEERS = ("torch", "cuDNN", "compile", "max-autotune")
# max-autotune by itself also makes CUDA graphs, whose copies of the inputs would be timed with it.
COMPILE_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
# A compiled backward may reuse the memory of what was saved for it, and so runs once only.
COMPILED_PASSES = ("forward", "forward+backward", "eval")
MOMENTUM, EPS = 0.1, 1e-5
# Relative difference of outputs and gradients (sum of |a-b| over sum of |b|) above which a timing would be of two
# different functions. 16-bit outputs round after every unfused step, float32 sums differ in order.
AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}


class Tensors:
    """The buffers of one configuration, shared by everything that is timed on it, and the op on them."""

    # So many calls make one call of a timed function.
    calls = 1

    def __init__(self, configuration: Configuration, device: torch.device, seed: int) -> None:
        # On the device: a CPU takes seconds for what a GPU fills in a millisecond.
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, configuration.dtype)
        shape = configuration.shape

        def normal(shape: tuple[int, ...], layout: str) -> Tensor:
            return to_layout(torch.randn(shape, generator=generator, device=device).to(dtype), layout)

        self.x = normal(shape, configuration.layout).requires_grad_()
        self.residual = normal(shape, configuration.layout).requires_grad_()
        if configuration.grad_y == "expanded":
            self.grad_y = torch.ones((), device=device, dtype=dtype).expand(shape)
        else:
            same = configuration.grad_y == "like x"
            self.grad_y = normal(shape, configuration.layout if same else configuration.grad_y)
        self.copy = torch.empty_like(self.x, requires_grad=False)
        channels = shape[1]
        self.weight = (torch.rand(channels, generator=generator, device=device) + 0.5).requires_grad_()
        self.bias = torch.randn(channels, generator=generator, device=device).requires_grad_()
        self.statistics = {
            name: (torch.zeros(channels, device=device), torch.ones(channels, device=device)) for name in (OURS, *PEERS)
        }
        # What torch.compile has made for them, by peer, mode and fusion: every pass that it is timed in runs the same.
        self.compiled: dict[tuple[str, bool, str], Callable[..., Tensor]] = {}

    def inputs(self, fusion: str) -> list[Tensor]:
        """What the forward reads and has a gradient."""
        return [self.x, self.weight, self.bias, *([self.residual] if fusion == "add_relu" else [])]

    def forward(self, name: str, training: bool, fusion: str) -> Callable[[], Tensor]:
        """A call of bnfused or a peer. Whether a graph is built is up to the grad mode."""
        if name in COMPILE_MODES:
            return compiled(name, self, training, fusion)
        return lambda: batch_norm(name, self, self.x, training, fusion)


def to_layout(tensor: Tensor, layout: str) -> Tensor:
    """``tensor`` with the strides that ``layout`` names."""
    if layout in ("channels_last", "channels_last_3d"):
        return tensor.contiguous(memory_format=getattr(torch, layout))
    if layout == "NLC view":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def batch_norm(name: str, tensors: Tensors, x: Tensor, training: bool, fusion: str) -> Tensor:
    """The function under test, as a network would call it eagerly.

    The unfused peer adds and clips in place: autograd allows it here (batch norm does not save its output), it is what
    torchvision's networks do, and it is the faster way.
    """
    mean, var = tensors.statistics[name]
    affine = tensors.weight, tensors.bias
    if name == OURS:
        residual = tensors.residual if fusion == "add_relu" else None
        fused = {"residual": residual, "activation": None if fusion == "plain" else "relu"}
        return bnfused.functional.batch_norm(x, mean, var, *affine, training, MOMENTUM, EPS, **fused)
    if x.is_cuda:
        # torch's choice between its kernels and cuDNN is a switch of the process. It is set by a call, not by
        # assignment, which torch.testing forbids for the rest of a process that has imported it.
        torch.backends.cudnn.set_flags(_enabled=name == "cuDNN")
    y = F.batch_norm(x, mean, var, *affine, training, MOMENTUM, EPS)
    if fusion == "add_relu":
        y = y.add_(tensors.residual)
    return y if fusion == "plain" else F.relu_(y)


def takes_cudnn(tensors: Tensors) -> bool:
    """Whether torch gives this tensor to cuDNN where it may: not every dtype, layout and version."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if not tensors.x.is_cuda or select is None:
        return False
    torch.backends.cudnn.set_flags(_enabled=True)
    chosen = select(tensors.x, tensors.weight, tensors.bias, *tensors.statistics["cuDNN"], True, EPS)
    return bool(chosen == torch._C._BatchNormBackend.Cudnn)


def compiled(name: str, tensors: Tensors, training: bool, fusion: str) -> Callable[[], Tensor]:
    """The unfused forward, given to torch.compile: it fuses the add and the ReLU itself."""
    mean, var = tensors.statistics[name]
    if tensors.x.is_cuda:
        torch.backends.cudnn.set_flags(_enabled=True)  # as users have it: it decides what is traced

    def forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS)
        if fusion == "add_relu":
            y = y + residual
        return y if fusion == "plain" else F.relu(y)

    key = name, training, fusion
    if key not in tensors.compiled:
        tensors.compiled[key] = torch.compile(forward, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name])
    return lambda: tensors.compiled[key](tensors.x, tensors.residual, tensors.weight, tensors.bias)


def gradients(tensors: Tensors, y: Tensor, fusion: str, retain: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, tensors.inputs(fusion), tensors.grad_y, retain_graph=retain)


def make_function(name: str, pass_name: str, fusion: str, tensors: Tensors) -> Callable[[], object]:
    """What is timed of bnfused or a peer in one cell. Outputs are allocated and freed inside, as in training."""
    forward = tensors.forward(name, pass_name != "eval", fusion)
    inputs, grad_y = tensors.inputs(fusion), tensors.grad_y
    one: Callable[[], object] = forward
    if pass_name == "backward":
        y = forward()
        one = lambda: torch.autograd.grad(y, inputs, grad_y, retain_graph=True)  # noqa: E731
    elif pass_name == "forward+backward":
        one = lambda: torch.autograd.grad(forward(), inputs, grad_y)  # noqa: E731
    elif pass_name not in ("forward", *WITHOUT_GRAD):
        raise ValueError(f"make_function: expected a pass other than {pass_name!r}")
    with_grad = pass_name not in WITHOUT_GRAD
    if with_grad and tensors.calls == 1:
        return one
    calls = range(tensors.calls)

    def run() -> None:
        with torch.set_grad_enabled(with_grad):
            for _ in calls:
                one()

    return run


def make_chain(name: str | None, fusion: str, tensors: Tensors) -> Callable[[], object]:
    """Producer writes x, batch norm reads it and writes y, consumer reads y.

    ``name`` None stands for the chain without batch norm: the consumer reads x.
    """
    source, x, sink = tensors.residual.detach(), tensors.x.detach(), tensors.copy

    def chain() -> None:
        with torch.no_grad():
            torch.mul(source, 1.0001, out=x)
            y = x if name is None else batch_norm(name, tensors, x, True, fusion)
            torch.mul(y, 1.0001, out=sink)

    return chain


def check_agreement(
    configuration: Configuration, cells: Sequence[Cell], tensors: Tensors, names: Iterable[str] = ("torch",)
) -> None:
    """Raise ValueError where a peer's results differ from bnfused's: the times would be of different functions."""
    for pass_name, fusion in sorted({(cell.pass_name, cell.fusion) for cell in cells}):
        outputs = {}
        for name in (OURS, *names):
            y = tensors.forward(name, pass_name != "eval", fusion)()
            backward = pass_name in ("backward", "forward+backward")
            grads = gradients(tensors, y, fusion, retain=False) if backward else ()
            outputs[name] = (y.detach(), *grads)
        results = ("y", "grad_x", "grad_weight", "grad_bias", "grad_residual")
        for name in names:
            for result, theirs, ours in zip(results, outputs[name], outputs[OURS], strict=False):
                # A gradient can be zero up to rounding (grad_x of a constant grad_y), hence the least scale;
                # grad_weight and grad_bias sum that rounding over the rows.
                rows = tensors.x.numel() // max(theirs.numel(), 1)
                scale = max(theirs.double().abs().mean().item(), 1e-2 * rows)
                difference = (ours.double() - theirs.double()).abs().mean().item()
                if not difference <= AGREEMENT[configuration.dtype] * scale:
                    raise ValueError(
                        f"{configuration.name} {pass_name} {fusion}: {result} of {name} and bnfused "
                        f"differ: mean |difference| {difference:.3g}, scale {scale:.3g}"
                    )
