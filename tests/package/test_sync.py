"""SyncBatchNorm on real processes, against one process that has the whole batch, in float64."""

from __future__ import annotations

import collections
import dataclasses
import os
import random
import re
import time
import unittest.mock
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bnfused
from support import cases, checks, oracle, ranks
from support.cases import Problem
from support.ranks import Failure, Ranks

WORLD = 4

pytestmark = pytest.mark.usefixtures("extension")


@pytest.fixture(scope="module")
def four():
    """Four processes, for worlds of up to four."""
    processes = Ranks(WORLD)
    yield processes
    processes.close()


def module_of(p: Problem, group) -> bnfused.SyncBatchNorm:
    """A module with the parameters and the state of ``p``."""
    affine = p.weight is not None
    bn = bnfused.SyncBatchNorm(
        *(p.x.shape[1], p.eps, p.momentum, affine, p.running_mean is not None, group),
        dtype=cases.parameter_dtype(p.x.dtype),
    )
    if p.bias is None:
        bn.register_parameter("bias", None)  # torch 2.11 has no argument that says so
    state = {n: getattr(p, n) for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    bn.load_state_dict({n: t for n, t in state.items() if t is not None and getattr(bn, n) is not None})
    return bn


def step(p: Problem, size: int | str) -> dict[str, Tensor | None]:
    """On a rank: forward and backward of this rank's part; what ``oracle.expected`` names, and the counter."""
    bn = module_of(p, ranks.group_of(size))
    x = p.x.detach().requires_grad_()
    residual = None if p.residual is None else p.residual.detach().requires_grad_()
    y = bn(x, residual, p.activation, p.activation_param)
    y.backward(p.grad_y)
    return {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_residual": None if residual is None else residual.grad,
        "grad_weight": None if bn.weight is None else bn.weight.grad,
        "grad_bias": None if bn.bias is None else bn.bias.grad,
        "running_mean": bn.running_mean,
        "running_var": bn.running_var,
        "num_batches_tracked": bn.num_batches_tracked,
    }


def split(p: Problem, sizes: list[int], layout: str) -> list[Problem]:
    """The parts of ``p`` that the ranks get, each in ``layout``."""

    def parts(t: Tensor | None) -> list:
        if t is None:
            return [None] * len(sizes)
        return [cases.LAYOUTS[layout](part) if len(part) else part for part in t.split(sizes)]

    names = ("x", "grad_y", "residual")
    return [
        p.but(**dict(zip(names, of_rank, strict=True)))
        for of_rank in zip(*(parts(getattr(p, n)) for n in names), strict=True)
    ]


def check_split(
    four: Ranks, p: Problem, sizes: list[int], layout: str = "contiguous", group: int | str | None = None
) -> None:
    """All that the ranks return for their parts of ``p`` is what one process returns for ``p``."""
    parts = split(p, sizes, layout)
    results = four.run(step, [(part, group or len(sizes)) for part in parts])
    truth = oracle.expected(p)
    for name, expected in truth.values.items():
        found = [r[name] for r in results]
        context = f"sizes {sizes}, {layout}, {p}"
        if expected is None:
            assert found == [None] * len(sizes), f"{name} {context}"
            continue
        of = p.x if name == "y" else getattr(p, name.removeprefix("grad_"))
        assert all(t.dtype == of.dtype for t in found), name
        if name in ("grad_weight", "grad_bias"):  # each rank's share
            actual = torch.stack(found).double().sum(0)
        elif name in ("running_mean", "running_var"):
            assert all(checks.same_bits(t, found[0]) for t in found), f"{name} differs between ranks, {context}"
            actual = found[0]
        else:
            actual = torch.cat(found)
            for t, part in zip(found, parts, strict=True):
                if t.numel() and name in ("y", "grad_x"):
                    wanted = cases.strides_that_matter(part.x, cases.dense_strides(part.x))
                    assert cases.strides_that_matter(t, t.stride()) == wanted, f"strides of {name}, {context}"
        measure = expected.abs() if name == "running_var" else truth.scales[name]
        checks.assert_within(name, actual, expected, cases.limit(expected, measure, of.dtype), context)
    if p.running_mean is not None:
        assert [int(r["num_batches_tracked"]) for r in results] == [truth.num_batches_tracked] * len(sizes)


SPLITS = ([3, 5], [0, 6], [1, 1], [2, 0, 5], [0, 0, 0, 7], [8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "holes_in_last"])
def test_is_one_process_with_the_whole_batch(four, layout, dtype):
    """Output, every gradient and the running statistics, for uneven splits and ranks without a batch."""
    drawn = [random.randint(0, 5) for _ in range(WORLD)]
    drawn[random.randrange(WORLD)] += 2  # one value per channel in all would be refused
    for sizes in (*SPLITS, drawn):
        spatial = random.choice(((5, 6), (3,), (2, 3, 4), (1, 1)))
        p = cases.make((sum(sizes), random.choice((1, 3, 16, 33)), *spatial), dtype=dtype, residual=True)
        check_split(four, p, sizes, layout)


def step_and_large_allocations(p: Problem, size: int) -> tuple[dict[str, Tensor | None], int]:
    """On a rank: ``step``, and how many times it asked for as much memory as ``x`` has, or more."""
    step(p, size)  # modules that are loaded on the way
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step(p, size)
    events = profile.profiler.kineto_results.events()
    return result, sum(e.name() == "[memory]" and e.nbytes() >= p.x.nbytes for e in events)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_channels_last_without_a_copy(four, memory_format, dtype):
    """What a rank allocates of the size of its batch is what it returns: y, grad_x and grad_residual, in that format.

    Trap: torch's SyncBatchNorm copies whatever has more than four dimensions into contiguous memory, and back.
    """
    spatial = (5, 6) if memory_format == torch.channels_last else (3, 5, 6)
    p = cases.make((7, 33, *spatial), dtype=dtype, residual=True, activation="relu")
    parts = [
        part.but(**{n: getattr(part, n).contiguous(memory_format=memory_format) for n in ("x", "grad_y", "residual")})
        for part in split(p, [3, 4], "contiguous")
    ]
    results = four.run(step_and_large_allocations, [(part, 2) for part in parts])
    expected = oracle.expected(p)
    for name in ("y", "grad_x", "grad_residual"):
        found = [result[name] for result, _ in results]
        assert all(t.is_contiguous(memory_format=memory_format) for t in found), name
        limits = cases.limit(expected.values[name], expected.scales[name], dtype)
        checks.assert_within(name, torch.cat(found), expected.values[name], limits)
    assert [large for _, large in results] == [3, 3]


@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
def test_activation_and_residual(four, activation):
    """Fused as everywhere, on two and on three ranks."""
    for sizes, residual in (([2, 4], True), ([3, 0, 2], False)):
        p = cases.make((sum(sizes), 6, 5, 3), residual=residual, activation=activation)
        check_split(four, p, sizes)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"weight": False, "bias": False}, {"running": False, "counter": None}, {"bias": False}],
    ids=str,
)
def test_options(four, options):
    """The cumulative average, no parameters, no running statistics."""
    check_split(four, cases.make((7, 4, 3), **options), [2, 5])


