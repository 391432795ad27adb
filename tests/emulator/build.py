"""Compiles the emulated device, and the programs and the ops that run the CUDA kernels on it.

``build(target)`` runs ninja, which compiles only what changed. From a shell:

    python tests/emulator/build.py faulty_kernels faulty_kernels-thread

The end of a program's name says with which sanitizer it is built: ``-address`` (and undefined behaviour) or
``-thread``. A name without either is the plain build. The emulated device itself is never built with a sanitizer, see
sanitizers.h. If several processes build at once, one runs ninja and the others wait for it.
``libbnfused_emulated.so`` has the ops for torch.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulator"
OUTPUT = ROOT / "build" / "emulator"

# No strict aliasing: kernels read 16 bytes as another type than they were written as.
# Contraction: nvcc also turns a * b + c into a fused multiply-add.
FLAGS = "-std=c++20 -fPIC -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=fast"
# -O1 compiles in half the time of -O2. -g adds a third: the emulator reports lines without it, and sanitizers need
# only line numbers, -g1. -thread needs -O2: ThreadSanitizer does not see what a function writes directly into the
# place of its result, except if the function is inlined.
SANITIZERS = {
    "": "-O1",
    "-address": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "-thread": "-O2 -g1 -fsanitize=thread",
}
DEVICE_FILES = ("launch", "scheduler", "barriers", "memory", "report", "fiber", "guarded_buffer")
DEVICE = tuple(HERE / f"{name}.cpp" for name in DEVICE_FILES)
# Of a machine without a toolkit: the headers of the runtime, of the compiler, and nv/target.
CUDA_HEADERS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88", "nvidia-cuda-cccl==13.0.85")
LAUNCHERS = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
PROGRAMS = {
    "faulty_kernels": (HERE / "faulty_kernels.cpp",),
    "run_launchers": (HERE / "run_launchers.cpp", *LAUNCHERS),
}
TORCH_OPS = (HERE / "emulated_ops.cpp", ROOT / "csrc" / "ops" / "schema.cpp")


def cuda_include() -> Path:
    """The folder of CUDA's headers. They are used for types and conversions; no CUDA library is linked.

    It is the toolkit's folder. Without a toolkit, it is a folder of its own with pip's packages, because the installed
    torch may come with other versions of them.
    """
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for toolkit in [*toolkits, Path("/usr/local/cuda")]:
        if (toolkit / "include" / "cuda_fp16.h").exists():
            return toolkit / "include"
    include = OUTPUT / "cuda" / "nvidia" / "cu13" / "include"
    return include if include.exists() else download_headers(OUTPUT / "cuda") / "nvidia" / "cu13" / "include"


def download_headers(folder: Path) -> Path:
    """Downloads the packages ``CUDA_HEADERS`` (6 MB) and unpacks them into ``folder``, which it returns.

    Raises:
        RuntimeError: pip could not download them; the message says what to do.
    """
    with tempfile.TemporaryDirectory(dir=OUTPUT) as temporary:
        wheels, content = Path(temporary, "wheels"), Path(temporary, "content")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        result = subprocess.run([*command, *CUDA_HEADERS], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                "no CUDA toolkit was found, and pip could not download its headers. "
                f"Set CUDA_HOME=<folder of a toolkit>\n{result.stderr}"
            )
        for wheel in wheels.iterdir():
            zipfile.ZipFile(wheel).extractall(content)
        return content.rename(folder)


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("no torch to build the emulated ops for")
    return Path(spec.origin).parent


def machine_flags() -> str:
    """Flags for fused multiply-add, which GPUs have, if this machine has it too."""
    try:
        has_fma = " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_fma = False
    return "-march=x86-64-v3" if has_fma else ""


def ninja_file() -> str:
    """The text of build.ninja: every program with every sanitizer."""
    compiler = os.environ.get("CXX", "g++")
    include = f"-I{HERE} -I{ROOT / 'csrc'} -isystem {cuda_include()}"
    lines = [
        f"flags = {FLAGS} {machine_flags()} {include}",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags $more -x c++ -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = $in",
        "rule link",
        # -rdynamic: the emulated device looks up the names of kernels among the exported symbols.
        f"  command = {compiler} -rdynamic $more $in -o $out $libraries -ldl",
        "  description = $out",
    ]

    objects: set[str] = set()

    def compile(sources: tuple[Path, ...], suffix: str, more: str) -> str:
        outputs = [f"{source.stem}{suffix}.o" for source in sources]
        for source, output in zip(sources, outputs, strict=True):
            if output not in objects:
                lines.append(f"build {output}: compile {source}\n  more = {more}")
                objects.add(output)
        return " ".join(outputs)

    device = compile(DEVICE, "", "-O2")
    launchers = compile(LAUNCHERS, "", SANITIZERS[""])
    torch = torch_folder()
    headers = f"-isystem {torch / 'include'} -isystem {torch / 'include/torch/csrc/api/include'}"
    ops = compile(TORCH_OPS, "", f"-O1 {headers}")
    lines.append(f"build libbnfused_emulated.so: link {ops} {launchers} {device}")
    lines.append(f"  more = -shared\n  libraries = -L{torch / 'lib'} -ltorch_cpu -lc10")
    for name, sources in PROGRAMS.items():
        for suffix, sanitizer in SANITIZERS.items():
            program = compile(sources, suffix, sanitizer)
            lines.append(f"build {name}{suffix}: link {program} {device}\n  more = {sanitizer}")
    return "\n".join(lines) + "\n"


def build(*targets: str) -> Path:
    """Brings the targets up to date, once in a process; the path of the first.

    Raises:
        RuntimeError: the compiler failed, now or in an earlier call; its output is the message.
    """
    if failure := _build_once(*targets):
        raise RuntimeError(failure)
    return OUTPUT / targets[0]


@cache  # a failure too: another try takes the compiler half a minute, and each test of the device would make one
def _build_once(*targets: str) -> str:
    """The command and its output if the build failed, otherwise an empty string."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        file = OUTPUT / "build.ninja"
        text = ninja_file()
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [find_ninja(), "-C", str(OUTPUT), "-j", jobs, *targets]
        result = subprocess.run(command, capture_output=True, text=True)
    return f"{' '.join(command)}\n{result.stdout}{result.stderr}" if result.returncode else ""


def find_ninja() -> str:
    """The ninja next to this Python, or the one on the PATH."""
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja") or "ninja"


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
