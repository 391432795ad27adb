"""Results, fake clocks and helpers that run scripts, for the tests of the benchmarks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import cases, networks, pictures
from benchmarks.cases import Cell
from benchmarks.results import CellResult, NetworkResult, PeerResult, Run
from benchmarks.timing import Band

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark or an example as a user would, from a folder that is not the checkout's."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def result(ratio: Band | None, peer: str = "torch", pairs: int = 9, **changes: object) -> CellResult:
    fields = {
        "configuration": "8x4x2x2 NCHW float32",
        "shape": (8, 4, 2, 2),
        "layout": "NCHW",
        "dtype": "float32",
        "family": cases.FIRST_32,
        "pass_name": "forward",
        "fusion": "relu",
        "threads": 1,
        "bytes": 1024,
        "ms": Band(0.5, 1.0, 1.5),
        "copy_ms": None,
        "copy_speed": 0.25,
        "peers": {peer: PeerResult(Band(1.0, 2.0, 3.0), ratio, pairs, None)},
    }
    return CellResult(**{**fields, **changes})


ENVIRONMENT = {
    "device": "a CPU",
    "commit": "0123",
    "date": "today",
    "torch": "2",
    "bnfused": "1",
    "bnfused_extension": True,
}


def run_of(*results: CellResult) -> Run[CellResult]:
    return Run(ENVIRONMENT, {"rounds": 9}, list(results), roof={1: 1e10})


class FakeGpu:
    """Stands in for torch.cuda. Each entry of its queue takes a millisecond; events can be read after a synchronize."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.log.append("event")
                self.at = len(gpu.log)

            def elapsed_time(self, end: Event) -> float:
                assert gpu.log[-1] == "synchronize"
                return float(end.at - self.at)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append("head start"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: self.log.append("synchronize"))
        properties = type("Properties", (), {"L2_cache_size": 64})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def every_cell() -> list[Cell]:
    dtypes = tuple(cases.DTYPE_BYTES)
    return [
        cell
        for configuration in cases.cpu_configurations(dtypes, quick=False)
        for threads in (1, 2)
        for cell in configuration.cells(threads)
    ]


NETWORKS = ["--size", "33", "--batch-size", "2", "--rounds", "1", "--threads", "1", "--dtypes", "float32"]


def network_result(**changes: object) -> NetworkResult:
    samples = {"torch": [0.4, 0.8, None], "bnfused": [0.2, 0.2, 0.1]}
    case = networks.Case("ResNet-50", "bfloat16", "channels_last")
    made = networks.network_result(case, 8, 64, samples, {"torch": 200, "bnfused": 150})
    return dataclasses.replace(made, **changes)


def drawn(monkeypatch) -> list:
    """The figures that are saved from now on."""
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    return figures
