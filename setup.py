"""Builds the extension ``bnfused._C``, and says which torch it needs. The rest of the package is in pyproject.toml.

Functions of their arguments alone decide whether to build for CUDA, for which GPUs, and with how many compilers at
once; tests/tooling/test_build.py calls them. ``main`` looks at the machine and asks them. setuptools runs this file as
``__main__``, also when pip asks it to. A source distribution needs no torch.
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

# nvcc reads no header of torch: one takes 100 s and 3 GB in each file. csrc/ops/cuda.cpp needs torch and CUDA, so it is
# C++ that uses CUDA's C API.
CUDA_BINDING = ("csrc/ops/cuda.cpp",)


def _sources(pattern: str) -> tuple[str, ...]:
    """Relative to ROOT, because setuptools takes no absolute path."""
    names = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(pattern)))
    return tuple(name for name in names if name not in CUDA_BINDING)


CPP_SOURCES = _sources("csrc/*/*.cpp")
CUDA_SOURCES = _sources("csrc/cuda/*.cu")

# No -std: torch adds the one that its headers need.
# No -march=native: the extension would end in an illegal instruction on another CPU.
# -fno-math-errno: sqrt becomes an instruction, also of vectors. Nothing here reads errno.
CXX_FLAGS = ("-O3", "-g0", "-Wall", "-Wextra", "-Wno-psabi", "-fno-math-errno", "-fvisibility=hidden")
# -std: C++17 is the oldest that all of CUDA's own headers accept.
# --expt-relaxed-constexpr: kernels call constexpr functions of headers that g++ reads too, which have no __device__.
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Icsrc",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
# The static runtime (1 MB). nvcc generates calls to the runtime of its own minor version. The dynamic one would be the
# one that torch has loaded, which may be older, or missing. Both use the contexts and streams of the driver.
CUDA_LIBRARIES = ("cudart_static", "dl", "rt", "pthread")
# For a torch without CUDA, where the kernels never run: the oldest and the newest that every nvcc since 11.8 knows.
ARCHS_WITHOUT_TORCH_CUDA = "7.5;9.0+PTX"

OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = (77, 0, 3)  # the first that knows the license field of pyproject.toml
SOURCE_COMMANDS = {"egg_info", "sdist"}  # pip runs them in isolation, so without torch
GIB_PER_COMPILER = 2  # memory of a compiler that reads torch's headers, rounded up

INSTALL = """\
    pip install torch==2.13.0 'setuptools>=77.0.3' ninja      # only what is missing
    pip install --no-build-isolation <what you installed: a folder, an archive or a URL>
`uv pip install` takes the same option. `python -m build` takes --no-isolation."""


def cxx_flags(compiler: str) -> list[str]:
    """The C++ flags for a compiler, of which ``--version`` prints ``compiler``.

    -fopenmp makes at::parallel_for parallel with g++. It goes to the compiler only, because the linker would load a
    second OpenMP runtime. clang's own runtime would be a second one too, see csrc/cpu/driver.h.
    """
    return [*CXX_FLAGS, *([] if "clang" in compiler else ["-fopenmp"])]


def check_setuptools(version: str) -> None:
    """Refuse a setuptools that would reject pyproject.toml, with an error that does not name setuptools."""
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST_SETUPTOOLS:
        wanted = ".".join(map(str, OLDEST_SETUPTOOLS))
        raise SystemExit(f"bnfused: setuptools {wanted} or newer is needed, {version} is installed:\n{INSTALL}")


def version_and_requirements(torch: str | None) -> tuple[str, list[str]]:
    """The version of the package, and what it needs: of a wheel built for ``torch``, or of the sources for None.

    The C++ ABI of torch holds within a minor version, so a wheel needs the one that it was compiled for, and its
    version names it: 0.1.0+torch2.13.
    """
    init = (ROOT / "bnfused" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.*)"$', init, re.MULTILINE)
    assert found is not None
    # numpy only because torch uses it without requiring it, and warns "Failed to initialize NumPy" if it is missing.
    if torch is None:
        return found[1], [f"torch>={'.'.join(map(str, OLDEST_TORCH))}", "numpy"]
    minor = ".".join(torch.split(".")[:2])
    return f"{found[1]}+torch{minor}", [f"torch=={minor}.*", "numpy"]


def check_torch(version: str) -> None:
    """Refuse a torch older than the oldest supported one, which would fail with an error in a header."""
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < OLDEST_TORCH:
        raise SystemExit(
            f"bnfused: torch {'.'.join(map(str, OLDEST_TORCH))} or newer is needed, "
            f"{version} is installed. Install a newer one, then build again:\n{INSTALL}"
        )


def decide_cuda(setting: str, torch_cuda: str | None, nvcc: str | None, nvcc_version: str | None) -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and a line to print: why not, or a warning.

    ``setting`` is BNFUSED_CUDA. ``auto`` builds them if everything is installed, and ``0`` never. ``1`` makes each
    reason not to build them an error, and builds them for a torch without CUDA (``torch_cuda`` is None) too. No GPU has
    to be visible, because the machine that builds is often not the one that runs.
    """
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"bnfused: BNFUSED_CUDA must be auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return False, "BNFUSED_CUDA=0. Unset it to build the CUDA kernels if that is possible"
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
            f"nvcc at {nvcc} is CUDA {nvcc_version}, torch is built for CUDA {torch_cuda}. Within one major version "
            "that works; if nvcc does not know a GPU, set TORCH_CUDA_ARCH_LIST without it"
        )
    return True, ""