def counter_of_a_cast_module(p: Problem, size: int) -> Tensor:
    """On a rank: after a step of a module whose buffers are all of one dtype."""
    bn = module_of(p, ranks.group_of(size)).type(p.x.dtype)
    bn(p.x)
    return bn.num_batches_tracked


def test_counter_of_another_dtype(four):
    """``Module.type()`` casts every buffer, the counter too."""
    p = cases.make((7, 4, 3), momentum=None, counter=4)
    counters = four.run(counter_of_a_cast_module, [(part, 2) for part in split(p, [2, 5], "contiguous")])
    assert [(counter.dtype, counter.item()) for counter in counters] == [(torch.float32, 5.0)] * 2


@pytest.mark.parametrize("regime", ["mean_1e4_std_0.01", "outlier_first", "constant", "drift"])
def test_merges_what_cancels(four, regime):
    """Means far from 0 and from each other: a mean or a variance that travels in float32, or as invstd, is far off."""
    check_split(four, cases.make((12, 5, 7, 3), regime=regime, zero_stats=True), [3, 0, 8, 1])


def half_statistics(rows: int, seed: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """On a rank: ``rows`` values of float16, and what running statistics of float16 learn of all ranks' values."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed)).half() * 3 + 1
    bn = bnfused.SyncBatchNorm(2, momentum=1.0, process_group=ranks.group_of(size)).half()
    with torch.autocast("cpu", torch.bfloat16):
        bn(x)
    return x, bn.running_mean, bn.running_var


def test_counts_and_statistics_of_float16(four, seed):
    """More values than float16 can count, beside running statistics of float16; under autocast, a rank being empty."""
    results = four.run(half_statistics, [(rows, seed + rank, 3) for rank, rows in enumerate((40_000, 0, 30_001))])
    x = torch.cat([x for x, _, _ in results]).double()
    for _, mean, var in results:
        for actual, wanted in ((mean, x.mean(0)), (var, x.var(0))):
            limits = wanted.abs() * torch.finfo(torch.float16).eps / 2 + cases.FLOAT32 * wanted.abs()
            checks.assert_within("running statistics", actual, wanted, limits)


@pytest.mark.parametrize("regime", ["normal", "mean_1e4_std_0.01"])
@pytest.mark.parametrize("sizes", [[3, 1, 0, 4], [0, 0, 2, 5]], ids=str)
def test_hierarchy(four, sizes, regime):
    """Two collectives each way, of fewer messages between the nodes; the same results, on a node of empty ranks too."""
    options = {"residual": True, "activation": "relu"} if regime == "normal" else {"regime": regime, "zero_stats": True}
    check_split(four, cases.make((sum(sizes), 5, 3, 4), **options), sizes, group="2x2")


def test_hierarchy_needs_whole_nodes(four):
    for outcome in four.outcomes(bnfused.sync.hierarchy, [(3,)] * 4):
        assert "expected a size that divides 4 processes, got 3" in outcome.message


def many_steps(size: int | str, steps: int, seed: int) -> list[Tensor]:
    """On a rank: running statistics after steps of random sizes, empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    bn = bnfused.SyncBatchNorm(3, process_group=ranks.group_of(size))
    with torch.no_grad():
        for _ in range(steps):
            rows = int(torch.randint(0, 4, (1,), generator=generator))
            bn(torch.randn(rows, 3, 2, generator=generator) + seed)
    return [bn.running_mean, bn.running_var, bn.num_batches_tracked]


@pytest.mark.parametrize("size", [2, 4, "2x2"])
def test_ranks_stay_bitwise_equal(four, seed, size):
    """A thousand steps of uneven batches drift nowhere."""
    results = four.run(many_steps, [(size, 1000, seed + rank) for rank in range(4 if size == "2x2" else size)])
    assert int(results[0][2]) == 1000
    for of_rank in results[1:]:
        for first, other in zip(results[0], of_rank, strict=True):
            assert checks.same_bits(first, other)


def penalty_grads(p: Problem, size: int | str, order: int) -> list[Tensor]:
    """On a rank: gradients of a penalty on the gradient, of the second or third order."""
    bn = module_of(p, ranks.group_of(size))
    return _penalty(p, bn.weight, bn.bias, lambda x, r: bn(x, r, p.activation), order)


def _penalty(p: Problem, weight: Tensor, bias: Tensor, function, order: int) -> list[Tensor]:
    x, residual = p.x.detach().requires_grad_(), p.residual.detach().requires_grad_()
    loss = (function(x, residual) * p.grad_y).sum()
    for _ in range(order - 1):
        grads = torch.autograd.grad(loss, [x, weight], create_graph=True)
        loss = (grads[0].pow(3) * p.grad_y).sum() + (grads[1].sum() if order == 2 else 0)
    # A penalty on ReLU's gradient is constant in the bias and the residual, by either way of computing it.
    return list(torch.autograd.grad(loss, [x, weight, bias, residual], materialize_grads=True))


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_of_higher_order(four, order, activation):
    """Through the collectives, an empty rank included, and from the mask of a ReLU; torch's SyncBatchNorm has none."""
    p = cases.make((6, 3, 4), dtype=torch.float64, residual=True, activation=activation)
    group, sizes = random.choice(((3, [2, 0, 4]), ("2x2", [2, 0, 3, 1])))
    found = four.run(penalty_grads, [(part, group, order) for part in split(p, sizes, "contiguous")])
    weight, bias = p.weight.clone().requires_grad_(), p.bias.clone().requires_grad_()

    def formula(x, r):
        return oracle.formula(x, None, None, weight, bias, True, p.eps, r, p.activation)

    wanted = _penalty(p, weight, bias, formula, order)
    joined = [torch.cat, lambda parts: sum(parts), lambda parts: sum(parts), torch.cat]
    for name, join, expected, parts in zip(checks.LEAVES, joined, wanted, zip(*found, strict=True), strict=True):
        # As many roundings as the first order has, in terms that cancel by a few digits more with each one.
        limits = torch.full_like(expected, 1e-9 * oracle.finite_max(expected))
        checks.assert_within(name, join(list(parts)), expected, limits)


def saved_bytes(p: Problem, size: int) -> tuple[int, bool]:
    """On a rank: what a forward keeps beside x and weight, in bytes; and whether y or the residual is part of it."""
    saved: list[Tensor] = []
    bn = module_of(p, ranks.group_of(size))
    x, residual = p.x.detach().requires_grad_(), p.residual.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = bn(x, residual, p.activation)
    theirs = {t.data_ptr() for t in (x, bn.weight, bn.bias)}
    own = sum(t.nbytes for t in saved if t.data_ptr() not in theirs)
    return own, any(t.data_ptr() in (y.data_ptr(), residual.data_ptr()) for t in saved)


def test_saved_for_backward_is_small(four):
    """As much as batch norm on one process keeps, and the count: of a ReLU on a residual one bit an element."""
    p = cases.make((8, 16, 14, 14), residual=True, activation="relu")
    parts = split(p, [3, 5], "contiguous")
    for part, (own, y_or_residual) in zip(parts, four.run(saved_bytes, [(q, 2) for q in parts]), strict=True):
        assert not y_or_residual
        # A bit an element, padded to bytes in each plane; then mean and invstd of 16 channels, and the count, float64.
        assert own <= part.x.numel() / 8 + len(part.x) * 16 + 2 * 8 * 16 + 8


# ---------------------------------------------------------------------------------------------- faults


def call(x: Tensor, size: int, channels: int, **options) -> list[Tensor]:
    """On a rank: one training step; the running statistics, which the error comes without."""
    bn = bnfused.SyncBatchNorm(channels, process_group=ranks.group_of(size), **options)
    bn(x).sum().backward()
    return [bn.running_mean, bn.running_var]


def test_one_value_per_channel_is_refused_on_every_rank(four):
    """Nobody waits for one that raised: the ranks can be used afterwards."""
    values = [torch.randn(1 if rank == 1 else 0, 3, requires_grad=True) for rank in range(3)]
    for outcome in four.outcomes(call, [(x, 3, 3) for x in values]):
        assert isinstance(outcome, Failure)
        assert (outcome.type, outcome.message[:36]) == ("ValueError", "Expected more than 1 value per chann")
    four.run(call, [(torch.randn(1, 3, requires_grad=True), 3, 3)] * 3)


@pytest.mark.parametrize(
    "other, message",
    [
        ((torch.randn(2, 6, requires_grad=True), 6), "same number of channels of input on every rank, got 4 on rank 0"),
        ((torch.randn(2, 4, dtype=torch.float16, requires_grad=True), 4), "got torch.float32 on rank 0, torch.float16"),
        ((torch.randn(2, 4), 4), "same requires_grad of input on every rank, got True on rank 0, False on rank 1"),
    ],
    ids=["channels", "dtype", "requires_grad"],
)
def test_what_differs_between_ranks_is_named_on_all(four, other, message):
    """Before statistics of different lengths would be gathered into one buffer."""
    first = (torch.randn(2, 4, requires_grad=True), 2, 4)
    for outcome in four.outcomes(call, [first, (other[0], 2, other[1])]):
        assert isinstance(outcome, Failure)
        assert outcome.type == "RuntimeError"
        assert message in outcome.message


def step_then(dies: bool) -> tuple[list[Tensor], str]:
    """On a rank: a step with everybody, then one from which ``dies`` is missing; state and error after it."""
    bn = bnfused.SyncBatchNorm(3)
    x = torch.arange(12.0).view(4, 3)
    bn(x)
    if dies:
        os._exit(1)
    before = [t.clone() for t in bn.buffers()]
    try:
        bn(x)
    except RuntimeError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, bn.buffers(), strict=True)), "statistics changed"
        return before, str(error)
    return before, "no error"


