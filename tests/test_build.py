"""What setup.py decides, on machines that this one is not."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = "/opt/cuda/bin/nvcc"


def _load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bnfused_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_setup()


def _run_setup(folder: Path, *arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the setup.py of ``folder`` as setuptools does, after ``before`` in the same process."""
    code = (
        "import runpy, sys\n"
        f"{before}\n"
        f"sys.argv = ['setup.py', *{list(arguments)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class TestDecideCuda:
    def test_builds_where_everything_is_there(self) -> None:
        """Without a GPU to look at: none of the arguments says whether one is visible."""
        assert build.decide_cuda("auto", "13.0", NVCC, "13.0", True) == (True, "")
        assert build.decide_cuda("1", "13.0", NVCC, "13.0", True) == (True, "")

    def test_zero_wins_over_a_machine_that_could(self) -> None:
        chosen, reason = build.decide_cuda("0", "13.0", NVCC, "13.0", True)
        assert not chosen
        assert "BNFUSED_CUDA=0" in reason

    @pytest.mark.parametrize(
        ("torch_cuda", "nvcc", "nvcc_version", "has_sources", "words"),
        [
            ("13.0", NVCC, "13.0", False, ["no CUDA kernels yet"]),
            (None, NVCC, "13.0", True, ["torch is built without CUDA", "CUDA build of torch"]),
            ("13.0", None, None, True, ["no nvcc", "CUDA 13.0 toolkit", "CUDA_HOME="]),
            ("13.0", NVCC, None, True, [NVCC, "could not be read", "CUDA_HOME="]),
            ("13.0", NVCC, "12.8", True, [NVCC, "12.8", "13.0", "CUDA_HOME=", "CUDA 13 toolkit"]),
            # "9" > "13" as text: versions are not compared as strings.
            ("13.0", NVCC, "9.2", True, [NVCC, "9.2", "13.0"]),
        ],
        ids=["no kernels", "torch for the CPU", "no nvcc", "mute nvcc", "other major", "old nvcc"],
    )
    def test_each_obstacle_names_itself_and_its_remedy(
        self,
        torch_cuda: str | None,
        nvcc: str | None,
        nvcc_version: str | None,
        has_sources: bool,
        words: list[str],
    ) -> None:
        """auto goes on without CUDA and says why; 1 stops with the same words."""
        machine = (torch_cuda, nvcc, nvcc_version, has_sources)
        chosen, reason = build.decide_cuda("auto", *machine)
        assert not chosen
        with pytest.raises(SystemExit) as stop:
            build.decide_cuda("1", *machine)
        for word in words:
            assert word in reason
            assert word in str(stop.value)
        assert "BNFUSED_CUDA=1" in str(stop.value)
        assert "\n" not in reason

    def test_another_minor_version_is_a_remark_only(self) -> None:
        """nvcc 13.1 builds for a torch of 13.0: to refuse that is what users comment out."""
        for setting in ("auto", "1"):
            chosen, remark = build.decide_cuda(setting, "13.0", NVCC, "13.1", True)
            assert chosen
            assert NVCC in remark and "13.0" in remark and "13.1" in remark

    @pytest.mark.parametrize("setting", ["", "yes", "TRUE", "2", "auto "])
    def test_any_other_setting_is_an_error_that_lists_the_three(self, setting: str) -> None:
        with pytest.raises(SystemExit, match="auto, 0 or 1") as stop:
            build.decide_cuda(setting, "13.0", NVCC, "13.0", True)
        assert repr(setting) in str(stop.value)


class TestCudaArchList:
    TORCH = ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"]

    def test_the_users_list_stands(self) -> None:
        assert build.cuda_arch_list("8.6+PTX", [(9, 0)], self.TORCH) == "8.6+PTX"

    def test_visible_gpus_once_each_in_numeric_order(self) -> None:
        """As text 12.0 sorts before 8.0, and the PTX would go to the older one."""
        visible = [(12, 0), (8, 0), (12, 0)]
        assert build.cuda_arch_list(None, visible, self.TORCH) == "8.0;12.0+PTX"
        assert build.cuda_arch_list("native", visible, self.TORCH) == "8.0;12.0+PTX"

    def test_a_gpu_newer_than_torch_knows_gets_its_newest(self) -> None:
        assert build.cuda_arch_list(None, [(12, 1)], self.TORCH) == "12.0+PTX"

    def test_without_a_gpu_all_that_torch_runs_on(self) -> None:
        """torch itself dies of an IndexError here, in a container build for example."""
        assert build.cuda_arch_list("", [], self.TORCH) == "7.5;8.0;9.0;12.0+PTX"

    def test_says_what_to_set_where_nothing_tells(self) -> None:
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST="):
            build.cuda_arch_list(None, [], [])


class TestJobs:
    @pytest.mark.parametrize(
        ("sources", "cpus", "free_gib", "jobs"),
        [
            (9, 64, 500.0, 9),
            (9, 2, 500.0, 2),
            (9, 64, 7.9, 3),
            (9, 64, 0.5, 1),
            (9, 4, None, 4),
        ],
        ids=["sources", "cpus", "memory", "at least one", "memory unknown"],
    )
    def test_the_scarcest_decides(self, sources: int, cpus: int, free_gib: float | None, jobs: int) -> None:
        assert build.default_jobs(sources, cpus, free_gib) == jobs

    def test_free_memory_is_some_of_the_machines(self) -> None:
        """In MiB it would be more than there is, in TiB next to nothing."""
        free = build.available_gib()
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        assert free is None or total / 500 < free < total


class TestFlags:
    def test_none_that_breaks_the_build_elsewhere(self) -> None:
        """-std fights torch's own; "arch" is -march=native, or a choice of GPUs to torch."""
        flags = [*build.cxx_flags("linux"), *build.NVCC_FLAGS]
        assert [flag for flag in flags if "std" in flag or "arch" in flag] == []

    def test_openmp_is_the_compilers_and_not_apples(self) -> None:
        assert "-fopenmp" in build.cxx_flags("linux")
        assert "-fopenmp" not in build.cxx_flags("darwin")


def test_every_source_is_listed_and_every_listed_one_is_there() -> None:
    """A file that is forgotten in setup.py shows only as an undefined symbol at import."""
    listed = {*build.CPP_SOURCES, *build.CUDA_SOURCES}
    there = {
        str(path.relative_to(ROOT))
        for folder in ("ops", "cpu", "cuda")
        for path in (ROOT / "csrc" / folder).glob("*.c*")
        if path.suffix in (".cpp", ".cu")
    }
    assert there == listed


@pytest.mark.parametrize("version", ["2.10.1", "1.13.1+cu117", "2.9.0a0+git1234"])
def test_an_old_torch_is_refused(version: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(version)):
        build.check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_a_new_torch_is_taken(version: str) -> None:
    """As text "2.9" is more than "2.11"."""
    assert build.check_torch(version) is None


def test_without_torch_the_two_commands_are_named() -> None:
    """None in sys.modules is how Python spells a module that is not there."""
    result = _run_setup(ROOT, "--name", before="sys.modules['torch'] = None")
    assert result.returncode == 1
    assert "pip install torch==2.13.0" in result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broken_torch_is_not_called_missing(tmp_path: Path) -> None:
    """A torch whose own import fails shows its own error: to install it again may not mend it."""
    (tmp_path / "torch.py").write_text("import a_module_that_torch_needs\n")
    result = _run_setup(ROOT, "--name", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert result.returncode != 0
    assert "a_module_that_torch_needs" in result.stderr
    assert "has to be installed first" not in result.stderr


class TestNvcc:
    @pytest.fixture
    def toolkit(self, tmp_path: Path) -> Path:
        """A toolkit whose nvcc only says which it is."""
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
        nvcc.chmod(0o755)
        return tmp_path

    def test_is_found_and_read(self, toolkit: Path) -> None:
        nvcc = build.find_nvcc(str(toolkit))
        assert nvcc == str(toolkit / "bin" / "nvcc")
        assert build.read_nvcc_version(nvcc) == "12.8"

    def test_none_where_there_is_none(self, tmp_path: Path) -> None:
        assert build.find_nvcc(None) is None
        assert build.find_nvcc(str(tmp_path)) is None

    def test_that_fails_has_no_version(self, toolkit: Path) -> None:
        nvcc = toolkit / "bin" / "nvcc"
        nvcc.write_text("#!/bin/sh\necho 'release 12.8'\nexit 1\n")
        assert build.read_nvcc_version(str(nvcc)) is None


class TestWholeBuild:
    """setup.py with sources of a line each: what it compiles, says and leaves behind."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("with space") / "a clone"
        (folder / "bnfused").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        (folder / "bnfused" / "__init__.py").write_text('__version__ = "0"\n')
        for number, name in enumerate(build.CPP_SOURCES):
            source = folder / name
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(f"int stub_{number} = {number};\n")
        (folder / "csrc" / "ops" / "module.cpp").write_text(
            "#include <Python.h>\n"
            "static PyModuleDef definition = {PyModuleDef_HEAD_INIT, BNFUSED_TORCH_VERSION};\n"
            "PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }\n"
        )
        return folder

    @pytest.fixture(scope="class")
    def built(self, folder: Path) -> subprocess.CompletedProcess[str]:
        return _run_setup(folder, "build_ext", "--inplace", BNFUSED_CUDA="0")

    def test_succeeds(self, built: subprocess.CompletedProcess[str]) -> None:
        assert built.returncode == 0, built.stdout + built.stderr

    def test_a_cpu_build_says_so_in_one_line(self, built: subprocess.CompletedProcess[str]) -> None:
        lines = [line for line in built.stderr.splitlines() if "bnfused: " in line]
        assert len(lines) == 1
        assert lines[0].startswith("bnfused: CPU-only build: BNFUSED_CUDA=0. ")

    def test_the_extension_and_the_stamp_name_the_same_torch(
        self, folder: Path, built: subprocess.CompletedProcess[str]
    ) -> None:
        """The stub carries BNFUSED_TORCH_VERSION as the name of its module."""
        import torch

        assert built.returncode == 0
        stamp = json.loads((folder / "bnfused" / "_build_info.txt").read_text())
        assert stamp["torch"] == torch.__version__
        assert stamp["python"] == sys.version.split()[0]
        assert stamp["compiler"]
        assert stamp["cuda"] is None
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        binary = (folder / "bnfused" / f"_C{suffix}").read_bytes()
        assert torch.__version__.encode() in binary

    def test_a_failed_build_leaves_no_stamp(self, folder: Path, tmp_path: Path) -> None:
        """Else the package would trust an extension that was never made."""
        clone = tmp_path / "clone"
        shutil.copytree(folder, clone, ignore=shutil.ignore_patterns("build", "_build_info.txt", "_C*"))
        (clone / "csrc" / "ops" / "cpu.cpp").write_text("#error no\n")
        failed = _run_setup(clone, "build_ext", "--inplace", BNFUSED_CUDA="0")
        assert failed.returncode != 0
        assert "#error no" in failed.stdout + failed.stderr
        assert not (clone / "bnfused" / "_build_info.txt").exists()

    def test_cuda_that_cannot_be_built_stops_where_it_is_demanded(self, folder: Path) -> None:
        """No test machine's torch and nvcc make the difference: CUDA is switched off in torch."""
        result = _run_setup(
            folder,
            "build_ext",
            "--inplace",
            before="import torch; torch.version.cuda = None",
            BNFUSED_CUDA="1",
        )
        assert result.returncode == 1
        assert "BNFUSED_CUDA=1, but" in result.stderr
        assert "Traceback" not in result.stderr
