"""What only a GPU can show: streams, devices, graphs, autocast, launches, more than 2^31 values.

Values and gradients of the kernels are tested by everything that takes the ``backend`` fixture.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnfused
from bnfused import functional
from support import cases

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; make gpu, where there is one"),
    pytest.mark.usefixtures("extension"),
]

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
# 96 channels of 32 x 28 x 28 values are too many for a block each: several wait for each other. With a residual and
# ReLU a byte of the mask belongs to two planes of 27 x 27, whose channels therefore take two launches.
SHAPES = pytest.mark.parametrize(
    "shape", [(4, 96, 8, 8), (32, 96, 28, 28), (32, 96, 27, 27)], ids=["small", "resident", "streaming"]
)


class Step:
    """A training step on fixed buffers: x, residual and grad_y in, y, gradients and running statistics out."""

    def __init__(self, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> None:
        def normal() -> Tensor:
            return torch.randn(shape, device="cuda").to(dtype, memory_format=layout)

        self.x, self.residual, self.grad_y = normal().requires_grad_(), normal().requires_grad_(), normal()
        self.module = bnfused.BatchNorm2d(shape[1], momentum=None, device="cuda")

    def run(self) -> tuple[Tensor, ...]:
        y = self.module(self.x, self.residual, "relu")
        inputs = (self.x, self.residual, self.module.weight, self.module.bias)
        return (y.detach(), *torch.autograd.grad(y, inputs, self.grad_y))

    @property
    def state(self) -> tuple[Tensor, ...]:
        return tuple(buffer.clone() for buffer in self.module.buffers())


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_the_build_is_for_this_gpu() -> None:
    """And says so: the first thing to look at where nothing below works."""
    for index in range(torch.cuda.device_count()):
        functional._extension.check_gpu(index)
    assert torch._C._dispatch_dump("bnfused::batch_norm_train").count("cuda.cpp") == 1


@LAYOUTS
@SHAPES
def test_current_stream(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """The inputs are written late on a side stream: a launch on another one reads NaN."""
    step = Step(shape, layout)
    expected = step.run()
    step.module.reset_running_stats()
    late = step.x.detach().clone()
    with torch.no_grad():
        step.x.fill_(float("nan"))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        with torch.no_grad():
            step.x.copy_(late)
        actual = step.run()
    side.synchronize()
    assert same(actual, expected)


@LAYOUTS
@SHAPES
def test_two_streams_at_once(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Launches that overlap share no counter and no workspace: each result is what it is alone."""
    steps = [Step(shape, layout) for _ in range(2)]
    expected = [step.run() for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for number, (step, stream) in enumerate(zip(steps, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[number].append(step.run())
    torch.cuda.synchronize()
    for number, wanted in enumerate(expected):
        assert all(same(result, wanted) for result in results[number])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here; this needs two")
@LAYOUTS
def test_second_device(layout: torch.memory_format) -> None:
    """Tensors on a device that is not the current one: right, and the current one stays."""
    step = Step((32, 96, 28, 28), layout)
    expected = step.run()
    with torch.no_grad():
        for name in ("x", "residual", "grad_y"):
            tensor = getattr(step, name)
            setattr(step, name, tensor.detach().to("cuda:1").requires_grad_(tensor.requires_grad))
    step.module = step.module.to("cuda:1")
    step.module.reset_running_stats()
    actual = step.run()
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in actual)
    if torch.cuda.get_device_properties(0).multi_processor_count == (
        torch.cuda.get_device_properties(1).multi_processor_count
    ):
        assert same(tuple(t.cuda(0) for t in actual), expected)
    else:  # another number of blocks merges in another order
        for got, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(got.cuda(0), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@LAYOUTS
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_capture_and_replay(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Replays compute on what the buffers hold then, and count batches, on the stream of the capture or another."""
    step, eager = Step(shape, layout, dtype), Step(shape, layout, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    step.module.reset_running_stats()
    for number in range(4):
        with torch.no_grad():
            for name in ("x", "residual", "grad_y"):
                fresh = torch.randn_like(getattr(step, name)) + number
                getattr(step, name).copy_(fresh)
                getattr(eager, name).copy_(fresh)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if number % 2 else torch.cuda.current_stream()):
            graph.replay()
        torch.cuda.current_stream().wait_stream(side)
        assert same(captured, eager.run())
        assert same(step.state, eager.state)
    assert int(step.module.num_batches_tracked) == 4


@LAYOUTS
@SHAPES
def test_repeats_bit_for_bit(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    step = Step(shape, layout)
    first = step.run()
    assert all(same(step.run(), first) for _ in range(20))


@LAYOUTS
@SHAPES
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_nothing_waits_for_the_gpu(shape: tuple[int, ...], layout: torch.memory_format, momentum: float | None) -> None:
    """Training, eval and backward without a synchronization that torch knows of."""
    step = Step(shape, layout)
    step.module.momentum = momentum
    step.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
        with torch.no_grad():
            step.module.eval()(step.x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(function: Callable[[], object]) -> list[str]:
    """Names of everything that one call launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]


@LAYOUTS
@SHAPES
def test_launches(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """At most two forward and two backward, one in eval, whatever is fused; no copy, no fill."""
    step = Step(shape, layout)
    limit = 2 if shape[2] == 27 else 1

    def forward() -> Tensor:
        return step.module(step.x, step.residual, "relu")

    y = forward()
    inputs = (step.x, step.residual, step.module.weight, step.module.bias)
    launched = {
        "forward": (kernels_of(forward), limit),
        "backward": (kernels_of(lambda: torch.autograd.grad(y, inputs, step.grad_y, retain_graph=True)), limit),
    }
    step.module.eval()
    with torch.no_grad():
        launched["eval"] = kernels_of(forward), 1
    for what, (names, most) in launched.items():
        assert 1 <= len(names) <= most, (what, names)
        assert all("batch_norm" in name for name in names), (what, names)


@LAYOUTS
def test_memory(layout: torch.memory_format) -> None:
    """A forward keeps y, one bit of mask for each value, and no further copy of anything as large."""
    step = Step((32, 96, 28, 28), layout)
    step.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = step.module(step.x, step.residual, "relu")
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes - y.numel() // 8
    assert extra < y.nbytes / 8


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(layout: torch.memory_format, dtype: torch.dtype) -> None:
    """A convolution hands on half precision, parameters stay float32: as torch's, but for its rounding."""
    convolution = nn.Conv2d(8, 32, 3, device="cuda").to(memory_format=layout)
    x = torch.randn(8, 8, 20, 20).to("cuda", memory_format=layout)
    results = []
    for module in (bnfused.BatchNorm2d(32, device="cuda"), nn.BatchNorm2d(32, device="cuda")):
        with torch.autocast("cuda", dtype=dtype):
            y = module(convolution(x))
        assert y.dtype == dtype
        y.float().square().mean().backward()
        assert module.weight.grad is not None and module.weight.grad.dtype == torch.float32
        results.append((y.detach(), module.weight.grad, module.running_var))
        convolution.zero_grad()
    for ours, theirs in zip(*results, strict=True):
        # Each rounds its y once: two units in the last place between them, of values up to 5.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    """One graph, and its replay where the mode makes CUDA graphs of it: what eager computes, call after call."""
    module, eager = (bnfused.BatchNorm2d(16, device="cuda") for _ in range(2))
    run = torch.compile(lambda x: module(x * 2, None, "relu") + 1, fullgraph=True, mode=mode)
    for _ in range(4):
        x = torch.randn(8, 16, 14, 14, device="cuda", requires_grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        y = run(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        wanted = eager(x * 2, None, "relu") + 1
        (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
        # Both run the same kernels; the sums around them may be fused and rounded differently.
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.running_var, eager.running_var)


def test_nothing_stays_in_the_memory_pool_of_a_call() -> None:
    """Of the first call on a stream: the counters, which later calls use, come from elsewhere.

    Trap: a pool of torch's CUDA graphs, which finds memory in use that is no output of the graph and refuses.
    """
    step = Step((32, 96, 28, 28), torch.channels_last)
    pool = torch.cuda.MemPool()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.use_mem_pool(pool):
        results = step.run()
    torch.cuda.synchronize()
    del results
    states = [block["state"] for segment in pool.snapshot() for block in segment["blocks"]]
    assert states
    assert "active_allocated" not in states


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ("cuda", "cpu", "expected weight on cuda:0, got cpu"),
        ("cpu", "cuda", "expected weight on cpu, got cuda:0"),
        ("cuda:0", "cuda:1", "expected weight on cuda:0, got cuda:1"),
    ],
)
def test_tensors_on_different_devices(x: str, weight: str, message: str) -> None:
    if weight == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU here; this needs two")
    mean = torch.zeros(3, device=x)
    with pytest.raises(RuntimeError, match=message):
        functional.batch_norm(torch.randn(4, 3, 5, device=x), mean, None, torch.ones(3, device=weight), training=True)
    assert not mean.any()


@LAYOUTS
def test_more_than_2_31_values(layout: torch.memory_format) -> None:
    """Offsets past 32 bits: the last sample, which lies past them, is right forward and backward."""
    shape = (33, 64, 1009, 1009)  # 2.15e9 values
    values = 33 * 64 * 1009 * 1009
    assert values > 2**31
    needed = 6 * 2 * values  # x, y, grad_y, grad_x, and room
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} are free")
    x = torch.empty(shape, dtype=torch.float16, device="cuda").to(memory_format=layout)
    x.normal_()
    last = x[-1:].float()
    mean = torch.stack([sample.float().mean((1, 2)) for sample in x]).mean(0)
    square = torch.stack([(s.float() - mean.view(-1, 1, 1)).square().mean((1, 2)) for s in x]).mean(0)
    invstd = (square + 1e-5).rsqrt()
    x.requires_grad_()
    y = functional.batch_norm(x, None, None, training=True, activation="relu")
    xhat = (last - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)
    limits = cases.limit(xhat.relu().double(), 8.0, torch.float16)
    assert bool(((y[-1:].detach().double() - xhat.relu().double()).abs() <= limits).all())
    # A gradient that is 1 in the last sample alone: what comes back differs from 0 in all, by the sums over all of it.
    grad_y = torch.zeros_like(y)
    grad_y[-1] = 1
    (grad,) = torch.autograd.grad(y, x, grad_y)
    passed = (xhat > 0).float()
    rows = values / 64
    sum_1 = passed.sum((0, 2, 3)).view(-1, 1, 1) / rows
    sum_2 = (passed * xhat).sum((0, 2, 3)).view(-1, 1, 1) / rows
    wanted = (passed - sum_1 - xhat * sum_2) * invstd.view(-1, 1, 1)
    sure = xhat.abs() > 1e-3  # on which side of 0 float32 knows it to be
    limits = cases.limit(wanted.double(), 8.0, torch.float16)
    assert bool((((grad[-1:].double() - wanted.double()).abs() <= limits) | ~sure).all())
