"""bench.py from end to end: what it measures, what it keeps when it is cut off, and what it refuses."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import bench, cases, measurement, peers, results
from benchmarks.cases import Configuration
from benchmarks.results import CellResult, Run
from support.benchmarking import run_script


def test_bench_from_end_to_end(extension, tmp_path):
    """Measures, prints, writes JSON and picture; a second call compares the run with itself."""
    numbers, picture = tmp_path / "new" / "run.json", tmp_path / "run.png"
    done = run_script(
        "benchmarks/bench.py",
        *("--filter", "64x256 NC float32 (forward|backward|eval) (plain|relu) T=1"),
        *("--threads", "1", "--rounds", "4", "--json", numbers, "--picture", picture),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64x256 NC float32, T=1" in done.stdout
    run = results.read_cells(numbers)
    assert [cell.cell.fusion for cell in run.results] == ["plain", "relu"] * 3
    assert all(cell.peers["torch"].pairs <= 4 and cell.bytes > 0 for cell in run.results)
    assert {name for cell in run.results for name in cell.saved} == {"torch", "bnfused"}
    assert str(tmp_path) not in numbers.read_text()  # what is kept speaks of no folder of this machine
    assert picture.read_bytes().startswith(b"\x89PNG")

    compared = run_script("benchmarks/bench.py", "--compare", numbers, numbers, cwd=tmp_path)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "64x256 NC float32 forward relu T=1" in compared.stdout
    assert re.search(r"^\d cells: 0 faster, 0 slower, \d within noise", compared.stdout, re.MULTILINE)


def bench_run(folder: Path, *arguments: str) -> tuple[int, Run[CellResult]]:
    """bench.py here, on a CPU, with the tensors of a GPU made small."""
    numbers = folder / "bench.json"
    every = ["--cases", "cuda", "--tiny", "--threads", "1", "--rounds", "1", "--json", str(numbers), *arguments]
    return bench.main(every), results.read_cells(numbers)


RESNET = ("--filter", "^ResNet-50 .*channels_last bfloat16", "--peers", "torch")


def test_a_gpus_run_on_the_cpu(extension, tmp_path, capsys):
    """The same script and file; the last lines are each peer's mean and worst cell."""
    status, found = bench_run(tmp_path, *RESNET, "--picture", str(tmp_path / "bench.png"))
    assert status == 0
    assert [(r.pass_name, r.fusion) for r in found.results] == [
        (pass_name, fusion) for pass_name in ("forward", "forward+backward") for fusion in cases.FUSIONS
    ]
    assert found.environment["torch"] == torch.__version__
    assert {"commit", "date", "device", "bnfused_build"} <= set(found.environment)
    assert found.failed == found.not_measured == []
    assert "geometric mean" in capsys.readouterr().out.splitlines()[-1]


def test_compiled_peers_run_the_unfused_forward(extension, tmp_path, monkeypatch):
    """With a stand-in for torch.compile, which takes seconds: each mode, each fusion, and where they are meant to."""
    modes = []

    def stand_in(function, *, mode, **_):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", stand_in)
    status, found = bench_run(tmp_path, "--filter", "^MLP .* NC float32")
    assert status == 0
    # Once for each fusion of the one tensor, whatever is done with it.
    assert Counter(modes) == dict.fromkeys(peers.COMPILE_MODES.values(), len(cases.FUSIONS))
    assert {(r.pass_name, r.fusion) for r in found.results} == {
        (pass_name, fusion) for pass_name in ("forward", "forward+backward") for fusion in cases.FUSIONS
    }
    assert all(set(peers.COMPILE_MODES) < set(r.peers) for r in found.results)


def test_what_is_compiled_comes_after_all_that_is_not():
    """cuDNN and torch share a measurement, each compile has its own, and no backward of a kept graph; the first dtype
    comes first, in one mode and then in the other."""
    some = [
        Configuration((size, 4), "NC", dtype, cases.TINY, ("forward", "backward"), ("plain", "relu"), compiled=compiled)
        for dtype in ("float32", "bfloat16")
        for size, compiled in ((2, True), (3, False), (4, True))
    ]
    work = measurement.plan_measurements(some, [1, 2], "", peers.PEERS, every=False)
    assert [what.peers for what in work[:12]] == [("torch", "cuDNN")] * 12
    assert [what.threads for what in work[:4]] == [1, 2, 1, 2]
    compiled = work[12:]
    modes = [("compile",)] * 8 + [("max-autotune",)] * 8
    assert [what.peers for what in compiled] == modes * 2
    assert [what.configuration.dtype for what in compiled] == ["float32"] * 16 + ["bfloat16"] * 16
    assert [what.configuration.shape[0] for what in compiled] == ([2] * 4 + [4] * 4) * 4
    assert all(cell.pass_name == "forward" for what in compiled for cell in what.cells)
    everything = measurement.plan_measurements(some[:2], [1], "", ("compile",), every=True)
    assert [what.configuration.compiled for what in everything] == [True, True, False, False]


