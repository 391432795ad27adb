"""Builds the extension ``bnfused._C``; everything else about the package is in pyproject.toml.

What has to be decided (CUDA or not, for which GPUs, how many compilers at once) is decided by
functions of their arguments alone, which tests/tooling/test_build.py calls; ``main`` looks at the machine
and asks them. setuptools runs this file as ``__main__``, also on behalf of pip.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent

CPP_SOURCES = (
    "csrc/ops/schema.cpp",
    "csrc/ops/cpu.cpp",
    "csrc/ops/module.cpp",
    "csrc/ops/python.cpp",
    "csrc/cpu/leaves.cpp",
    "csrc/cpu/per_channel.cpp",
    "csrc/cpu/batch_norm_stats.cpp",
    "csrc/cpu/batch_norm_gather_stats.cpp",
    "csrc/cpu/batch_norm_train.cpp",
    "csrc/cpu/batch_norm_apply.cpp",
    "csrc/cpu/batch_norm_backward.cpp",
    "csrc/cpu/transpose.cpp",
    "csrc/cpu/leaves_baseline.cpp",
    "csrc/cpu/leaves_avx2.cpp",
    "csrc/cpu/leaves_avx512.cpp",
    "csrc/cpu/leaves_avx512_bf16.cpp",
)
# nvcc sees no header of torch: one costs it 100 s and 3 GB a file. What needs both is C++ over the runtime's C API.
CUDA_SOURCES = (
    "csrc/cuda/batch_norm_stats.cu",
    "csrc/cuda/batch_norm_train.cu",
    "csrc/cuda/batch_norm_apply.cu",
    "csrc/cuda/batch_norm_backward.cu",
    "csrc/cuda/workspace.cu",
)
CUDA_BINDING = ("csrc/ops/cuda.cpp",)

# No -std: torch adds the one that its headers need, unless a flag names another.
# No -march=native: the build would die of an illegal instruction on another CPU.
# -fno-math-errno: sqrt becomes an instruction, also in vectors; nothing here reads errno.
CXX_FLAGS = ("-O3", "-g0", "-Wall", "-Wextra", "-Wno-psabi", "-fno-math-errno", "-fvisibility=hidden")
# -std: no header of torch has a say here, and C++17 is the oldest that all of CUDA's own headers take.
# --expt-relaxed-constexpr: kernels call constexpr functions of headers that g++ reads too, and so bear no __device__.
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Icsrc",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
# The static runtime: nvcc generates calls to the runtime of its own minor version, and the dynamic one would be
# whichever torch has loaded, an older one maybe, or none beside a torch without CUDA. Both share torch's contexts
# and streams, which belong to the driver. It costs 1 MB.
CUDA_LIBRARIES = ("cudart_static", "dl", "rt", "pthread")
# Beside a torch without CUDA the kernels never run; the oldest and the newest that every nvcc since 11.8 knows.
ARCHS_WITHOUT_TORCH_CUDA = "7.5;9.0+PTX"

OLDEST_TORCH = (2, 11)
GIB_PER_COMPILER = 2  # what one compiler may take of a file that includes torch headers, rounded up

INSTALL = """\
    python -m pip install torch==2.13.0        # only where no torch is installed yet
    python -m pip install --no-build-isolation -e ."""


def cxx_flags(system: str) -> list[str]:
    """The C++ flags on ``sys.platform == system``.

    -fopenmp makes at::parallel_for parallel. It goes to the compiler only: the linker would bind a
    second OpenMP runtime beside torch's. Apple's clang has none.
    """
    return [*CXX_FLAGS, *([] if system == "darwin" else ["-fopenmp"])]


def check_torch(version: str) -> None:
    """Refuse a torch older than the oldest supported one, before it fails in some header."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < OLDEST_TORCH:
        raise SystemExit(
            f"bnfused: torch {'.'.join(map(str, OLDEST_TORCH))} or newer is needed, "
            f"{version} is installed. Install a newer one, then build again:\n{INSTALL}"
        )


