"""What a run of a benchmark gives, and its file in JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.cases import DTYPE_BYTES, Cell
from benchmarks.memory import Saved
from benchmarks.peers import OURS
from benchmarks.timing import COPY, Band

FORMAT = 2


@dataclass(frozen=True)
class PeerResult:
    """A peer in one cell. ``ratio`` is its time over bnfused's in ``pairs`` rounds: above 1, bnfused is faster."""

    ms: Band | None
    ratio: Band | None
    pairs: int
    copy_speed: float | None


@dataclass(frozen=True)
class CellResult:
    """One cell. Bands are (lower quartile, median, upper quartile); None stands where no sample counted.

    ``bytes`` is the least traffic, and ``copy_speed`` the bandwidth reached with it over that of a copy of the same
    tensor in the same rounds. ``ms`` and ``copy_speed`` are bnfused's. A chain's times are net of producer and
    consumer. ``saved`` is what the graph of a forward keeps, by implementation.
    """

    configuration: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    family: str
    pass_name: str
    fusion: str
    threads: int
    bytes: int
    ms: Band | None
    copy_ms: Band | None
    copy_speed: float | None
    peers: dict[str, PeerResult]
    saved: dict[str, Saved] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        return Cell(self.configuration, self.family, self.pass_name, self.fusion, self.threads)

    def ratio(self, peer: str) -> Band | None:
        return self.peers[peer].ratio if peer in self.peers else None

    def speed(self, name: str) -> float | None:
        """The bandwidth of bnfused or of a peer, relative to that of a copy."""
        if name == OURS:
            return self.copy_speed
        return self.peers[name].copy_speed if name in self.peers else None

    def bandwidth(self, name: str) -> float | None:
        """Bytes per second of bnfused, of a peer, or of "copy", counting the least traffic. None where that is 0."""
        if name == COPY:
            activation = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
            return None if self.copy_ms is None else 2 * activation / (1e-3 * self.copy_ms.median)
        ms = self.ms if name == OURS else self.peers[name].ms if name in self.peers else None
        return None if ms is None or ms.median <= 0 or not self.bytes else self.bytes / (1e-3 * ms.median)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CellResult:
        peers = {
            name: PeerResult(_band(peer["ms"]), _band(peer["ratio"]), peer["pairs"], peer["copy_speed"])
            for name, peer in row["peers"].items()
        }
        saved = {name: Saved(*value) for name, value in row["saved"].items()}
        bands = {name: _band(row[name]) for name in ("ms", "copy_ms")}
        return cls(**{**row, **bands, "shape": tuple(row["shape"]), "peers": peers, "saved": saved})


def _band(value: Sequence[float] | None) -> Band | None:
    return None if value is None else Band(*value)


@dataclass(frozen=True)
class NetworkResult:
    """Both implementations in one case; ``memory`` in bytes. ``ratio`` is torch's time of a step over bnfused's."""

    network: str
    dtype: str
    layout: str
    batch: int
    size: int
    ms: dict[str, Band | None]
    images_per_second: dict[str, float | None]
    ratio: Band | None
    pairs: int
    memory: dict[str, int]


Result = TypeVar("Result")


@dataclass
class Run(Generic[Result]):
    """One run of a benchmark: where, how, and what came out.

    ``roof`` is the bandwidth of a copy that no cache holds, bytes per second by number of threads. ``failed`` has a
    message for each measurement that raised an error or whose results were wrong, ``not_measured`` the names of those
    that the time, or the user, did not suffice for.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    roof: dict[int, float | None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_status(self) -> int:
        if self.failed:
            return 1
        return 130 if self.interrupted else 0 if self.results else 1

    def to_json(self) -> str:
        """A line for each result, and for each fact about the run."""
        whole = {"format": FORMAT, **dataclasses.asdict(self)}
        lines = ",\n".join(json.dumps(row) for row in whole.pop("results"))
        return json.dumps(whole, indent=1)[:-2] + f',\n "results": [\n{lines}\n ]\n}}\n'

    def write(self, path: Path) -> None:
        """Whole or not at all, so that a run that is cut off leaves its last whole file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_json())
        partial.replace(path)


def read_cells(path: Path) -> Run[CellResult]:
    """What bench.py has written. Raises ValueError where it is anything else."""
    try:
        raw = json.loads(path.read_text())
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise ValueError(f"expected benchmark results of format {FORMAT}")
        results = [CellResult.from_row(row) for row in raw.pop("results")]
        roof = {int(threads): value for threads, value in raw.pop("roof").items()}
        return Run(results=results, roof=roof, **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def merge(results: list[CellResult], new: Iterable[CellResult]) -> None:
    """Add ``new`` to ``results``: the peers of a cell that is there already go to it, each with the ratio of its own
    rounds."""
    cells = {result.cell: result for result in results}
    for result in new:
        there = cells.get(result.cell)
        if there is not None:
            result = dataclasses.replace(there, peers=there.peers | result.peers, saved=result.saved | there.saved)
        cells[result.cell] = result
    results[:] = cells.values()
