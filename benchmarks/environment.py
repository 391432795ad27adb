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


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with ``+`` if files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[1]
    # Also where the files are another user's, as in a container: this file is one of them.
    git = ["git", "-C", str(root), "-c", f"safe.directory={root}"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def huge_pages() -> str | None:
    """Linux' setting for huge pages, which decides the price of fresh memory; None elsewhere."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return None


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
        "huge_pages": huge_pages(),
        "commit": commit() or named_commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": cpu_name(),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment |= {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "L2_MiB": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return environment


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


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
