"""``csrc/plan.h``: for every problem and every GPU, all units are covered once and the device's limits are kept.

A unit is 8 values. What is checked here is arithmetic on the plan; that the kernels follow it is shown by running them
(outputs that start as NaN, buffers of exact size, counted bytes).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import bnfused
from bnfused import _extension, explanation

pytestmark = pytest.mark.usefixtures("extension")

# How long an example takes says something of the machine only.
SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])

UNIT = 8
SIZES = {0: 2, 1: 2, 2: 4, 3: 8}
LARGEST_GRID = 2**31 - 1
SHARED_BYTES = 48 * 1024  # what every GPU gives a block unasked
# Of each kernel: static shared memory, and dynamic for each value of a tile's columns or plane of a run, float32 and
# narrower, float64. The merges hold a Moments (24 bytes) or GradSums (16) for 9 values of half of 256 threads, and the
# flag of the last block; constants are 4 numbers forward and 6 backward.
SHARED_BYTES_OF = {
    "stats": {"reduce": (9 * 128 * 24 + 16, 0, 0)},
    "train": {"reduce": (9 * 128 * 24 + 16, 0, 0), "apply": (0, 16, 32)},
    "eval": {"apply": (0, 16, 32)},
    "backward": {"reduce": (9 * 128 * 16 + 16, 16, 32), "apply": (0, 24, 48)},
}
# The kernels of small and resident ask for what they need; a block of sm_75 gets the least, 64 KiB.
SHARED_STATIC = {"rows": 9 * 128 * 24 + 64, "planes": 128 * 24 + 64}
SHARED_BYTES_ASKED = 64 * 1024
# In blocks, by compute capability: every GPU from sm_90 on has 8; 16 are on some, and a kernel has to ask for them.
LARGEST_CLUSTER = {(9, 0): 16, (10, 0): 16, (12, 0): 8}

# Channels and spatial sizes of networks, what is odd about others, and anything.
channels = st.sampled_from([1, 2, 3, 4, 8, 12, 64, 65, 96, 100, 320, 513, 2048, 4099, 70_001]) | st.integers(1, 10_000)
inner = st.sampled_from([1, 1, 1, 2, 4, 7, 49, 64, 196, 784, 3136, 50_176, 1_046_529]) | st.integers(1, 10**6)
outer = st.sampled_from([1, 2, 8, 32, 256, 65_537]) | st.integers(1, 10**6)
devices = st.sampled_from(sorted(explanation.DEVICES)) | st.just("one SM")


@st.composite
def problems(draw: st.DrawFn) -> dict[str, int]:
    problem = {"outer": draw(outer), "channels": draw(channels), "inner": draw(inner), "dtype": draw(st.integers(0, 3))}
    while math.prod(problem[name] for name in ("outer", "channels", "inner")) > 2**34:
        largest = max(("outer", "channels", "inner"), key=problem.__getitem__)
        problem[largest] = max(1, problem[largest] // 7)
    return problem


def limits_of(device: str) -> explanation.DeviceLimits:
    return explanation.DEVICES.get(device) or explanation.DeviceLimits("one SM", 1, (7, 5), None)


def plan_of(problem: dict[str, int], device: str, **request: Any) -> dict[str, Any]:
    limits = limits_of(device)
    major, minor = limits.compute_capability
    request.setdefault("shared_per_sm", limits.shared_per_sm)
    return _extension.plan(**problem, **{"sm_count": limits.sm_count, **request}, compute_capability=10 * major + minor)


def check_rows(shape: dict[str, int], problem: dict[str, int]) -> None:
    """Every unit of the tensor has one tile, one slot, one part and one lane."""
    numel = problem["outer"] * problem["channels"] * problem["inner"]
    assert shape["columns"] * UNIT == math.lcm(problem["channels"], UNIT)
    assert shape["copies"] * problem["channels"] == shape["columns"] * UNIT
    units = -(-numel // UNIT)
    assert shape["columns"] * (shape["rows"] - 1) < units <= shape["columns"] * shape["rows"]
    assert (shape["tiles"] - 1) * shape["tile"] < shape["columns"] <= shape["tiles"] * shape["tile"]
    assert 1 <= shape["parts"] <= shape["rows"]
    assert shape["row_slots"] >= 1
    assert shape["tile"] * shape["row_slots"] <= shape["threads"]


def check_planes(shape: dict[str, int], problem: dict[str, int]) -> None:
    """A plane that starts anywhere in a unit touches no more units than its threads visit."""
    size = problem["inner"]
    starts = range(UNIT) if size % UNIT else (0,)
    assert max((start + size - 1) // UNIT + 1 for start in starts) == shape["units_per_plane"]
    assert shape["units_per_channel"] == shape["units_per_plane"] * problem["outer"]
    assert 1 <= shape["parts"] <= shape["units_per_channel"]


def check_flat(shape: dict[str, int], problem: dict[str, int]) -> None:
    """The blocks' runs of units cover the tensor, and the table has room for the planes that a run touches."""
    numel = problem["outer"] * problem["channels"] * problem["inner"]
    assert shape["units"] == -(-numel // UNIT)
    assert (shape["blocks"] - 1) * shape["units_per_block"] < shape["units"]
    assert shape["units"] <= shape["blocks"] * shape["units_per_block"]
    values = shape["units_per_block"] * UNIT
    # A run that starts at the last value of a plane.
    assert shape["planes_per_block"] >= 1 + -(-(values - 1) // problem["inner"])


def check_residency(
    op: str, plan: dict[str, Any], launch: dict[str, Any], problem: dict[str, int], limits: Any
) -> None:
    """Teams that cover all tiles; where blocks wait for each other, all of them on the device at once.

    A cluster is a team that keeps its tile and needs no workspace, as large as the GPU allows, on one of its GPCs.
    """
    tiles = launch.get("tiles", problem["channels"])
    domains = 1 if launch.get("copies", 1) > 1 else tiles
    waits = tiles * launch["parts"] > domains
    if launch["cluster"] > 1:
        assert launch["cluster"] == launch["parts"]
        assert launch["cluster"] in (2, 4, 8, 16) and launch["cluster"] <= LARGEST_CLUSTER[limits.compute_capability]
        assert plan["values_kept"] == problem["outer"] * problem["channels"] * problem["inner"]
        assert domains == tiles or tiles == 1
    assert (plan["partials"] > 0) == (waits and launch["cluster"] == 1)
    counts_batch = op != "backward"
    assert plan["tickets"] == (1 + 2 * domains if plan["partials"] else counts_batch)
    assert launch["blocks"] == launch["teams"] * launch["parts"]
    assert 1 <= launch["teams"] <= tiles
    assert launch["teams"] == tiles or (waits and domains == tiles)
    assert waits <= (plan["strategy"] == "resident")
    # What is fetched before its turn has a tile that it is of, room, and a device that copies by itself.
    assert 0 <= launch["ahead"] <= launch["steps"]
    assert launch["ahead"] == 0 or (launch["teams"] < tiles and limits.compute_capability >= (8, 0))
    table = launch["tile"] * UNIT * 64 if "tile" in launch else 0
    slot = launch["threads"] * UNIT * SIZES[problem["dtype"]]
    tensors, left = divmod(launch["shared_bytes"] - table, max(1, launch["steps"] + launch["ahead"]) * slot)
    assert left == 0 and tensors <= 3
    layout = "rows" if "columns" in launch else "planes"
    shared = SHARED_STATIC[layout] + launch["shared_bytes"]
    if plan["strategy"] == "small" or limits.shared_per_sm == 0:
        assert launch["steps"] == 0 and shared <= SHARED_BYTES_ASKED
        return
    on_sm = limits.shared_per_sm // (shared + 1024)
    assert on_sm >= 1
    if waits:
        by_registers = 1 if layout == "rows" or problem["dtype"] == 3 else 2  # launch bounds of the kernels
        assert launch["blocks"] <= limits.sm_count * min(on_sm, by_registers)


def check(op: str, plan: dict[str, Any], problem: dict[str, int], device: str) -> None:
    for launch in plan["launches"]:
        assert launch["threads"] % 32 == 0
        assert 32 <= launch["threads"] <= 256
        assert 1 <= launch["blocks"] <= LARGEST_GRID
        if "columns" in launch:
            check_rows(launch, problem)
            constants = launch["tile"] * UNIT
        elif "units_per_plane" in launch:
            check_planes(launch, problem)
            constants = 0
        else:
            check_flat(launch, problem)
            constants = launch["planes_per_block"]
        if launch["kernel"] in ("small", "resident"):
            check_residency(op, plan, launch, problem, limits_of(device))
            continue
        static, single, double = SHARED_BYTES_OF[op][launch["kernel"]]
        assert static + constants * (double if problem["dtype"] == 3 else single) <= SHARED_BYTES, launch


@SETTINGS
@given(problems(), devices, st.booleans(), st.booleans(), st.sampled_from([None, "small", "streaming", "resident"]))
@example({"outer": 2**34 // 8, "channels": 8, "inner": 1, "dtype": 0}, "b200", True, True, None)
@example({"outer": 1, "channels": 1, "inner": 2**34, "dtype": 1}, "h200", False, False, "small")
@example({"outer": 2**31 - 1, "channels": 1, "inner": 2, "dtype": 1}, "t4", True, True, None)
@example({"outer": 2, "channels": 2**31 - 1, "inner": 1, "dtype": 1}, "t4", True, True, None)
def test_forward(problem: dict[str, int], device: str, residual: bool, mask: bool, strategy: str | None) -> None:
    """At most two launches, and the bytes that the design counts: what stays on chip is read once."""
    mask = mask and residual
    numel = problem["outer"] * problem["channels"] * problem["inner"]
    size = numel * SIZES[problem["dtype"]]
    train = plan_of(problem, device, op="train", residual=residual, mask=mask, strategy=strategy)
    check("train", train, problem, device)
    assert len(train["launches"]) == (2 if train["strategy"] == "streaming" else 1)
    evaluate = plan_of(problem, device, op="eval", residual=residual, mask=mask)
    check("eval", evaluate, problem, device)
    assert len(evaluate["launches"]) == 1
    kept = train["values_kept"] * SIZES[problem["dtype"]]
    assert 0 <= kept <= (size if train["strategy"] == "resident" else 0)
    for plan, read in ((train, 2 * size - kept), (evaluate, size)):
        assert plan["bytes_read"] == read + residual * size
        assert plan["bytes_written"] == size + (-(-numel // 8) if mask else 0)


@SETTINGS
@given(problems(), devices, st.data(), st.sampled_from([None, "small", "streaming", "resident"]))
def test_backward(problem: dict[str, int], device: str, data: st.DataObject, strategy: str | None) -> None:
    """At most two launches; one where nothing waits for the sums."""
    names = ("residual", "training", "grad_x", "grad_residual", "grad_parameters", "means")
    request = {name: data.draw(st.booleans(), label=name) for name in names}
    request["means"] &= not request["grad_parameters"]
    plan = plan_of(problem, device, op="backward", strategy=strategy, **request)
    check("backward", plan, problem, device)
    waits = request["training"] and request["grad_x"] and not request["means"]
    sums = waits or request["grad_parameters"]
    expected = {"small", "streaming", "resident"} if waits else {"reduce"} if sums else {"apply"}
    assert plan["strategy"] in expected
    assert len(plan["launches"]) == (2 if plan["strategy"] == "streaming" else 1)
    size = problem["outer"] * problem["channels"] * problem["inner"] * SIZES[problem["dtype"]]
    kept = plan["values_kept"] * SIZES[problem["dtype"]]
    assert plan["bytes_read"] == ((2 if waits else 1) * size - kept) * (2 + request["residual"])
    assert plan["bytes_written"] == (request["grad_x"] + request["grad_residual"]) * size


@SETTINGS
@given(problems(), devices)
def test_statistics_of_a_part(problem: dict[str, int], device: str) -> None:
    """One launch, one read."""
    plan = plan_of(problem, device, op="stats")
    check("stats", plan, problem, device)
    assert (plan["strategy"], len(plan["launches"])) == ("reduce", 1)
    size = problem["outer"] * problem["channels"] * problem["inner"] * SIZES[problem["dtype"]]
    assert (plan["bytes_read"], plan["bytes_written"]) == (size, 0)


@SETTINGS
@given(st.integers(0, 100_000), st.integers(0, 10**6))
@example(1, 2**31 - 1)
def test_merge_of_parts(parts: int, channels: int) -> None:
    """Every column once: the channels and that of the counts. No device is asked, so that all give the same bits."""
    plan = _extension.merge_plan(parts=parts, channels=channels)
    assert (plan["parts"], plan["columns"]) == (parts, channels + 1)
    assert (plan["blocks"] - 1) * plan["columns_per_block"] < plan["columns"]
    assert plan["columns"] <= plan["blocks"] * plan["columns_per_block"]
    assert plan["blocks"] <= LARGEST_GRID
    # A lane of a block's columns for each part, up to the threads that a block may have.
    lanes = plan["threads"] // plan["columns_per_block"]
    assert plan["threads"] == lanes * plan["columns_per_block"] <= 256
    assert plan["threads"] % 32 == 0
    assert lanes == min(max(parts, 1), 256 // plan["columns_per_block"])


def test_strategies_can_be_asked_for() -> None:
    problem = {"outer": 64, "channels": 64, "inner": 784, "dtype": 2}
    for strategy in ("small", "streaming", "resident"):
        assert plan_of(problem, "h100", op="train", strategy=strategy)["strategy"] == strategy
    with pytest.raises(ValueError, match="expected strategy small, streaming or resident, got persistent"):
        plan_of(problem, "h100", op="train", strategy="persistent")


@SETTINGS
@given(
    problems(),
    st.sampled_from(["train", "backward"]),
    st.sampled_from([None, "resident"]),
    st.integers(1, 200),
    st.integers(0, 256),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_more_capacity_is_never_more_traffic(
    problem: dict[str, int], op: str, strategy: str | None, sms: int, kib: int, more_sms: int, more_kib: int
) -> None:
    """Neither more SMs nor more shared memory on each; nor is what is chosen ever worse than two launches.

    Traps: fewer blocks with more memory each, parts that are rounded, a threshold in bytes of the device.
    """
    moved = []
    for sm_count, shared in (
        (sms, kib),
        (sms + more_sms, kib),
        (sms, kib + more_kib),
        (sms + more_sms, kib + more_kib),
    ):
        plan = plan_of(problem, "h100", op=op, strategy=strategy, sm_count=sm_count, shared_per_sm=1024 * shared)
        moved.append(plan["bytes_read"] + plan["bytes_written"])
    assert max(moved[1:]) <= moved[0]
    assert moved[3] <= min(moved[1:3])
    streaming = plan_of(problem, "h100", op=op, strategy="streaming")
    assert moved[0] <= streaming["bytes_read"] + streaming["bytes_written"]


def test_a_layer_that_fits_is_read_once() -> None:
    """One launch, 2A forward and 3A backward: layers of ResNet-50 at batch 64, a channel or tile at once."""
    for channels, inner in ((64, 112 * 112), (256, 56 * 56), (512, 28 * 28), (1024, 14 * 14)):
        for shape in ((64, channels, inner), (64 * inner, channels, 1)):
            problem = dict(zip(("outer", "channels", "inner"), shape, strict=True)) | {"dtype": 1}
            size = 2 * math.prod(shape)
            for op, passes in (("train", 2), ("backward", 3)):
                plan = plan_of(problem, "h100", op=op)
                assert plan["strategy"] in ("resident", "small"), (shape, op)
                if plan["strategy"] == "resident" and plan["values_kept"] == math.prod(shape):
                    assert plan["bytes_read"] + plan["bytes_written"] == passes * size


def test_clusters() -> None:
    """Blocks that share a channel and keep it are one: as few as that takes, and as many as leave few SMs idle."""

    def cluster(device: str, outer: int, channels: int, inner: int, **request: Any) -> tuple[int, int]:
        problem = {"outer": outer, "channels": channels, "inner": inner, "dtype": 1}
        (launch,) = plan_of(problem, device, op="train", **request)["launches"]
        return launch["cluster"], launch["teams"]

    # 784 KiB of a channel are on 8 blocks, 196 KiB on 2: two blocks on an SM, of which each keeps up to 109 KiB.
    assert cluster("h100", 128, 256, 3136) == (8, 32)
    assert cluster("h100", 128, 256, 784) == (2, 128)
    # Of 6 channels of 196 KiB, 2 blocks for each would leave most SMs idle.
    assert cluster("h100", 32, 6, 3136) == (8, 6)
    # Nor do 16 do enough for the one channel of a large tensor, of which all SMs have something where they wait longer.
    assert cluster("h100", 32, 1, 50_176) == (1, 1)
    # 16 blocks are for the GPUs of data centers, none for those before sm_90, and 12 MiB of a channel for no cluster.
    assert cluster("h100", 128, 64, 12_544) == (16, 8)
    assert cluster("rtx5090", 128, 64, 12_544)[0] == cluster("a100", 128, 256, 3136)[0] == 1
    assert cluster("h100", 512, 64, 12_544)[0] == 1


@SETTINGS
@given(problems(), st.sampled_from(["train", "backward"]), st.sampled_from(["h100", "b200", "rtx5090"]))
def test_clusters_move_no_more(problem: dict[str, int], op: str, device: str) -> None:
    """They are another way to exchange sums: strategy, launches and bytes are those of a GPU without them."""
    plans = [plan_of(problem, device, op=op), _extension.plan(**problem, op=op, **without_clusters(device))]
    names = ("strategy", "bytes_read", "bytes_written", "values_kept")
    assert [plans[0][name] for name in names] == [plans[1][name] for name in names]


def without_clusters(device: str) -> dict[str, int]:
    limits = limits_of(device)
    return {"sm_count": limits.sm_count, "shared_per_sm": limits.shared_per_sm, "compute_capability": 80}


def test_blocks_wait_only_where_the_device_lets_them() -> None:
    """Without cooperative launches everything that would wait is two launches."""
    problem = {"outer": 64, "channels": 64, "inner": 3136, "dtype": 1}
    assert plan_of(problem, "h100", op="train")["strategy"] == "resident"
    assert plan_of(problem, "h100", op="train", cooperative=False)["strategy"] == "streaming"
    assert plan_of(problem, "h100", op="train", cooperative=False, strategy="resident")["strategy"] == "streaming"


def test_few_blocks_only_where_there_is_little_to_do() -> None:
    """C = 3 at 1024 x 1024 fills the machine, and so does C = 2048 at 7 x 7: two blocks for each SM at least.

    Or nearly one, or two, that have all of its shared memory.
    """
    sizes = ((8, 3, 1024 * 1024), (256, 2048, 49), (8 * 1024 * 1024, 3, 1), (256 * 49, 2048, 1), (3136, 2240, 1))
    for outer, channels, inner in (*sizes, (64, 140, 784)):
        problem = {"outer": outer, "channels": channels, "inner": inner, "dtype": 1}
        for op in ("train", "backward"):
            for launch in plan_of(problem, "h100", op=op)["launches"]:
                least = 0.75 * 132 if launch["kernel"] == "resident" else 2 * 132
                assert launch["blocks"] >= least, (problem, op, launch)


def test_an_empty_batch_is_one_launch() -> None:
    for op in ("stats", "train", "eval", "backward"):
        plan = plan_of({"outer": 0, "channels": 8, "inner": 4, "dtype": 2}, "h100", op=op)
        assert (plan["strategy"], len(plan["launches"])) == ("empty", 1)
        assert plan["bytes_read"] == plan["bytes_written"] == 0


def test_too_many_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 2\^34 values"):
        plan_of({"outer": 2**31, "channels": 16, "inner": 1, "dtype": 0}, "b200", op="train")


def test_explain_says_what_runs() -> None:
    """For a GPU that is not here: strategy, launches, bytes, what is saved, and the time of the bytes."""
    shape = (64, 64, 56, 56)
    it = bnfused.explain(
        shape,
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
        residual=True,
        activation="relu",
        device_limits="h100",
    )
    size = 2 * math.prod(shape)
    mask = math.prod(shape) // 8
    assert it.forward.strategy == "resident"
    assert [launch.kernel for launch in it.forward.launches] == ["resident"]
    assert (it.forward.bytes_read, it.forward.bytes_written) == (2 * size, size + mask)
    assert it.backward is not None
    assert (it.backward.bytes_read, it.backward.bytes_written) == (2 * size + mask, 2 * size)
    assert it.forward.seconds == pytest.approx((3 * size + mask) / 3350e9)
    assert it.saved == {"x": size, "mean and invstd": 16 * 64, "mask": mask}
    for words in ("batch_norm + add + relu, training", "cuda on H100", "launch resident", "mask 1.61 MB"):
        assert words in str(it)


def test_explain_saves_what_the_autograd_function_saves() -> None:
    """The bytes that ``saved`` counts, against tensors that autograd really keeps."""
    for residual, activation in ((False, None), (True, None), (False, "relu"), (True, "relu"), (True, "silu")):
        x = torch.randn(4, 16, 6, 6, requires_grad=True)
        added = torch.randn_like(x, requires_grad=True) if residual else None
        y = bnfused.functional.batch_norm(x, None, None, training=True, residual=added, activation=activation)
        assert y.grad_fn is not None
        kept = sum(t.numel() * t.element_size() for t in y.grad_fn.saved_tensors if t is not None)  # type: ignore[attr-defined]
        it = bnfused.explain(x, residual=residual, activation=activation)
        assert sum(it.saved.values()) == kept, (residual, activation)


def test_explain_of_the_cpu() -> None:
    x = torch.randn(8, 16, 14, 14)
    it = bnfused.explain(x)
    assert (it.backend, it.forward.strategy) == ("cpu", "planes")
    assert (it.forward.bytes_read, it.forward.bytes_written) == (x.nbytes, x.nbytes)
    last = bnfused.explain(x.to(memory_format=torch.channels_last))
    assert (last.forward.strategy, last.forward.bytes_read) == ("rows", 2 * x.nbytes)
    assert last.forward.seconds is not None and last.forward.seconds > 0
    evaluated = bnfused.explain(x, training=False, grad=False)
    assert evaluated.backward is None and evaluated.saved == {}


def test_explain_of_short_planes_on_the_cpu() -> None:
    """A group of channels is what has to fit the cache, 1 MiB: 32 of 7 x 7 do, of 16 images and not of 256."""
    for batch, passes in ((16, 1), (256, 2)):
        x = torch.empty(batch, 64, 7, 7)
        forward = bnfused.explain(x).forward
        assert (forward.strategy, forward.bytes_read) == ("short planes", passes * x.nbytes)
    assert "a group of up to 32 channels" in forward.why
    assert bnfused.explain((16, 63, 7, 7)).forward.strategy == "planes"


@pytest.mark.parametrize("device_limits", [None, "h100"])
def test_explain_counts_the_mask_that_a_training_without_gradients_writes(device_limits: str | None) -> None:
    """The op does not know whether a backward will come."""
    x = torch.randn(4, 16, 8, 8)
    *_, mask = torch.ops.bnfused.batch_norm_train(x, None, None, None, None, None, x, 0.1, 1e-5, 1, 0.0)
    fused = bnfused.explain(x, residual=True, activation="relu", grad=False, device_limits=device_limits)
    assert fused.forward.bytes_written == x.nbytes + mask.nbytes
    assert fused.saved == {}


def test_explain_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="expected device_limits of .*h100.*, got 'gtx'"):
        bnfused.explain((8, 4), device_limits="gtx")
    with pytest.raises(ValueError, match="activation"):
        bnfused.explain((8, 4), activation="cube")
    with pytest.raises(ValueError, match=r"expected a shape \(N, C, \*\), got \(8,\)"):
        bnfused.explain((8,))


def test_explain_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from bnfused.__main__ import main

    assert main(["explain", "32", "64", "56", "56", "--channels-last", "--device-limits", "a100"]) == 0
    assert "cuda on A100" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["explain", "32", "64", "--channels-last"])
    assert error.value.code == 2
    assert "4 and 5 dimensions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_bandwidth_by_the_name_of_the_gpu(name: str, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch reports names; none where the memory is another one than that of the table."""
    properties = SimpleNamespace(
        name=name, major=9, minor=0, multi_processor_count=132, shared_memory_per_multiprocessor=1 << 17
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    limits = explanation._limits(None, torch.device("cuda"))
    assert limits is not None
    assert limits.bandwidth == (None if key is None else explanation.DEVICES[key].bandwidth)