def _obstacle_to_cuda(torch_cuda: str | None, nvcc: str | None, nvcc_version: str | None) -> str | None:
    """The first reason why the CUDA kernels cannot be built, and what to do about it."""
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
    """The GPUs to build for, as TORCH_CUDA_ARCH_LIST writes them; a list that the user set is returned as it is.

    These are the visible GPUs (``(9, 0)``), or without any all that torch is built for (``sm_90``). The newest has PTX,
    for GPUs that are newer still.
    """
    if setting and setting != "native":
        return setting
    if torch_cuda is None:
        return ARCHS_WITHOUT_TORCH_CUDA
    matches = [re.fullmatch(r"sm_(\d+)(\d)", arch) for arch in torch_archs]
    supported = sorted({(int(m[1]), int(m[2])) for m in matches if m})
    # A GPU that is newer than all that torch knows runs the PTX of the newest.
    wanted = sorted({min([gpu, *supported[-1:]]) for gpu in visible})
    names = [f"{major}.{minor}" for major, minor in wanted or supported]
    if not names:
        raise SystemExit(
            "bnfused: no GPU is visible and torch names none that it is built for. "
            "Set TORCH_CUDA_ARCH_LIST, as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
        )
    return ";".join(names) + "+PTX"


def split_archs(arch_list: str) -> list[str]:
    """``["8.0", "9.0+PTX"]`` from ``8.0;9.0+PTX``, with each separator that torch allows.

    Torch's names of GPU families are not known here.
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
    """nvcc's flags: machine code for each, and also PTX for those that end in ``+PTX``."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def default_jobs(sources: int, cpus: int, free_gib: float | None) -> int:
    """How many compilers to run at once if MAX_JOBS is not set: as many as fit in memory."""
    limits = [sources, cpus]
    if free_gib is not None:
        limits.append(int(free_gib / GIB_PER_COMPILER))
    return max(1, min(limits))


def available_gib() -> float | None:
    """The memory that new processes can have, or None if /proc does not tell."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) / 2**20 if match else None


def find_toolkit(cuda_home: str | None, nvcc_on_path: str | None) -> Path | None:
    """The folder of the CUDA toolkit, with nvcc and the runtime's headers; None if there is none.

    If the user names ``cuda_home``, no other folder is tried. ``nvcc_on_path`` is asked for its toolkit, because it is
    often a wrapper in a folder without headers.
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
    """The folder of the static CUDA runtime. Distributions and conda put it in different places."""
    for folder in (toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").exists():
            return str(folder)
    raise SystemExit(
        f"bnfused: expected libcudart_static.a in lib64, lib or targets/*/lib of {toolkit}, found none. Install the "
        "CUDA runtime's development files (cuda-cudart-dev), or set CUDA_HOME=<folder of a whole CUDA toolkit>"
    )


def read_nvcc_version(nvcc: str) -> str | None:
    """``13.0`` from what ``nvcc --version`` prints; None if it does not run or prints no version."""
    match = re.search(r"release (\d+\.\d+)", _output_of([nvcc, "--version"]))
    return match[1] if match else None


def read_compiler_version() -> str:
    """The first line of the C++ compiler's ``--version``. Torch compiles with $CXX, or with ``c++``."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    return _output_of([*compiler, "--version"]).partition("\n")[0]


def _output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def import_torch() -> Any:
    """torch, or an exit with a message that says what to type, which pip shows unchanged."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit(
            f"bnfused: {error}. The extension is compiled for the torch that you run with.\n"
            f"So torch has to be installed first, and the build must not be isolated from it:\n{INSTALL}"
        ) from None
    return torch


