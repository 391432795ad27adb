"""Benchmarks: files, tables, pictures, and the comparison of two runs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import arguments, bench, cases, environment, pictures, report, results
from benchmarks.memory import Saved
from benchmarks.timing import Band
from support.benchmarking import ROOT, drawn, every_cell, result, run_of


def test_json_round_trip(tmp_path):
    run = run_of(result(Band(1.5, 2.0, 2.5), saved={"torch": Saved(3, 2, 1)}), result(None, pairs=0, threads=2))
    run.interrupted, run.failed, run.not_measured = True, ["this"], ["that"]
    run.write(tmp_path / "new" / "run.json")
    again = results.read_cells(tmp_path / "new" / "run.json")
    assert again == run
    assert isinstance(again.results[0].ratio("torch"), Band)
    assert isinstance(again.results[0].saved["torch"], Saved)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_kept_results_lie_in_a_folder_of_the_device():
    """What --json says itself is not overruled."""
    options = bench.parse_arguments(["--keep", "--json", "mine.json"])
    arguments.set_output_files(options, {"device": "NVIDIA H100 80GB HBM3"}, "bench")
    folder = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
    assert (options.json, options.picture) == (Path("mine.json"), folder / "bench.png")
    options = bench.parse_arguments(["--keep", "elsewhere"])
    arguments.set_output_files(options, {"device": "NVIDIA H100 80GB HBM3"}, "bench")
    assert options.json == Path("elsewhere/nvidia-h100-80gb-hbm3/bench.json")


def test_the_commit_where_git_is_wary(monkeypatch):
    """Of a checkout that is another user's it tells nothing unless asked to."""
    wanted = environment.commit()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert environment.commit() == wanted


def test_the_commit_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None
    assert environment.describe_environment(named_commit="abc")["commit"] == "abc"


def test_a_run_without_results_is_read_too(tmp_path):
    run_of().write(tmp_path / "run.json")
    assert results.read_cells(tmp_path / "run.json") == run_of()


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1, "results": []}', '{"format": 2}', "no json"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json"):
        results.read_cells(path)


def test_the_committed_run_can_be_compared_with():
    run = results.read_cells(ROOT / "benchmarks" / "results" / "cpu-amd-epyc-zen5" / "bench.json")
    names = {cell.name for cell in every_cell()}
    assert len(run.results) > 800
    assert {result.cell.name for result in run.results} <= names


def test_a_peer_that_is_measured_later_joins_its_cell():
    """Its ratio stays that of its own rounds; bnfused's time stays that of the first."""
    merged = [result(Band(2.0, 2.0, 2.0), saved={"torch": Saved(1, 1, 1)})]
    results.merge(
        merged, [result(Band(3.0, 3.0, 3.0), peer="compile", ms=None), result(None, peer="compile", threads=2)]
    )
    first, second = merged
    assert (first.ratio("torch").median, first.ratio("compile").median) == (2.0, 3.0)
    assert first.ms is not None and first.saved
    assert second.threads == 2


def test_summary_has_geomean_worst_and_target():
    (summary,) = report.summarize(
        [
            result(Band(2.0, 2.0, 2.0), configuration="slow"),
            result(Band(8.0, 8.0, 8.0), configuration="fast"),
            result(None, configuration="not measured"),
        ]
    )
    assert len(summary.members) == 2
    assert summary.geomean == pytest.approx(4.0)
    assert summary.worst.configuration == "slow"
    assert summary.target == cases.TARGETS[cases.FIRST_32, "forward", "relu"][0]
    (of_gpu,) = report.summarize([result(Band(2.0, 2.0, 2.0), threads=0)])
    assert of_gpu.target == cases.Target()


def test_summaries_and_closing_lines_keep_peers_apart():
    """A fast peer must not hide behind a slow one; targets are those against eager torch."""
    results = [
        result(Band(2.0, 2.0, 2.0)),
        result(Band(8.0, 8.0, 8.0), configuration="fast"),
        result(Band(0.5, 0.5, 0.5), peer="cuDNN", configuration="slow"),
    ]
    summaries = report.summarize(results)
    assert [(s.peer, len(s.members), s.geomean) for s in summaries] == [
        ("torch", 2, pytest.approx(4.0)),
        ("cuDNN", 1, 0.5),
    ]
    assert summaries[1].target == cases.Target()
    assert report.closing_lines(results) == [
        "torch, all 2 cells: geometric mean 4.00, worst 2.00: 8x4x2x2 NCHW float32 forward relu T=1",
        "cuDNN, all 1 cells: geometric mean 0.50, worst 0.50: slow forward relu T=1",
    ]
    assert report.closing_lines([]) == []


def test_eval_of_all_layouts_is_one_group_but_tiny_ones_stay_apart():
    evals = [
        result(Band(1.0, 1.0, 1.0), pass_name="eval", family=family)
        for family in (cases.FIRST_32, cases.LAST_16, cases.TINY)
    ]
    assert [len(summary.members) for summary in report.summarize(evals)] == [2, 1]


