"""The model of collectives: its formulas are what a simulation gives, and the schedules do their work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import collectives
from benchmarks.collectives import SCHEDULES, Cluster, Link, predict, simulated

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8, 16, 64, 4096])
def test_every_rank_gets_everything(schedule, ranks):
    """Whoever sends, sends all that it knows; in the end all know all. What a gather moves is known exactly."""
    groups = np.arange(ranks)[None]
    known = np.eye(ranks, dtype=bool) if ranks <= 64 else None
    received = np.zeros(ranks)
    for sources, destinations, size in SCHEDULES[schedule](groups, 1.0):
        source, destination = sources.ravel(), destinations.ravel()
        assert len(set(source)) == len(source) == len(set(destination))
        received[destination] += size
        if known is not None:
            known[destination] |= known[source]
    if known is not None:
        assert known.all()
    if "gather" in schedule:
        assert np.all(received == ranks - 1)
    elif schedule == "ring reduce":
        assert np.allclose(received, 2 * (ranks - 1) / ranks)  # the least there can be


CLUSTERS = {
    "assumed": Cluster(0),
    "one card": Cluster(0, cards=1),
    "slow network": Cluster(0, node=4, between=Link(50e-6, 1e9)),
    "one in a node": Cluster(0, node=1, cards=1),
}


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("hierarchical", [False, True], ids=["flat", "levels"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_formulas_are_what_the_simulation_gives(schedule, hierarchical, name):
    """2 to 4,096 ranks; a message's latency forgotten, or a card not shared, is off by far more than rounding."""
    for ranks, channels in ((2, 64), (8, 2048), (16, 64), (128, 16), (1024, 512), (4096, 2048)):
        cluster = Cluster(**{**vars(CLUSTERS[name]), "ranks": ranks})
        size = collectives.gather_bytes(channels) if "gather" in schedule else collectives.reduce_bytes(channels)
        wanted = simulated(cluster, schedule, size, hierarchical)
        assert predict(cluster, schedule, size, hierarchical) == pytest.approx(wanted, rel=1e-9), (ranks, channels)


def test_when_a_hierarchy_pays():
    """What docs/sync.md says: in a ring, and for gathers of any kind, from the second node on; for a tree, never."""
    for ranks in (8, 16, 256, 4096):
        cluster = Cluster(ranks)
        for schedule in SCHEDULES:
            flat, levels = (predict(cluster, schedule, collectives.gather_bytes(512), h) for h in (False, True))
            if ranks <= cluster.node or schedule == "tree reduce":
                assert levels == pytest.approx(flat)
            else:
                assert levels < 0.6 * flat


def torchrun(ranks: int, script: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*command, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_benchmark_runs(tmp_path, extension):
    """On four ranks, and in a hierarchy: two collectives in a step, four there, and their bytes."""
    json_file = tmp_path / "run.json"
    torchrun(
        4, "benchmarks/sync.py", "--steps", "2", "--shapes", "2x6x3x3", "--hierarchy", "2", "--json", str(json_file)
    )
    cells = {cell["module"]: cell for cell in json.loads(json_file.read_text())["cells"]}
    once = collectives.gather_bytes(6) + collectives.reduce_bytes(6)
    wanted = {"alone": (0, 0), "SyncBatchNorm": (2, once), "in a hierarchy": (4, 2 * once)}
    for name, (calls, size) in wanted.items():
        assert (cells[name]["calls"], cells[name]["bytes"]) == (calls, size), name
        assert len(cells[name]["seconds"]) == 2


def test_demo(extension):
    """Two processes end where one with the joint batch does; the script itself compares, in float64 and float32."""
    output = torchrun(2, "examples/train_digits_sync.py")
    assert re.findall(r"^after (\d+) steps", output, re.MULTILINE) == ["120", "10"]
