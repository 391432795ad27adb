"""The emulated device finds what it is there to find: small kernels with one fault each, and none in the right ones.

The kernels are in ``emulator/faulty_kernels.cpp``; each runs under six schedules. Three builds look at them: the plain
one sees wrong results and what the emulator itself reports, ``-address`` what a plain dereference does out of bounds,
``-thread`` every race, in any schedule, also where the result is right.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from emulator.build import HERE, build

SCHEDULES = {"forward", "reverse", "random1", "random2", "random3", "random4"}
SOURCE = (HERE / "faulty_kernels.cpp").read_text()
RIGHT = ["sum", "reverse", "reverse_in_warp", "grid", "cluster", "async", "async_again", "chain"]
RIGHT += ["collectives", "copy"]

EVERYWHERE = len(SCHEDULES)
# What the plain build says of each fault, and under how many of the six schedules at least. Where it is not all six,
# the fault is invisible in some orders; that is why there are several.
FAULTS = {
    "sum_no_barrier": (5, "wrong"),
    "reverse_no_barrier": (EVERYWHERE, "wrong"),
    "reverse_in_warp_no_syncwarp": (EVERYWHERE, "wrong"),
    "sum_shared_not_initialised": (EVERYWHERE, "wrong"),
    "sum_ticket_not_reset": (EVERYWHERE, "wrong"),
    "grid_no_sync": (5, "wrong"),
    "cluster_no_sync": (5, "wrong"),
    "async_no_wait": (3, "wrong"),
    "async_read_in_flight": (3, "wrong"),
    "read_inactive_lane": (EVERYWHERE, "wrong"),
    "sum_read_past_end": (EVERYWHERE, r"thread 44 of block 1 loads 4 bytes at <line>, byte 1200 of 'x' \(1200 bytes\)"),
    "sum_write_past_end": (
        EVERYWHERE,
        r"thread 0 of block 2 stores 4 bytes at <line>, byte 12 of 'partials' \(12 bytes\)",
    ),
    "sum_plain_read_past_end": (EVERYWHERE, r"thread 44 of block 1 accesses byte 1200 of 'x' \(1200 bytes\)"),
    "sum_shared_overrun": (EVERYWHERE, r"block \d wrote byte 8 of a shared object of 8 bytes"),
    "sum_misaligned": (EVERYWHERE, r"misaligned: thread \d+ of block \d loads 16 bytes at <line>, byte \d+ of 'x'"),
    "sum_divergent_barrier": (
        EVERYWHERE,
        r"divergent __syncthreads: thread \d+ of block \d is at <line> while others wait at <line>",
    ),
    "cluster_early_exit": (4, r"map_shared_rank at <line>: the block of rank \d has exited"),
    "grid_too_large": (EVERYWHERE, r"cooperative launch of 257 blocks on a device with room for 256"),
    "chain_not_resident": (2, r"livelock: thread 0 of block \d spins and nothing moves"),
    "wait_for_each_other": (EVERYWHERE, r"livelock: .* 2 threads can run; 62 threads have exited"),
    "shuffle_during_barrier": (
        EVERYWHERE,
        r"deadlock: 16 threads wait in __shfl_xor_sync at <line>; 16 threads wait in __syncthreads at <line>",
    ),
    "different_masks": (3, r"__shfl_xor_sync with mask \w+ at <line>, but __shfl_xor_sync with mask \w+ at <line>"),
    "half_warp": (EVERYWHERE, r"warp mismatch in block 0: .*__shfl_xor_sync with mask ffffffff at <line>"),
    "mask_without_self": (EVERYWHERE, r"__shfl_xor_sync at <line>: mask 0000ffff lacks its own lane \d+"),
}
# Faults that ThreadSanitizer has to see, with a line of the kernel; the fence is one that nothing else can see.
RACES = [
    "sum_no_barrier",
    "sum_no_fence",
    "reverse_no_barrier",
    "reverse_in_warp_no_syncwarp",
    "grid_no_sync",
    "cluster_no_sync",
]
# Faults that AddressSanitizer or UndefinedBehaviorSanitizer stops at the very line of.
STRAY_ACCESSES = {"sum_plain_read_past_end": "use-after-poison", "sum_shared_overrun": "index 2 out of bounds"}


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Fibers of a launch that failed are abandoned with what they had allocated.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def outcomes(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What each schedule ended in: "right", "wrong" or a report."""
    lines = [line.partition(": ") for line in result.stdout.splitlines()]
    return {schedule: outcome for schedule, _, outcome in lines if schedule in SCHEDULES}


