"""The collectives of SyncBatchNorm: process groups, gathers and sums, and what the ranks compare before the first one.

They run on any backend of torch.distributed; Gloo with CPU tensors is one of them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnfused import checks

# torch 2.13 renamed it, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Two process groups that make up a larger one, for one collective in ``inner`` and then one in ``outer``.

    SyncBatchNorm takes it in place of a process group. ``inner`` has the processes of a node, and ``outer`` the
    processes that have the same place in each node. Fewer messages and bytes cross the network that way (docs/sync.md
    says when it pays).
    """

    inner: Any
    outer: Any


def hierarchy(size: int, timeout: timedelta | None = None) -> Hierarchy:
    """Make groups of ``size`` consecutive ranks, and the groups across them. Every process has to call this.

    Args:
        size: usually the number of processes of a node, which is torchrun's ``LOCAL_WORLD_SIZE``.
        timeout: as for ``torch.distributed.new_group``.

    Returns:
        The two groups that this process is in.

    Raises:
        ValueError: ``size`` does not divide the number of processes. Every process raises, before it makes a group.
    """
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise ValueError(f"hierarchy: expected a size that divides {world} processes, got {size}")
    ranks = list(range(world))
    nodes, places = [ranks[i : i + size] for i in range(0, world, size)], [ranks[i::size] for i in range(size)]
    inner, _ = dist.new_subgroups_by_enumeration(nodes, timeout=timeout)
    outer, _ = dist.new_subgroups_by_enumeration(places, timeout=timeout)
    return Hierarchy(inner, outer)


def group_to_sync(group: Any) -> Any:
    """The process group, where None means all processes; None if this process is alone in it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if any(dist.get_world_size(level) > 1 for level in levels(group)) else None


def levels(group: Any) -> tuple[Any, ...]:
    return (group.inner, group.outer) if isinstance(group, Hierarchy) else (group,)


def gather(values: Tensor, group: Any) -> Tensor:
    """The 1-d ``values`` of every rank, ``(world, *)``."""
    gathered = values.new_empty(dist.get_world_size(group) * values.numel())
    with _named("all_gather", values, group):
        _all_gather(gathered, values, group=group)
    return gathered.view(-1, values.numel())


def all_reduce(values: Tensor, group: Any) -> Tensor:
    """The sum of ``values``, which it may overwrite, over all ranks."""
    return start_all_reduce(values, group)()


def start_all_reduce(values: Tensor, group: Any) -> Callable[[], Tensor]:
    """Start ``all_reduce``; the function that is returned waits for it, and returns its result."""
    first, *others = levels(group)
    if torch.compiler.is_compiling():  # two nodes of the graph, start and wait; dist.all_reduce would become one node
        started = torch.ops._c10d_functional.all_reduce(values, "sum", first.group_name)
    else:
        with _named("all_reduce", values, first):
            work = dist.all_reduce(values, group=first, async_op=True)

    def finish() -> Tensor:
        if torch.compiler.is_compiling():
            total = torch.ops._c10d_functional.wait_tensor(started)
        else:
            with _named("all_reduce", values, first):
                work.wait()
            total = values
        for level in others:
            with _named("all_reduce", total, level):
                dist.all_reduce(total, group=level)
        return total

    return finish


@contextlib.contextmanager
def _named(name: str, values: Tensor, group: Any) -> Iterator[None]:
    """Name the collective of ``values``, the rank and the group in the error of a collective that fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"SyncBatchNorm: {name} of {list(values.shape)} {values.dtype} failed on rank {dist.get_rank()}, in a "
            f"group of {dist.get_world_size(group)}: {error}"
        ) from error


# The group in which each module was compared. It is the object and not its name, because a group that is destroyed and
# made again has the same name.
_compared: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def compare_ranks_once(module: nn.Module, input: Tensor, group: Any) -> None:
    """Compare the properties that have to agree between ranks, the first time that ``module`` is called in ``group``.

    A copy of the module is compared again. A mark on the module itself would be copied with it, and might reach some
    ranks only.

    Raises:
        RuntimeError: a property differs. Every rank raises, and lists the ranks and the value of each.
    """
    known = _compared.get(module)
    if known is not None and known() is group:
        return
    checks.check_input(input)
    ours = [input.shape[1], checks.DTYPES.index(input.dtype), torch.is_grad_enabled() and input.requires_grad]
    values = torch.tensor([*ours, dist.get_rank()], dtype=torch.int64, device=input.device)
    for level in levels(group):
        values = gather(values, level).flatten()
    found = values.view(-1, len(ours) + 1).tolist()
    # How each number that was sent is shown.
    names: dict[str, Callable[[int], Any]] = {
        "number of channels": int,
        "dtype": checks.DTYPES.__getitem__,
        "requires_grad": bool,
    }
    for i, (what, name) in enumerate(names.items()):
        if any(of_rank[i] != found[0][i] for of_rank in found):
            listed = ", ".join(f"{name(of_rank[i])} on rank {of_rank[-1]}" for of_rank in found)
            raise RuntimeError(f"SyncBatchNorm: expected the same {what} of input on every rank, got {listed}")
    _compared[module] = weakref.ref(group)
