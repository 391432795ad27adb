"""Builds the extension ``bnfused._C``; everything else about the package is in pyproject.toml.

What has to be decided (CUDA or not, for which GPUs, how many compilers at once) is decided by
functions of their arguments alone, which tests/test_build.py calls; ``main`` looks at the machine
and asks them. setuptools runs this file as ``__main__``, also on behalf of pip.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent

CPP_SOURCES = (
    "csrc/ops/schema.cpp",
    "csrc/ops/cpu.cpp",
    "csrc/ops/module.cpp",
    "csrc/cpu/driver.cpp",
    "csrc/cpu/batch_norm_train.cpp",
    "csrc/cpu/batch_norm_eval.cpp",
    "csrc/cpu/batch_norm_backward.cpp",
    "csrc/cpu/leaves_baseline.cpp",
    "csrc/cpu/leaves_avx2.cpp",
    "csrc/cpu/leaves_avx512.cpp",
)
CUDA_SOURCES: tuple[str, ...] = ()

# No -std: torch adds the one that its headers need, unless a flag names another.
# No -march=native: the build would die of an illegal instruction on another CPU.
CXX_FLAGS = ("-O3", "-g0", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden")
# No flag with the letters "arch": torch takes one for a choice of GPUs and then adds none itself.
NVCC_FLAGS = ("-O3", "-lineinfo", "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden")

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
    has_sources: bool,
) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the line to print: why not, or what is odd about it.

    No GPU has to be visible: the machine that builds is often not the one that runs.

    Args:
        setting: BNFUSED_CUDA: ``auto`` builds them where everything is there, ``0`` never does,
            ``1`` makes an error of each reason not to.
        torch_cuda: the CUDA version that torch is built for, None for a CPU build.
        nvcc: path of the compiler, None where there is none.
        nvcc_version: ``major.minor`` of it, None where it could not be read.
        has_sources: whether there are kernels to build.

    Raises:
        SystemExit: an unknown setting, or ``1`` where the kernels cannot be built.
    """
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"bnfused: BNFUSED_CUDA must be auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return False, "BNFUSED_CUDA=0. Unset it to build the CUDA kernels where that is possible"
    obstacle = _obstacle_to_cuda(torch_cuda, nvcc, nvcc_version, has_sources)
    if obstacle is not None:
        if setting == "1":
            raise SystemExit(f"bnfused: BNFUSED_CUDA=1, but {obstacle}")
        return False, obstacle
    if nvcc_version != torch_cuda:
        return True, (
            f"nvcc at {nvcc} is CUDA {nvcc_version}, torch is built for CUDA {torch_cuda}. "
            "Within one major version that works; if nvcc does not know a GPU, set "
            "TORCH_CUDA_ARCH_LIST without it"
        )
    return True, ""


def _obstacle_to_cuda(
    torch_cuda: str | None, nvcc: str | None, nvcc_version: str | None, has_sources: bool
) -> str | None:
    """The first thing that keeps the CUDA kernels from being built, and what mends it."""
    if not has_sources:
        return "this version has no CUDA kernels yet. CUDA tensors run the reference in plain torch"
    if torch_cuda is None:
        return "the installed torch is built without CUDA. Install a CUDA build of torch"
    if nvcc is None:
        return (
            f"torch is built for CUDA {torch_cuda} and no nvcc was found. Install the CUDA "
            f"{torch_cuda} toolkit, or set CUDA_HOME=<its folder> if it is installed"
        )
    if nvcc_version is None:
        return f"the version of nvcc at {nvcc} could not be read. Set CUDA_HOME=<folder of a working CUDA toolkit>"
    if _major(nvcc_version) != _major(torch_cuda):
        return (
            f"nvcc at {nvcc} is CUDA {nvcc_version}, torch is built for CUDA {torch_cuda}. "
            f"Set CUDA_HOME=<folder of a CUDA {_major(torch_cuda)} toolkit>, "
            f"or install a torch built for CUDA {_major(nvcc_version)}"
        )
    return None


def _major(version: str) -> str:
    return version.split(".")[0]


def cuda_arch_list(setting: str | None, visible: list[tuple[int, int]], torch_archs: list[str]) -> str:
    """The GPUs to build for, as TORCH_CUDA_ARCH_LIST writes them.

    Args:
        setting: TORCH_CUDA_ARCH_LIST; what the user chose stands.
        visible: compute capability of each visible GPU.
        torch_archs: ``torch.cuda.get_arch_list()``; needs no GPU to be visible.

    Returns:
        The visible GPUs, else all that torch runs on; the newest with PTX, for newer ones.

    Raises:
        SystemExit: nothing tells.
    """
    if setting and setting != "native":
        return setting
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


def find_nvcc(cuda_home: str | None) -> str | None:
    """nvcc of the toolkit that torch would use, None where it has none."""
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    return str(nvcc) if cuda_home and nvcc.exists() else None


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


def build_command(base: Any, remark: str, stamp: dict[str, str | None]) -> Any:
    """torch's build_ext, which also keeps objects, limits its memory and leaves a stamp.

    Args:
        base: ``torch.utils.cpp_extension.BuildExtension``.
        remark: a line for stderr, or "".
        stamp: written as JSON to ``_build_info.txt`` beside the extension. The package reads it
            to tell which torch the extension was built for, also where that does not load.
    """

    class BuildExtension(base):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.inplace:
                # An editable build would compile in a folder that pip deletes, and so from scratch
                # each time.
                self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")

        def run(self) -> None:
            if remark:
                print(f"bnfused: {remark}.", file=sys.stderr)
            sources = sum(len(extension.sources) for extension in self.extensions)
            jobs = default_jobs(sources, usable_cpus(), available_gib())
            os.environ.setdefault("MAX_JOBS", str(jobs))
            super().run()
            folder = Path(self.get_ext_fullpath("bnfused._C")).parent
            (folder / "_build_info.txt").write_text(json.dumps(stamp, indent=2) + "\n")

    return BuildExtension


def main() -> None:
    from setuptools import setup

    torch = import_torch()
    check_torch(torch.__version__)
    from torch.utils import cpp_extension

    nvcc = find_nvcc(cpp_extension.CUDA_HOME)
    build_cuda, remark = decide_cuda(
        os.environ.get("BNFUSED_CUDA", "auto"),
        torch.version.cuda,
        nvcc,
        read_nvcc_version(nvcc) if nvcc else None,
        bool(CUDA_SOURCES),
    )
    if not build_cuda:
        remark = f"CPU-only build: {remark}"
    stamp = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "compiler": read_compiler_version(),
        "cuda": torch.version.cuda if build_cuda else None,
        "cuda_archs": None,
    }
    make_extension = cpp_extension.CppExtension
    if build_cuda:
        make_extension = cpp_extension.CUDAExtension
        stamp["cuda_archs"] = os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_arch_list(
            os.environ.get("TORCH_CUDA_ARCH_LIST"),
            [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())],
            torch.cuda.get_arch_list(),
        )
    extension = make_extension(
        "bnfused._C",
        [*CPP_SOURCES, *(CUDA_SOURCES if build_cuda else ())],
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("BNFUSED_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args={"cxx": cxx_flags(sys.platform), "nvcc": list(NVCC_FLAGS)},
        # Headers: they go into a source distribution, and without ninja they decide what is stale.
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h")),
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": build_command(cpp_extension.BuildExtension, remark, stamp)},
    )


if __name__ == "__main__":
    main()