def test_a_rank_that_dies_fails_the_others():
    """An error that says what failed where, and running statistics as they were."""
    two = Ranks(2)
    try:
        survivor, dead = two.outcomes(step_then, [(False,), (True,)])
    finally:
        two.close()
    assert isinstance(dead, Failure)
    assert not isinstance(survivor, Failure), survivor
    assert "SyncBatchNorm: all_gather of [11] torch.float32 failed on rank 0, in a group of 2" in survivor[1]


SHORT = timedelta(seconds=1)  # a test waits for it


def interrupted(rank: int, how: str) -> tuple[str, bool, list[Tensor]]:
    """On a rank: a step that rank 1 does not take; the error, whether buffers were left alone, and a step after it.

    In a group of its own, which the timeout leaves broken; then in that group made anew. The timeout is a short one
    only where somebody is missing: on a loaded machine, those who come may be late.
    """
    group = dist.new_group(list(range(WORLD)), timeout=ranks.PATIENCE)
    bn = bnfused.SyncBatchNorm(3, process_group=group)
    x = torch.arange(12.0).view(4, 3) + rank
    y = bn(x.requires_grad_())
    dist.distributed_c10d._set_pg_timeout(SHORT, group)
    before = [t.clone() for t in bn.buffers()]
    message = "none"
    try:
        if rank != 1:
            (y.sum().backward if how == "skips the backward" else lambda: bn(x))()
        elif how == "raises":
            bn(x.long())
        elif how == "stalls":
            time.sleep(2 * SHORT.total_seconds())
    except (RuntimeError, TypeError) as error:
        message = str(error)
    untouched = all(torch.equal(a, b) for a, b in zip(before, bn.buffers(), strict=True))
    dist.barrier()  # of all processes' own group
    dist.destroy_process_group(group)
    bn.process_group = dist.new_group(list(range(WORLD)), timeout=ranks.PATIENCE)
    bn(x)
    return message, untouched, list(bn.buffers())


