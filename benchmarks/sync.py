"""What synchronized batch norm costs a step (time, collectives, bytes), and whether it computes what one process does.

``torchrun --nproc-per-node 2 benchmarks/sync.py`` runs on CPUs with Gloo and on GPUs with NCCL. It compares
SyncBatchNorm with a batch norm without other processes, with SyncBatchNorm in a hierarchy (``--hierarchy K``), and on
GPUs with torch's SyncBatchNorm, which does not run on a CPU. It exits non-zero if a result differs from that of
``torch.nn`` on the joint batch in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bnfused
from benchmarks.environment import describe_environment

# The shapes of a rank's batch.
SHAPES = ((8, 64, 56, 56), (8, 256, 28, 28), (8, 2048, 7, 7), (2, 512, 14, 14))
# float32 results of sums of up to 10^5 values, accumulated in float64: some roundings of y and grad_x, both about 1.
TOLERANCE = 1e-5


class Collectives(TorchDispatchMode):
    """Counts the collectives within, and the bytes that this rank hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            self.calls.append(name)
            sent = args[1] if "gather" in name else args[0]
            tensors = sent if isinstance(sent, (list, tuple)) else [sent]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def step(module: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(grad_y)
    assert x.grad is not None
    return y.detach(), x.grad


def batch_of(shape: tuple[int, ...], rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and grad_y of a rank, which any rank can draw. The mean is another one on each rank."""
    generator = torch.Generator().manual_seed(rank)
    x, grad_y = torch.randn(shape, generator=generator) + rank, torch.randn(shape, generator=generator)
    return x.to(device), grad_y.to(device)


def error(module: nn.Module, shape: tuple[int, ...], device: torch.device) -> float:
    """How far y and grad_x are from ``torch.nn`` on the joint batch in float64, in units of their largest value."""
    rank, world = dist.get_rank(), dist.get_world_size()
    joint = [
        torch.cat(parts).double() for parts in zip(*(batch_of(shape, r, device) for r in range(world)), strict=True)
    ]
    # In two dimensions: of torch's modules, that one takes any number of values.
    flat = [t.transpose(1, -1).reshape(-1, shape[1]) for t in (t.flatten(2) for t in joint)]
    wanted = step(nn.BatchNorm1d(shape[1], dtype=torch.float64, device=device), *flat)
    worst = 0.0
    for actual, whole in zip(step(module, *batch_of(shape, rank, device)), wanted, strict=True):
        own = whole.view(world, -1, shape[1])[rank]
        found = actual.flatten(2).transpose(1, -1).reshape(-1, shape[1])
        worst = max(worst, float((found - own).abs().max() / own.abs().max()))
    return worst


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], metavar="8x64x56x56")
    parser.add_argument("--hierarchy", type=int, help="also in a hierarchy of so many ranks in a node")
    parser.add_argument("--json", help="a file for all times, of rank 0")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    kinds: dict[str, Any] = {"alone": bnfused.BatchNorm2d, "SyncBatchNorm": bnfused.SyncBatchNorm}
    if args.hierarchy:
        levels = bnfused.sync.hierarchy(args.hierarchy)
        kinds["in a hierarchy"] = lambda c: bnfused.SyncBatchNorm(c, process_group=levels)
    if on_gpu:
        kinds["torch's"] = nn.SyncBatchNorm

    if rank == 0:
        print(f"{world} ranks, {dist.get_backend()}, torch {torch.__version__}; forward and backward, float32")
        print(f"{'shape of a rank':>16} {'':16} {'ms':>8} {'25-75 %':>14} {'calls':>5} {'bytes':>7} {'error':>8}")
    results, status = [], 0
    shuffled = random.Random(0)  # the same order on every rank
    for text in args.shapes:
        shape = tuple(map(int, text.split("x")))
        modules = {name: make(shape[1]).to(device) for name, make in kinds.items()}
        worst = {name: error(module, shape, device) for name, module in modules.items() if name != "alone"}
        x, grad_y = batch_of(shape, rank, device)
        counted, times = {}, {name: [] for name in modules}
        for name, module in modules.items():
            with Collectives() as counted[name]:
                step(module, x, grad_y)
        for _ in range(args.steps):
            for name in shuffled.sample(list(modules), len(modules)):
                dist.barrier()
                synchronize(device)
                begin = time.perf_counter()
                step(modules[name], x, grad_y)
                synchronize(device)
                slowest = torch.tensor(time.perf_counter() - begin, device=device)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                times[name].append(float(slowest))
        for name, samples in times.items():
            low, middle, high = statistics.quantiles(samples, n=4)
            calls, size = len(counted[name].calls), counted[name].bytes
            failed = torch.tensor(float(worst.get(name, 0.0) > TOLERANCE), device=device)
            dist.all_reduce(failed)
            status |= int(failed > 0)
            if rank == 0:
                error_text = f"{worst[name]:8.0e}" if name in worst else ""
                print(
                    f"{text:>16} {name:16} {middle * 1e3:8.3f} {low * 1e3:6.3f}-{high * 1e3:<7.3f} {calls:5} {size:7} "
                    f"{error_text}"
                )
            results.append({"shape": shape, "module": name, "seconds": samples, "calls": calls, "bytes": size})
    if rank == 0 and args.json:
        run = {"ranks": world, "backend": dist.get_backend(), "threads": torch.get_num_threads(), "cells": results}
        text = json.dumps({"environment": describe_environment(device), **run})  # before the file is there
        Path(args.json).write_text(text + "\n")
    dist.barrier()
    dist.destroy_process_group()
    if status and rank == 0:
        print(f"results differ from those of one process by more than {TOLERANCE:.0e}")
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of Gloo must not meet an interpreter that shuts down
