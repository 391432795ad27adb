"""Train a small network on the digits with SyncBatchNorm over all ranks, and in one process with the joint batch.

``torchrun --nproc-per-node 2 benchmarks/train_digits_sync.py``, or ``make demo-sync``. Every rank trains on its share
of each batch, shares being uneven; the first one then trains the same network on whole batches with bnfused's own
BatchNorm2d, compares, and exits non-zero where the two differ.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnfused

# float64, in which the two runs, which sum in another order, part by 3e-15 in 120 steps. In float32 they part within
# 60: one value in a million lands on the other side of a ReLU's kink, and training does the rest.
TOLERANCE = 1e-9


def network(norm: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    block = [[nn.Conv2d(i, o, 3, padding=1, bias=False), norm(o), nn.ReLU()] for i, o in ((1, 16), (16, 32))]
    return nn.Sequential(*block[0], *block[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).double()


def train(net: nn.Module, batches: list[tuple[Tensor, Tensor]], share: slice, scale: float) -> None:
    """SGD; ``scale`` makes the sum of the ranks' losses, as DDP averages their gradients, that of the joint batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for x, target in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[share]), target[share], reduction="sum") / len(x)
        (loss * scale).backward()
        optimizer.step()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float64).unsqueeze(1) / 16
    target = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    size = 64
    batches = [(x[i], target[i]) for i in order.repeat(steps * size // len(x) + 1).split(size)[:steps]]

    # Uneven on purpose: rank r has r + 1 parts of the batch.
    parts = world * (world + 1) // 2
    begin, end = (size * (r * (r + 1) // 2) // parts for r in (rank, rank + 1))
    net = network(bnfused.SyncBatchNorm)
    train(DistributedDataParallel(net), batches, slice(begin, end), world)

    status = 0
    if rank == 0:
        whole = network(bnfused.BatchNorm2d)
        train(whole, batches, slice(None), 1)
        worst = 0.0
        for (name, found), wanted in zip(net.state_dict().items(), whole.state_dict().values(), strict=True):
            error = float((found - wanted).abs().max() / wanted.abs().max())
            worst = max(worst, error)
            print(f"{name:24} {error:.1e}")
        status = int(not worst <= TOLERANCE)
        accuracy = (net.eval()(x).argmax(1) == target).float().mean()
        print(
            f"{world} processes and one with the joint batch, after {steps} steps: parameters and statistics differ by "
            f"{worst:.1e} of the largest value, allowed {TOLERANCE:.0e}; accuracy {accuracy:.1%}"
        )
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
