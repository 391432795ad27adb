"""Real processes that form a process group on Gloo, and run the functions that a test sends them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import bnfused

# How long a rank waits for another. It is far more than a loaded machine needs, because only broken code waits so long.
PATIENCE = timedelta(seconds=120)


class Failure:
    """An exception in a rank: the name of its type, its message, and its traceback."""

    def __init__(self, error: BaseException):
        self.type, self.message = type(error).__name__, str(error)
        self.trace = traceback.format_exc()

    def __repr__(self) -> str:
        return self.trace


class Ranks:
    """``world`` processes. Each takes seconds to import torch, so they are spawned once and run many cases."""

    def __init__(self, world: int):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        pipes = [context.Pipe() for _ in range(world)]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def outcomes(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Runs ``function(*arguments[rank])`` on the first ``len(arguments)`` ranks: its result or Failure on each."""
        pipes = self._pipes[: len(arguments)]
        for pipe, of_rank in zip(pipes, arguments, strict=True):
            pipe.send_bytes(pickle.dumps((function, of_rank)))
        results = []
        for rank, pipe in enumerate(pipes):
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except (EOFError, ConnectionResetError):
                self.processes[rank].join()
                results.append(Failure(RuntimeError(f"rank {rank} exited, {self.processes[rank].exitcode}")))
        return results

    def run(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The same, but no rank may fail."""
        results = self.outcomes(function, arguments)
        failures = [f"rank {rank}: {r}" for rank, r in enumerate(results) if isinstance(r, Failure)]
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


_groups: dict[int | str, Any] = {}


def group_of(size: int | str) -> Any:
    """The group of the first ``size`` ranks. ``"2x2"`` is all four as a hierarchy, with two in a node."""
    return _groups[size]


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE)
    for size in range(1, world + 1):
        _groups[size] = dist.new_group(list(range(size)), timeout=PATIENCE)
    if world == 4:
        _groups["2x2"] = bnfused.sync.hierarchy(2, timeout=PATIENCE)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pickle.loads(pipe.recv_bytes())
            try:
                result = function(*arguments)
            except Exception as error:
                result = Failure(error)
            pipe.send_bytes(pickle.dumps(result))
    dist.destroy_process_group()
    # Threads of Gloo and DDP may still hold Python objects. If such a thread asks for the interpreter while that shuts
    # down, it ends in the middle of C++, which calls std::terminate ("terminate called without an active exception").
    os._exit(0)
