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
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import bnfused

ROOT = Path(__file__).resolve().parents[2]
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
        assert build.decide_cuda("auto", "13.0", NVCC, "13.0") == (True, "")
        assert build.decide_cuda("1", "13.0", NVCC, "13.0") == (True, "")

    def test_zero_wins_over_a_machine_that_could(self) -> None:
        chosen, reason = build.decide_cuda("0", "13.0", NVCC, "13.0")
        assert not chosen
        assert "BNFUSED_CUDA=0" in reason

    @pytest.mark.parametrize(
        ("torch_cuda", "nvcc", "nvcc_version", "words"),
        [
            ("13.0", None, None, ["no nvcc", "CUDA 13.0 toolkit", "CUDA_HOME="]),
            ("13.0", NVCC, None, [NVCC, "could not be read", "CUDA_HOME="]),
            ("13.0", NVCC, "12.8", [NVCC, "12.8", "13.0", "CUDA_HOME=", "CUDA 13 toolkit"]),
            # "9" > "13" as text: versions are not compared as strings.
            ("13.0", NVCC, "9.2", [NVCC, "9.2", "13.0"]),
        ],
        ids=["no nvcc", "mute nvcc", "other major", "old nvcc"],
    )
    def test_each_obstacle_names_itself_and_its_remedy(
        self, torch_cuda: str | None, nvcc: str | None, nvcc_version: str | None, words: list[str]
    ) -> None:
        """auto goes on without CUDA and says why; 1 stops with the same words."""
        machine = (torch_cuda, nvcc, nvcc_version)
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
            chosen, remark = build.decide_cuda(setting, "13.0", NVCC, "13.1")
            assert chosen
            assert NVCC in remark and "13.0" in remark and "13.1" in remark

    def test_a_torch_without_cuda_gets_them_only_where_they_are_demanded(self) -> None:
        """They would never run there; to compile and link them is how a machine without a GPU checks them."""
        chosen, reason = build.decide_cuda("auto", None, NVCC, "13.0")
        assert not chosen
        assert "torch is built without CUDA" in reason and "CUDA build of torch" in reason
        chosen, remark = build.decide_cuda("1", None, NVCC, "12.8")
        assert chosen
        assert NVCC in remark and "torch built without CUDA" in remark
        with pytest.raises(SystemExit, match="BNFUSED_CUDA=1, but no nvcc was found.*CUDA_HOME="):
            build.decide_cuda("1", None, None, None)

    @pytest.mark.parametrize("setting", ["", "yes", "TRUE", "2", "auto "])
    def test_any_other_setting_is_an_error_that_lists_the_three(self, setting: str) -> None:
        with pytest.raises(SystemExit, match="auto, 0 or 1") as stop:
            build.decide_cuda(setting, "13.0", NVCC, "13.0")
        assert repr(setting) in str(stop.value)


class TestCudaArchList:
    TORCH = ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"]

    def test_the_users_list_stands(self) -> None:
        assert build.cuda_arch_list("8.6+PTX", [(9, 0)], self.TORCH, "13.0") == "8.6+PTX"
        assert build.cuda_arch_list("8.6", [], [], None) == "8.6"

    def test_visible_gpus_once_each_in_numeric_order(self) -> None:
        """As text 12.0 sorts before 8.0, and the PTX would go to the older one."""
        visible = [(12, 0), (8, 0), (12, 0)]
        assert build.cuda_arch_list(None, visible, self.TORCH, "13.0") == "8.0;12.0+PTX"
        assert build.cuda_arch_list("native", visible, self.TORCH, "13.0") == "8.0;12.0+PTX"

    def test_a_gpu_newer_than_torch_knows_gets_its_newest(self) -> None:
        assert build.cuda_arch_list(None, [(12, 1)], self.TORCH, "13.0") == "12.0+PTX"

    def test_without_a_gpu_all_that_torch_runs_on(self) -> None:
        """torch itself dies of an IndexError here, in a container build for example."""
        assert build.cuda_arch_list("", [], self.TORCH, "13.0") == "7.5;8.0;9.0;12.0+PTX"

    def test_says_what_to_set_where_nothing_tells(self) -> None:
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST="):
            build.cuda_arch_list(None, [], [], "13.0")

    def test_a_torch_without_cuda_names_none_and_needs_none(self) -> None:
        archs = build.split_archs(build.cuda_arch_list(None, [], [], None))
        assert len(archs) >= 2 and archs[-1].endswith("+PTX")

    @pytest.mark.parametrize("text", ["8.0;9.0+PTX", "8.0 9.0+PTX", "8.0, 9.0+PTX;"])
    def test_split(self, text: str) -> None:
        assert build.split_archs(text) == ["8.0", "9.0+PTX"]

    @pytest.mark.parametrize("text", ["Hopper", "90", "8.0;sm_90", "8.0+ptx", ";", "9.0; rm"])
    def test_what_is_no_compute_capability_is_named(self, text: str) -> None:
        with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must be.*'8\.0;9\.0\+PTX'") as stop:
            build.split_archs(text)
        assert repr(text) in str(stop.value)

    def test_machine_code_for_each_and_ptx_where_it_is_asked_for(self) -> None:
        assert build.gencode_flags(["8.0", "9.0a", "12.0+PTX"]) == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_120,code=sm_120",
            "-gencode=arch=compute_120,code=compute_120",
        ]


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
        """-std fights torch's own; -march=native is an illegal instruction on another CPU, on nvcc's host side too."""
        assert [flag for flag in build.cxx_flags("linux") if "std" in flag or "arch" in flag] == []
        assert [flag for flag in build.NVCC_FLAGS if "arch" in flag] == []

    @pytest.mark.parametrize("clang", ["Debian clang version 19.1.7", "Apple clang version 17.0.0"])
    def test_openmp_is_that_of_gcc(self, clang: str) -> None:
        assert "-fopenmp" in build.cxx_flags("c++ (Debian 12.2.0-14) 12.2.0")
        assert "-fopenmp" not in build.cxx_flags(clang)


