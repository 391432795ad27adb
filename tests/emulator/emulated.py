"""``torch.ops.bnfused_emulated``: the CUDA backend on CPU tensors, and the settings of the device that it runs on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from bnfused import _extension, fake
from emulator.build import build

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
STRATEGIES = {"small": 1, "streaming": 2, "resident": 5}  # csrc/plan.h
_forced: str | None = None  # where settings name no strategy


@dataclass
class Traffic:
    """Bytes moved by accesses of 16 bytes, and by smaller ones."""

    wide: int = 0
    narrow: int = 0

    @property
    def bytes(self) -> int:
        return self.wide + self.narrow


@dataclass
class Launch:
    """One kernel that ran, and what it moved of every buffer that it loaded from or stored to."""

    kernel: str
    grid: int
    block: int
    dynamic_shared: int
    static_shared: int
    cluster: int
    read: dict[str, Traffic] = field(default_factory=dict)
    written: dict[str, Traffic] = field(default_factory=dict)


@cache
def library() -> ctypes.CDLL:
    """Builds and loads it; the ops are defined then."""
    path = build("libbnfused_emulated.so")
    torch.ops.load_library(str(path))
    fake.register("bnfused_emulated")
    lib = ctypes.CDLL(str(path))
    lib.bnfused_emulated_fix_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint]
    lib.bnfused_emulated_take_launches.restype = ctypes.c_char_p
    return lib


@cache
def ops() -> SimpleNamespace:
    """What ``bnfused.ops`` has, for this backend."""
    library()
    return SimpleNamespace(**{name: _below_autograd(name) for name in _extension.OPS})


def _below_autograd(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.bnfused_emulated, name).default

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def take_launches() -> list[Launch]:
    """The launches since the last call."""
    launches: list[Launch] = []
    for line in library().bnfused_emulated_take_launches().decode().splitlines():
        kind, name, *rest = line.split()
        numbers = [int(n) for n in rest]
        if kind == "launch":
            launches.append(Launch(name, *numbers))
        else:
            launches[-1].read[name] = Traffic(*numbers[:2])
            launches[-1].written[name] = Traffic(*numbers[2:])
    return launches


def force(strategy: str | None) -> None:
    """This strategy in every call whose settings name none; None is the planner's choice again."""
    global _forced
    _forced = strategy
    configure()


@contextmanager
def settings(**changes: Any) -> Iterator[None]:
    """The emulated device as ``configure(**changes)`` leaves it; the usual one again afterwards."""
    configure(**changes)
    try:
        yield
    finally:
        configure()


def configure(
    *,
    order: str | None = None,
    seed: int = 1,
    resident_blocks: int = 4,
    sm_count: int = 4,
    compute_capability: int = 90,
    shared_per_sm: int = 228 * 1024,
    sms_taken: int = 0,
    hopes: bool = False,
    strategy: str | None = None,
) -> None:
    """The emulated device from here on; without arguments the usual one, of sm_90.

    Args:
        order: forward, reverse or random, with ``seed``; None gives each call another schedule.
        resident_blocks: alive at once.
        compute_capability: below 90 there are no clusters.
        shared_per_sm: bytes; what blocks keep on chip has to fit.
        sms_taken: SMs that the planner counts on, and that cooperative launches and clusters do not get.
        hopes: blocks that wait for each other are launched as any others, ``resident_blocks`` at once, in no cluster.
        strategy: small, streaming or resident, where the problem allows it; None is the planner's choice.
    """
    lib: Any = library()
    if order is None:
        lib.bnfused_emulated_vary_schedule()
    else:
        lib.bnfused_emulated_fix_schedule(ORDERS[order], seed, resident_blocks)
    lib.bnfused_emulated_device(sm_count, compute_capability, shared_per_sm, sms_taken, hopes)
    strategy = strategy or _forced
    lib.bnfused_emulated_strategy(STRATEGIES[strategy] if strategy else -1)