def decide_cuda(
    setting: str,
    torch_cuda: str | None,
    nvcc: str | None,
    nvcc_version: str | None,
) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the line to print: why not, or what is odd about it.

    No GPU has to be visible: the machine that builds is often not the one that runs.

    Args:
        setting: BNFUSED_CUDA: ``auto`` builds them where everything is there, ``0`` never does,
            ``1`` makes an error of each reason not to, and builds them for a torch without CUDA too.
        torch_cuda: the CUDA version that torch is built for, None for a CPU build.
        nvcc: path of the compiler, None where there is none.
        nvcc_version: ``major.minor`` of it, None where it could not be read.

    Raises:
        SystemExit: an unknown setting, or ``1`` where the kernels cannot be built.
    """
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"bnfused: BNFUSED_CUDA must be auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return False, "BNFUSED_CUDA=0. Unset it to build the CUDA kernels where that is possible"
    if setting == "auto" and torch_cuda is None:
        return False, "the installed torch is built without CUDA. Install a CUDA build of torch"
    obstacle = _obstacle_to_cuda(torch_cuda, nvcc, nvcc_version)
    if obstacle is not None:
        if setting == "1":
            raise SystemExit(f"bnfused: BNFUSED_CUDA=1, but {obstacle}")
        return False, obstacle
    if torch_cuda is None:
        return True, (
            f"BNFUSED_CUDA=1 with a torch built without CUDA: nvcc at {nvcc} compiles the kernels and they are "
            "linked, but this torch has no CUDA tensors to run them on"
        )
    if nvcc_version != torch_cuda:
        return True, (
            f"nvcc at {nvcc} is CUDA {nvcc_version}, torch is built for CUDA {torch_cuda}. "
            "Within one major version that works; if nvcc does not know a GPU, set "
            "TORCH_CUDA_ARCH_LIST without it"
        )
    return True, ""


def _obstacle_to_cuda(torch_cuda: str | None, nvcc: str | None, nvcc_version: str | None) -> str | None:
    """The first thing that keeps the CUDA kernels from being built, and what mends it."""
    if nvcc is None:
        return (
            f"no nvcc was found{f' and torch is built for CUDA {torch_cuda}' if torch_cuda else ''}. Install the CUDA "
            f"{torch_cuda or '13'} toolkit, or set CUDA_HOME=<its folder> if it is installed"
        )
    if nvcc_version is None:
        return f"the version of nvcc at {nvcc} could not be read. Set CUDA_HOME=<folder of a working CUDA toolkit>"
    if torch_cuda is not None and _major(nvcc_version) != _major(torch_cuda):
        return (
            f"nvcc at {nvcc} is CUDA {nvcc_version}, torch is built for CUDA {torch_cuda}. "
            f"Set CUDA_HOME=<folder of a CUDA {_major(torch_cuda)} toolkit>, "
            f"or install a torch built for CUDA {_major(nvcc_version)}"
        )
    return None


def _major(version: str) -> str:
    return version.split(".")[0]


def cuda_arch_list(
    setting: str | None, visible: list[tuple[int, int]], torch_archs: list[str], torch_cuda: str | None
) -> str:
    """The GPUs to build for, as TORCH_CUDA_ARCH_LIST writes them.

    Args:
        setting: TORCH_CUDA_ARCH_LIST; what the user chose stands.
        visible: compute capability of each visible GPU.
        torch_archs: the GPUs that torch is built for, as ``sm_90``.
        torch_cuda: the CUDA version that torch is built for, None for a CPU build.

    Returns:
        The visible GPUs, else all that torch runs on; the newest with PTX, for newer ones.

    Raises:
        SystemExit: nothing tells.
    """
    if setting and setting != "native":
        return setting
    if torch_cuda is None:
        return ARCHS_WITHOUT_TORCH_CUDA
    matches = [re.fullmatch(r"sm_(\d+)(\d)", arch) for arch in torch_archs]
    supported = sorted({(int(m[1]), int(m[2])) for m in matches if m})
    # A GPU newer than all that torch knows runs the PTX of torch's newest.
    wanted = sorted({min([gpu, *supported[-1:]]) for gpu in visible})
    names = [f"{major}.{minor}" for major, minor in wanted or supported]
    if not names:
        raise SystemExit(
            "bnfused: no GPU is visible and torch names none that it is built for. "
            "Set TORCH_CUDA_ARCH_LIST, as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
        )
    return ";".join(names) + "+PTX"


def split_archs(arch_list: str) -> list[str]:
    """``["8.0", "9.0+PTX"]`` of ``8.0;9.0+PTX``, separated as torch allows it.

    Raises:
        SystemExit: one that is no compute capability; torch's names of GPU families are not known here.
    """
    archs = re.split(r"[;,\s]+", arch_list.strip("; ,"))
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(
                "bnfused: TORCH_CUDA_ARCH_LIST must be compute capabilities, as in '8.0;9.0+PTX', "
                f"got {arch!r} in {arch_list!r}"
            )
    return archs


def gencode_flags(archs: Iterable[str]) -> list[str]:
    """What nvcc is told: machine code for each, and PTX beside those that end in ``+PTX``."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def default_jobs(sources: int, cpus: int, free_gib: float | None) -> int:
    """How many compilers to run at once where MAX_JOBS does not say: as many as fit in memory."""
    limits = [sources, cpus]
    if free_gib is not None:
        limits.append(int(free_gib / GIB_PER_COMPILER))
    return max(1, min(limits))


