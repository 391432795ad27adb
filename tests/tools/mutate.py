"""Plants small faults in the CUDA kernels, one at a time, and says which test of the emulated device finds each.

    make mutate                                  all of csrc/kernels
    make mutate ARGS="layout.cuh pack.cuh"       these files

A fault is one of these: a condition is always or never true, an operand of && or || is left out, a comparison is off
by one (< for <=), a statement is missing. It leaves out barriers and fences, which test_emulated_kernels.py drops.

All faults are compiled at once, each behind a switch, into a copy of the tree below build/. One run of the tests
records which switches each test reaches, and so which tests a fault concerns. Then a forked process for each fault
turns it on and runs these tests until one fails. A fault that was found is not tried again until its file changes;
survivors are. The end is an error if a fault survives that is not in ``equivalent_faults.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tools.equivalent_faults import EQUIVALENT
from tools.faults import Fault, Planter

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutate"
TREE = WORK / "tree"
RESULTS = WORK / "results.json"
MEASURED = WORK / "measured.jsonl"  # a version; then per line a test, its seconds, its faults
KERNELS = Path("csrc") / "kernels"
NOT_HERE = {"platform.cuh"}  # g++ does not compile its code for nvcc
TESTS = (
    "kernels/test_emulated_kernels.py",
    *(
        f"package/test_{name}.py"
        for name in ("functional", "numerics", "parts", "errors", "autograd", "properties", "torch_samples")
    ),
)
# These tests read the source, are sweeps themselves, or test CPU threads with tensors that take long.
LEFT_OUT = re.compile(r"test_(every_(barrier|kernel)|\w*threads|concurrent)")
# These tests run programs, so nothing records which faults they reach.
RUNS_PROGRAMS = re.compile(r"::test_(results_do_not_depend_on_the_schedule|no_races|no_stray_accesses)")
PROGRAMS = ("run_launchers", "run_launchers-thread", "run_launchers-address")
SECONDS_AT_FIRST = 8  # of tests for a fault that has not survived these yet
SECONDS_OF_A_TEST = 20  # CPU time after which a test counts as hanging; programs have their own limit

SWITCHES = """
#pragma once
#include <atomic>
#include <cstdlib>
extern "C" {
inline int bnfused_planted = std::getenv("BNFUSED_PLANTED") ? std::atoi(std::getenv("BNFUSED_PLANTED")) : -1;
inline std::atomic<bool> bnfused_met[%d];
}
inline bool planted(int i) {
  bnfused_met[i].store(true, std::memory_order_relaxed);
  return i == bnfused_planted;
}
template <class L, class R> bool lt(int i, L l, R r) { return planted(i) ? l <= r : l < r; }
template <class L, class R> bool le(int i, L l, R r) { return planted(i) ? l < r : l <= r; }
template <class L, class R> bool gt(int i, L l, R r) { return planted(i) ? l >= r : l > r; }
template <class L, class R> bool ge(int i, L l, R r) { return planted(i) ? l > r : l >= r; }
"""


def plant() -> list[Fault]:
    """Writes a copy of the tree that has every fault."""
    for folder in ("bnfused", "csrc", "tests"):
        shutil.copytree(ROOT / folder, TREE / folder, dirs_exist_ok=True, ignore=not_twice)
    shutil.copy2(ROOT / "pyproject.toml", TREE)
    faults: list[Fault] = []
    for file in sorted((ROOT / KERNELS).glob("*.cuh")):
        if file.name not in NOT_HERE:
            planter = Planter(file.name, file.read_text(), len(faults))
            faults += planter.faults
            write(TREE / KERNELS / file.name, planter.text())
    write(TREE / "switches.h", SWITCHES % len(faults))
    return faults


def not_twice(folder: str, names: list[str]) -> list[str]:
    """The names that are not copied. plant() writes the kernels, and only those that change: ninja compares times."""
    kernels = [name for name in names if name.endswith(".cuh") and name not in NOT_HERE]
    return [*kernels, "__pycache__", "faults.py", "equivalent_faults.py", "mutate.py", "test_mutate.py"]


def write(file: Path, text: str) -> None:
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


# ----------------------------------------------------------------------------------------------------------- the sweep


class Sweep:
    """A pytest plugin that runs the tests once, to see which faults each reaches, and then again for each fault."""

    def __init__(self, faults: list[Fault], files: list[str], jobs: int):
        self.faults, self.jobs = faults, jobs
        self.wanted = [i for i, fault in enumerate(faults) if not files or fault.file in files]
        self.results: dict[str, dict[str, str]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.failed = False
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def concerns(item: Any) -> bool:
            backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
            of_device = item.path.name == "test_emulated_kernels.py" and backend is None
            return (backend == "emulated" or of_device) and not LEFT_OUT.match(item.name)

        items[:] = [item for item in items if concerns(item)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        from emulator import emulated
        from emulator.build import build

        for program in PROGRAMS:
            build(program)
        library = emulated.library()
        self.planted = ctypes.c_int.in_dll(library, "bnfused_planted")
        self.met = (ctypes.c_bool * len(self.faults)).in_dll(library, "bnfused_met")
        self.items = {item.nodeid: item for item in session.items}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, auto_refresh=False) as bar:  # no thread, because a fork would copy its locks
            self.measure(bar)
            self.sweep(bar)
        return True

    def run(self, test: str) -> bool:
        """Whether ``test`` passes. It is called in a process of its own."""
        signal.setitimer(signal.ITIMER_PROF, SECONDS_OF_A_TEST)
        item = self.items[test]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.failed

    def in_turns(
        self, bar: Progress, work: Callable[[Any], int], todo: list[Any], done: Callable[[Any, int], None]
    ) -> None:
        """Runs ``work(it)`` in silent processes, ``jobs`` at once; calls ``done(it, status)`` at the end of each."""
        running: dict[int, Any] = {}
        todo = todo[::-1]
        try:
            while todo or running:
                if todo and len(running) < self.jobs:
                    it = todo.pop()
                    pid = os.fork()
                    running[pid] = it
                    if pid == 0:
                        os.setpgid(0, 0)
                        null = os.open(os.devnull, os.O_RDWR)
                        os.dup2(null, 1)
                        os.dup2(null, 2)
                        status = 1
                        try:
                            status = work(it)
                        finally:
                            os._exit(status)
                else:
                    pid, status = os.wait()
                    end_group(pid)  # programs that still hang
                    done(running.pop(pid), status)
                    bar.refresh()
        finally:
            for pid in running:
                end_group(pid)

    def measure(self, bar: Progress) -> None:
        """Measures the seconds of each test and the faults that it reaches, unless they are known for these files."""
        version = hashlib.sha256()
        for file in sorted(TREE.rglob("*")):
            if file.suffix in (".py", ".cuh", ".cu", ".h", ".cpp", ".so"):
                version.update(file.read_bytes())
        known = [json.loads(line) for line in MEASURED.read_text().splitlines()] if MEASURED.exists() else []
        if known[:1] != [version.hexdigest()]:
            known = [version.hexdigest()]
            MEASURED.write_text(json.dumps(known[0]) + "\n")
        measured = {test for test, *_ in known[1:]}
        task = bar.add_task("tests without a fault", total=len(self.items), completed=len(measured))

        def work(tests: list[str]) -> int:
            with MEASURED.open("a", buffering=1) as log:
                for test in tests:
                    ctypes.memset(self.met, 0, len(self.faults))
                    start = time.perf_counter()
                    if not self.run(test):
                        return 1
                    seconds = round(time.perf_counter() - start, 3)
                    log.write(json.dumps([test, seconds, [i for i, met in enumerate(self.met) if met]]) + "\n")
            return 0

        def done(tests: list[str], status: int) -> None:
            bar.advance(task, len(tests))
            if status:
                raise SystemExit(f"{tests[0]}, or one of the {len(tests)} behind it, fails without any fault")

        left = [test for test in self.items if test not in measured]
        self.in_turns(bar, work, [left[i : i + 50] for i in range(0, len(left), 50)], done)
        gc.freeze()  # so that collections do not touch, and copy, these objects in each process
        self.concerned: list[list[str]] = [[] for _ in self.faults]
        for test, seconds, met in map(json.loads, MEASURED.read_text().splitlines()[1:]):
            if test not in self.items:
                continue
            self.seconds[test] = seconds
            for i in range(len(self.faults)) if RUNS_PROGRAMS.search(test) else met:
                self.concerned[i].append(test)

    def sweep(self, bar: Progress) -> None:
        """Runs the tests that are likely to find each fault, and then all tests for the faults that survive."""
        texts = {file.name: file.read_bytes() for file in (ROOT / KERNELS).glob("*.cuh")}
        version = {name: hashlib.sha256(text).hexdigest()[:16] for name, text in texts.items()}
        found = Counter(result["by"] for result in self.results.values())
        task = bar.add_task("faults", total=len(self.wanted))

        def known(i: int) -> dict[str, str]:
            result = self.results.get(str(self.faults[i]), {})
            return result if result.get("version") == version[self.faults[i].file] else {}

        def work(i: int) -> int:
            by = self.results.get(str(self.faults[i]), {}).get("by")
            # First the test that has found it before, then tests that are quick and have found many.
            order = sorted(self.concerned[i], key=lambda test: (test != by, self.seconds[test] / (1 + found[test])))
            self.planted.value = i
            os.environ["BNFUSED_PLANTED"] = str(i)
            left = math.inf if known(i) else SECONDS_AT_FIRST
            for test in order:
                (WORK / f"fault{i}").write_text(test)
                if not self.run(test):
                    return 1
                left -= self.seconds[test]
                if left < 0:
                    break
            return 0

        def done(i: int, status: int) -> None:
            file, fault = WORK / f"fault{i}", self.faults[i]
            by = file.read_text() if file.exists() and status else ""
            file.unlink(missing_ok=True)
            how = "fails"
            if os.WIFSIGNALED(status):
                by_signal = signal.Signals(os.WTERMSIG(status))
                how = "hangs" if by_signal == signal.SIGPROF else by_signal.name
            if not status and known(i):
                bar.console.print(f"survives: {fault.file}:{fault.line}: {fault.what}: {fault.text}", markup=False)
            self.results[str(fault)] = {"by": by, "how": how if status else "", "version": version[fault.file]}
            found[by] += 1
            RESULTS.write_text(json.dumps(self.results, indent=1))
            bar.advance(task, bool(status) or bool(EQUIVALENT.get(str(fault))))

        todo = [i for i in self.wanted if not known(i)]
        bar.advance(task, sum(bool(known(i).get("how") or EQUIVALENT.get(str(self.faults[i]))) for i in self.wanted))
        self.in_turns(bar, work, todo, done)
        todo = [i for i in self.wanted if not known(i)["how"] and not EQUIVALENT.get(str(self.faults[i]))]
        self.in_turns(bar, work, todo, done)


def end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def report(sweep: Sweep, console: Console) -> int:
    """Prints the result of each fault; returns how many are wrong."""
    table = Table("fault", "", "found by", box=None)
    wrong = 0
    suites: Counter[str] = Counter()
    for i in sweep.wanted:
        fault = sweep.faults[i]
        result, why = sweep.results[str(fault)], EQUIVALENT.get(str(fault))
        by = f"{result['how']}: {result['by']}" if result["how"] else f"equivalent: {why}" if why else "SURVIVES"
        wrong += bool(result["how"]) == bool(why)
        suites[result["by"].partition("::")[0] or "none"] += 1
        table.add_row(f"{fault.file}:{fault.line}", escape(f"{fault.what}: {fault.text}"), escape(by))
    console.print(table)
    console.print("found by " + ", ".join(f"{suite}: {n}" for suite, n in suites.most_common()))
    console.print(f"{len(sweep.wanted)} faults; {wrong} survive, or are found and said to be equivalent")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="kernel files, such as layout.cuh; all without")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    arguments = parser.parse_args()
    faults = plant()
    sys.path[:0] = [str(TREE), str(TREE / "tests")]
    os.chdir(TREE)
    os.environ |= {
        # The pattern: a variable that a missing statement does not set must not have the right value by chance.
        "CXX": f"{os.environ.get('CXX', 'g++')} -w -ftrivial-auto-var-init=pattern -include {TREE / 'switches.h'}",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    import pytest

    sweep = Sweep(faults, arguments.files, arguments.jobs)
    files = [f"tests/{name}" for name in TESTS]
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin", "--seed", "1", "--sanitize"]
    status = pytest.main([*options, *files], [sweep])
    return status or bool(report(sweep, Console(width=200)))


if __name__ == "__main__":
    sys.exit(main())
