"""torch.compile: one graph, the same values, strides and running statistics as eager, no recompilation."""

from __future__ import annotations

import copy
import io
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import bnfused
from bnfused import functional
from support import cases, checks, oracle

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


TRANSFORMS = {
    "grad": lambda f, v: torch.func.grad(lambda x: (f(x) * v).sum()),
    "grad of grad": lambda f, v: torch.func.grad(lambda x: (torch.func.grad(lambda x: (f(x) * v).sum())(x) * v).sum()),
    "vjp": lambda f, v: lambda x: torch.func.vjp(f, x)[1](v)[0],
    "jvp": lambda f, v: lambda x: torch.func.jvp(f, (x,), (v,))[1],
    "vmap": lambda f, v: lambda x: torch.func.vmap(f)(torch.stack([x, v])),
    "vmap of grad": lambda f, v: (
        lambda x: torch.func.vmap(torch.func.grad(lambda x: (f(x) * v).sum()))(torch.stack([x, v]))
    ),
    "jacrev": lambda f, v: torch.func.jacrev(f),
    "jacfwd": lambda f, v: torch.func.jacfwd(f),
    "hessian": lambda f, v: torch.func.hessian(lambda x: (f(x) * v).sum()),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transforms(transform, training):
    """torch.func inside a compiled function. Trap: an op without its own autograd returns zeros there."""
    p = cases.make((4, 3, 5), dtype=torch.float64, training=training, running=not training, counter=None)

    def fused(x):
        return checks.call(functional.batch_norm, p.but(activation="silu"), x=x)

    def exact(x):
        return oracle.formula(x, p.running_mean, p.running_var, p.weight, p.bias, training, p.eps, None, "silu")

    actual, wanted = (TRANSFORMS[transform](function, p.grad_y) for function in (fused, exact))
    wanted = wanted(p.x)
    # Both in float64; a Hessian is two derivatives deep.
    limits = cases.limit(wanted, 100 * oracle.finite_max(wanted), torch.float64)
    checks.assert_within(transform, compiled(actual)(p.x), wanted, limits)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_ensemble(training, momentum):
    """vmap of functional_call over stacked modules, compiled: outputs, and the buffers that it moves, of eager mode."""
    modules = [bnfused.BatchNorm2d(3, momentum=momentum).double().train(training) for _ in range(3)]
    for module in modules:
        torch.nn.init.normal_(module.weight)
        module.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)

    def ensemble(parameters, buffers):
        def call(parameters, buffers):
            return torch.func.functional_call(modules[0], (parameters, buffers), (x,))

        return torch.func.vmap(call)(parameters, buffers)

    results = []
    for run in (ensemble, compiled(ensemble)):
        parameters, buffers = torch.func.stack_module_state(modules)
        results.append([run(parameters, buffers).detach(), *(b.double() for b in buffers.values())])
    for wanted, actual in zip(*results, strict=True):
        checks.assert_within("ensemble", actual, wanted, cases.limit(wanted, oracle.finite_max(wanted), torch.float64))
    assert int(buffers["num_batches_tracked"].sum()) == 3 * training


def test_compiled_per_sample_gradients():
    """vmap of grad of functional_call, compiled."""
    module = bnfused.BatchNorm2d(3).double().eval()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(6, 3, 5, 2, dtype=torch.float64)

    def loss(parameters, sample):
        return torch.func.functional_call(module, parameters, (sample[None],)).pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    wanted, actual = per_sample(parameters, x), compiled(per_sample)(parameters, x)
    for name, gradient in wanted.items():
        limits = cases.limit(gradient, oracle.finite_max(gradient), torch.float64)
        checks.assert_within(name, actual[name], gradient, limits)


def test_tangent_inside_a_compiled_function():
    """forward_ad in the function that is compiled; torch's own batch norm cannot be compiled so."""
    p = cases.make((4, 3, 5), dtype=torch.float64, running=False, counter=None, activation="tanh")

    def tangent(x):
        with torch.autograd.forward_ad.dual_level():
            y = checks.call(functional.batch_norm, p, x=torch.autograd.forward_ad.make_dual(x, p.grad_y))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    wanted = tangent(p.x)
    assert wanted.count_nonzero() > 0
    actual = torch.compile(tangent, backend="aot_eager")(p.x)
    checks.assert_within("tangent", actual, wanted, cases.limit(wanted, oracle.finite_max(wanted), torch.float64))