def usable_cpus() -> int:
    """The CPUs that this process may run on, where the system tells, else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_gib() -> float | None:
    """Memory that new processes can have, or None where /proc does not tell."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) / 2**20 if match else None


def find_toolkit(cuda_home: str | None, nvcc_on_path: str | None) -> Path | None:
    """The folder of the CUDA toolkit, with nvcc and the runtime's headers; None where there is none.

    Args:
        cuda_home: what the user names; then no other is looked for.
        nvcc_on_path: which often is a wrapper, so that it has to be asked where the toolkit is: torch goes by its
            folder and ends up without headers.
    """
    places = [cuda_home] if cuda_home else [_toolkit_of(nvcc_on_path), "/usr/local/cuda"]
    for place in places:
        if place and Path(place, "bin", "nvcc").exists() and Path(place, "include", "cuda_runtime_api.h").exists():
            return Path(place).resolve()
    return None


def _toolkit_of(nvcc: str | None) -> str | None:
    if nvcc is None:
        return None
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    match = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return match[1] if match else None


def runtime_folder(toolkit: Path) -> str:
    """Where the static CUDA runtime is: distributions and conda put it in different places."""
    for folder in (toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").exists():
            return str(folder)
    raise SystemExit(
        f"bnfused: expected libcudart_static.a in lib64, lib or targets/*/lib of {toolkit}, found none. Install the "
        "CUDA runtime's development files (cuda-cudart-dev), or set CUDA_HOME=<folder of a whole CUDA toolkit>"
    )


def read_nvcc_version(nvcc: str) -> str | None:
    """``13.0`` of what ``nvcc --version`` prints, None where it does not run or print one."""
    match = re.search(r"release (\d+\.\d+)", _output_of([nvcc, "--version"]))
    return match[1] if match else None


def read_compiler_version() -> str:
    """The first line that the C++ compiler says of itself; torch compiles with $CXX or ``c++``."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return _output_of([*compiler, "--version"]).partition("\n")[0]


def _output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def import_torch() -> Any:
    """torch, or an exit that says what to type: pip shows it as it is."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit(
            f"bnfused: {error}. The extension is compiled for the torch that you run with, so\n"
            "torch has to be installed first, and the build must not be isolated from it:\n"
            f"{INSTALL}"
        ) from None
    return torch


