"""``explain``: how a batch norm would run, and how many bytes it moves, without running it.

The plan is the one that the backend itself follows: ``csrc/plan.h`` for CUDA, ``csrc/cpu/plan.h`` for the CPU. The CUDA
plan is known for any GPU with known limits; no GPU has to be there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfused import _extension, activations, checks, fake


@dataclass(frozen=True)
class DeviceLimits:
    """What the planner and the estimate know of a GPU.

    Attributes:
        name: the name in reports.
        sm_count: number of streaming multiprocessors.
        compute_capability: ``(9, 0)`` for sm_90.
        bandwidth: of its memory, in bytes per second; None if it is not known.
        shared_per_sm: bytes of shared memory of a multiprocessor; 0 if it is not known. Then nothing is kept there.
    """

    name: str
    sm_count: int
    compute_capability: tuple[int, int]
    bandwidth: float | None
    shared_per_sm: int = 0


# Sources: NVIDIA's data sheets, for the SXM module if there are several; CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
DEVICES = {
    "t4": DeviceLimits("T4", 40, (7, 5), 320e9, 64 * 1024),
    "a100": DeviceLimits("A100 80GB", 108, (8, 0), 2039e9, 164 * 1024),
    "rtx3090": DeviceLimits("GeForce RTX 3090", 82, (8, 6), 936e9, 100 * 1024),
    "l4": DeviceLimits("L4", 58, (8, 9), 300e9, 100 * 1024),
    "rtx4090": DeviceLimits("GeForce RTX 4090", 128, (8, 9), 1008e9, 100 * 1024),
    "h100": DeviceLimits("H100", 132, (9, 0), 3350e9, 228 * 1024),
    "h200": DeviceLimits("H200", 132, (9, 0), 4800e9, 228 * 1024),
    "b200": DeviceLimits("B200", 148, (10, 0), 8000e9, 228 * 1024),
    "rtx5090": DeviceLimits("GeForce RTX 5090", 170, (12, 0), 1792e9, 100 * 1024),
}

# The order of enum class DType in csrc/batch_norm.h.
_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


@dataclass(frozen=True)
class Launch:
    """One kernel: what it does, the number of its blocks, threads per block, and blocks per cluster."""

    kernel: str
    blocks: int
    threads: int
    cluster: int = 1

    def __str__(self) -> str:
        clusters = f", in clusters of {self.cluster}" if self.cluster > 1 else ""
        return f"{self.kernel}: {self.blocks} blocks of {self.threads} threads{clusters}"


@dataclass(frozen=True)
class Pass:
    """Forward or backward.

    Attributes:
        strategy: how the work is cut. For CUDA these are the words of ``csrc/plan.h``; for the CPU ``planes``, ``short
            planes`` or ``rows``.
        launches: in order; empty for the CPU.
        bytes_read, bytes_written: counts tensors of the size of ``x``, and the mask.
        seconds: a lower bound, which is the time for these bytes at the device's bandwidth; None if that is not known.
        why: the reason for the strategy.
    """

    strategy: str
    launches: tuple[Launch, ...]
    bytes_read: int
    bytes_written: int
    seconds: float | None
    why: str


@dataclass(frozen=True)
class Explanation:
    """The result of ``explain``; ``str()`` of it is a report."""

    backend: str
    device: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    call: str
    forward: Pass
    backward: Pass | None
    saved: dict[str, int]

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        lines = [
            f"{self.call} of {shape}, {str(self.dtype).removeprefix('torch.')}, {self.layout}",
            f"backend   {self.backend} on {self.device}",
        ]
        for name, it in (("forward", self.forward), ("backward", self.backward)):
            if it is None:
                continue
            lines.append(f"{name:9s} {it.strategy}: {it.why}")
            lines += [f"          launch {launch}" for launch in it.launches]
            bound = "" if it.seconds is None else f", at least {_time(it.seconds)} at the device's bandwidth"
            lines.append(f"          reads {_size(it.bytes_read)}, writes {_size(it.bytes_written)}{bound}")
        if self.backward is not None:
            kept = ", ".join(f"{name} {_size(count)}" for name, count in self.saved.items())
            lines.append(f"saved     for backward: {kept}")
        return "\n".join(lines)


def explain(
    x: Tensor | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    residual: bool = False,
    activation: str | None = None,
    training: bool = True,
    grad: bool = True,
    device_limits: str | DeviceLimits | None = None,
) -> Explanation:
    """How ``bnfused.functional.batch_norm`` would run on ``x``, how many bytes it would move, and why.

    Args:
        x: the input, or its shape ``(N, C, *)``. The values of a tensor are not read.
        dtype, memory_format: used with a shape; a tensor has its own. The dtype is float32 if None.
        residual: whether one is added.
        activation: a name in ``bnfused.activations.ACTIVATIONS``, or None.
        training: uses the statistics of the batch; otherwise the running statistics.
        grad: whether a backward follows, with gradients of everything.
        device_limits: a GPU in ``DEVICES``, or its limits. The plan is then the CUDA plan for that GPU, on any machine.
            None stands for the device of ``x``; for a shape, for the CPU.

    Raises:
        RuntimeError: the extension, which has the planner, is not loaded; or batch norm does not know the dtype.
        ValueError: the device or the activation is not known, or the shape has fewer than two dimensions.
    """
    if not _extension.is_available():
        raise RuntimeError(f"bnfused.explain needs the extension: {_extension.why_unavailable()}")
    if isinstance(x, Tensor):
        meta = torch.empty_like(x, device="meta")
        device = x.device
    else:
        meta = torch.empty(tuple(x), dtype=dtype or torch.float32, device="meta")
        if memory_format != torch.contiguous_format:
            meta = meta.to(memory_format=memory_format)
        device = torch.device("cpu")
    if meta.dim() < 2:
        raise ValueError(f"bnfused.explain: expected a shape (N, C, *), got {tuple(meta.shape)}")
    checks.check_input(meta)
    code, _ = activations.resolve(activation, None)
    masked = residual and code == activations.RELU_CODE and (training or grad)  # the training op always writes one
    problem = fake.problem(meta)
    limits = _limits(device_limits, device)
    options = {"residual": residual, "masked": masked, "training": training, "recomputes": code != 0 and not masked}
    if limits is None:
        backend, name = "cpu", _cpu_name()
        forward = _cpu_pass(meta, problem, options, backward=False)
        backward = _cpu_pass(meta, problem, options, backward=True) if grad else None
    else:
        backend, name = "cuda", limits.name
        forward = _cuda_pass(meta, problem, options, limits, backward=False)
        backward = _cuda_pass(meta, problem, options, limits, backward=True) if grad else None
    saved = {"x": _bytes(meta), "mean and invstd": 16 * meta.shape[1]}
    if residual and code != 0 and not masked:
        saved["residual"] = _bytes(meta)
    if masked:
        saved["mask"] = fake.mask_bytes(meta)
    call = " + ".join(["batch_norm", *(["add"] if residual else []), *([activation] if activation else [])])
    return Explanation(
        backend=backend,
        device=name,
        shape=tuple(meta.shape),
        dtype=meta.dtype,
        layout="channels innermost" if problem[2] == 1 else "channels outside of planes",
        call=f"{call}, {'training' if training else 'eval'}",
        forward=forward,
        backward=backward,
        saved=saved if grad else {},
    )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _limits(given: str | DeviceLimits | None, device: torch.device) -> DeviceLimits | None:
    if isinstance(given, DeviceLimits):
        return given
    if given is not None:
        if given not in DEVICES:
            raise ValueError(f"bnfused.explain: expected device_limits of {', '.join(DEVICES)}, got {given!r}")
        return DEVICES[given]
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.name,
        properties.multi_processor_count,
        (properties.major, properties.minor),
        _bandwidth_of(properties.name),
        properties.shared_memory_per_multiprocessor,
    )


def _bandwidth_of(name: str) -> float | None:
    """The bandwidth of the GPU of this name, if it is in ``DEVICES``.

    All words of an entry's name have to be there: "NVIDIA H100 80GB HBM3" is not the A100 of 80 GB.
    """
    words = set(name.replace("-", " ").split())
    if words & {"PCIe", "PCIE", "NVL", "Laptop"}:  # slower memory than the modules in DEVICES
        return None
    found = [limits.bandwidth for limits in DEVICES.values() if words.issuperset(limits.name.split())]
    return found[0] if found else None


def _cuda_pass(
    x: Tensor, problem: tuple[int, int, int], options: dict[str, bool], limits: DeviceLimits, *, backward: bool
) -> Pass:
    outer, channels, inner = problem
    major, minor = limits.compute_capability
    if backward:
        op = "backward"
        request = {
            "residual": options["residual"] and options["recomputes"],
            "mask": options["masked"],
            "training": options["training"],
            "grad_residual": options["residual"],
        }
    else:
        op = "train" if options["training"] else "eval"
        request = {"residual": options["residual"], "mask": options["masked"]}
    plan = _extension.plan(
        op=op,
        outer=outer,
        channels=channels,
        inner=inner,
        dtype=_DTYPE_CODES[x.dtype],
        sm_count=limits.sm_count,
        compute_capability=10 * major + minor,
        shared_per_sm=limits.shared_per_sm,
        **request,
    )
    moved = plan["bytes_read"] + plan["bytes_written"]
    return Pass(
        strategy=plan["strategy"],
        launches=tuple(
            Launch(it["kernel"], it["blocks"], it["threads"], it.get("cluster", 1)) for it in plan["launches"]
        ),
        bytes_read=plan["bytes_read"],
        bytes_written=plan["bytes_written"],
        seconds=moved / limits.bandwidth if limits.bandwidth else None,
        why=plan["why"],
    )


def _cpu_pass(x: Tensor, problem: tuple[int, int, int], options: dict[str, bool], *, backward: bool) -> Pass:
    size, mask = _bytes(x), fake.mask_bytes(x) if options["masked"] else 0
    outer, channels, inner = problem
    residual, threads = options["residual"], torch.get_num_threads()
    if backward:
        op, residual_read = "backward", residual and options["recomputes"]
        once = 2 * size + mask + (size if residual_read else 0)
        more, written = 0, size + (size if residual else 0)
    else:
        op, residual_read = "train" if options["training"] else "apply", residual
        once, more, written = size, size if residual else 0, size + mask
    plan = _extension.cpu_plan(
        op=op,
        outer=outer,
        channels=channels,
        inner=inner,
        dtype=_DTYPE_CODES[x.dtype],
        threads=threads,
        residual=residual_read,
        mask=options["masked"],
    )
    read, why = plan["passes"] * once + more, plan["why"]
    if op != "apply" and plan["traversal"] != "rows":
        most = plan["most_group_channels"]
        why = f"{'a channel' if most == 1 else f'a group of up to {most} channels'} at a time: {why}"
    return Pass(
        strategy=plan["traversal"],
        launches=(),
        bytes_read=read,
        bytes_written=written,
        seconds=(read + written) / _cpu_bandwidth(threads),
        why=why,
    )


def _cpu_name() -> str:
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}, {_extension.build_info()['cpu_capability']}"


@functools.cache
def _cpu_bandwidth(threads: int) -> float:
    """Bytes read and written per second by a copy of 64 MiB. ``threads`` is the current number of threads."""
    source = torch.zeros(1 << 24)
    target = torch.empty_like(source).copy_(source)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * _bytes(source) / min(seconds)


def _size(count: int) -> str:
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.3g} {unit}"
    return f"{count} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
