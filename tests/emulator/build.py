"""Compiles what runs the CUDA kernels on the CPU: the emulated device and the programs on top of it.

``build(target)`` runs ninja, which compiles what changed and nothing else. From a shell:

    python tests/emulator/build.py faulty_kernels faulty_kernels-thread

A program ends in the sanitizer that it is built with: ``-address`` (with undefined behaviour) or ``-thread``; without
either it is the plain build. The emulated device itself is never built with one, see sanitizers.h.
``libbnfused_emulated.so`` has the ops for torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulator"
OUTPUT = ROOT / "build" / "emulator"

# Aliasing: kernels read 16 bytes as what they are not. Contraction: nvcc makes a fused multiply-add of a * b + c.
FLAGS = "-std=c++20 -g -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=fast"
SANITIZERS = {
    "": "-O2",
    "-address": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "-thread": "-O1 -fsanitize=thread",
}
DEVICE = ("emulated_device.cpp", "fiber.cpp", "guarded_buffer.cpp")
LAUNCHERS = tuple(ROOT / "csrc" / "cuda" / f"batch_norm_{op}.cu" for op in ("train", "eval", "backward"))
PROGRAMS = {"faulty_kernels": (HERE / "faulty_kernels.cpp",)}
TORCH_OPS = (HERE / "emulated_ops.cpp", ROOT / "csrc" / "ops" / "schema.cpp")


def cuda_include() -> Path:
    """The folder of CUDA's headers: only types and conversions are used, nothing of CUDA is linked.

    Raises:
        FileNotFoundError: no toolkit was found, nor the headers that pip has.
    """
    site_packages = Path(sysconfig.get_paths()["purelib"])
    folders = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders += [Path("/usr/local/cuda"), site_packages / "nvidia" / "cu13"]
    for folder in folders:
        if (folder / "include" / "cuda_fp16.h").exists() and (folder / "include" / "crt" / "host_defines.h").exists():
            return folder / "include"
    raise FileNotFoundError(
        f"no CUDA headers in {', '.join(map(str, folders))}. Set CUDA_HOME=<folder of a CUDA toolkit>, or "
        f"{sys.executable} -m pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("no torch to build the emulated ops for")
    return Path(spec.origin).parent


def machine_flags() -> str:
    """Fused multiply-add where the compiler and this machine have it, as a GPU has."""
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
        # -rdynamic: the emulated device asks the linker for the names of kernels.
        f"  command = {compiler} -rdynamic $more $in -o $out $libraries -ldl",
        "  description = $out",
    ]

    def compile(source: Path, suffix: str, more: str) -> str:
        output = f"{source.stem}{suffix}.o"
        lines.append(f"build {output}: compile {source}\n  more = {more}")
        return output

    plain = f"{SANITIZERS['']} -fPIC"
    device = " ".join(compile(HERE / name, "", plain) for name in DEVICE)
    torch = torch_folder()
    headers = f"-isystem {torch / 'include'} -isystem {torch / 'include/torch/csrc/api/include'}"
    objects = " ".join(
        [compile(source, "", plain) for source in LAUNCHERS]
        + [compile(source, "", f"-O1 -fPIC {headers}") for source in TORCH_OPS]
    )
    lines.append(f"build libbnfused_emulated.so: link {objects} {device}")
    lines.append(f"  more = -shared\n  libraries = -L{torch / 'lib'} -ltorch_cpu -lc10")
    for name, sources in PROGRAMS.items():
        for suffix, sanitizer in SANITIZERS.items():
            objects = " ".join(compile(source, suffix, sanitizer) for source in sources)
            lines.append(f"build {name}{suffix}: link {objects} {device}\n  more = {sanitizer}")
    return "\n".join(lines) + "\n"


def build(*targets: str) -> Path:
    """Brings the targets up to date; the path of the first.

    Raises:
        RuntimeError: the compiler said no; its output is the message.
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "build.ninja"
    text = ninja_file()
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    command = [find_ninja(), "-C", str(OUTPUT), "-j", jobs, *targets]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return OUTPUT / targets[0]


def find_ninja() -> str:
    """ninja beside this Python, else the one on the PATH."""
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja") or "ninja"


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