@pytest.mark.parametrize(
    "how, call", [("raises", "all_gather"), ("stalls", "all_gather"), ("skips the backward", "all_reduce")]
)
def test_a_rank_that_does_not_come_fails_the_others(four, how, call):
    """The backend's timeout, with rank, op and shape; running statistics as before; the group can be made anew."""
    results = four.run(interrupted, [(rank, how) for rank in range(WORLD)])
    for rank, (message, untouched, after) in enumerate(results):
        assert untouched
        assert all(checks.same_bits(a, b) for a, b in zip(after, results[0][2], strict=True))
        if rank != 1:
            shape = "[11]" if call == "all_gather" else "[2, 3]"
            assert message.startswith(f"SyncBatchNorm: {call} of {shape} torch.float"), message
            # A rank whose neighbour gave up first is told that the connection is gone.
            assert f"failed on rank {rank}, in a group of 4: " in message
            assert re.search("imed out|onnection closed|reset by peer", message), message
    assert any("imed out" in message for message, _, _ in results)
    if how == "raises":
        assert "int64" in results[1][0]


def anew(store: str, rank: int) -> tuple[list[str], list[Tensor]]:
    """On a rank: errors and buffers where everything is destroyed, and set up again, in the life of a module."""
    bn = bnfused.SyncBatchNorm(3)
    bn(torch.randn(4, 3))
    dist.destroy_process_group()
    bn(torch.randn(4, 3))  # alone
    bn.load_state_dict(bnfused.SyncBatchNorm(3).state_dict())
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=ranks.PATIENCE)
    messages = []
    try:
        bn(torch.randn(4, 3, dtype=(torch.float32, torch.float64)[rank]))  # is compared again
    except RuntimeError as error:
        messages.append(str(error))
    bn(torch.randn(4 + rank, 3))
    return messages, list(bn.buffers())


