"""What a reader needs to judge numbers: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import bnfused


def found_in(path: str, pattern: str) -> str | None:
    """The first group of ``pattern`` in a file of Linux; None where there is no such file or match."""
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    return found_in("/proc/cpuinfo", r"^model name\s*: (.*\S)") or platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with ``+`` if files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    # git reads the files of another user, as in a container, only with this option. This file is one of them.
    git = ["git", "-C", str(root), "-c", f"safe.directory={root}"]
    head, status = output_of(*git, "rev-parse", "--short=12", "HEAD"), output_of(*git, "status", "--porcelain")
    return None if head is None or status is None else head + ("+" if status else "")


def describe_environment(device: torch.device | None = None, named_commit: str | None = None) -> dict[str, Any]:
    """What a reader needs to judge numbers: versions, machine, commit, date; of ``device`` too if it is a GPU.

    ``named_commit`` stands in for that of a copy that git knows nothing of.
    """
    environment: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bnfused": bnfused.__version__,
        "bnfused_extension": bnfused.is_available(),
        "bnfused_build": {key: str(value) for key, value in bnfused.build_info().items()},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        # Linux' setting for huge pages decides the price of fresh memory.
        "huge_pages": found_in("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(.*)\]"),
        "commit": commit() or named_commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_name(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
        environment |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "L2_MiB": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": next(iter(versions.split()), None),
        }
    return environment


def folder_of_device(results: Path, environment: Mapping[str, Any]) -> Path:
    """Where results of this device are kept in a folder of results."""
    return results / re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")


def missing_packages(console: Console, **needed: str) -> bool:
    """Whether a module of ``needed`` cannot be imported; then the package that has it is named."""
    missing = [package for module, package in needed.items() if not importlib.util.find_spec(module)]
    if missing:
        console.print(f"This needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return bool(missing)


def backend_line() -> str:
    """Which code ``bnfused`` runs in this process, in one line."""
    if bnfused.is_available():
        build = bnfused.build_info()
        shown = ", ".join(f"{key} {value}" for key, value in build.items() if value is not None)
        return f"bnfused {bnfused.__version__}, compiled extension ({shown})"
    return f"bnfused {bnfused.__version__}, REFERENCE PATH in plain torch, not the kernels: {bnfused.why_unavailable()}"


def print_environment(console: Console, environment: Mapping[str, Any]) -> None:
    if "capability" in environment:
        console.print(
            f"[bold]{environment['device']}[/], compute capability {environment['capability']}, "
            f"{environment['multiprocessors']} SMs, {environment['memory_GiB']} GiB, L2 {environment['L2_MiB']} MiB, "
            f"CUDA {environment['cuda']}, cuDNN {environment['cudnn']}, driver {environment['driver']}"
        )
    console.print(
        f"[bold]{environment['cpu']}[/], {environment['cores']} cores, {environment['system']}, "
        f"huge pages: {environment['huge_pages']}"
    )
    console.print(
        f"torch {environment['torch']} ({environment['torch_cpu_capability']}), "
        f"Python {environment['python']}, commit {environment['commit'] or 'unknown'}, "
        f"{environment['date']}"
    )
    style = "" if bnfused.is_available() else "bold red"
    console.print(backend_line(), style=style, markup=False, soft_wrap=True)