def test_transforms_of_a_compiled_function():
    """A function compiled for plain calls, and called under a transform afterwards: right, not the plain graph's."""
    p = cases.make((4, 3, 5), dtype=torch.float64, running=False, counter=None, activation="tanh")

    def plain(x):
        return checks.call(functional.batch_norm, p, x=x)

    graph = torch.compile(plain, backend="aot_eager")
    graph(p.x)
    for transform in ("grad", "jvp"):
        actual, wanted = (TRANSFORMS[transform](function, p.grad_y)(p.x) for function in (graph, plain))
        checks.assert_within(transform, actual, wanted, cases.limit(wanted, oracle.finite_max(wanted), torch.float64))


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("where", ["eager forward", "compiled forward"])
def test_compiled_autograd(where, training):
    """The backward is traced too, of a graph that was made in eager mode and of one that was compiled."""
    p = cases.make((4, 6, 5, 3), residual=True, activation="relu", training=training)
    wanted = checks.run(functional.batch_norm, p).values
    leaves = {name: getattr(p, name).detach().requires_grad_() for name in checks.LEAVES}
    names = ("running_mean", "running_var", "num_batches_tracked")
    state = {name: getattr(p, name).clone() for name in names}

    def backward():
        checks.call(functional.batch_norm, p, **leaves, **state).backward(p.grad_y)

    if where == "compiled forward":
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(backward, backend="aot_eager")()
    else:
        y = checks.call(functional.batch_norm, p, **leaves, **state)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            y.backward(p.grad_y)
    for name, leaf in leaves.items():
        assert checks.same_bits(leaf.grad, wanted[f"grad_{name}"]), name


def test_double_backward_of_a_compiled_graph_raises():
    """torch.compile has none, for torch's batch norm neither; it must say so."""
    p = cases.make((4, 3, 5), activation="silu")
    x = p.x.detach().requires_grad_()
    y = checks.call(compiled(functional.batch_norm), p, x=x)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad,) = torch.autograd.grad(y, x, p.grad_y, create_graph=True)
        torch.autograd.grad(grad.square().sum(), x)


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
        assert checks.same_bits(eager, graph)
        assert eager.stride() == graph.stride()


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++, which is not here")


class Residual(torch.nn.Module):
    """What a compiler would like to fuse, before and after each call."""

    def __init__(self, momentum: float | None = 0.1):
        super().__init__()
        self.first, self.second = (bnfused.BatchNorm2d(6, momentum=momentum) for _ in range(2))

    def forward(self, x):
        h = self.first(2 * x, activation="relu")
        return self.second(h + 1, residual=x, activation="silu") * 3


def steps(module, run, inputs):
    """Outputs and gradients of a few training steps, then of one in eval."""
    results = []
    for mode, x in zip((True, True, True, False), inputs, strict=True):
        module.train(mode)
        module.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        results += [y.detach().clone(), leaf.grad, *(p.grad.clone() for p in module.parameters())]
    return results


@needs_compiler
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode, momentum):
    """Training steps and eval of a channels_last network: values, strides and buffers of eager mode."""
    inputs = [torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last) for _ in range(4)]
    eager, module = Residual(momentum), Residual(momentum)
    wanted = steps(eager, eager, inputs)
    actual = steps(module, torch.compile(module, fullgraph=True, mode=mode), inputs)
    for ours, theirs in zip(actual, wanted, strict=True):
        # The pointwise operations around the ops are compiled otherwise; the sums of the loss are of 360 terms.
        scale = oracle.finite_max(theirs)
        limits = 4 * cases.limit(theirs.double(), scale, torch.float32)
        checks.assert_within(mode, ours, theirs.double(), limits)
        assert ours.stride() == theirs.stride()
    for name, buffer in eager.named_buffers():
        if buffer.is_floating_point():
            limits = cases.limit(buffer.double(), oracle.finite_max(buffer), torch.float32)
            checks.assert_within(name, module.get_buffer(name), buffer.double(), limits)
        else:
            assert torch.equal(module.get_buffer(name), buffer)


def generated_code(run):
    """What Inductor writes for a call: the code of forward and, where there is one, of backward."""
    from torch._inductor.utils import run_and_get_code

    # The cache on disk knows an op by its name: what it holds may be from before the op changed.
    with torch._inductor.config.patch(force_disable_caches=True):
        return [code[code.index("def call(") :] for code in run_and_get_code(run)[1]]