def test_everything_destroyed_and_made_anew(tmp_path):
    two = Ranks(2)
    try:
        results = two.run(anew, [(str(tmp_path / "store"), rank) for rank in range(2)])
    finally:
        two.close()
    for (message,), buffers in results:
        assert "expected the same dtype of input on every rank" in message
        assert all(checks.same_bits(a, b) for a, b in zip(buffers, results[0][1], strict=True))
        assert int(buffers[2]) == 1


# ----------------------------------------------------------------------------------- around the module


def network(kind: str, size: int) -> torch.nn.Sequential:
    torch.manual_seed(0)
    norm = {
        "sync": lambda: bnfused.SyncBatchNorm(4, process_group=ranks.group_of(size)),
        "whole": lambda: torch.nn.BatchNorm2d(4),
    }[kind]
    layers = [torch.nn.Conv2d(2, 4, 3), norm(), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), norm()]
    return torch.nn.Sequential(*layers).double()


class Renamed(torch.nn.BatchNorm2d):
    """Inherits forward, so that convert leaves its class alone."""


class Residual(torch.nn.Module):
    """Batch norm and ReLU, and batch norm, add and ReLU, of four classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(2, 4, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = torch.nn.BatchNorm2d(4), Renamed(4), torch.nn.SyncBatchNorm(4)
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.SiLU())
        self.relu = torch.nn.ReLU(inplace=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        identity = self.stem(x)
        y = self.relu(self.bn1(self.conv(x)))
        y = self.relu(self.bn2(y))
        return self.relu(self.bn3(y) + identity)


RESIDUAL_OPS = {"sync_batch_norm+relu": 2, "sync_batch_norm+add+relu": 1, "sync_batch_norm+silu": 1}


def converted_step(x: Tensor, size: int) -> tuple[dict[str, Tensor], list[str], dict]:
    """On a rank: a converted network's gradients and statistics; the synchronized ops that ran; what the report says.

    And what is converted in a group of its own is found there by a copy.
    """
    group = ranks.group_of(size)
    net = bnfused.convert(bnfused.convert(Residual(), sync=True, process_group=group), sync=True)
    assert net.bn1.process_group is group
    assert net.bn2.forward.process_group is group
    ran = []
    sync_batch_norm = bnfused.sync.sync_batch_norm

    def recorded(*args, **options):
        assert options["group"] is group
        parts = ["sync_batch_norm", *["add"] * (options["residual"] is not None), str(options["activation"])]
        ran.append("+".join(parts))
        return sync_batch_norm(*args, **options)

    bnfused.sync.sync_batch_norm = recorded
    try:
        net(x).pow(2).sum().backward()
    finally:
        bnfused.sync.sync_batch_norm = sync_batch_norm
    found = {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())
    return found, ran, dict(bnfused.fusion_report(net).counts)


def test_converted_network(four):
    """Ops synchronized and fused, whatever the class was; gradients and statistics of the joint batch."""
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    found = four.run(converted_step, [(part, 2) for part in x.split([2, 3])])
    net = Residual()
    net(x).pow(2).sum().backward()
    for _, ran, report in found:
        assert collections.Counter(ran) == report == RESIDUAL_OPS
    # Sums of 180 products and less, of float64; the largest gradient stands for the size of the terms.
    largest = max(oracle.finite_max(p.grad) for p in net.parameters())
    for name, parameter in net.named_parameters():
        limits = torch.full_like(parameter, 1e-11 * largest)
        checks.assert_within(name, sum(of_rank[name] for of_rank, _, _ in found), parameter.grad, limits)
    for name, wanted in net.named_buffers():
        for of_rank, _, _ in found:
            limits = torch.full_like(wanted, 1e-12 * oracle.finite_max(wanted), dtype=torch.float64)
            checks.assert_within(name, of_rank[name], wanted, limits)


class Checkpointed(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.inner, x, use_reentrant=False)


def ddp_grads(x: Tensor, size: int, how: str) -> list[Tensor]:
    """On a rank: parameter gradients, times the number of ranks, after one or two batches."""
    from torch.nn.parallel import DistributedDataParallel

    net = network("sync", size)
    options = {"find_unused_parameters": {"find_unused_parameters": True}, "static_graph": {"static_graph": True}}
    wrapped: torch.nn.Module = Checkpointed(net) if how == "checkpoint" else net
    ddp = DistributedDataParallel(wrapped, process_group=ranks.group_of(size), **options.get(how, {}))
    if how == "no_sync":
        with ddp.no_sync():
            ddp(x).pow(3).sum().backward()
    ddp(x).pow(3).sum().backward()
    return [p.grad * size for p in net.parameters()]


@pytest.mark.parametrize("how", ["plain", "find_unused_parameters", "static_graph", "checkpoint", "no_sync"])
def test_ddp(four, how):
    """DDP's averaged gradients, times the ranks, are those of the sum of losses in one process."""
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    found = four.run(ddp_grads, [(part, 2, how) for part in x.split([2, 3])])
    net = network("whole", 1)
    for _ in range(2 if how == "no_sync" else 1):
        net(x).pow(3).sum().backward()
    for of_rank in found:
        for actual, parameter in zip(of_rank, net.parameters(), strict=True):
            # A convolution's bias before batch norm has no gradient but rounding, of terms the size of the others.
            limits = torch.full_like(parameter, 1e-10 * max(oracle.finite_max(p.grad) for p in net.parameters()))
            checks.assert_within("grad", actual, parameter.grad, limits, how)