def test_compare_says_what_is_beyond_noise():
    """Bands that touch or stand on few pairs are noise, whatever the medians say; cells of one run are left out."""
    before = run_of(
        result(Band(1.8, 2.0, 2.2)),
        result(Band(1.8, 2.0, 2.2), fusion="plain"),
        result(Band(2.0, 2.0, 2.0), fusion="add_relu"),
        result(Band(1.0, 1.0, 1.0), threads=2),
    )
    after = run_of(
        result(Band(2.1, 2.5, 2.9)),
        result(Band(2.3, 2.5, 2.7), fusion="plain"),
        result(Band(2.5, 2.5, 2.5), fusion="add_relu", pairs=1),
        result(None, threads=2),
    )
    changes = report.compare(before, after)
    assert [change.factor for change in changes] == [1.25, 1.25, 1.25]
    assert [change.verdict for change in changes] == ["within noise", "faster", "within noise"]
    assert [change.verdict for change in report.compare(after, before)] == ["within noise", "slower", "within noise"]
    assert report.comparison_line(changes) == (
        "3 cells: 1 faster, 0 slower, 2 within noise; geometric mean of the change 1.250"
    )
    console = report.make_console()
    with console.capture() as captured:
        for table in report.comparison_tables(changes):
            console.print(table)
    shown = [line.split() for line in captured.get().splitlines()]
    assert [line[-1] for line in shown if line[-2:-1] == ["1.25"]] == ["faster"]
    assert shown[-1][-3:] == ["0", "0", "1"]  # by group, add_relu comes last: within noise


def test_compare_takes_each_peer_by_itself():
    before = run_of(
        dataclasses.replace(result(None), peers=result(Band(1, 1, 1)).peers | result(Band(2, 2, 2), "cuDNN").peers)
    )
    after = run_of(result(Band(4.0, 4.0, 4.0), peer="cuDNN"))
    (change,) = report.compare(before, after)
    assert (change.peer, change.factor) == ("cuDNN", 2.0)


def test_tables_print_what_was_not_measured_as_a_dash():
    console = report.make_console()
    with console.capture() as captured:
        console.print(report.cell_table("a title", [result(None, pairs=0), result(Band(1.5, 2.0, 2.5))]))
    lines = [line for line in captured.get().splitlines() if "forward" in line]
    assert "2.00x" not in lines[0] and " - " in lines[0]
    assert "2.00x" in lines[1] and "1.50-2.50" in lines[1] and "25%" in lines[1]
    assert lines[1].split()[2:5] == ["0.000977", "1", "0.00102"]  # 1024 B in 1 ms


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(map(tuple, line.get_xydata())) for line in axes.get_lines()}


def test_a_sweep_is_drawn_under_its_roofs(monkeypatch):
    """GB/s of each fusion against the size, the copy of the same tensor above it, and the copy that no cache holds."""
    swept = [
        result(
            Band(2.0, 2.0, 2.0),
            configuration=f"{n}",
            shape=(n, 4, 2, 2),
            family=f"batch sweep, {layout}",
            layout=layout,
            copy_ms=Band(1e-4, 1e-4, 1e-4),
            pass_name=pass_name,
        )
        for n in (8, 2)
        for layout, pass_name in pictures.SWEEP_PANELS
    ]
    figures = drawn(monkeypatch)
    pictures.save_sweeps(run_of(*swept), Path("unused.png"))
    (figure,) = figures
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [
        f"{pass_name}, {layout}" for layout, pass_name in pictures.SWEEP_PANELS
    ]
    for axes in panels:
        lines = lines_of(axes)
        wanted = {
            "bnfused, +ReLU": (1024 / 1e-3, 1024 / 1e-3),
            "torch, +ReLU": (1024 / 2e-3, 1024 / 2e-3),
            "roof: a copy of x": (2 * 128 / 1e-7, 2 * 512 / 1e-7),
            "roof: a copy that no cache holds": (10e9, 10e9),
        }
        for label, speeds in wanted.items():
            sizes, shown = zip(*lines[label], strict=True)
            assert sizes == (2, 8) and shown == pytest.approx([speed / 1e9 for speed in speeds]), label
        assert axes.get_xlabel() == "batch size N of (N, 4, 2, 2), T=1"
    assert panels[0].get_ylabel().startswith("GB/s")
    with pytest.raises(ValueError, match="results of a sweep"):
        pictures.save_sweeps(run_of(result(Band(1.0, 1.0, 1.0))), Path("unused.png"))


def test_ratios_and_speeds_are_drawn_by_group(monkeypatch):
    figures = drawn(monkeypatch)
    pictures.save_ratios(run_of(result(Band(1.5, 2.0, 2.5))), Path("unused.png"))
    left, right = figures[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["channels first float32, forward +ReLU"]
    assert 2.0 in [x for line in left.get_lines() for x in line.get_xdata()]
    assert 0.25 in [x for line in right.get_lines() for x in line.get_xdata()]
    with pytest.raises(ValueError, match="at least one cell"):
        pictures.save_ratios(run_of(result(None)), Path("unused.png"))
