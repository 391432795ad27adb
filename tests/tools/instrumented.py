"""The CPU extension under AddressSanitizer, UndefinedBehaviorSanitizer and a count of the basic blocks reached.

``python -m tools.instrumented pytest ARGUMENTS...`` runs tests with it, and ``... fuzz ARGUMENTS...`` runs fuzz.py. It
is built in ``build/instrumented``, next to links to the package's Python. A process that uses it loads the runtime of
the sanitizers first, and ends at the first report.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "instrumented"

# -O1 overrides setup.py's -O3. AddressSanitizer calls a function at each access, because with inlined checks the loops
# take four times as long to compile. So they would with UndefinedBehaviorSanitizer's checks of each access, which are
# left to AddressSanitizer. vptr needs type information that torch hides.
FLAGS = (
    "-O1",
    "-g0",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr,null,object-size,pointer-overflow,alignment,bounds",
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fno-sanitize-recover=undefined",
    "-fsanitize-coverage=trace-pc",
)
BUILD = f"""
import setup
setup.CXX_FLAGS += {FLAGS!r}
setup.CPP_SOURCES += ("tests/tools/block_counter.cpp",)
setup.main()
"""


def build() -> None:
    """Compiles what changed, and puts links to the package's modules next to the result."""
    package = FOLDER / "bnfused"
    package.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", BUILD, "build_ext"]
    command += ["--build-lib", str(FOLDER), "--build-temp", str(FOLDER / "objects")]
    environment = os.environ | {"BNFUSED_CUDA": "0", "LDFLAGS": "-fsanitize=address,undefined", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])
    for source in (ROOT / "bnfused").rglob("*.py"):
        link = package / source.relative_to(ROOT / "bnfused")
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(source)


def runtime(library: str) -> str:
    """The path of a library of the compiler."""
    return subprocess.run(
        ["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(script: str, arguments: list[str], capability: str) -> int:
    """Runs a Python program that finds the instrumented package first."""
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')} {runtime('libstdc++.so')}",
        # No leak detection, because Python frees little before it exits. New memory is NaN in every dtype, so that
        # reading it shows.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1048576:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "ATEN_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    if not capability:
        del environment["ATEN_CPU_CAPABILITY"]
    start = f"import sys; sys.path[:1] = [{str(FOLDER)!r}, {str(ROOT / 'tests')!r}]; {script}"
    return subprocess.run([sys.executable, "-c", start, *arguments], cwd=ROOT, env=environment).returncode


SCRIPTS = {
    "pytest": "import pytest; sys.exit(pytest.main(sys.argv[1:]))",
    "fuzz": "from tools import fuzz; sys.exit(fuzz.main(sys.argv[1:]))",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in SCRIPTS:
        sys.exit(f"usage: instrumented.py {'|'.join(SCRIPTS)} ARGUMENTS...")
    build()
    if arguments[0] == "fuzz":
        return run(SCRIPTS["fuzz"], arguments[1:], os.environ.get("ATEN_CPU_CAPABILITY", ""))
    # Runs every instruction set's loops. One that this machine does not have falls back to a smaller one.
    return max(run(SCRIPTS["pytest"], arguments[1:], capability) for capability in ("default", "avx2", ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