def compile_kernels(nvcc: str, sources: Sequence[str], archs: Sequence[str], folder: Path, jobs: int) -> list[Path]:
    """Compile ``sources`` with nvcc, ``jobs`` at once, into ``folder``, and return the objects.

    Objects that have not changed are kept. Torch's own step is not used: with a torch without CUDA it has no nvcc, and
    it does not see that a header changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # All that a kernel may include, not only what it includes: a stale object takes a day to find.
    patterns = ("*.h", "kernels/*", "cuda/*h")
    headers = b"".join(path.read_bytes() for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern)))
    # nvcc reads these variables itself.
    setting = [os.environ.get(f"NVCC_{name}", "") for name in ("PREPEND_FLAGS", "APPEND_FLAGS", "CCBIN")]
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
    """Torch's build_ext, which also links the kernels, keeps objects, limits its memory and leaves a stamp.

    ``remark`` is a line for stderr. The stamp is ``_build_info.txt`` next to the extension: the package reads there for
    which torch the extension was built, even if it does not load. ``compile_objects`` takes a folder and a number of
    jobs and returns the compiled kernels; it is None without CUDA.
    """

    class BuildExtension(base):
        def finalize_options(self) -> None:
            if self.build_temp is None:
                # One folder for editable builds and wheels. pip deletes the folder of an editable build.
                self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")
            super().finalize_options()
            if compile_objects is not None:
                self.force = True  # setuptools does not see that a kernel changed

        def run(self) -> None:
            if remark:
                print(f"bnfused: {remark}.", file=sys.stderr)
            sources = sum(len(extension.sources) for extension in self.extensions)
            # macOS does not tell which CPUs this process may use.
            cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            jobs = default_jobs(sources, cpus, available_gib())
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


def extension_and_command(torch: Any) -> tuple[Any, Any]:
    """The extension for the installed torch and this machine, and the command that builds it."""
    from torch.utils import cpp_extension

    toolkit = find_toolkit(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc"))
    nvcc = str(toolkit / "bin" / "nvcc") if toolkit else None
    nvcc_version = read_nvcc_version(nvcc) if nvcc else None
    build_cuda, remark = decide_cuda(os.environ.get("BNFUSED_CUDA", "auto"), torch.version.cuda, nvcc, nvcc_version)
    if not build_cuda:
        remark = f"CPU-only build: {remark}"
    compiler = read_compiler_version()
    stamp: dict[str, str | None] = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "compiler": compiler,
        "cuda": None,
        "cuda_archs": None,
    }
    sources, macros, options = list(CPP_SOURCES), [("BNFUSED_TORCH_VERSION", f'"{torch.__version__}"')], {}
    include_dirs = [str(ROOT / "csrc")]
    compile_objects = None
    if build_cuda:
        assert toolkit is not None and nvcc is not None
        visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        # torch.cuda.get_arch_list() says the same, but nothing if no GPU is visible.
        torch_archs = torch._C._cuda_getArchFlags().split() if torch.version.cuda else []
        wanted = cuda_arch_list(os.environ.get("TORCH_CUDA_ARCH_LIST"), visible, torch_archs, torch.version.cuda)
        archs = split_archs(wanted)
        stamp["cuda"], stamp["cuda_archs"] = nvcc_version, ";".join(archs)
        sources += CUDA_BINDING
        include_dirs.append(str(toolkit / "include"))
        macros += [("BNFUSED_CUDA_VERSION", f'"{nvcc_version}"'), ("BNFUSED_CUDA_ARCHS", f'"{",".join(archs)}"')]
        options = {"library_dirs": [runtime_folder(toolkit)], "libraries": list(CUDA_LIBRARIES)}

        def compile_objects(folder: Path, jobs: int) -> list[Path]:
            return compile_kernels(nvcc, CUDA_SOURCES, archs, folder, jobs)

    # CppExtension with CUDA too: the kernels need none of torch's CUDA libraries. So the same extension is built,
    # linked and imported with a torch that has none.
    extension = cpp_extension.CppExtension(
        "bnfused._C",
        sources,
        include_dirs=include_dirs,
        define_macros=macros,
        # -isystem: the compiler shows no warnings of torch's headers.
        extra_compile_args={
            "cxx": cxx_flags(compiler) + [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
        },
        depends=[path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("csrc/**/*.*"))],
        **options,
    )
    return extension, build_command(cpp_extension.BuildExtension, remark, stamp, compile_objects)


def main() -> None:
    import setuptools

    check_setuptools(setuptools.__version__)
    torch_version, options = None, {}
    if not SOURCE_COMMANDS.intersection(sys.argv):
        torch = import_torch()
        torch_version = torch.__version__
        check_torch(torch_version)
        extension, command = extension_and_command(torch)
        options = {"ext_modules": [extension], "cmdclass": {"build_ext": command}}
    version, requirements = version_and_requirements(torch_version)
    setuptools.setup(version=version, install_requires=requirements, **options)


if __name__ == "__main__":
    main()
