"""Build the whole extension for a CUDA build of torch and import it, on a machine without a GPU: ``make cuda-build``.

Torch's wheel is downloaded once (0.5 GB, 1.1 GB unpacked) into build/cuda-build. Empty libraries (stubs.py) stand in
for the NVIDIA libraries that it loads. It runs in this Python, with the packages of this environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import check
import stubs

TORCH = "torch==2.11.0"  # the oldest supported; from PyPI it is a build for CUDA 13.0


def fetch(requirement: str, folder: Path) -> None:
    """Unpacks torch's wheel into ``folder``, unless an earlier call has completed that."""
    if (folder / "torch" / "version.py").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder.with_name(f"{folder.name}-wheel")
    print(f"fetching {requirement}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(wheels), requirement], check=True)
    (wheel,) = wheels.glob("torch-*.whl")
    partial = folder.with_name(f"{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    partial.rename(folder)
    shutil.rmtree(wheels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", default=TORCH, help="what pip fetches (default: %(default)s)")
    options = parser.parse_args()
    setup = check.load_setup()
    toolkit = setup.find_toolkit(os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc"))
    if toolkit is None:
        print("NOT BUILT: there is no CUDA toolkit. Install one with nvcc 13.0, or set CUDA_HOME=<its folder>")
        return 1
    start = time.monotonic()
    folder = check.ROOT / "build" / "cuda-build" / options.torch.replace("==", "-")
    site, libraries = folder / "site", Path(setup.runtime_folder(toolkit))
    fetch(options.torch, site)
    names = stubs.write(site / "torch" / "lib", libraries, folder / "stubs")
    print(f"stood in for {', '.join(names)}", flush=True)
    # The build, and the process that uses it, inherit these.
    os.environ["PYTHONPATH"] = str(site)
    os.environ["LD_LIBRARY_PATH"] = f"{folder / 'stubs'}{os.pathsep}{libraries}"
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")  # one is enough to link
    check.build(folder, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=archs)
    status = check.use(folder)
    print(f"{'FAILED' if status else 'ok'} in {time.monotonic() - start:.0f} s")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