def test_every_source_is_compiled_by_one_compiler() -> None:
    assert "csrc/ops/module.cpp" in build.CPP_SOURCES
    assert "csrc/cuda/workspace.cu" in build.CUDA_SOURCES
    assert not set(build.CUDA_BINDING) & {*build.CPP_SOURCES, *build.CUDA_SOURCES}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.c*") if path.suffix != ".cuh"}
    assert there == {*build.CPP_SOURCES, *build.CUDA_SOURCES, *build.CUDA_BINDING}


class TestVersionAndRequirements:
    def test_a_wheel_needs_the_torch_that_it_was_compiled_for(self) -> None:
        version, requirements = build.version_and_requirements("2.13.0+cpu")
        assert version == f"{bnfused.__version__}+torch2.13"
        assert "torch==2.13.*" in requirements

    def test_sources_need_any_supported_torch(self) -> None:
        version, requirements = build.version_and_requirements(None)
        assert version == bnfused.__version__
        assert "torch>=2.11" in requirements


@pytest.mark.parametrize("version", ["65.5.0", "77.0.1"])
def test_an_old_setuptools_is_refused(version: str) -> None:
    """It would say "project.license must be valid exactly by one definition"."""
    with pytest.raises(SystemExit, match=f"77.0.3.*{re.escape(version)}"):
        build.check_setuptools(version)


@pytest.mark.parametrize("version", ["77.0.3", "84.2.1", "100.0", "81.0.0.post20260101"])
def test_a_new_setuptools_is_taken(version: str) -> None:
    assert build.check_setuptools(version) is None


@pytest.mark.parametrize("version", ["2.10.1", "1.13.1+cu117", "2.9.0a0+git1234"])
def test_an_old_torch_is_refused(version: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(version)):
        build.check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_a_new_torch_is_taken(version: str) -> None:
    """As text "2.9" is more than "2.11"."""
    assert build.check_torch(version) is None


# None in sys.modules is how Python spells a module that is not there.
NO_TORCH = "sys.modules['torch'] = None"