def fsdp_grads(x: Tensor, size: int, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """On a rank: whole gradients, times the number of ranks, and statistics, after two steps of FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    net = network("sync", size)
    for layer in net[:3]:  # a group of their own, gathered for the forward and again for the backward
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert type(net[1].weight).__name__ == "DTensor"
    for _ in range(2):
        net(x).pow(3).sum().backward()
    return [p.grad.full_tensor() * size for p in net.parameters()], list(net.buffers())


def test_fsdp2(four):
    """Parameters sharded over all ranks, those of batch norm too: gradients and statistics of one process."""
    x = torch.randn(9, 2, 8, 8, dtype=torch.float64)
    found = four.run(fsdp_grads, [(part, WORLD, rank) for rank, part in enumerate(x.split([2, 4, 1, 2]))])
    net = network("whole", 1)
    for _ in range(2):
        net(x).pow(3).sum().backward()
    largest = max(oracle.finite_max(p.grad) for p in net.parameters())
    for grads, buffers in found:
        for actual, parameter in zip(grads, net.parameters(), strict=True):
            checks.assert_within("grad", actual, parameter.grad, torch.full_like(parameter, 1e-10 * largest))
        for actual, wanted in zip(buffers, net.buffers(), strict=True):
            limits = torch.full_like(wanted, 1e-12 * oracle.finite_max(wanted), dtype=torch.float64)
            checks.assert_within("statistics", actual, wanted, limits)


def compiled_and_eager(p: Problem, size: int | str, backend: str) -> tuple[dict, dict]:
    """On a rank: the same step by fullgraph torch.compile and eagerly."""
    results = []
    for compiled in (True, False):
        bn = module_of(p, ranks.group_of(size))
        x = p.x.detach().requires_grad_()
        function = lambda x, r, bn=bn: bn(x, r, p.activation)  # noqa: E731
        if compiled:
            function = torch.compile(function, fullgraph=True, backend=backend)
        y = function(x, p.residual)
        y.backward(p.grad_y)
        state = {"y": y.detach(), "x": x.grad, "weight": bn.weight.grad, "bias": bn.bias.grad}
        results.append(state | {name: t.clone() for name, t in bn.named_buffers()})
    return results[0], results[1]


@pytest.mark.parametrize(
    "backend, shape, sizes, group",
    [
        ("aot_eager", (4, 4, 6), [2, 2], 2),
        ("aot_eager", (6, 4, 6), [2, 2, 2], 3),  # the same shapes, in another group
        ("aot_eager", (4, 4), [1, 0, 3], 3),
        ("aot_eager", (5, 4, 6), [2, 0, 1, 2], "2x2"),
        ("inductor", (5, 4, 6), [2, 3], 2),
    ],
)
def test_compiles_to_one_graph(four, backend, shape, sizes, group):
    """Collectives as nodes of the graph, and the same bits; also where a rank has to ask how many the others have."""
    p = cases.make(shape, residual=True, activation="relu", momentum=None)
    parts = [(q, group, backend) for q in split(p, sizes, "contiguous")]
    for compiled, eager in four.run(compiled_and_eager, parts):
        for name, value in eager.items():
            assert torch.equal(compiled[name], value), name


class HostReads(TorchDispatchMode):
    """Counts the ops that hand a value of a tensor to the host, and the collectives."""

    def __init__(self):
        super().__init__()
        self.reads, self.collectives = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        if func.namespace == "c10d":
            self.collectives.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def watched(p: Problem, size: int, check_ranks: bool) -> tuple[int, list[str]]:
    """On a rank: host reads and collectives of a step, but for the comparison of ranks in the first one."""
    bn = module_of(p, ranks.group_of(size))
    bn.check_ranks = check_ranks
    if check_ranks:
        bn(p.x)
    with HostReads() as mode:
        bn(p.x.detach().requires_grad_(), p.residual, p.activation).backward(p.grad_y)
    return mode.reads, mode.collectives


@pytest.mark.parametrize("check_ranks", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_collective_each_way_and_nothing_read_on_the_host(four, momentum, check_ranks):
    """So that a GPU is never waited for, and a step can be captured; empty batches are no exception of many rows."""
    p = cases.make((6, 4, 5), residual=True, activation="relu", momentum=momentum)
    for reads, collectives in four.run(watched, [(q, 2, check_ranks) for q in split(p, [2, 4], "contiguous")]):
        assert reads == 0
        assert len(collectives) == 2, collectives
        assert "gather" in collectives[0]
        assert "reduce" in collectives[1]


class Recorded(TorchDispatchMode):
    """The ops within, by name, and among them where all_reduce begins, and where it is waited for."""

    def __init__(self):
        super().__init__()
        self.log: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.log.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))

    def all_reduce(self, *args, **kwargs):
        work = self._all_reduce(*args, **kwargs)
        self.log.append("begin")
        return Waited(work, self.log)

    def __enter__(self):
        self._all_reduce, dist.all_reduce = dist.all_reduce, self.all_reduce
        return super().__enter__()

    def __exit__(self, *exception):
        dist.all_reduce = self._all_reduce
        return super().__exit__(*exception)


@dataclasses.dataclass
class Waited:
    work: dist.Work
    log: list[str]

    def wait(self):
        self.log.append("end")
        return self.work.wait()


def ops_of_backward(p: Problem, size: int) -> list[str]:
    """On a rank: the ops of an eager backward beside parameters of 16 bits, in their order."""
    bn = module_of(p, ranks.group_of(size)).to(p.x.dtype)
    y = bn(p.x.detach().requires_grad_())
    with Recorded() as recorded:
        y.backward(p.grad_y)
    return recorded.log


def nodes_of_compiled_backward(p: Problem, size: int) -> list[str]:
    """The same of a compiled one."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    nodes = []

    def compile_backward(graph, _):
        for node in graph.graph.nodes:
            nodes.extend(str(node.target).split(".")[1:2])  # add of aten.add.Tensor
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=compile_backward)
    bn = module_of(p, ranks.group_of(size)).to(p.x.dtype)
    torch.compile(bn, fullgraph=True, backend=backend)(p.x.detach().requires_grad_()).backward(p.grad_y)
    return nodes


