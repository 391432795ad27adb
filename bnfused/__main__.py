"""``python -m bnfused``: what is installed here, what it was built with, and whether it computes the right thing.

``python -m bnfused explain 32 64 56 56 --device-limits h100`` says how a batch norm of that shape would run.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time

import torch

import bnfused
from bnfused import _extension, activations, explanation

SHAPE = (16, 32, 28, 28)
# Float32 arithmetic around a float64 oracle, relative to the largest value: the bound of docs and tests.
TOLERANCE = 5e-6


def describe() -> list[tuple[str, str]]:
    """What a bug report needs to say, as (name, value)."""
    rows = [
        ("bnfused", bnfused.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("machine", f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads"),
    ]
    if torch.cuda.is_available():
        rows += [(f"cuda:{i}", describe_gpu(i)) for i in range(torch.cuda.device_count())]
    if bnfused.is_available():
        rows += [(f"built: {name}", str(value)) for name, value in bnfused.build_info().items()]
    else:
        rows.append(("extension", f"not loaded: {bnfused.why_unavailable()}"))
    return rows


def describe_gpu(index: int) -> str:
    """Name and compute capability, and whether the extension has kernels for it."""
    capability = torch.cuda.get_device_capability(index)
    archs = bnfused.build_info().get("cuda_archs", ())
    kernels = "" if _extension.runs_on(archs, capability) else ", NO KERNELS for it in this build"
    return f"{torch.cuda.get_device_name(index)}, {capability[0]}.{capability[1]}{kernels}"


def self_test(device: str) -> list[tuple[str, float]]:
    """Largest relative error of a fused training step (residual, ReLU) on ``device`` against float64, per layout."""
    torch.manual_seed(0)
    errors = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x, residual, grad = (torch.randn(SHAPE).to(device, memory_format=layout) for _ in range(3))
        results = []
        for dtype in (torch.float32, torch.float64):
            module = bnfused.BatchNorm2d(SHAPE[1], dtype=dtype, device=device)
            leaf = x.detach().to(dtype, copy=True).requires_grad_()
            if dtype == torch.float32:
                y = module(leaf, residual, "relu")
            else:
                y = torch.relu(torch.nn.BatchNorm2d.forward(module, leaf) + residual.double())
            y.backward(grad.to(dtype))
            assert leaf.grad is not None and module.running_var is not None
            results.append((y.detach(), leaf.grad, module.running_var))
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
        errors.append((str(layout).removeprefix("torch."), worst))
    return errors


def check() -> int:
    """Print what is here and the self-test of each device; the exit status, 1 if a result or the extension fails."""
    for name, value in describe():
        print(f"{name:22s} {value}")
    start = time.perf_counter()
    failed = False
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        has_kernels = _extension.has_cuda() if device == "cuda" else bnfused.is_available()
        backend = f"{device} kernels" if has_kernels else f"reference path on {device}"
        for layout, error in self_test(device):
            failed |= not error <= TOLERANCE
            print(f"self-test {layout:18s} largest error {error:.1e} of {TOLERANCE:.0e} allowed ({backend})")
    if not bnfused.is_available():
        print("FAILED: the extension is not loaded, so the slow reference path ran")
        return 1
    print(f"{'FAILED' if failed else 'ok'} in {time.perf_counter() - start:.2f} s")
    return int(failed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bnfused", description="Without a command: the environment, the build and a self-test."
    )
    commands = parser.add_subparsers(dest="command")
    explain = commands.add_parser("explain", help="how a batch norm would run, and what it would move")
    explain.add_argument("shape", type=int, nargs="+", help="N C and what follows")
    explain.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    explain.add_argument("--channels-last", action="store_true")
    explain.add_argument("--residual", action="store_true")
    explain.add_argument("--activation", choices=tuple(activations.ACTIVATIONS))
    explain.add_argument("--eval", action="store_true", help="running statistics, and no backward")
    explain.add_argument(
        "--device-limits", choices=tuple(explanation.DEVICES), help="a GPU, which need not be here; else the CPU"
    )
    options = parser.parse_args(arguments)
    if options.command is None:
        return check()
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if options.channels_last and len(options.shape) not in channels_last:
        parser.error("--channels-last is for shapes of 4 and 5 dimensions")
    try:
        report = bnfused.explain(
            options.shape,
            dtype=getattr(torch, options.dtype),
            memory_format=channels_last[len(options.shape)] if options.channels_last else torch.contiguous_format,
            residual=options.residual,
            activation=options.activation,
            training=not options.eval,
            grad=not options.eval,
            device_limits=options.device_limits,
        )
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
