"""torch.compile: one graph, the same values, strides and running statistics as eager, no recompilation."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import bnfused
import cases
import checks
import oracle
from bnfused import functional

pytestmark = pytest.mark.usefixtures("extension")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """No graph of another test is found again."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", dynamic=False):
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def same_outcome(problem, function, needs=checks.LEAVES):
    """The compiled call is the eager one bit for bit: it runs the same ops."""
    eager = checks.run(functional.batch_norm, problem, needs)
    other = checks.run(function, problem, needs)
    for name, value in eager.values.items():
        actual = other.values[name]
        assert (actual is None) == (value is None), name
        if value is not None:
            assert checks.same_bits(actual, value), f"{name} differs between compiled and eager"
            assert actual.stride() == value.stride(), f"strides of {name}"
    assert other.num_batches_tracked == eager.num_batches_tracked


CALLS = {
    "train": {},
    "train, residual and relu": {"residual": True, "activation": "relu"},
    "train, silu": {"activation": "silu"},
    "train, bfloat16": {"dtype": torch.bfloat16, "residual": True, "activation": "relu"},
    "cumulative average": {"momentum": None},
    "no statistics": {"running": False, "counter": None},
    "frozen": {"training": False},
    "frozen, residual and relu": {"training": False, "residual": True, "activation": "relu"},
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("what", CALLS)
def test_equals_eager(what, layout):
    """Forward and backward in one graph, no break."""
    p = cases.make((4, 6, 5, 3), layout=layout, **CALLS[what])
    same_outcome(p, compiled(functional.batch_norm))


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(training):
    """Inference graphs too."""
    p = cases.make((4, 6, 5, 3), training=training, residual=True, activation="gelu")
    same_outcome(p, compiled(functional.batch_norm), needs=())


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_every_activation(activation):
    """The name of the activation is a constant of the graph."""
    p = cases.make((4, 6, 5), residual=True, activation=activation)
    same_outcome(p, compiled(functional.batch_norm))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_steps_update_statistics_without_recompiling(momentum):
    """Several steps of a compiled module: one compilation, running statistics and counter as eager's.

    Trap: a counter read on the host, baked into the graph as 1.
    """
    counter = CompileCounterWithBackend("aot_eager")
    torch.manual_seed(0)
    eager = bnfused.BatchNorm2d(5, momentum=momentum)
    module = bnfused.BatchNorm2d(5, momentum=momentum)
    run = torch.compile(module, fullgraph=True, backend=counter, dynamic=False)
    for _ in range(4):
        x = torch.randn(3, 5, 4, 2) * 2 + 1
        outputs = []
        for bn in (eager, run):
            leaf = x.clone().requires_grad_()
            y = bn(leaf, activation="relu")
            y.square().sum().backward()
            outputs.append((y, leaf.grad))
        assert checks.same_bits(outputs[0][0], outputs[1][0])
        assert checks.same_bits(outputs[0][1], outputs[1][1])
    assert counter.frame_count == 1
    for name, buffer in eager.named_buffers():
        assert checks.same_bits(buffer, module.get_buffer(name)), name
    for name, parameter in eager.named_parameters():
        assert checks.same_bits(parameter.grad, module.get_parameter(name).grad), name


@pytest.mark.parametrize("residual", [False, True])
def test_dynamic_shapes(residual):
    """dynamic=True: batch and plane may change without a new graph."""
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(functional.batch_norm, fullgraph=True, backend=counter, dynamic=True)
    options = {"residual": residual, "activation": "relu"}
    same_outcome(cases.make((4, 6, 5, 3), **options), function)
    graphs = counter.frame_count
    for shape in ((7, 6, 4, 9), (2, 6, 11, 8)):
        same_outcome(cases.make(shape, **options), function)
    assert counter.frame_count == graphs


def test_train_then_eval():
    """Each mode has its graph, and eval uses what training left in the buffers."""
    module = bnfused.BatchNorm1d(6)
    run = compiled(module)
    x = torch.randn(40, 6) * 3 + 2
    run(x)
    module.eval()
    with torch.no_grad():
        y = run(x)
        assert checks.same_bits(y, module(x))
    assert int(module.num_batches_tracked) == 1


@pytest.mark.parametrize("training", [True, False])
def test_compiled_func_grad(training):
    """torch.func.grad inside a compiled function. Trap: an op without its own autograd returns zeros there."""
    p = cases.make((4, 3, 5), training=training, running=not training, counter=None, activation="silu")

    def loss(x):
        return (checks.call(functional.batch_norm, p, x=x) * p.grad_y).sum()

    wanted = oracle.expected(p)
    actual = compiled(torch.func.grad(loss))(p.x)
    limits = cases.limit(wanted.values["grad_x"], wanted.scales["grad_x"], torch.float32)
    checks.assert_within("grad_x", actual, wanted.values["grad_x"], limits)


def test_network():
    """Convolutions, a residual block and a loss in one graph."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.bn = bnfused.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x), residual=x, activation="relu")

    block = Block().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in block.state_dict().items()}
    results = []
    for run in (block, compiled(block)):
        block.load_state_dict(start)
        block.zero_grad()
        y = run(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters()), *block.buffers()])
        results[-1] = [t.clone() for t in results[-1]]
    for eager, graph in zip(*results, strict=True):
        assert torch.allclose(eager, graph, rtol=1e-5, atol=1e-6)
        assert eager.stride() == graph.stride()


def test_inductor():
    """The default backend, once: it compiles C++ for what surrounds the op, and changes no value of it."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs g++, which is not here")
    p = cases.make((4, 6, 5, 3), layout="channels_last", residual=True, activation="relu")

    def network(*args, **kwargs):
        return functional.batch_norm(*args, **kwargs) * 2 + 1

    eager = checks.run(network, p)
    graph = checks.run(torch.compile(network, fullgraph=True), p)
    for name, value in eager.values.items():
        assert torch.allclose(graph.values[name], value, rtol=1e-6, atol=1e-6), name
    assert graph.values["y"].stride() == eager.values["y"].stride()


def test_export():
    """torch.export keeps one node for the op, and the exported program gives the same values."""
    module = bnfused.BatchNorm2d(6).eval()
    module.running_mean.normal_()
    x = torch.randn(4, 6, 5, 3)
    with torch.no_grad():
        program = torch.export.export(module, (x,), {"activation": "relu"})
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets == ["bnfused.batch_norm_eval.default"]
        assert checks.same_bits(program.module()(x, activation="relu"), module(x, activation="relu"))
