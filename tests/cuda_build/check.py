"""Compile, inspect, link and import the CUDA half on a machine without a GPU: ``make cuda-check``.

nvcc compiles every .cu with warnings, spills and local memory as errors. The machine code is compared with RULES. Then
the extension is linked with the installed torch, which may be a build without CUDA, and imported. All of this happens
in a folder of its own, so the extension in bnfused/ does not change.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import machine_code
from machine_code import Rule

ROOT = Path(__file__).resolve().parents[2]
# The oldest GPU, the first with asynchronous copies, the first with clusters, and the newest. Each compiles code that
# the one before leaves out, and a kernel that has registers to spare on one may have none on another.
ONE_OF_EACH = "7.5;8.0;9.0;12.0"
EVERY = "7.5;8.0;8.6;8.9;9.0;10.0;12.0"
STRICT = "-Werror all-warnings -Xptxas=-warn-spills,-warn-lmem-usage,-Werror"

# The first rule that fits a kernel's name holds for it. Two blocks on an SM cover the latency of its memory. Two kinds
# of kernels load more at once, and need only one block: the backward's sums of rows, which keep sums and constants of 8
# channels in registers, and those of float64, which takes two registers for a value.
# For blocks that wait for each other, csrc/plan_resident.h relies on the blocks that registers allow
# (resident_blocks_per_sm), and on the shared memory that cannot keep values: static_shared, and kReservedShared, which
# new GPUs report as used.
OF_ROWS, OF_PLANES = 9 * 128 * 24 + 64 + 1024, 128 * 24 + 64 + 1024
# loads_together: a kernel that waits for each unit before it loads the next has 2 or 3 (x, grad_y, a residual), and 1
# in the statistics. docs/performance.md says of how many units the loads are. Kernels for sm_120 wait for the first one
# alone.
_resident = partial(Rule, wide_loads=True, wide_stores=True, copies=True, clusters=True, loads_together=7)
RULES = (
    Rule("_gather", 2, wide_loads=False, wide_stores=False),
    Rule("_empty", 4, wide_loads=False, wide_stores=False),
    _resident("_resident_rows", 1, shared_bytes=OF_ROWS),
    _resident("_resident_planes<double", 1, shared_bytes=OF_PLANES),
    _resident("_resident_planes", 2, shared_bytes=OF_PLANES),
    Rule("_apply_.*<double", 1, wide_loads=True, wide_stores=True, loads_together=7),
    Rule("_backward_apply_", 2, wide_loads=True, wide_stores=True, loads_together=3),
    Rule("_apply_", 2, wide_loads=True, wide_stores=True, loads_together=7),
    Rule("_backward_reduce_(rows|.*<double)", 1, wide_loads=True, wide_stores=False, loads_together=7),
    Rule("_backward_reduce_", 2, wide_loads=True, wide_stores=False, loads_together=7),
    Rule("_stats_.*<double", 1, wide_loads=True, wide_stores=False, loads_together=3),
    Rule("_stats_", 2, wide_loads=True, wide_stores=False, loads_together=3),
)

# The functions of the CUDA runtime that a launch may call. None of them waits for the GPU, ends the capture of a graph,
# or is a launch of its own. This also holds if there is no room for blocks that wait, and a second plan is launched.
# The exceptions are cudaMalloc and cudaMemsetAsync, for the counters of a stream: once, and never during a capture.
RUNTIME = {
    *("cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaStreamIsCapturing"),
    *("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", "cudaOccupancyMaxActiveClusters"),
    *("cudaThreadExchangeStreamCaptureMode", "cudaMalloc", "cudaMemsetAsync"),
    "cudaLaunchKernelExC",
    *("cudaGetLastError", "cudaGetErrorName", "cudaGetErrorString"),
}


def load_setup() -> ModuleType:
    """setup.py as a module, which can find nvcc and knows the kernels by name."""
    spec = importlib.util.spec_from_file_location("bnfused_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path, **environment: str) -> None:
    """Builds the whole extension, with CUDA, in ``folder``/lib. Exits if that fails."""
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "objects")]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    with log.open("w") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "BNFUSED_CUDA": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        text = log.read_text()
        found = text.rfind("bnfused: ")  # nvcc's errors come with the command, g++'s at the end
        sys.exit(f"{text[found if found >= 0 else -6000 :][:6000]}\nthe build failed; all of its output is in {log}")


def inspect(folder: Path, tools: str) -> list[str]:
    """Prints a table of the kernels and returns a message for each broken rule."""
    sources = [ROOT / "csrc" / "plan_shapes.h", *sorted((ROOT / "csrc" / "kernels").glob("*.cuh"))]
    threads = machine_code.block_size(sources)
    kernels = machine_code.read(sorted((folder / "objects" / "kernels").glob("*.o")), tools, os.cpu_count() or 1)
    kernels = list(dict.fromkeys(kernels))  # a kernel that is not a template is in every object
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(arch.removeprefix("sm_")))
    print(f"on each GPU: registers, blocks of {threads} on an SM, 128-bit loads and stores, instructions")
    print(f"{'':58s}", *(f"{arch:>22s}" for arch in archs))
    for name in sorted({kernel.name for kernel in kernels}):
        of_arch = {kernel.arch: kernel for kernel in kernels if kernel.name == name}
        cells = [
            f"{k.registers:4d} {k.blocks_per_sm(threads):2d} {k.wide_loads:4d} {k.wide_stores:3d} {k.instructions:6d}"
            for k in (of_arch[arch] for arch in archs)
        ]
        print(f"{name:58s}", *(f"{cell:>22s}" for cell in cells))
    wrong = [f"{k.name} on {k.arch}: {what}" for k in kernels for what in machine_code.broken(k, RULES, threads)]
    return wrong if kernels else ["expected kernels in the objects, found none"]


def forbidden_calls(folder: Path) -> list[str]:
    """A message for each runtime function that the launchers, or the ops that call them, use and RUNTIME lacks."""
    calls: set[tuple[str, str]] = set()
    for path in [*(folder / "objects" / "kernels").glob("*.o"), *(folder / "objects").rglob("csrc/ops/cuda.o")]:
        command = ["nm", "--undefined-only", str(path)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        calls |= {(path.name, name) for name in machine_code.runtime_calls(symbols)}
    missing = {"cudaLaunchKernelExC", "cudaStreamIsCapturing"} - {name for _, name in calls}
    return [f"{file} calls {name}" for file, name in sorted(calls) if name not in RUNTIME] + [
        f"expected {name} to be called, found no call" for name in sorted(missing)
    ]


def use(folder: Path) -> int:
    """Imports the build and runs its CPU ops in a process of its own; returns the exit status."""
    package = folder / "lib" / "bnfused"
    shutil.copytree(
        ROOT / "bnfused", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "_*.so", "_*.txt")
    )
    script = Path(__file__).with_name("use_extension.py")
    path = os.pathsep.join(filter(None, [str(folder / "lib"), os.environ.get("PYTHONPATH")]))
    return subprocess.call([sys.executable, str(script)], cwd=folder, env={**os.environ, "PYTHONPATH": path})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help=f"for {EVERY} instead of {ONE_OF_EACH}")
    options = parser.parse_args()
    setup = load_setup()
    toolkit = setup.find_toolkit(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc"))
    if toolkit is None:
        print(
            "NOT CHECKED: there is no CUDA toolkit, so no kernel was compiled. Install one with nvcc 13.0, or set "
            "CUDA_HOME=<its folder>"
        )
        return 1
    tools = machine_code.find_tools(toolkit)
    if tools is None:
        print("NOT CHECKED: there is no cuobjdump with nvdisasm; python -m pip install -r requirements-dev.txt")
        return 1
    archs = EVERY if options.all else ONE_OF_EACH
    folder = ROOT / "build" / ("cuda-check-all" if options.all else "cuda-check")
    print(f"nvcc of {toolkit}, for {archs}; warnings, spills and local memory are errors", flush=True)
    start = time.monotonic()
    build(folder, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=archs, NVCC_APPEND_FLAGS=STRICT)
    print(f"compiled and linked in {time.monotonic() - start:.0f} s", flush=True)
    wrong = [*inspect(folder, tools), *forbidden_calls(folder)]
    status = use(folder)
    for line in wrong:
        print(f"WRONG: {line}")
    print(f"{'FAILED' if wrong or status else 'ok'} in {time.monotonic() - start:.0f} s")
    return 1 if wrong or status else 0


if __name__ == "__main__":
    sys.exit(main())
