"""The source distribution and the wheel that ``make wheel`` builds, installed and used."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import bnfused

ROOT = Path(__file__).resolve().parents[2]
MINOR = ".".join(torch.__version__.split(".")[:2])


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both. The objects of the last build are linked again, nothing else is compiled."""
    folder = tmp_path_factory.mktemp("dist")
    for command in (f"build_meta.build_sdist({str(folder)!r})", f"build_meta.build_wheel({str(folder)!r})"):
        run(sys.executable, "-c", f"from setuptools import build_meta; {command}")
    return folder


@pytest.fixture(scope="module")
def wheel(packages: Path) -> Path:
    (path,) = packages.glob("*.whl")
    return path


def metadata(text: bytes) -> Message:
    return Parser().parsestr(text.decode())


def test_the_wheel_names_the_torch_that_it_was_compiled_for(wheel: Path) -> None:
    assert wheel.name.startswith(f"bnfused-{bnfused.__version__}+torch{MINOR}-")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = metadata(archive.read(name)).get_all("Requires-Dist")
    assert wanted is not None
    assert [line for line in wanted if line.startswith("torch")] == [f"torch=={MINOR}.*"]


def test_the_wheel_has_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("bnfused/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bnfused").rglob("*.py*") if path.suffix != ".pyc"}
    built = f"bnfused/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert names == modules | {built, "bnfused/_build_info.txt", "bnfused/py.typed"}


def test_the_source_distribution_has_every_file(packages: Path) -> None:
    """The tests too, and what they read; and it needs whichever torch it will be compiled for."""
    (path,) = packages.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        info = archive.extractfile(f"bnfused-{bnfused.__version__}/PKG-INFO")
        assert info is not None
        wanted = metadata(info.read()).get_all("Requires-Dist")
    assert wanted is not None and "torch>=2.11" in wanted
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files is git's")
    assert set(run("git", "ls-files").splitlines()) <= names
    assert {name for name in names if name.endswith((".so", ".pyc"))} == set()


def test_the_installed_wheel_passes_tests(wheel: Path, tmp_path: Path) -> None:
    """A part of the suite, run where the checkout's package cannot be imported."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # torch and pytest are those of this Python. It may have an editable bnfused, which only its own start-up finds.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    place = run(python, "-c", "import bnfused; print(bnfused.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(site)
    assert "ok in" in run(python, "-m", "bnfused", cwd=tmp_path)
    tests = ROOT / "tests" / "package"
    options = ("-q", "-p", "no:cacheprovider", "--backend", "cpu", "--rootdir", ROOT, "-k", "float32 or relu")
    said = run(python, "-m", "pytest", *options, tests / "test_functional.py", cwd=tmp_path)
    assert "extension built" in run(python, "-m", "pytest", "--collect-only", tests / "test_ops.py", cwd=tmp_path)
    assert " passed" in said and "failed" not in said


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {bnfused.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {bnfused.__version__}" in (ROOT / "CHANGELOG.md").read_text()
