"""``torch.ops.bnfused_emulated`` runs the CUDA backend on CPU tensors. Here are its ops and its device's settings."""

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
_forced: str | None = None  # used if settings name no strategy


@dataclass
class Traffic:
    """Bytes moved by accesses of 16 bytes (wide) and by smaller ones (narrow)."""

    wide: int = 0
    narrow: int = 0

    @property
    def bytes(self) -> int:
        return self.wide + self.narrow


@dataclass
class Launch:
    """One kernel that ran, and the bytes that it moved from and to each buffer."""

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
    """Builds and loads the library, which defines the ops."""
    path = build("libbnfused_emulated.so")
    torch.ops.load_library(str(path))
    fake.register("bnfused_emulated")
    lib = ctypes.CDLL(str(path))
    lib.bnfused_emulated_fix_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint]
    lib.bnfused_emulated_take_launches.restype = ctypes.c_char_p
    return lib


@cache
def ops() -> SimpleNamespace:
    """The functions of ``bnfused.ops``, for this backend."""
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
    """Uses this strategy in every call whose settings name none. None restores the planner's choice."""
    global _forced
    _forced = strategy
    configure()


@contextmanager
def settings(**changes: Any) -> Iterator[None]:
    """Calls ``configure(**changes)``, and restores the default settings afterwards."""
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
    """Sets up the emulated device for the calls that follow. The default is a device of sm_90.

    Args:
        order: forward, reverse or random (with ``seed``). With None each call has another schedule.
        resident_blocks: how many blocks are on the device at once.
        compute_capability: below 90 there are no clusters.
        shared_per_sm: bytes of shared memory, which bound what blocks keep on chip.
        sms_taken: how many of the SMs that the planner counts on are not free for cooperative launches and clusters.
        hopes: launches blocks that wait for each other like any others, without clusters, ``resident_blocks`` at once.
        strategy: small, streaming or resident, if the problem allows it; None is the planner's choice.
    """
    lib: Any = library()
    if order is None:
        lib.bnfused_emulated_vary_schedule()
    else:
        lib.bnfused_emulated_fix_schedule(ORDERS[order], seed, resident_blocks)
    lib.bnfused_emulated_device(sm_count, compute_capability, shared_per_sm, sms_taken, hopes)
    strategy = strategy or _forced
    lib.bnfused_emulated_strategy(STRATEGIES[strategy] if strategy else -1)