@pytest.mark.parametrize(
    "backward, begin, end",
    [(ops_of_backward, "begin", "end"), (nodes_of_compiled_backward, "all_reduce", "wait_tensor")],
    ids=["eager", "compiled"],
)
def test_the_collective_is_under_way_while_parameters_get_their_gradients(four, backward, begin, end):
    """It begins once the sums are there, and is waited for by what needs its result, the gradient of x, alone."""
    p = cases.make((6, 4, 5), dtype=torch.bfloat16)
    for log in four.run(backward, [(q, 2) for q in split(p, [2, 4], "contiguous")]):
        order = [log.index(name) for name in ("batch_norm_backward_reduce", begin, end, "batch_norm_backward_apply")]
        assert order == sorted(order), log
        assert set(log[order[0] + 1 : order[1]]) <= {"clone", "allreduce_"}, log
        assert order[3] == order[2] + 1, log
        meanwhile = log[order[1] : order[2]]
        assert sum(name in ("_to_copy", "convert_element_type") for name in meanwhile) == 2, log


@pytest.mark.parametrize("rows", [6, 1], ids=["rows", "one_row"])
def test_a_step_on_a_gpu_looks_at_no_value(extension, monkeypatch, rows):
    """On tensors that have none, where whoever asks for one, in whatever way, gets an error: the rules of a CUDA graph.

    Also where a rank has one value per channel, and all of them together may have no more.
    """
    monkeypatch.setattr(bnfused.parts, "_has_kernel", lambda x: True)
    monkeypatch.setattr(bnfused.sync.collectives, "_all_gather", lambda gathered, values, group: None)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda values, group, async_op: unittest.mock.Mock())
    x, residual = (torch.randn(rows, 3, device="meta", requires_grad=True) for _ in range(2))
    state = [torch.zeros(3, device="meta"), torch.ones(3, device="meta")]
    weight, bias = (torch.ones(3, device="meta", requires_grad=True) for _ in range(2))
    y = bnfused.sync.sync_batch_norm(
        *(x, *state, weight, bias, None),
        residual=residual,
        activation="relu",
        num_batches_tracked=torch.tensor(0, device="meta"),
        group="two",
    )
    y.backward(torch.ones_like(y))
    assert all(t.grad.shape == t.shape for t in (x, residual, weight, bias))
