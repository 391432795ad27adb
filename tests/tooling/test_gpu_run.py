"""``make gpu`` where there is no GPU: its order, and what a failure or too little time does, with stand-in programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import every_kernel

ROOT = Path(__file__).resolve().parents[2]
# Says what it was called with, does nothing, and fails where FAILS is part of that.
STAND_IN = """#!/bin/sh
echo "called: $(basename "$0") $*"
echo "PYTHONPATH=$PYTHONPATH archs=$TORCH_CUDA_ARCH_LIST"
case "$0 $*" in *"${FAILS:-no such call}"*) exit 3 ;; esac
"""
BUILD = "python setup.py build_ext --inplace"
IN_ORDER = {
    "build": ["python -m bnfused"],
    "tests": ["-n 8 --backend cuda tests", "tests/kernels/test_cuda.py"],
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
    """The build, then these and no other steps, one after the other."""
    places = [output.find(call) for call in (BUILD, *wanted)]
    assert -1 not in places and places == sorted(places), (places, wanted, output)
    others = {call for calls in IN_ORDER.values() for call in calls} - set(wanted)
    assert not [call for call in others if call in output], output


def test_all_of_it_in_order(gpu_run) -> None:
    status, output = gpu_run("--quick")
    assert status == 0 and "=== ok after" in output
    assert_called(output, [call for calls in IN_ORDER.values() for call in calls])
    assert re.search(r"bench.py --device cuda --keep benchmarks/results --limit \d+ --quick\n", output)


def test_where_the_numbers_go(gpu_run) -> None:
    """A folder that outlives the machine, and the commit of a copy without git, for both benchmarks."""
    _, output = gpu_run(PARTS="bench", RESULTS="/out of here", COMMIT="abc")
    assert output.count("--device cuda --keep /out of here --commit abc --limit ") == 2


def test_what_the_environment_says(gpu_run) -> None:
    """Packages that PYTHONPATH names are found behind those of the checkout; the build is for the GPUs that are there,
    whatever else TORCH_CUDA_ARCH_LIST names, as it does in images."""
    _, output = gpu_run(PARTS="build", PYTHONPATH="/site", TORCH_CUDA_ARCH_LIST="7.5;8.0;9.0")
    build, then = (output.partition(call)[2].splitlines()[1] for call in (BUILD, *IN_ORDER["build"]))
    assert re.fullmatch(r"PYTHONPATH=/.*:/site archs=native", build)
    assert re.fullmatch(r"PYTHONPATH=/.*:/site archs=7.5;8.0;9.0", then)


def test_time_is_left_for_the_networks(gpu_run) -> None:
    """Of 480 s the last 100, in which they begin nothing 30 s before the end; and bench.py has all before."""
    _, output = gpu_run(PARTS="bench")
    bench, networks = map(int, re.findall(r"--limit (\d+)", output))
    assert 370 <= bench <= 380 and 440 <= networks <= 450  # the stand-ins take no time


@pytest.mark.parametrize("parts", ["build tests", "sanitize", "bench"])
def test_in_parts(gpu_run, parts: str) -> None:
    """A machine may end a command after ten minutes, and forget between two of them what the first one built."""
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
    assert_called(output, [])


@pytest.mark.usefixtures("extension")
def test_the_calls_under_the_sanitizer_are_calls(capsys):
    """What compute-sanitizer is to watch runs to its end; on the CPU here, with one dtype."""
    assert every_kernel.main(["--device", "cpu", "--dtypes", "1"]) == 0
    numbers = [line.split(":")[0].split("/") for line in capsys.readouterr().out.splitlines()]
    assert numbers and numbers[-1][0] == numbers[-1][1] == str(len(numbers))