def sites(result: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^site (.*)$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("suffix", ["", "-address", "-thread"])
@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_pass(kernel: str, suffix: str):
    """Without a fault there is no report, no race and no wrong result: a check that cries wolf is turned off."""
    result = run(build(f"faulty_kernels{suffix}"), kernel)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert outcomes(result) == dict.fromkeys(SCHEDULES, "right")


@pytest.mark.parametrize("kernel", FAULTS)
def test_faults_are_found(kernel: str):
    """Each planted fault is found, and the report says which line, thread and buffer."""
    least, expected = FAULTS[kernel]
    pattern = expected.replace("<line>", r"faulty_kernels\.cpp:\d+")
    result = run(build("faulty_kernels"), kernel)
    found = {schedule: text for schedule, text in outcomes(result).items() if re.search(pattern, text)}
    others = {schedule: text for schedule, text in outcomes(result).items() if schedule not in found}
    assert len(found) >= least, (found, others)
    assert set(others.values()) <= {"right"}


def test_every_fault_is_tried():
    """A case that is added to the program is added here."""
    cases = set(re.findall(r'^    \{"(\w+)", ', SOURCE, re.MULTILINE))
    assert cases == {*RIGHT, *FAULTS, *RACES}


@pytest.mark.parametrize("kernel", RACES)
def test_races_are_found(kernel: str):
    result = run(build("faulty_kernels-thread"), kernel)
    assert result.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert re.search(r"faulty_kernels\.cpp:\d+", result.stderr)


@pytest.mark.parametrize("kernel", STRAY_ACCESSES)
def test_stray_accesses_are_found(kernel: str):
    result = run(build("faulty_kernels-address"), kernel)
    assert result.returncode != 0
    assert STRAY_ACCESSES[kernel] in result.stderr
    assert re.search(r"faulty_kernels\.cpp:\d+", result.stderr)


@pytest.mark.parametrize("kernel", ["sum", "reverse", "reverse_in_warp", "grid", "cluster", "async", "chain"])
def test_every_barrier_can_be_dropped(kernel: str):
    """Mutation: with any one barrier, fence or wait dropped, a schedule or ThreadSanitizer notices; with none, neither.

    The first wait of cp.async is dropped for all but the last tile only, and so on: what is dropped is what the source
    has on that line. A site that could be dropped unnoticed would mean that the sweep over the real kernels says
    nothing.
    """
    plain, thread = build("faulty_kernels"), build("faulty_kernels-thread")
    met = sites(run(plain, kernel))
    assert met
    unnoticed = []
    for site in met:
        wrong = set(outcomes(run(plain, kernel, site)).values()) != {"right"}
        if not wrong and run(thread, kernel, site).returncode != 66:
            unnoticed.append(f"{site}: {SOURCE.splitlines()[int(site.rpartition(':')[2]) - 1].strip()}")
    assert not unnoticed


def test_a_failed_build_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    """Each test of the device asks for the build, and the compiler takes half a minute to fail."""
    calls = []

    def ninja(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "emulated_ops.cpp: error: ", "ambiguous")

    monkeypatch.setattr(subprocess, "run", ninja)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="error: ambiguous"):
            build("a program that does not compile")
    assert len(calls) == 1
