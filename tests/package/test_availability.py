"""The package without its extension, with one built for another torch, and what it says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnfused
from bnfused import _extension

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds the package in ``cwd``."""
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(cwd)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


BLOCKED = """
import sys
sys.modules["bnfused._C"] = None  # the import system takes this for a module that cannot be found
import bnfused, torch
"""

USE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    y = bnfused.functional.batch_norm(x, mean, var, training=True, activation="relu")
    y.square().sum().backward()
    bnfused.functional.batch_norm(x, mean, var)
    bnfused.BatchNorm1d(3)(x)
same = bnfused.reference.batch_norm(x, torch.zeros(3), torch.ones(3), training=True, activation="relu")
print(json.dumps({
    "available": bnfused.is_available(),
    "why": bnfused.why_unavailable(),
    "info": bnfused.build_info(),
    "warnings": [str(w.message) for w in caught if "bnfused" in str(w.message)],
    "same": torch.equal(y, same),
    "updated": bool((var != 1).all()),
    "grad": bool(x.grad.abs().sum() > 0),
}))
"""


def report(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_without_the_extension():
    """Everything imports and runs the reference; one warning, with the command that builds the extension."""
    said = report(python(BLOCKED + USE))
    assert not said["available"]
    assert _extension.REBUILD in said["why"]
    assert said["info"] == {}
    assert len(said["warnings"]) == 1, said["warnings"]
    assert _extension.REBUILD in said["warnings"][0]
    assert said["same"]
    assert said["updated"]
    assert said["grad"]


def test_importing_alone_does_not_warn():
    """A program that never calls batch norm hears nothing."""
    result = python(BLOCKED)
    assert result.returncode == 0
    assert "bnfused" not in result.stderr


def test_compiles_without_the_extension():
    """torch.compile of the fallback: the reference is plain torch."""
    code = """
run = torch.compile(bnfused.functional.batch_norm, backend="eager")
y = run(torch.ones(4, 3) * torch.arange(4.0).view(4, 1), None, None, training=True)
print(y.sum().abs().item() < 1e-5)
"""
    result = python(BLOCKED + code)
    assert result.stdout.strip().endswith("True"), result.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package whose stamp can be changed."""
    shutil.copytree(ROOT / "bnfused", tmp_path / "bnfused", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_built_for_another_torch(checkout):
    """Its stamp is read before it is loaded: the message says both versions and how to rebuild; nothing crashes."""
    stamp = {"torch": "2.1.0+cpu", "compiler": "a compiler"}
    (checkout / "bnfused" / "_build_info.txt").write_text(json.dumps(stamp))
    said = report(python("import bnfused, torch\n" + USE, cwd=checkout))
    assert not said["available"]
    for part in ("2.1.0+cpu", torch.__version__, "rebuild it with: pip install --no-build-isolation"):
        assert part in said["why"], said["why"]
    assert said["same"]


def test_built_from_older_sources(checkout):
    """An op that the sources have come to call is not in it: the message says which one, and how to rebuild."""
    source = checkout / "bnfused" / "fake.py"
    source.write_text(source.read_text() + 'KERNELS["batch_norm_to_come"] = _eval\n')
    said = report(python("import bnfused, torch\n" + USE, cwd=checkout))
    assert not said["available"]
    assert "batch_norm_to_come" in said["why"]
    assert "rebuild it with: pip install --no-build-isolation" in said["why"]
    assert said["same"]


def test_extension_that_does_not_load(checkout):
    """A broken file beside a right stamp, as an interrupted build leaves it."""
    stamp = {"torch": torch.__version__, "compiler": "a compiler"}
    (checkout / "bnfused" / "_build_info.txt").write_text(json.dumps(stamp))
    for file in (checkout / "bnfused").glob("_C*.so"):
        file.unlink()
    suffix = __import__("sysconfig").get_config_var("EXT_SUFFIX")
    (checkout / "bnfused" / f"_C{suffix}").write_text("not a library")
    said = report(python("import bnfused, torch\n" + USE, cwd=checkout))
    assert not said["available"]
    assert "build it with: pip install --no-build-isolation" in said["why"]
    assert len(said["warnings"]) == 1


@pytest.mark.parametrize("stamp", ["", "not json", "{}"])
def test_unreadable_stamp(checkout, stamp):
    """A damaged stamp is no reason to fail at import."""
    (checkout / "bnfused" / "_build_info.txt").write_text(stamp)
    result = python("import bnfused; print(bnfused.why_unavailable())", cwd=checkout)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("extension")
def test_build_info():
    """What the extension was built with, and the torch that runs it."""
    info = bnfused.build_info()
    assert info["torch"].split("+")[0].split(".")[:2] == torch.__version__.split("+")[0].split(".")[:2]
    assert {"compiler", "cpu_capability", "openmp", "cuda", "cuda_archs"} <= set(info)
    assert info["openmp"] is True, "without OpenMP torch has no threads for the kernels"
    assert bnfused.why_unavailable() is None


@pytest.mark.usefixtures("extension")
def test_self_test():
    """``python -m bnfused`` says what is there and tries it."""
    result = subprocess.run(
        [sys.executable, "-m", "bnfused"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout
    tried = re.findall(
        r"^self-test (\w+) +largest error \S+ of \S+ allowed \(cpu kernels\)$", result.stdout, re.MULTILINE
    )
    assert tried == ["contiguous_format", "channels_last"]
    assert re.search(r"^ok in \d", result.stdout, re.MULTILINE)


def test_self_test_fails_without_the_extension(checkout):
    """The exit status and the last line say it: the results alone are right, the reference computes them."""
    for file in (checkout / "bnfused").glob("_C*.so"):
        file.write_text("not a library")
    result = python("import runpy; runpy.run_module('bnfused', run_name='__main__')", cwd=checkout)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "not loaded: the extension could not be imported" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAILED: the extension is not loaded")


@pytest.mark.parametrize("has_sources", [True, False])
def test_the_advice_fits_a_checkout_and_an_installed_package(checkout, has_sources):
    if has_sources:
        (checkout / "setup.py").touch()
    result = python("from bnfused import _extension; print(_extension.REBUILD)", cwd=checkout)
    assert result.stdout.startswith("pip install --no-build-isolation ")
    assert result.stdout.strip().endswith(" -e .") == has_sources
    assert ("sources" in result.stdout) != has_sources


def test_public_names():
    """What is listed is there, and says what it is."""
    for name in bnfused.__all__:
        assert getattr(bnfused, name).__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", bnfused.__version__)
