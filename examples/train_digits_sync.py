"""Train a small network on the digits with SyncBatchNorm over all ranks, and in one process with the joint batch.

``torchrun --nproc-per-node 2 examples/train_digits_sync.py``, or ``make demo-sync``. Every rank trains on its share
of each batch, shares being uneven; the first one then trains the same network on whole batches with bnfused's own
BatchNorm2d, compares, and exits non-zero where the two differ.

Sums in another order round differently, and training amplifies that: a value next to a ReLU's kink lands on its other
side. A third training shows by how much. It runs in one process too, but starts with one weight changed by one
rounding. In float32 it drifts from the first one as far as the run on several processes does.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnfused

# After how many steps the trainings are compared, and the largest difference that is allowed, relative to the largest
# value of each parameter and statistic. A step rounds a few times, by 1e-16 or by 6e-8; float32 is compared before it
# has drifted.
ALLOWED = {torch.float64: (120, 1e-9), torch.float32: (10, 1e-5)}
SHOWN = (1, 4, 10, 30, 60, 120)


def network(norm: type[nn.Module], dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    block = [[nn.Conv2d(i, o, 3, padding=1, bias=False), norm(o), nn.ReLU()] for i, o in ((1, 16), (16, 32))]
    return nn.Sequential(*block[0], *block[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).to(dtype)


def train(
    net: nn.Module, batches: list[tuple[Tensor, Tensor]], share: slice = slice(None), scale: float = 1.0
) -> dict[int, dict[str, Tensor]]:
    """SGD; the state after each number of steps that is shown.

    ``scale`` makes the sum of the ranks' losses, as DDP averages their gradients, that of the joint batch.
    """
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    states = {}
    for i, (x, target) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[share]), target[share], reduction="sum") / len(x)
        (loss * scale).backward()
        optimizer.step()
        if i in SHOWN:
            states[i] = {name: t.clone() for name, t in net.state_dict().items()}
    return states


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    pairs = zip(found.values(), wanted.values(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = load_digits()
    images = torch.tensor(data.images).unsqueeze(1) / 16
    target = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    size, steps = 64, SHOWN[-1]
    indices = order.repeat(steps * size // len(order) + 1).split(size)[:steps]

    # Uneven on purpose: rank r has r + 1 parts of the batch.
    parts = world * (world + 1) // 2
    begin, end = (size * (r * (r + 1) // 2) // parts for r in (rank, rank + 1))
    status = 0
    if rank == 0:
        print(f"{world} processes, against one with the joint batch: largest difference of parameters and statistics")
    for dtype, (step, allowed) in ALLOWED.items():
        x = images.to(dtype)
        batches = [(x[i], target[i]) for i in indices]
        net = network(bnfused.SyncBatchNorm, dtype)
        found = train(DistributedDataParallel(net), batches, slice(begin, end), world)
        if rank > 0:
            continue
        found = {n: {k.removeprefix("module."): t for k, t in state.items()} for n, state in found.items()}
        wanted = train(network(bnfused.BatchNorm2d, dtype), batches)
        changed = network(bnfused.BatchNorm2d, dtype)
        with torch.no_grad():
            weight = changed[0].weight[0, 0, 0, :1]
            weight.copy_(torch.nextafter(weight, torch.ones_like(weight)))
        rounded = train(changed, batches)
        print(f"\n{str(dtype).removeprefix('torch.'):24}" + "".join(f"{f'step {n}':>10}" for n in SHOWN))
        for name, states in ((f"{world} processes", found), ("one, one weight rounded", rounded)):
            print(f"{name:24}" + "".join(f"{difference(states[n], wanted[n]):10.0e}" for n in SHOWN))
        worst = difference(found[step], wanted[step])
        status |= int(not worst <= allowed)
        accuracy = (net.eval()(x).argmax(1) == target).float().mean()
        print(f"after {step} steps {worst:.1e}, allowed {allowed:.0e}; accuracy after {steps} {accuracy:.1%}")
    dist.barrier()
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of Gloo must not meet an interpreter that shuts down
