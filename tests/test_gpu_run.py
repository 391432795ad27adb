"""``make gpu`` where there is no GPU: its order, and what a failure or too little time does, with stand-in programs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import every_kernel

ROOT = Path(__file__).resolve().parents[1]
# Says what it was called with, does nothing, and fails where FAILS is part of that.
STAND_IN = """#!/bin/sh
echo "called: $(basename "$0") $*"
case "$0 $*" in *"${FAILS:-no such call}"*) exit 3 ;; esac
"""
IN_ORDER = {
    "build": ["python setup.py build_ext --inplace", "python -m bnfused"],
    "tests": ["-n 8 --backend cuda tests", "tests/test_cuda.py"],
    "sanitize": ["--tool memcheck", "--tool racecheck", "--tool synccheck"],
    "bench": ["benchmarks/bench.py --device cuda", "benchmarks/networks.py --device cuda"],
}


@pytest.fixture
def gpu_run(tmp_path: Path):
    """Runs a copy of .ci/gpu; its exit status and output, what it called with it."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "gpu", tmp_path / ".ci")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)

    def run(*arguments: str, **environment: str) -> tuple[int, str]:
        result = subprocess.run(
            [tmp_path / ".ci" / "gpu", *arguments],
            env={"PYTHON": str(programs / "python"), "PATH": f"{programs}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        log = tmp_path / "build" / "gpu.log"
        return result.returncode, (log.read_text() if log.exists() else "") + result.stdout

    return run


def assert_called(output: str, wanted: list[str]) -> None:
    """These and no other steps, one after the other."""
    places = [output.find(call) for call in wanted]
    assert -1 not in places and places == sorted(places), (dict(zip(wanted, places, strict=True)), output)
    others = {call for calls in IN_ORDER.values() for call in calls} - set(wanted)
    assert not [call for call in others if call in output], output


def test_all_of_it_in_order(gpu_run) -> None:
    status, output = gpu_run("--quick")
    assert status == 0 and "=== ok after" in output
    assert_called(output, [call for calls in IN_ORDER.values() for call in calls])
    assert "--keep --limit 150 --quick" in output


@pytest.mark.parametrize("parts", ["build tests", "sanitize", "bench"])
def test_in_parts(gpu_run, parts: str) -> None:
    """A machine may end a command after ten minutes: what one part built is there for the next."""
    status, output = gpu_run(PARTS=parts)
    assert status == 0
    assert_called(output, [call for part in parts.split() for call in IN_ORDER[part]])


def test_a_part_that_there_is_not(gpu_run) -> None:
    status, output = gpu_run(PARTS="build benchmark")
    assert status == 2 and "expected some of 'build tests sanitize bench', got 'benchmark'" in output
    assert "called" not in output


@pytest.mark.parametrize("fails", ["-m bnfused", "--backend cuda", "racecheck", "bench.py"])
def test_the_steps_behind_a_failure_run(gpu_run, fails: str) -> None:
    status, output = gpu_run(FAILS=fails)
    assert status == 1 and "=== FAILED: " in output and "=== FAILED after" in output
    assert_called(output, [call for calls in IN_ORDER.values() for call in calls])


def test_nothing_runs_without_the_build(gpu_run) -> None:
    status, output = gpu_run(FAILS="setup.py")
    assert status == 1
    assert_called(output, IN_ORDER["build"][:1])


@pytest.mark.usefixtures("extension")
def test_the_calls_under_the_sanitizer_are_calls(capsys):
    """What compute-sanitizer is to watch runs to its end; on the CPU here, with one dtype."""
    assert every_kernel.main(["--device", "cpu", "--dtypes", "1"]) == 0
    numbers = [line.split(":")[0].split("/") for line in capsys.readouterr().out.splitlines()]
    assert numbers and numbers[-1][0] == numbers[-1][1] == str(len(numbers))