def kernels(code):
    """The loops of its own that Inductor calls, beside convolutions and ops."""
    return re.findall(r"^ +(cpp_fused\w*)\(", code, re.MULTILINE)


def between_convolutions(module, memory_format):
    """A residual block, of which all but the convolutions is one call of batch norm, and its input."""
    convolutions = [torch.nn.Conv2d(6, 6, 3, padding=1, bias=False).to(memory_format=memory_format) for _ in range(2)]

    def network(x):
        return convolutions[1](module(convolutions[0](x), residual=x, activation="relu"))

    return network, torch.randn(2, 6, 8, 9).to(memory_format=memory_format)


@needs_compiler
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_inductor_copies_no_channels_last_input(training):
    """In the generated code, each call is one node between the convolutions, and nothing moves its tensors.

    Trap: a custom op whose input is made contiguous first.
    """
    network, x = between_convolutions(bnfused.BatchNorm2d(6).train(training), torch.channels_last)
    upstream = torch.randn_like(x)
    forward, backward = generated_code(
        lambda: torch.compile(network, fullgraph=True)(x.requires_grad_()).backward(upstream)
    )
    op = "batch_norm_train" if training else "batch_norm_frozen"
    assert forward.count(f"torch.ops.bnfused.{op}.default(") == 1
    assert backward.count("torch.ops.bnfused.batch_norm_backward.default(") == 1
    assert kernels(forward) == []
    # The two paths to x: what came through the first convolution, and through the residual.
    assert len(kernels(backward)) == 1 and "add" in kernels(backward)[0], kernels(backward)


@needs_compiler
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_inductor_copies_nothing_in_eval(memory_format):
    """Without gradients the op takes whatever layout Inductor has chosen for the convolutions around it.

    Inductor makes contiguous networks channels_last: it converts the weights, and the network's input and output.
    """
    network, x = between_convolutions(bnfused.BatchNorm2d(6).eval(), memory_format)
    with torch.no_grad():
        (code,) = generated_code(
            lambda: torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), network(x))
        )
    (convolved,) = re.findall(r"torch\.ops\.bnfused\.batch_norm_eval\.default\((\w+),", code)
    assert f"{convolved} = extern_kernels.convolution(" in code
    assert not [name for name in kernels(code) if "batch_norm" in name]


@needs_compiler
def test_inductor_with_dynamic_shapes():
    """Other batches and planes run the same code."""
    module, eager = Residual(), Residual()
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for shape in ((2, 6, 5, 3), (3, 6, 8, 8), (5, 6, 4, 9)):
        x = torch.randn(shape)
        wanted = eager(x)
        limits = 4 * cases.limit(wanted.double(), oracle.finite_max(wanted.detach()), torch.float32)
        checks.assert_within("y", run(x), wanted.detach().double(), limits)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


# ---------------------------------------------------------------------------------------- exporters


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_export(strict, training):
    """Saved, loaded and called with another batch size: one node a call, values and buffers of eager mode."""
    module, eager = Residual().train(training), Residual().train(training)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if "running" in name:
                value.uniform_(0.5, 2)
    eager.load_state_dict(module.state_dict())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (torch.randn(4, 6, 5, 3),), strict=strict, dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    targets = [str(node.target) for node in program.graph.nodes if "bnfused" in str(node.target)]
    assert targets == [f"bnfused.batch_norm_{'train' if training else 'eval'}.default"] * 2
    loaded = program.module()
    x = torch.randn(7, 6, 5, 3)
    assert checks.same_bits(loaded(x).detach(), eager(x).detach())
    loaded_buffers = dict(loaded.named_buffers())
    for name, buffer in eager.named_buffers():
        if name in loaded_buffers:
            assert checks.same_bits(loaded_buffers[name], buffer), name
    if training:
        mutated = program.run_decompositions().graph_signature.buffers_to_mutate
        assert sorted(mutated.values()) == sorted(name for name, _ in module.named_buffers())