def compile_kernels(nvcc: str, sources: Sequence[str], archs: Sequence[str], folder: Path, jobs: int) -> list[Path]:
    """Compile ``sources`` with nvcc, ``jobs`` at once, into ``folder``, and return the objects.

    What has not changed is kept. Torch's own step is not used: beside a torch without CUDA it has no nvcc, and it
    does not see that a header changed.

    Raises:
        SystemExit: one does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # All that a kernel may include, not what it does: a stale object takes a day to find.
    patterns = ("*.h", "kernels/*", "cuda/*h")
    headers = b"".join(path.read_bytes() for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern)))
    # nvcc reads the variables itself, for example to be told the host compiler.
    setting = [os.environ.get(f"NVCC_{name}_FLAGS", "") for name in ("PREPEND", "APPEND")] + [
        os.environ.get("NVCC_CCBIN", "")
    ]
    version = _output_of([nvcc, "--version"])

    def compile_one(source: str) -> Path:
        compiled = folder / f"{Path(source).stem}.o"
        command = [nvcc, *NVCC_FLAGS, *gencode_flags(archs), "-c", source, "-o", str(compiled)]
        content = [repr((command, setting, version)).encode(), (ROOT / source).read_bytes(), headers]
        key = hashlib.sha256(b"\0".join(content)).hexdigest()
        stamp = compiled.with_suffix(".key")
        if compiled.exists() and stamp.exists() and stamp.read_text() == key:
            return compiled
        stamp.unlink(missing_ok=True)
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{shlex.join(command)}\n{result.stdout}", end="", flush=True)
        if result.returncode != 0:
            raise SystemExit(f"bnfused: nvcc at {nvcc} could not compile {source}:\n{result.stdout}")
        stamp.write_text(key)
        return compiled

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, sources))


def build_command(
    base: Any,
    remark: str,
    stamp: dict[str, str | None],
    compile_objects: Callable[[Path, int], list[Path]] | None,
) -> Any:
    """torch's build_ext, which also links the kernels, keeps objects, limits its memory and leaves a stamp.

    Args:
        base: ``torch.utils.cpp_extension.BuildExtension``.
        remark: a line for stderr, or "".
        stamp: written as JSON to ``_build_info.txt`` beside the extension. The package reads it
            to tell which torch the extension was built for, also where that does not load.
        compile_objects: from a folder and a number of jobs to the compiled kernels; None without CUDA.
    """

    class BuildExtension(base):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.inplace:
                # An editable build would compile in a folder that pip deletes, and so from scratch
                # each time.
                self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")
            if compile_objects is not None:
                self.force = True  # else setuptools, without ninja, does not see that a kernel changed

        def run(self) -> None:
            if remark:
                print(f"bnfused: {remark}.", file=sys.stderr)
            sources = sum(len(extension.sources) for extension in self.extensions)
            jobs = default_jobs(sources, usable_cpus(), available_gib())
            os.environ.setdefault("MAX_JOBS", str(jobs))
            super().run()
            folder = Path(self.get_ext_fullpath("bnfused._C")).parent
            (folder / "_build_info.txt").write_text(json.dumps(stamp, indent=2) + "\n")

        def build_extensions(self) -> None:
            if compile_objects is not None:
                folder = Path(self.build_temp).resolve() / "kernels"
                objects = compile_objects(folder, int(os.environ["MAX_JOBS"]))
                for extension in self.extensions:
                    extension.extra_objects = [str(path) for path in objects]
            super().build_extensions()

    return BuildExtension


def main() -> None:
    from setuptools import setup

    torch = import_torch()
    check_torch(torch.__version__)
    from torch.utils import cpp_extension

    toolkit = find_toolkit(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc"))
    nvcc = str(toolkit / "bin" / "nvcc") if toolkit else None
    nvcc_version = read_nvcc_version(nvcc) if nvcc else None
    build_cuda, remark = decide_cuda(os.environ.get("BNFUSED_CUDA", "auto"), torch.version.cuda, nvcc, nvcc_version)
    if not build_cuda:
        remark = f"CPU-only build: {remark}"
    stamp: dict[str, str | None] = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "compiler": read_compiler_version(),
        "cuda": None,
        "cuda_archs": None,
    }
    sources, macros, options = list(CPP_SOURCES), [("BNFUSED_TORCH_VERSION", f'"{torch.__version__}"')], {}
    compile_objects = None
    if build_cuda:
        assert toolkit is not None and nvcc is not None
        archs = split_archs(
            cuda_arch_list(
                os.environ.get("TORCH_CUDA_ARCH_LIST"),
                [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())],
                # torch.cuda.get_arch_list() says the same, but nothing where no GPU is visible.
                torch._C._cuda_getArchFlags().split() if torch.version.cuda else [],
                torch.version.cuda,
            )
        )
        stamp["cuda"], stamp["cuda_archs"] = nvcc_version, ";".join(archs)
        sources += CUDA_BINDING
        macros += [("BNFUSED_CUDA_VERSION", f'"{nvcc_version}"'), ("BNFUSED_CUDA_ARCHS", f'"{",".join(archs)}"')]
        options = {"library_dirs": [runtime_folder(toolkit)], "libraries": list(CUDA_LIBRARIES)}

        def compile_objects(folder: Path, jobs: int) -> list[Path]:
            return compile_kernels(nvcc, CUDA_SOURCES, archs, folder, jobs)

    # Torch's CppExtension, whatever torch it is: the kernels need nothing of torch's CUDA libraries, and so the same
    # extension is built, linked and imported beside a torch that has none.
    extension = cpp_extension.CppExtension(
        "bnfused._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), *([str(toolkit / "include")] if build_cuda else [])],
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags(sys.platform)},
        # They go into a source distribution, also where this build does not compile them, and without ninja they
        # decide what is stale.
        depends=[
            *CUDA_SOURCES,
            *CUDA_BINDING,
            *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h")),
        ],
        **options,
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": build_command(cpp_extension.BuildExtension, remark, stamp, compile_objects)},
    )


if __name__ == "__main__":
    main()