def test_what_fails_is_named_and_the_rest_is_measured(extension, tmp_path, monkeypatch):
    """A wrong result gets no time, and the exit status tells."""
    right = peers.bnfused.functional.batch_norm

    def wrong_on_mlp(x, mean, var, weight, bias, *rest, **keywords):
        return right(x, mean, var, weight, bias + (0.1 if x.dim() == 2 else 0), *rest, **keywords)

    monkeypatch.setattr(peers.bnfused.functional, "batch_norm", wrong_on_mlp)
    status, found = bench_run(tmp_path, "--filter", "^(MLP|U-Net).* float32", "--peers", "torch")
    assert status == 1
    assert {message.split()[0] for message in found.failed} == {"MLP"}
    assert all("differ" in message for message in found.failed)
    assert {r.configuration.split()[0] for r in found.results} == {"U-Net"}


def test_a_run_that_is_cut_off_keeps_what_it_has(extension, tmp_path, monkeypatch):
    """The file is whole after every tensor, and names what is missing after a limit or Ctrl-C."""
    measured = bench.measure
    seen = []

    def interrupted_at_the_third(*arguments):
        if len(seen) == 2:
            assert len(results.read_cells(tmp_path / "bench.json").results) == 12
            raise KeyboardInterrupt
        seen.append(1)
        return measured(*arguments)

    monkeypatch.setattr(bench, "measure", interrupted_at_the_third)
    status, found = bench_run(tmp_path, "--filter", " channels_last bfloat16", "--peers", "torch")
    assert status == 130
    assert found.interrupted and len(found.results) == 12
    assert len(found.not_measured) == 2  # of the four networks with images

    status, found = bench_run(tmp_path, *RESNET, "--limit", "0")
    assert status == 1
    assert found.results == [] and len(found.not_measured) == 1


def test_a_sweep_from_end_to_end(extension, tmp_path):
    picture = tmp_path / "sweep.png"
    arguments = [
        "--sweep",
        "batch,threads",
        "--filter",
        "channels_last float32 .*forward plain",
        "--picture",
        str(picture),
    ]
    assert bench.main([*arguments, "--tiny", "--quick", "--rounds", "1", "--json", str(tmp_path / "a.json")]) == 0
    swept = results.read_cells(tmp_path / "a.json").results
    assert {r.family for r in swept} == {"batch sweep, channels_last", "threads sweep, channels_last"}
    assert len({r.threads for r in swept if r.family.startswith("batch")}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ("--device", "cuda"),
            "no GPU is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
        (("--device", "cuda", "--threads", "2"), "are for a CPU"),
        (("--sweep", "depth"), "expected some of batch"),
        (("--peers", "apex"), "expected some of torch"),
        (("--picture", "x.gif"), "ends in .png"),
        (("--filter", "nothing has this name"), "No cell matches"),
        (("--compare", "missing.json", "missing.json"), "missing.json"),
        (("--dtypes", "int8"), "expected some of float32"),
        (("--threads", "0"), "at least one thread"),
        (("--rounds", "0"), "expected at least 1"),
    ],
)
def test_bench_refuses_with_a_reason(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = bench.main(arguments)
    except SystemExit as refused:
        status = refused.code
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.out + captured.err


def test_overhead_from_end_to_end(extension, tmp_path):
    """A cell for each pass and fusion of each tensor; a call of 50 takes a 50th of the time of all."""
    numbers = tmp_path / "run.json"
    done = run_script("benchmarks/bench.py", "--cases", "overhead", "--rounds", "2", "--json", numbers, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch/bnfused" in done.stdout
    run = results.read_cells(numbers)
    assert len(run.results) == 3 * 4 * 3
    assert run.settings["threads"] == [1]