@needs_compiler
def test_aot_inductor(tmp_path):
    """Packaged, then run by a process that has torch and the compiled extension, and never imports the package."""
    module = Residual().eval()
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2)
        x = torch.randn(4, 6, 5, 3)
        program = torch.export.export(module, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        wanted = module(x)
    torch.save(x, tmp_path / "x.pt")
    script = f"""
import sys, torch
torch.ops.load_library({bnfused._extension._module.__file__!r})
network = torch._inductor.aoti_load_package("network.pt2")
torch.save(network(torch.load("x.pt")), "y.pt")
assert "bnfused" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    limits = 4 * cases.limit(wanted.double(), oracle.finite_max(wanted), torch.float32)
    checks.assert_within("y", torch.load(tmp_path / "y.pt"), wanted.double(), limits)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_jit_trace(training, grad):
    """One node in the graph; values, gradients and buffers of eager mode, after saving and loading."""
    module, eager = (bnfused.BatchNorm2d(6).train(training) for _ in range(2))
    x = torch.randn(4, 6, 5, 3)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself
        traced = torch.jit.trace(module, x, check_trace=False)
        op = f"bnfused::batch_norm_{'train' if training else 'eval'}"
        assert str(traced.inlined_graph).count(op) == 1
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    eager(x)
    for other in (torch.randn(4, 6, 5, 3), torch.randn(2, 6, 7, 7)):
        leaves = [other.clone().requires_grad_() for _ in range(2)]
        outputs = [run(leaf) for run, leaf in zip((loaded, eager), leaves, strict=True)]
        for y in outputs:
            y.square().sum().backward()
        assert checks.same_bits(outputs[0].detach(), outputs[1].detach())
        assert checks.same_bits(leaves[0].grad, leaves[1].grad)
    buffers = dict(loaded.named_buffers())
    for name, buffer in eager.named_buffers():
        assert checks.same_bits(buffers[name], buffer), name


def test_jit_script():
    """torch.jit.script compiles torch's forward around the same parameters and buffers, and leaves the network alone.

    Trap: a module that hands torch.jit another one to compile is replaced by it in the network that was scripted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), bnfused.BatchNorm2d(4))
        modules = list(network)
        scripted = torch.jit.script(network)
        assert list(network) == modules
        x = torch.randn(2, 3, 5, 5)
        twin = torch.nn.BatchNorm2d(4)
        twin.load_state_dict(network[1].state_dict())
        wanted = twin(network[0](x))
        torch.testing.assert_close(scripted(x), wanted)
        assert int(network[1].num_batches_tracked) == 1

        class Fused(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = bnfused.BatchNorm2d(3)

            def forward(self, x):
                return self.bn(x, x)

        fused = torch.jit.script(Fused())
        with pytest.raises(torch.jit.Error, match="expected no residual and no activation in torch.jit.script"):
            fused(torch.randn(2, 3, 5, 5))


def test_fx_keeps_modules_whole():
    """symbolic_trace sees one node, as of torch.nn's modules, and train() and eval() of the traced one still count."""
    module = Residual()
    traced = torch.fx.symbolic_trace(module)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in calls] == ["first", "second"]
    assert [sorted(node.kwargs) for node in calls] == [["activation"], ["activation", "residual"]]
    assert all(len(node.args) == 1 for node in calls)
    eager = copy.deepcopy(module)
    for mode in (True, False):
        x = torch.randn(4, 6, 5, 3)
        assert checks.same_bits(traced.train(mode)(x).detach(), eager.train(mode)(x).detach())
    for name, buffer in eager.named_buffers():
        assert checks.same_bits(traced.get_buffer(name), buffer), name
    for alone in (torch.nn.BatchNorm2d(3), bnfused.BatchNorm2d(3)):
        with pytest.raises(torch.fx.proxy.TraceError, match="control flow"):
            torch.fx.symbolic_trace(alone)


def test_onnx_names_the_op():
    """There is no ONNX of the op, and the exporter says of which."""
    module = bnfused.BatchNorm2d(3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.onnx.errors.OnnxExporterError, match="bnfused::batch_norm_eval"):
            torch.onnx.export(module, (torch.randn(2, 3, 4, 4),), io.BytesIO(), dynamo=False)


def test_onnx_through_revert(monkeypatch):
    """A converted network that is reverted has torch's batch norms, and an ONNX of each."""
    # The one step that needs the package onnx: it adds the functions of onnxscript, of which there are none.
    step = "torch.onnx._internal.torchscript_exporter.onnx_proto_utils._add_onnxscript_fn"
    monkeypatch.setattr(step, lambda model, _: model)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()).eval()
    network = bnfused.convert(network)
    assert isinstance(network[0], bnfused.BatchNorm2d)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(bnfused.revert(network), (torch.randn(2, 3, 4, 4),), file, dynamo=False)
    assert b"BatchNormalization" in file.getvalue()
    assert b"bnfused" not in file.getvalue()
