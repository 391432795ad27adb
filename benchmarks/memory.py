"""What a graph keeps for the backward, in bytes: the storages of its saved tensors, each counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Saved(NamedTuple):
    """Bytes that live until the backward: those of the inputs, those of the output, and all others.

    Inputs and output are often alive anyway, because the neighbouring layers keep them too; the rest never is.
    """

    inputs: int
    output: int
    other: int

    @property
    def total(self) -> int:
        return sum(self)


def saved_for_backward(forward: Callable[[], Tensor], inputs: Iterable[Tensor] = ()) -> Saved:
    """The memory that ``forward`` leaves in its graph when it ends, which is when a layer keeps the most.

    A tensor's whole storage counts, even if only a part of it is used, because the whole stays allocated.
    """
    storages: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is given out twice

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage

    # Nothing is unpacked: the graph is dropped without a backward.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
        y = forward()
    sizes = {address: storage.nbytes() for address, storage in storages.items()}
    of_output = sizes.pop(y.untyped_storage().data_ptr(), 0)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    of_inputs = sum(size for address, size in sizes.items() if address in addresses)
    return Saved(of_inputs, of_output, sum(sizes.values()) - of_inputs)
