"""The CUDA kernels on the emulated device: schedules, races, barriers, launches and bytes.

Whether their results are right is what every test with ``backend`` asks. Here: that no result depends on the order in
which threads and blocks run, that every barrier and fence is needed, and that each kernel moves what it should.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from functools import cache

import pytest
import torch

from bnfused import _extension, parts
from emulator import emulated
from emulator.build import ROOT, build
from support import cases, checks

KERNELS = sorted((ROOT / "csrc" / "kernels").glob("*.cuh"))
SCHEDULES = 6  # emulator/schedules.h
# A barrier, a fence, or a wait for a copy.
WAIT = r"(__(syncthreads|syncwarp|threadfence)\w*|cluster_barrier|cp_async_wait<\d+>)\("

# ------------------------------------------------------------------------------- without torch: run_launchers.cpp


class Run:
    """One case of ``run_launchers``: what each schedule wrote, as a hash or a report, and what was met on the way."""

    def __init__(self, suffix: str, case: str, dropped_site: str = ""):
        # Fibers of a launch that failed are abandoned with what they had allocated.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
        result = subprocess.run(
            [build(f"run_launchers{suffix}"), case, *filter(None, [dropped_site])],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        self.exit_status, self.errors = result.returncode, result.stderr
        lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
        self.sites = [text for kind, text in lines if kind == "site"]
        self.kernels = {text for kind, text in lines if kind == "kernel"}
        self.outcomes = {kind.rstrip(":"): text for kind, text in lines if kind.endswith(":")}


@cache
def case_names() -> list[str]:
    return subprocess.run([build("run_launchers")], capture_output=True, text=True, check=True).stdout.split()


@cache
def undisturbed(case: str) -> Run:
    return Run("", case)


def is_hash(outcome: str) -> bool:
    """Not a report."""
    return re.fullmatch(r"[0-9a-f]{16}", outcome) is not None


def test_results_do_not_depend_on_the_schedule():
    """Bit for bit the same forward, in reverse and in four random orders; no report of the emulator.

    Trap: partial sums that are added in the order in which blocks come.
    """
    for case in case_names():
        run = undisturbed(case)
        assert run.exit_status == 0 and len(run.outcomes) == SCHEDULES, (case, run.errors)
        assert is_hash(run.outcomes["forward"]), (case, run.outcomes)
        assert len(set(run.outcomes.values())) == 1, (case, run.outcomes)


def test_no_races():
    """ThreadSanitizer, to which each CUDA thread is a thread, sees every pair of accesses that nothing orders."""
    for case in case_names():
        run = Run("-thread", case)
        assert run.exit_status == 0 and not run.errors, f"{case}: {run.errors}"
        assert is_hash(run.outcomes["forward"]), (case, run.outcomes)


def test_no_stray_accesses(request):
    """AddressSanitizer and UndefinedBehaviorSanitizer: plain dereferences too, shared memory, overflow, alignment."""
    if not request.config.getoption("--sanitize"):
        pytest.skip("compiles for a minute; run with --sanitize, as make sanitize does")
    for case in case_names():
        run = Run("-address", case)
        assert run.exit_status == 0 and not run.errors, f"{case}: {run.errors}"


def test_every_kernel_and_every_barrier_is_run():
    """What a kernel file has and no case meets would be tested by nothing below."""
    text = "".join(path.read_text() for path in KERNELS)
    kernels = set(re.findall(r"__global__ void __launch_bounds__\([^()]*\)\s+(\w+)\(", text))
    assert kernels == set().union(*(undisturbed(case).kernels for case in case_names()))
    in_source = {
        f"{path.name}:{number}"
        for path in KERNELS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path.name != "platform.cuh" and re.search(WAIT, line.split("//")[0])
    }
    assert in_source == {site for case in case_names() for site in undisturbed(case).sites}


def test_every_barrier_and_fence_is_needed():
    """Without any one of them, a result changes, a schedule is reported, or ThreadSanitizer sees a race.

    Traps: a barrier that is there to be safe; a fence that nothing tests, for its lack shows on few GPUs.
    """
    needless = []
    for site in sorted({site for case in case_names() for site in undisturbed(case).sites}):
        cases = [case for case in case_names() if site in undisturbed(case).sites]
        if not any(changes_results(case, site) for case in cases) and not any(is_a_race(case, site) for case in cases):
            needless.append(site)
    assert not needless


def changes_results(case: str, dropped_site: str) -> bool:
    run = Run("", case, dropped_site)
    return set(run.outcomes.values()) != set(undisturbed(case).outcomes.values())


def is_a_race(case: str, dropped_site: str) -> bool:
    return "WARNING: ThreadSanitizer" in Run("-thread", case, dropped_site).errors


# ----------------------------------------------------------------------------------- with torch: launches and bytes

# (N, C, H, W) with planes of whole units of 8 values, and their places in memory.
SHAPE = (6, 16, 8, 16)
LAYOUTS = {"planes": torch.contiguous_format, "rows": torch.channels_last}
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # enum class DType
# The names of the arguments of each activation code: does the backward need the residual again, or a mask?
IDENTITY, RELU, SILU = 0, 1, 5


def tensors(shape: tuple[int, ...], layout: str, dtype: torch.dtype, residual: bool):
    x = torch.randn(shape).to(dtype=dtype, memory_format=LAYOUTS[layout])
    return x, torch.randn_like(x) if residual else None, torch.ones(shape[1]), torch.zeros(shape[1])


def train(x, residual, weight, bias, activation):
    emulated.take_launches()
    result = emulated.ops().batch_norm_train(x, weight, bias, None, None, None, residual, 0.1, 1e-5, activation, 0.0)
    return result, emulated.take_launches()


def evaluate(x, residual, weight, bias, activation):
    emulated.take_launches()
    emulated.ops().batch_norm_eval(x, weight, bias, bias, weight, residual, 1e-5, activation, 0.0)
    return emulated.take_launches()


def backward(x, residual, weight, bias, activation, saved, needs):
    emulated.take_launches()
    emulated.ops().batch_norm_backward(
        torch.randn_like(x), x, weight, bias, residual, *saved, activation, 0.0, True, needs
    )
    return emulated.take_launches()


def moved(launch: emulated.Launch, side: str, of: set[str]) -> dict[str, int]:
    """Bytes of the tensors ``of``; workspace and per-channel values are a thousandth of them."""
    return {name: t.bytes for name, t in getattr(launch, side).items() if name in of and t.bytes}


TENSORS = {"x", "residual", "y", "mask", "grad_y", "grad_x", "grad_residual"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", emulated.STRATEGIES)
def test_forward_bytes(strategy, layout, residual, dtype):
    """Two reads of x, one where it stays on chip, and one write of y; the residual once, a bit a value of the mask."""
    inputs = tensors(SHAPE, layout, dtype, residual)
    a = inputs[0].nbytes
    with emulated.settings(strategy=strategy):
        _, launches = train(*inputs, RELU)
    applied_read = {"x": a} | ({"residual": a} if residual else {})
    applied_written = {"y": a} | ({"mask": inputs[0].numel() // 8} if residual else {})
    if strategy == "streaming":
        expected = [({"x": a}, {}), (applied_read, applied_written)]
    else:
        expected = [(applied_read | {"x": a if strategy == "resident" else 2 * a}, applied_written)]
    assert [(moved(launch, "read", TENSORS), moved(launch, "written", TENSORS)) for launch in launches] == expected
    assert_wide(launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "activation, residual",
    [(IDENTITY, False), (RELU, False), (RELU, True), (SILU, True)],
    ids=["plain", "relu", "residual-relu", "residual-silu"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", emulated.STRATEGIES)
def test_backward_bytes(strategy, layout, activation, residual, dtype):
    """grad_y and x twice, once where they stay on chip, with what the activation needs; one write of each gradient."""
    inputs = tensors(SHAPE, layout, dtype, residual)
    a = inputs[0].nbytes
    with emulated.settings(strategy=strategy):
        (_, *saved), _ = train(*inputs, activation)
        launches = backward(*inputs, activation, saved, [True, True, True, residual])
    once = {"grad_y": a, "x": a}
    if residual:
        once |= {"mask": inputs[0].numel() // 8} if activation == RELU else {"residual": a}
    written = {"grad_x": a} | ({"grad_residual": a} if residual else {})
    if strategy == "streaming":
        expected = [(once, {}), (once, written)]
    else:
        expected = [({name: n if strategy == "resident" else 2 * n for name, n in once.items()}, written)]
    assert [(moved(launch, "read", TENSORS), moved(launch, "written", TENSORS)) for launch in launches] == expected
    assert_wide(launches)


FUSIONS = ({}, {"residual": True, "activation": "relu"}, {"residual": True, "activation": "silu"})
# Of an SM: nothing fits, a unit or a few of each thread do, all of the small tensors below do.
KIB_OF_SHARED = (20, 40, 60, 228)


@pytest.mark.parametrize("activation, residual, capability", [(RELU, False, 90), (RELU, True, 80), (SILU, True, 90)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(24, 16, 8, 16), (3, 5, 40, 56), (2, 168, 12, 16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_is_what_was_predicted(layout, shape, dtype, activation, residual, capability):
    """The bytes that cross to and from memory are the plan's, whether all, a part or nothing stays on chip.

    Traps: a unit that is kept and read again; one that is recalled and was never kept.
    """
    x, added, *parameters = tensors(shape, layout, dtype, residual)
    inputs = x, added, *(t.to(cases.parameter_dtype(dtype)) for t in parameters)
    masked = residual and activation == RELU
    n, c, h, w = shape
    outer, inner = (n, h * w) if layout == "planes" else (n * h * w, 1)
    problem = {"outer": outer, "channels": c, "inner": inner, "dtype": CODES[dtype], "sm_count": 4}
    problem |= {"compute_capability": capability, "strategy": "resident"}
    kept = []
    for kib in KIB_OF_SHARED:
        shared = 1024 * kib
        request = problem | {"shared_per_sm": shared, "residual": residual}
        forward = _extension.plan(**request, op="train", mask=masked)
        request |= {"residual": residual and not masked, "grad_residual": residual}
        backwards = _extension.plan(**request, op="backward", mask=masked)
        with emulated.settings(strategy="resident", shared_per_sm=shared, compute_capability=capability):
            (_, *saved), launches = train(*inputs, activation)
            assert [launch.kernel for launch in launches] == [f"batch_norm_resident_{layout}"]
            more = backward(*inputs, activation, saved, [True, True, True, residual])
            assert [launch.kernel for launch in more] == [f"batch_norm_backward_resident_{layout}"]
        for plan, (launch,) in ((forward, launches), (backwards, more)):
            assert sum(moved(launch, "read", TENSORS).values()) == plan["bytes_read"]
            assert sum(moved(launch, "written", TENSORS).values()) == plan["bytes_written"]
            assert (launch.grid, launch.dynamic_shared, launch.cluster) == tuple(
                plan["launches"][0][name] for name in ("blocks", "shared_bytes", "cluster")
            )
        kept.append(forward["values_kept"])
    assert kept == sorted(kept) and kept[-1] == x.numel()


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 16, 20, 65, 131])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset"])
@pytest.mark.parametrize("strategy, capability", [("streaming", 90), ("resident", 80), ("resident", 90)])
def test_every_strategy_agrees_with_the_oracle(backend, strategy, capability, layout, channels, dtype):
    """Values, gradients and running statistics, of one block and of many that wait for each other, kept and read again.

    Traps: a tile's constants that are still those of the tile before; a plane's edge that is kept with its neighbour's.
    """
    shape = (3, channels, 13, 15) if channels < 65 else (3, channels, 5, 7)
    for fused, kib in zip(FUSIONS, (48, 228, 40), strict=True):
        with emulated.settings(strategy=strategy, shared_per_sm=1024 * kib, compute_capability=capability):
            checks.check_against_oracle(backend.batch_norm, cases.make(shape, dtype=dtype, layout=layout, **fused))


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("fused", FUSIONS, ids=["plain", "masked", "residual"])
@pytest.mark.parametrize(
    "layout, ahead, dtype",
    [
        *((layout, "some", dtype) for layout in ("contiguous", "channels_last") for dtype in CODES),
        ("contiguous", "all", torch.bfloat16),
        ("channels_last", "all", torch.bfloat16),
        ("offset", "some", torch.bfloat16),
        ("offset_channels_last", "some", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["train", "backward"])
def test_the_next_tile_is_fetched_in_time(backend, op, layout, ahead, dtype, fused):
    """Of a team's next tile, some steps, or all, into room of their own, the others into that of this one; each once.

    Traps: a slot that is overwritten before it was used, or read before the copy has ended; one that belongs to another
    turn; a unit at the edge of a plane that was never fetched; one beside the last tile that was; one of a tensor that
    is not aligned; grad_y without the mask.
    """
    masked = fused.get("activation") == "relu"
    whole = masked and op == "train"  # planes of whole units: a byte of the mask is of one channel
    rows = layout.endswith("channels_last")
    if rows:
        shape = (4, 40, 10, 25) if ahead == "some" else (9, 96, 7, 31)
    elif ahead == "some":
        shape = (3, 3, 48, 48) if whole else (3, 3, 45, 51)
    else:
        shape = (2, 3, 92, 96) if whole else (2, 3, 91, 91)
    n, c, h, w = shape
    outer, inner = (n * h * w, 1) if rows else (n, h * w)
    problem = {"outer": outer, "channels": c, "inner": inner, "dtype": CODES[dtype]}
    sms = 2 if ahead == "some" else 4 if rows else 1
    device = {"sm_count": sms, "compute_capability": 90}
    needed = {"residual": bool(fused) and not masked} if op == "backward" else {}
    for kib in range(20, 400, 4):
        plan = _extension.plan(op=op, **problem, **device, **needed, shared_per_sm=1024 * kib, strategy="resident")
        (launch,) = plan["launches"]
        if launch["ahead"] > 0 and (launch["ahead"] == launch["steps"]) == (ahead == "all"):
            break
    else:
        pytest.fail(f"expected a device on which {ahead} of the next tile has room, found none; the last plan: {plan}")
    with emulated.settings(strategy="resident", shared_per_sm=1024 * kib, sm_count=sms):
        emulated.take_launches()
        checks.check_against_oracle(backend.batch_norm, cases.make(shape, dtype=dtype, layout=layout, **fused))
        kernel = "batch_norm_resident" if op == "train" else "batch_norm_backward_resident"
        (launch,) = (it for it in emulated.take_launches() if it.kernel.startswith(kernel))
    read = moved(launch, "read", {"x", "grad_y", "residual"})
    assert set(read.values()) == {math.prod(shape) * dtype.itemsize}, read


@pytest.mark.parametrize(
    "capability, report",
    [
        (80, r"livelock: thread 0 .* wait in __syncthreads"),
        (90, r"cluster sync at layout.cuh:\d+ for 2 blocks, but the cluster has 1"),
    ],
    ids=["through memory", "clusters"],
)
def test_blocks_that_wait_have_to_be_there_together(capability, report):
    """They pass as a cooperative launch or clusters; where being together is only hoped for, that is reported."""
    x = torch.randn(64, 16, 8, 16)
    inputs = x, None, torch.ones(16), torch.zeros(16)
    few = {"shared_per_sm": 48 * 1024, "resident_blocks": 1, "order": "forward", "compute_capability": capability}
    with emulated.settings(strategy="resident", **few):
        _, (launch,) = train(*inputs, IDENTITY)
    assert launch.grid > 1
    report = "batch_norm_resident_planes, " + report
    with emulated.settings(strategy="resident", hopes=True, **few), pytest.raises(RuntimeError, match=report):
        train(*inputs, IDENTITY)


@pytest.mark.parametrize("layout, shape, kib", [("planes", (16, 16, 16, 32), 21), ("rows", (2, 16, 16, 32), 46)])
def test_clusters_give_the_same_bits(layout, shape, kib):
    """A team of the same blocks, whether its partial sums go through shared memory or through memory.

    Trap: partial sums in another order than that of the parts.
    """
    x, residual, _, _ = tensors(shape, layout, torch.float64, True)
    x = torch.randn_like(x)  # of 53 bits: the sums of what was float32 are exact in any order
    launches, results = [], []
    for capability in (80, 90):
        with emulated.settings(strategy="resident", shared_per_sm=1024 * kib, compute_capability=capability):
            outputs, (launch,) = train(x, residual, None, None, RELU)
        launches.append(launch)
        results.append(outputs)
    without, with_clusters = launches
    assert without.grid == with_clusters.grid and (without.cluster, with_clusters.cluster) == (1, 4)
    assert all(map(torch.equal, *results))
    assert {"partials", "tickets"} & set(without.written) == {"partials"}
    assert not {"partials", "tickets"} & (set(with_clusters.read) | set(with_clusters.written))


def test_fewer_clusters_than_planned_take_more_tiles_each():
    """8 rounds become 9, by clusters that all run at once, with the same bits; 11 would leave too much idle."""
    inputs = tensors((64, 72, 8, 16), "planes", torch.float32, True)
    found, results = [], []
    for taken in (0, 1, 2):
        with emulated.settings(strategy="resident", sm_count=9, shared_per_sm=48 * 1024, sms_taken=taken):
            outputs, launches = train(*inputs, RELU)
        found.append([(launch.cluster, launch.grid) for launch in launches[:1]])
        results.append(outputs)
    assert found == [[(2, 18)], [(2, 16)], [(1, 72)]]
    assert all(map(torch.equal, *results[:2]))


def test_what_there_is_room_for_is_launched():
    """A cluster of 8 blocks; with less room 5 that wait through memory; with room for less, two launches."""
    x = torch.randn(15, 1, 32, 64, dtype=torch.float64)
    found, results = [], []
    for taken in (0, 2, 5):
        with emulated.settings(strategy="resident", sm_count=8, shared_per_sm=53 * 1024, sms_taken=taken):
            outputs, launches = train(x, None, None, None, RELU)
        found.append([(launch.kernel, launch.grid, launch.cluster) for launch in launches])
        results.append(outputs)
    resident = "batch_norm_resident_planes"
    assert found[:2] == [[(resident, 8, 8)], [(resident, 5, 1)]]
    assert [kernel for kernel, _, _ in found[2]] == ["batch_norm_stats_planes", "batch_norm_apply_planes"]
    for others in results[1:]:
        torch.testing.assert_close(others, results[0])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["streaming", "resident"])
def test_a_batch_is_counted_once(strategy, layout, capability):
    """By one of the blocks that share a channel, or one that shares it with none."""
    x, _, weight, bias = tensors((64, 2, 16, 32), layout, torch.float32, False)
    state = torch.zeros(2), torch.ones(2), torch.tensor(5)
    emulated.take_launches()
    with emulated.settings(strategy=strategy, compute_capability=capability):
        emulated.ops().batch_norm_train(x, weight, bias, *state, None, 0.1, 1e-5, IDENTITY, 0.0)
    assert emulated.take_launches()[0].grid > 2
    assert state[2] == 6


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_room_to_wait_nobody_waits(layout, capability):
    """Where others have a part of the device, blocks that wait are refused, and two launches do the work."""
    inputs = tensors((64, 2, 16, 32), layout, torch.float32, True)
    with emulated.settings(compute_capability=capability):
        (y, *saved), launches = train(*inputs, RELU)
        assert [launch.kernel for launch in launches] == [f"batch_norm_resident_{layout}"]
        assert (launches[0].cluster > 1) == (capability == 90)
    with emulated.settings(sms_taken=4, compute_capability=capability):
        (again, *saved_again), launches = train(*inputs, RELU)
        assert [launch.kernel for launch in launches] == [f"batch_norm_{name}_{layout}" for name in ("stats", "apply")]
        launches = backward(*inputs, RELU, saved, [True, True, True, True])
        names = [f"batch_norm_backward_{name}_{layout}" for name in ("reduce", "apply")]
        assert [launch.kernel for launch in launches] == names
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(saved_again, saved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_bytes(layout):
    """One read of x and of the residual, one write of y."""
    inputs = tensors(SHAPE, layout, torch.float32, True)
    a = inputs[0].nbytes
    launches = evaluate(*inputs, RELU)
    assert [(moved(launch, "read", TENSORS), moved(launch, "written", TENSORS)) for launch in launches] == [
        ({"x": a, "residual": a}, {"y": a})
    ]
    assert_wide(launches)


def in_parts(inputs, activation):
    """The launches of each op of ``bnfused.parts`` on ``inputs``, by name, for a batch of which they are one of two."""
    x, residual, weight, bias = inputs
    ops, launches = emulated.ops(), {}

    def run(name, *args):
        emulated.take_launches()
        results = getattr(ops, name)(*args)
        launches[name] = emulated.take_launches()
        return results

    moments = run("batch_norm_stats", x).expand(2, -1).contiguous()
    state = (torch.zeros_like(bias), torch.ones_like(bias), torch.tensor(0))
    mean, var, _ = run("batch_norm_gather_stats", moments, *state, None, None)
    _, invstd, mask = run("batch_norm_apply", x, weight, bias, mean, var, residual, 1e-5, activation, 0.0)
    saved = (torch.randn_like(x), x, weight, bias, residual, mean, invstd, mask)
    run("batch_norm_backward_reduce", *saved, activation, 0.0)
    of_batch = (torch.randn(2, x.shape[1], dtype=torch.float64), torch.tensor(2.0 * x.numel(), dtype=torch.float64))
    run("batch_norm_backward_apply", *saved, *of_batch, activation, 0.0, [True, residual is not None])
    return launches


@pytest.mark.parametrize(
    "activation, residual",
    [(IDENTITY, False), (RELU, False), (RELU, True), (SILU, True)],
    ids=["plain", "relu", "residual-relu", "residual-silu"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_in_parts(layout, activation, residual):
    """One launch for each part, which reads each tensor once; the merge reads five values a channel and part."""
    inputs = tensors(SHAPE, layout, torch.bfloat16, residual)
    a, mask = inputs[0].nbytes, {"mask": inputs[0].numel() // 8} if residual and activation == RELU else {}
    added = {"residual": a} if residual else {}
    needed = {"grad_y": a, "x": a} | (mask or (added if activation != IDENTITY else {}))
    expected = {
        "batch_norm_stats": ({"x": a}, {}),
        "batch_norm_gather_stats": ({}, {}),
        "batch_norm_apply": ({"x": a} | added, {"y": a} | mask),
        "batch_norm_backward_reduce": (needed, {}),
        "batch_norm_backward_apply": (needed, {"grad_x": a} | ({"grad_residual": a} if residual else {})),
    }
    launches = in_parts(inputs, activation)
    for name, (launch,) in launches.items():
        assert (moved(launch, "read", TENSORS), moved(launch, "written", TENSORS)) == expected[name], name
        assert_wide([launch])
    (gather,) = launches["batch_norm_gather_stats"]
    channels, two_parts, single = SHAPE[1], 2, 4
    # Mean, its rest and deviation of each channel; count and its rest for each too, and for their own sum.
    assert {name: t.bytes for name, t in gather.read.items()} == {
        "moments": two_parts * (3 * channels + 2 * (channels + 1)) * single
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (16, 4, 48, 48), (0, 3, 2, 2)], ids=str)
def test_a_part_is_one_launch(shape, layout):
    """Whatever its size, also of a batch without values."""
    launches = in_parts(tensors(shape, layout, torch.float32, True), RELU)
    assert {name: len(of) for name, of in launches.items()} == dict.fromkeys(launches, 1)


def test_the_merge_gives_the_same_bits_on_every_gpu():
    """However many SMs it has, whatever its order of blocks: running statistics must not drift apart between ranks."""
    mean, var = torch.randn(9, 70, dtype=torch.float64), torch.rand(9, 70, dtype=torch.float64)
    gathered = parts.pack_moments(mean, var, torch.randint(1, 1000, (9,)).double())
    results = []
    for sm_count, order in ((1, "forward"), (132, "reverse"), (4, "random")):
        state = (torch.zeros(70), torch.ones(70), torch.tensor(3))
        with emulated.settings(sm_count=sm_count, order=order):
            merged = emulated.ops().batch_norm_gather_stats(gathered, *state, None, 0.1)
        results.append(torch.cat([t.double().view(-1) for t in (*merged, *state)]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def assert_wide(launches: list[emulated.Launch]) -> None:
    for launch in launches:
        for name in TENSORS - {"mask"}:
            for side in (launch.read, launch.written):
                assert name not in side or side[name].narrow == 0, (launch.kernel, name, side[name])


@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (3, 65, 1, 3), (9, 7, 13, 17)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", emulated.STRATEGIES)
def test_odd_sizes_move_no_more(strategy, layout, shape):
    """A plane that begins or ends within a unit of 8 values has those few moved one by one, and none of them twice."""
    inputs = tensors(shape, layout, torch.float32, False)
    a = inputs[0].nbytes
    edges = 1 if layout == "rows" else shape[0] * shape[1]
    most_narrow = edges * 14 * inputs[0].element_size()  # up to 7 values at either end
    with emulated.settings(strategy=strategy):
        (_, *saved), forward = train(*inputs, RELU)
        launches = forward + backward(*inputs, RELU, saved, [True, True, True, False])
    passes = len(launches) // 2  # over x, in all launches of one direction
    for direction, read, written in ((launches[:passes], ["x"], "y"), (launches[passes:], ["x", "grad_y"], "grad_x")):
        for name in read:
            times = 1 if strategy == "resident" else 2
            assert sum(launch.read[name].bytes for launch in direction if name in launch.read) == times * a
        assert sum(launch.written[written].bytes for launch in direction if written in launch.written) == a
    for launch in launches:
        for side in (launch.read, launch.written):
            for name in TENSORS & set(side):
                assert side[name].narrow <= 2 * most_narrow, (launch.kernel, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values", [1, 4, 7])
def test_no_bit_of_the_mask_is_beyond_the_tensor(layout, values):
    """The last unit has 1, 4 or 7 values. These use as many bits of its byte, and the others are 0.

    A register beyond the tensor holds zero, or is filled with the pattern 0xfe by ``make mutate``, which is a large
    negative float. With a bias of 99 and a weight of -4, ReLU lets both through, and their bits would be set.
    """
    n = 8 * 64 + values
    x, *_ = tensors((1, 1, 1, n) if layout == "planes" else (n, 1, 1, 1), layout, torch.float32, False)
    (*_, mask), _ = train(x, torch.zeros_like(x), torch.full((1,), -4.0), torch.full((1,), 99.0), RELU)
    assert mask.tolist() == [255] * 64 + [2**values - 1]


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_first_moments_are_taken_as_they_are(backend, layout):
    """A constant whose square leaves float64 is one: its distance from no mean, squared, times 0 would be NaN."""
    p = cases.make((6, 3, 40, 41), layout=layout, dtype=torch.float64, regime=lambda x: torch.full_like(x, 1e200))
    checks.check_constant_channels(backend.batch_norm, p)


def test_sums_are_added_in_short_runs():
    """Of rows, 32 values of float32 are added in float32, and the runs in float64: 32 roundings of 2^-24 at most, with
    that of the result.

    Trap: a run without an end. Each of a thread's 256 terms is 1 and just less than half a unit in the last place of
    what lies between 128 and 256, so that the last 128 lose 2^-17 each: 2^-18 of the sum.
    """
    lanes, values = 256, 256
    term = 1 + 2.0**-17 - 2.0**-23
    x = torch.full((values, lanes, 8), term**0.5)
    x[1::2] *= -1  # a mean of 0
    x = x.view(-1, 8)
    mean, var = torch.zeros(8), torch.ones(8)
    with emulated.settings(strategy="small"):
        emulated.take_launches()
        (_, *saved) = emulated.ops().batch_norm_train(x, None, None, mean, var, None, None, 1.0, 1e-5, IDENTITY, 0.0)
        needs = [True, False, True, False]
        grads = emulated.ops().batch_norm_backward(
            torch.full_like(x, term), x, None, torch.zeros(8), None, *saved, IDENTITY, 0.0, True, needs
        )
        launches = emulated.take_launches()
    assert [(launch.grid, launch.block) for launch in launches] == [(1, lanes)] * 2
    rounding = {"rtol": 32 * 2.0**-24, "atol": 0.0}
    torch.testing.assert_close(var.double(), x.double().var(0), **rounding)
    torch.testing.assert_close(grads[2].double(), torch.full((8,), term * len(x), dtype=torch.float64), **rounding)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_no_values(layout):
    """Without values the statistics that are handed back are 0 in training, and the running ones frozen; none is left
    unwritten, in the second block of channels neither."""
    x, *_ = tensors((0, 300, 2, 2), layout, torch.float32, False)
    mean, var = torch.randn(300), torch.rand(300)
    (_, *saved), _ = train(x, None, None, None, IDENTITY)
    frozen = emulated.ops().batch_norm_frozen(x, None, None, mean, var, None, 1e-5, IDENTITY, 0.0)
    assert all(torch.equal(t, torch.zeros(300, dtype=torch.float64)) for t in saved[:2])
    assert torch.equal(frozen[1], mean.double())
    torch.testing.assert_close(frozen[2], (var.double() + 1e-5).rsqrt())


@pytest.mark.parametrize("activation", [IDENTITY, RELU, SILU])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), SHAPE, (16, 4, 48, 48), (0, 3, 2, 2)], ids=str)
def test_number_of_launches(shape, layout, residual, activation):
    """At most two for a training forward and two for its backward, one in eval: whatever is fused, and for any size."""
    inputs = tensors(shape, layout, torch.float32, residual)
    (_, *saved), launches = train(*inputs, activation)
    assert 1 <= len(launches) <= 2
    assert 1 <= len(backward(*inputs, activation, saved, [True, True, True, residual and activation != 0])) <= 2
    assert len(evaluate(*inputs, activation)) == 1
