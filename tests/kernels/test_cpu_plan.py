"""``csrc/cpu/plan.h``: for every problem, op and number of threads, the CPU plan covers every value once.

These are checks of arithmetic. That the drivers follow the plan is shown where they run (test_functional.py): outputs
start as NaN, and results are compared with the reference at the thresholds.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bnfused import _extension

pytestmark = pytest.mark.usefixtures("extension")

# The time that an example takes depends on the machine alone.
SETTINGS = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SIZES = {0: 2, 1: 2, 2: 4, 3: 8}
LINE = 64
OPS = ("stats", "train", "apply", "backward")

channels = st.sampled_from([1, 2, 3, 7, 8, 56, 63, 64, 72, 100, 255, 256, 257, 512, 2048, 4099]) | st.integers(1, 5000)
inner = st.sampled_from([1, 1, 1, 2, 4, 7, 49, 64, 127, 128, 129, 784, 3136]) | st.integers(1, 100_000)
outer = st.sampled_from([1, 2, 8, 32, 256]) | st.integers(1, 100_000)
threads = st.sampled_from([1, 2, 3, 4, 8, 64]) | st.integers(1, 256)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    call: dict[str, Any] = {"outer": draw(outer), "channels": draw(channels), "inner": draw(inner)}
    while math.prod(call.values()) > 2**28:
        largest = max(call, key=call.__getitem__)
        call[largest] = max(1, call[largest] // 7)
    flags = {name: draw(st.booleans()) for name in ("residual", "mask", "aligned")}
    call |= {"op": draw(st.sampled_from(OPS)), "dtype": draw(st.integers(0, 3)), "threads": draw(threads)}
    return {**call, **flags}


def numel(call: dict[str, Any]) -> int:
    return call["outer"] * call["channels"] * call["inner"]


def check_view(view: dict[str, Any], call: dict[str, Any]) -> None:
    """Rows of whole sets of channels have all values; the tasks, at most one a thread, have all rows, each once."""
    assert view["columns"] % call["channels"] == 0
    assert view["columns"] * view["full_rows"] + view["tail"] == numel(call)
    assert 0 <= view["tail"] < view["columns"]
    tasks = view["tasks"]
    assert 1 <= len(tasks) <= call["threads"]
    ends = [0, *(end for _, end in tasks)]
    assert [begin for begin, _ in tasks] == ends[:-1]
    assert all(begin < end for begin, end in tasks)
    assert ends[-1] == view["full_rows"] + (view["tail"] > 0)


def check_parts(plan: dict[str, Any], call: dict[str, Any]) -> None:
    """The parts of a channel have all of its values, each once, and share no line that two threads would write."""
    parts = plan["parts"]
    assert len(parts) in (1, call["threads"])
    values = sum((plane_end - plane_begin) * (end - begin) for plane_begin, plane_end, begin, end in parts)
    assert values == plan["outer"] * plan["inner"]
    if all((begin, end) == (0, plan["inner"]) for _, _, begin, end in parts):
        ends = [0, *(plane_end for _, plane_end, _, _ in parts)]
        assert [plane_begin for plane_begin, _, _, _ in parts] == ends[:-1] and ends[-1] == plan["outer"]
    else:
        assert all(part[:2] == (0, plan["outer"]) for part in parts)
        ends = [0, *(end for _, _, _, end in parts)]
        assert [begin for _, _, begin, _ in parts] == ends[:-1] and ends[-1] == plan["inner"]
        assert all(begin % LINE == 0 for _, _, begin, _ in parts)


def check_group(plan: dict[str, Any], call: dict[str, Any]) -> None:
    """Groups divide the channels and have whole bytes of the mask. L1 holds their coefficients."""
    assert plan["group_channels"] % 8 == 0 and call["channels"] % plan["group_channels"] == 0
    assert 8 <= plan["group_channels"] <= plan["most_group_channels"] <= call["channels"]
    assert plan["group_channels"] == 8 or plan["inner"] <= 1600
    assert len(plan["parts"]) == 1


@SETTINGS
@given(calls())
@example({"op": "train", "outer": 1, "channels": 1, "inner": 32768, "dtype": 2, "threads": 64})
@example({"op": "apply", "outer": 1, "channels": 3, "inner": 32768, "dtype": 2, "threads": 5})
@example({"op": "backward", "outer": 3, "channels": 64, "inner": 128, "dtype": 2, "threads": 7})
@example({"op": "backward", "outer": 3000, "channels": 3000, "inner": 1, "dtype": 1, "threads": 2})
def test_every_value_is_covered_once(call: dict[str, Any]) -> None:
    plan = _extension.cpu_plan(**call)
    assert plan["outer"] * plan["channels"] * plan["inner"] == numel(call)
    assert (plan["traversal"] == "rows") == (call["inner"] == 1)
    if plan["traversal"] == "rows":
        if call["op"] != "stats":
            check_view(plan["rows"], call)
            assert 0 < plan["strip"] <= plan["rows"]["columns"]
        if call["op"] != "apply":
            check_view(plan["sum_rows"], call)
        if call["op"] in ("train", "backward"):
            assert plan["piece"] >= 1
    else:
        check_parts(plan, call)
        if plan["traversal"] == "short planes":
            check_group(plan, call)
        else:
            assert plan["group_channels"] == 1
    assert plan["grain"] >= 1
    assert plan["why"]


@SETTINGS
@given(calls())
def test_small_problems_are_done_by_one_thread(call: dict[str, Any]) -> None:
    """Below 32768 values there are neither parts nor tasks, and the grain gives one thread all items."""
    plan = _extension.cpu_plan(**call)
    few = numel(call) < 32768
    for name in ("sum_rows", "rows"):
        assert len(plan[name]["tasks"]) <= 1 or not few
    assert len(plan["parts"]) == 1 or not few
    items = plan["rows"]["full_rows"] if plan["traversal"] == "rows" else plan["channels"]
    assert not few or plan["grain"] >= items or plan["traversal"] == "rows" and call["op"] != "apply"


@SETTINGS
@given(calls())
def test_streamed_only_where_large_and_aligned(call: dict[str, Any]) -> None:
    """From 6 MiB on, where every run, and every strip of one, starts on a line."""
    plan = _extension.cpu_plan(**call)
    size = SIZES[call["dtype"]]
    length = plan["rows"]["columns"] if plan["traversal"] == "rows" else plan["inner"]
    large = numel(call) * size >= 6 * 2**20
    whole_lines = length * size % LINE == 0
    if call["op"] == "stats":
        assert not plan["streamed"]
    elif (call["op"], call["inner"] > 1) != ("apply", True):  # apply takes groups if they stream
        assert plan["streamed"] == (large and whole_lines and call.get("aligned", True))
    assert not plan["streamed"] or (large and whole_lines and call.get("aligned", True))
    if plan["streamed"]:
        assert all(begin * size % LINE == 0 for _, _, begin, _ in plan["parts"])
    if plan["traversal"] == "rows" and call["op"] != "stats" and plan["strip"] < plan["rows"]["columns"]:
        assert plan["streamed"] and plan["strip"] * size % LINE == 0


@SETTINGS
@given(calls())
def test_the_bits_of_the_mask_do_not_depend_on_threads(call: dict[str, Any]) -> None:
    """Forward and backward of a masked ReLU agree on the order of the mask, on any two numbers of threads."""
    orders = set()
    for op in ("train", "apply", "backward"):
        for count in (1, 2, 3, call["threads"]):
            plan = _extension.cpu_plan(**{**call, "op": op, "threads": count, "mask": True})
            orders.add(plan["traversal"])
            if plan["traversal"] == "rows":
                assert plan["rows"]["columns"] % 8 == 0
                if op == "backward":
                    assert plan["sum_rows"]["columns"] % 8 == 0
    assert len(orders) == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 4, 9), (0, 64, 49), (4, 0, 9), (0, 5, 1), (4, 0, 1), (4, 64, 0)])
def test_a_problem_without_values_has_a_plan(op: str, shape: tuple[int, int, int]) -> None:
    """Trap: rows of no channels never reach the columns that they should have at least."""
    n, c, size = shape
    plan = _extension.cpu_plan(op=op, outer=n, channels=c, inner=size, dtype=2, threads=4)
    assert plan["rows"]["tasks"] == [] and not plan["streamed"]


def test_unknown_ops_are_refused() -> None:
    with pytest.raises(ValueError, match="expected op stats, train, apply or backward, got eval"):
        _extension.cpu_plan(op="eval", outer=1, channels=1, inner=1, dtype=2, threads=1)