def test_without_torch_the_two_commands_are_named() -> None:
    result = _run_setup(ROOT, "--name", before=NO_TORCH)
    assert result.returncode == 1
    for part in ("pip install torch==2.13.0", "pip install --no-build-isolation", "uv pip install", "--no-isolation"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broken_torch_is_not_called_missing(tmp_path: Path) -> None:
    """A torch whose own import fails shows its own error: to install it again may not mend it."""
    (tmp_path / "torch.py").write_text("import a_module_that_torch_needs\n")
    result = _run_setup(ROOT, "--name", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert result.returncode != 0
    assert "a_module_that_torch_needs" in result.stderr
    assert "has to be installed first" not in result.stderr


# An nvcc that tells its version and where it is, notes its arguments, and compiles whatever it gets to one symbol.
FAKE_NVCC = """#!/bin/sh
case $1 in
  --version) echo 'Cuda compilation tools, release 12.8, V12.8.93'; exit ;;
  --dryrun) echo "#\\$ TOP={toolkit}" >&2; exit ;;
esac
for argument; do case $argument in *broken.cu) echo 'broken.cu(1): error: no such kernel'; exit 2 ;; esac; done
echo "$*" >>'{toolkit}/calls'
while [ "$1" != -o ]; do shift; done
echo "int nvcc_compiled_$(basename "$2" .o);" | cc -fPIC -x c -c - -o "$2"
"""


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CUDA toolkit, as far as a build looks at it."""
    folder = tmp_path_factory.mktemp("toolkit").resolve()
    for name in ("bin", "include", "targets/x86_64-linux/lib"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda_runtime_api.h").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(toolkit=folder))
    nvcc.chmod(0o755)
    subprocess.run(["ar", "rc", folder / "targets/x86_64-linux/lib/libcudart_static.a"], check=True)
    return folder


class TestToolkit:
    def test_the_one_that_the_user_names(self, toolkit: Path, tmp_path: Path) -> None:
        """And no other, where that is none: a silent second choice is the wrong version some day."""
        nvcc = str(toolkit / "bin" / "nvcc")
        assert build.find_toolkit(str(toolkit), None) == toolkit
        assert build.find_toolkit(str(tmp_path), nvcc) is None

    def test_is_where_nvcc_says_not_where_its_wrapper_is(self, toolkit: Path, tmp_path: Path) -> None:
        """Torch takes the wrapper's folder, which has no headers."""
        wrapper = tmp_path / "bin" / "nvcc"
        wrapper.parent.mkdir()
        wrapper.write_text(f"#!/bin/sh\nexec '{toolkit}/bin/nvcc' \"$@\"\n")
        wrapper.chmod(0o755)
        assert build.find_toolkit(None, str(wrapper)) == toolkit

    def test_without_headers_is_none(self, toolkit: Path, tmp_path: Path) -> None:
        shutil.copytree(toolkit / "bin", tmp_path / "bin")
        assert build.find_toolkit(str(tmp_path), None) is None

    def test_version(self, toolkit: Path, tmp_path: Path) -> None:
        assert build.read_nvcc_version(str(toolkit / "bin" / "nvcc")) == "12.8"
        broken = tmp_path / "nvcc"
        broken.write_text("#!/bin/sh\necho 'release 12.8'\nexit 1\n")
        broken.chmod(0o755)
        assert build.read_nvcc_version(str(broken)) is None

    def test_runtime_folder(self, toolkit: Path, tmp_path: Path) -> None:
        assert build.runtime_folder(toolkit) == str(toolkit / "targets" / "x86_64-linux" / "lib")
        with pytest.raises(SystemExit, match=re.escape(str(tmp_path))):
            build.runtime_folder(tmp_path)


class TestCompileKernels:
    """Which files nvcc is called for, seen in what a stand-in for it notes."""

    @pytest.fixture
    def compiled(self, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
        """Compiles two kernels of a project in ``tmp_path``; returns the calls of nvcc since the last time."""
        monkeypatch.setattr(build, "ROOT", tmp_path)
        for name in ("one.cu", "two.cu", "kernels/shared.cuh"):
            path = tmp_path / "csrc" / name
            path.parent.mkdir(exist_ok=True)
            path.touch()

        def compile_all(*archs: str) -> list[str]:
            calls = toolkit / "calls"
            calls.unlink(missing_ok=True)
            sources = ["csrc/one.cu", "csrc/two.cu"]
            nvcc = str(toolkit / "bin" / "nvcc")
            objects = build.compile_kernels(nvcc, sources, archs or ("9.0",), tmp_path / "objects", 2)
            assert [path.name for path in objects] == ["one.o", "two.o"]
            assert all(path.exists() for path in objects)
            return calls.read_text().splitlines() if calls.exists() else []

        return compile_all

    def test_each_file_once_with_every_flag(self, compiled: Callable[..., list[str]]) -> None:
        calls = compiled("8.0", "9.0+PTX")
        assert sorted(call.split(" -c ")[1].split()[0] for call in calls) == ["csrc/one.cu", "csrc/two.cu"]
        for flag in (*build.NVCC_FLAGS, *build.gencode_flags(["8.0", "9.0+PTX"])):
            assert all(flag in call.split() for call in calls)

    def test_nothing_where_nothing_changed(self, compiled: Callable[..., list[str]]) -> None:
        compiled()
        assert compiled() == []

    def test_one_where_its_source_changed(self, compiled: Callable[..., list[str]], tmp_path: Path) -> None:
        compiled()
        (tmp_path / "csrc" / "two.cu").write_text("// changed\n")
        assert [call.split(" -c ")[1].split()[0] for call in compiled()] == ["csrc/two.cu"]

    def test_all_where_a_header_the_flags_or_the_compiler_changed(
        self, compiled: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Torch's own step keeps the object when a header changes, where torch is built without CUDA."""
        compiled()
        (tmp_path / "csrc" / "kernels" / "shared.cuh").write_text("// changed\n")
        assert len(compiled()) == 2
        assert len(compiled("8.0")) == 2
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-v")
        assert len(compiled("8.0")) == 2
        monkeypatch.setattr(build, "_output_of", lambda command: "release 12.9")
        assert len(compiled("8.0")) == 2
        assert compiled("8.0") == []

    def test_an_error_is_shown_and_leaves_nothing_to_be_kept(self, toolkit: Path, tmp_path: Path) -> None:
        for suffix in (".o", ".key"):
            (tmp_path / f"broken{suffix}").write_text("of an earlier build")
        source = tmp_path / "broken.cu"
        source.touch()
        with pytest.raises(SystemExit, match=r"(?s)could not compile .*broken\.cu.*no such kernel"):
            build.compile_kernels(str(toolkit / "bin" / "nvcc"), [str(source)], ["9.0"], tmp_path, 1)
        assert not (tmp_path / "broken.key").exists()


class TestWholeBuild:
    """setup.py with sources of a line each: what it compiles, says and leaves behind."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("with space") / "a clone"
        (folder / "bnfused").mkdir(parents=True)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        (folder / "bnfused" / "__init__.py").write_text('__version__ = "0"\n')
        for number, name in enumerate((*build.CPP_SOURCES, *build.CUDA_SOURCES, *build.CUDA_BINDING)):
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

    def test_kernels_are_compiled_linked_and_noted(self, folder: Path, tmp_path: Path, toolkit: Path) -> None:
        """With a stand-in for nvcc, so on every machine; the link fails where a folder or a library is wrong."""
        clone = tmp_path / "clone"
        shutil.copytree(folder, clone, ignore=shutil.ignore_patterns("build", "_build_info.txt", "_C*"))
        (toolkit / "calls").unlink(missing_ok=True)
        settings = {"BNFUSED_CUDA": "1", "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}
        result = _run_setup(
            clone, "build_ext", "--inplace", before="import torch; torch.version.cuda = None", **settings
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert len((toolkit / "calls").read_text().splitlines()) == len(build.CUDA_SOURCES)
        (binary,) = (clone / "bnfused").glob("_C*.so")
        for source in build.CUDA_SOURCES:
            assert f"nvcc_compiled_{Path(source).stem}".encode() in binary.read_bytes()
        stamp = json.loads((clone / "bnfused" / "_build_info.txt").read_text())
        assert (stamp["cuda"], stamp["cuda_archs"]) == ("12.8", "8.0;9.0+PTX")

    def test_a_source_distribution_has_the_kernels(self, folder: Path, tmp_path: Path) -> None:
        """Also if this machine does not compile them. It needs no torch, because pip builds it in isolation."""
        (folder / "csrc" / "kernels").mkdir(exist_ok=True)
        (folder / "csrc" / "kernels" / "pack.cuh").touch()
        (folder / "bnfused" / "part").mkdir(exist_ok=True)
        (folder / "bnfused" / "part" / "__init__.py").touch()
        result = _run_setup(folder, "sdist", "--dist-dir", str(tmp_path), before=NO_TORCH)
        assert result.returncode == 0, result.stdout + result.stderr
        (archive,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            names = {name.partition("/")[2] for name in tar.getnames()}
        assert {*build.CPP_SOURCES, *build.CUDA_SOURCES, *build.CUDA_BINDING, "csrc/kernels/pack.cuh"} <= names
        assert {"bnfused/__init__.py", "bnfused/part/__init__.py"} <= names

    def test_cuda_that_cannot_be_built_stops_where_it_is_demanded(self, folder: Path, tmp_path: Path) -> None:
        result = _run_setup(folder, "build_ext", "--inplace", BNFUSED_CUDA="1", CUDA_HOME=str(tmp_path))
        assert result.returncode == 1
        assert "BNFUSED_CUDA=1, but" in result.stderr
        assert "Traceback" not in result.stderr
