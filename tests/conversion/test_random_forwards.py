"""Random forwards: a converted block computes, changes and shows its hooks what the original does.

Each forward is a text of a few statements over four variables and the children of ``Parts``. Converted and original
run it in float64, twice in training and once in eval. Compared are outputs, gradients, buffers, the input, and a log:
what hooks and the forward itself saw, in their order, with the batch norms' counters at that moment.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import nn

import bnfused
from support import same_training

C = 3
EXAMPLES = 60
VARIABLES = ["x", "a", "b", "c"]

HEADER = """\
import contextlib

import torch
import torch.nn.functional as F


class Forward:
"""


def batch_norm():
    """One whose ``eps`` keeps rounding small.

    With the usual 1e-5 a constant input makes ``invstd`` 316, and a chain of batch norms multiplies rounding by 316
    each. Two correct orders of the same sums then differ by more than any tolerance.
    """
    return nn.BatchNorm2d(C, eps=1.0)


class Inner(nn.Module):
    """A block of its own, which may end in a batch norm that waits."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), batch_norm()

    def forward(self, x):
        return self.bn(self.conv(x))


class Parts(nn.Module):
    """What the forwards are made of."""

    def __init__(self):
        super().__init__()
        self.conv, self.seen_conv = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.bn, self.bn1, self.seen_bn = (batch_norm() for _ in range(3))
        self.relu, self.relu_, self.leaky = nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3)
        self.seen_act, self.identity, self.drop = nn.SiLU(), nn.Identity(), nn.Dropout(0.2)
        self.sequence = nn.Sequential(nn.Conv2d(C, C, 1), batch_norm(), nn.Identity())
        self.act_sequence = nn.Sequential(batch_norm(), nn.Hardswish())
        self.inner = Inner()
        self.layers = nn.ModuleList([nn.Conv2d(C, C, 1), batch_norm(), nn.Identity(), nn.Tanh(), batch_norm()])
        self.flag, self.other_flag, self.nothing, self.calls, self.log = False, True, None, 0, []

    def counters(self):
        return tuple(
            int(m.num_batches_tracked) for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        )

    def see(self, what, value):
        self.log.append((what, self.counters(), float(value.detach().sum())))

    def watch(self):
        for name in ("seen_conv", "seen_bn", "seen_act"):
            module = getattr(self, name)
            module.register_forward_pre_hook(lambda _, args, name=name: self.see(f"before {name}", args[0]))
            module.register_forward_hook(lambda _, args, y, name=name: self.see(f"after {name}", y))
        self.conv.register_forward_hook(lambda *_: setattr(self, "flag", not self.flag))

    def finish(self, v):
        return F.relu(v)


CHILDREN = ["conv", "seen_conv", "bn", "bn", "bn1", "seen_bn", "relu", "relu_", "leaky", "seen_act", "identity", "drop"]
CHILDREN += ["sequence", "act_sequence", "inner", "finish", "layers[1]", "layers[n % 5]", "layers[min(n, 4)]", "method"]
UNARY = [
    "F.relu({})",
    "F.relu({}, inplace=True)",
    "F.leaky_relu({}, 0.1)",
    "torch.tanh({})",
    "{}.relu()",
    "{}.sigmoid()",
]
UNARY += ["{}.relu_()", "torch.sigmoid({})", "{} * 0.5", "-{}", "F.hardswish({})", "{}.view_as(a)", "{}.clone()"]
UNARY += ["F.relu(self.bn({}))", "self.leaky(self.identity(self.bn1({})))"]
UNARY += ["(lambda t: self.bn(t))({})", "getattr(self, 'bn1')({})", "self.bn.forward({})", "self.relu({0} + {0})"]
BINARY = [
    "{} + {}",
    "{} + {}",
    "F.relu(self.bn({}) + {})",
    "F.relu({} + self.bn1({}))",
    "torch.add({}, {})",
    "{}.add({})",
    "{}.add_({})",
    "{} * {}",
    "torch.maximum({}, {})",
]
BINARY += ["sum([{}, {}])", "({} if self.flag else {})", "torch.stack([{}, {}]).sum(0)", "{{'k': {}, 'l': {}}}['k']"]
TESTS = ["self.flag", "not self.other_flag", "self.nothing is None", "self.training", "{}.mean() > 0", "{} is {}"]
TESTS += ["self.flag and self.training", "isinstance({}, torch.Tensor)", "{}.shape[0] == 2", "self.counters()[0] > 1"]
TESTS += ["n == 1", "n", "n is not None and n > 1"]  # n is another name of a batch norm's counter
EFFECTS = ["self.see('forward', {})", "self.flag = not self.flag", "self.calls += 1", "{}.relu_()", "{}.mul_(0.9)"]
EFFECTS += [
    "{}.add_({})",
    "{}[:, :1] = 0.5",
    "{}[0] += 0.25",
    "assert {} is not None",
    "self.log.append(self.counters())",
]
EFFECTS += ["self.kept = {}", "pass", "F.relu_({})"]


@st.composite
def expressions(draw, depth=2):
    kind = draw(st.sampled_from(["variable", *["child"] * 4, "unary", "unary", "binary"])) if depth else "variable"
    inner = expressions(depth - 1)
    if kind == "variable":
        return draw(st.sampled_from(VARIABLES))
    if kind == "child":
        return f"self.{draw(st.sampled_from(CHILDREN))}({draw(inner)})"
    if kind == "unary":
        return draw(st.sampled_from(UNARY)).format(f"({draw(inner)})")
    return draw(st.sampled_from(BINARY)).format(f"({draw(inner)})", f"({draw(inner)})")


@st.composite
def statements(draw, depth=2, in_loop=False):
    """The lines of one statement."""
    kinds = [*["assign"] * 8, *["augment"] * 2, "effect", "effect", "alias", "two", "walrus", "delete"]
    if depth:
        kinds += ["if", "if", "if", "for", "layers", "while", "with", "try", "comprehension"]
    if in_loop:
        kinds.append("leave")
    v, w = draw(st.sampled_from(VARIABLES)), draw(st.sampled_from(VARIABLES))
    body = st.lists(statements(depth - 1, in_loop), min_size=1, max_size=3) if depth else st.nothing()
    loop_body = st.lists(statements(depth - 1, True), min_size=1, max_size=3) if depth else st.nothing()

    def indented(strategy):
        return ["    " + line for lines in draw(strategy) for line in lines]

    match draw(st.sampled_from(kinds)):
        case "assign":
            return [f"{v} = {draw(expressions())}"]
        case "augment":
            return [f"{v} {draw(st.sampled_from(['+=', '+=', '*=', '-=']))} {draw(expressions(1))}"]
        case "effect":
            return [draw(st.sampled_from(EFFECTS)).format(v, w)]
        case "alias":
            return [f"{v} = {w}"]
        case "two":
            return [f"{v}, {w} = {draw(expressions(1))}, {draw(expressions(1))}"]
        case "walrus":
            return [f"{v} = self.relu(({w} := {draw(expressions(1))}))"]
        case "delete":
            other = "x" if v != "x" else "a"
            return [f"del {v}", f"{v} = " + re.sub(rf"\b{v}\b", other, draw(expressions(1)))]
        case "if":
            lines = [f"if {draw(st.sampled_from(TESTS)).format(v, w)}:", *indented(body)]
            if draw(st.booleans()):
                lines += ["else:", *indented(body)]
            elif draw(st.integers(0, 3)) == 0:
                lines += [f"    return {draw(expressions(1))}"]
            return lines
        case "for":
            return [f"for _ in range({draw(st.sampled_from(['2', '2', 'n % 3', 'n']))}):", *indented(loop_body)]
        case "layers":
            return ["for layer in self.layers:", *indented(loop_body), f"    {v} = layer({w})"]
        case "while":
            return [f"while {v}.dim() < 4 or self.calls % 3 != 0:", "    self.calls += 1", *indented(loop_body)]
        case "with":
            context = draw(st.sampled_from(["contextlib.nullcontext()", "torch.no_grad()", "torch.enable_grad()"]))
            return [f"with {context}:", *indented(body)]
        case "try":
            end = draw(st.sampled_from(["finally", "except ValueError"]))
            return ["try:", *indented(body), f"{end}:", *indented(body)]
        case "comprehension":
            return [f"{v} = [layer({w}) for layer in self.layers][{draw(st.integers(-1, 1))}]"]
        case "leave":
            return [
                f"if {draw(st.sampled_from(TESTS)).format(v, w)}:",
                f"    {draw(st.sampled_from(['break', 'continue']))}",
            ]
    raise AssertionError


@st.composite
def forwards(draw):
    lines = ["def forward(self, x):", "    a = b = c = x", "    n = self.bn.num_batches_tracked"]
    lines += ["    " + line for lines in draw(st.lists(statements(), min_size=1, max_size=7)) for line in lines]
    lines.append(
        "    return " + draw(st.sampled_from(["{}", "{}", "({}, {})", "[{}, {}]"])).format(draw(expressions()), "a")
    )
    lines += [
        "",
        "def method(self, v):",
        "    a = b = c = x = v",
        "    n = self.bn.num_batches_tracked",
        f"    v = {draw(expressions(1)).replace('self.method', 'self.bn')}",
    ]
    lines.append(f"    return {draw(st.sampled_from(['v', 'self.bn1(v)', 'F.relu(v)', 'self.bn1(v) + x']))}")
    return HEADER + "".join(f"    {line}\n" if line else "\n" for line in lines)


numbers = itertools.count()


def model_of(text):
    """A module with the text's forward, which ``inspect`` and ``linecache`` can read as if it stood in a file."""
    filename = f"<random forward {next(numbers)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    space = {"__name__": __name__}
    exec(compile(text, filename, "exec", dont_inherit=True), space)
    cls = type("Random", (Parts,), {name: vars(space["Forward"])[name] for name in ("forward", "method")})
    torch.manual_seed(0)
    model = cls().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    return model, filename


def outcome(model, x):
    """What a call shows: outputs, gradients, buffers and the log, or the error."""
    model.log.clear()
    model.zero_grad()
    given = x.clone().requires_grad_()
    entered = given * 1  # may be written in place
    torch.manual_seed(1)
    try:
        outputs = model(entered)
    except Exception as error:
        return "forward", type(error), list(model.log)
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    values = [t.detach().clone() for t in [*tensors, entered]]
    try:
        sum(
            ((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in tensors), 0.0
        ).backward()
    except RuntimeError:
        gradients = None  # nothing to differentiate, or a tensor that backward needs was overwritten
    else:
        gradients = [None if p.grad is None else p.grad.clone() for p in [given, *model.parameters()]]
    is_same = [a is b for a, b in itertools.combinations([*tensors, entered], 2)]
    return type(outputs), is_same, values, [b.clone() for b in model.buffers()], gradients, list(model.log)


def assert_near(name, actual, wanted):
    assert (actual is None) == (wanted is None), name
    if wanted is not None:
        same_training.assert_near(name, actual, wanted, max(1.0, same_training.largest(wanted)))


def assert_same_log(actual, wanted):
    def without_values(log):
        return [entry[:2] if isinstance(entry[0], str) else entry for entry in log]

    assert without_values(actual) == without_values(wanted)
    for one, other in zip(actual, wanted, strict=True):
        if isinstance(one[0], str):
            assert abs(one[2] - other[2]) <= same_training.TOLERANCE * max(1.0, abs(other[2]))


def check(text):
    original, filename = model_of(text)
    converted = bnfused.convert(copy.deepcopy(original))
    torch.manual_seed(2)
    x = torch.randn(2, C, 3, 2, dtype=torch.float64)
    original.watch()
    converted.watch()
    try:
        for training in (True, True, False):
            wanted, actual = outcome(original.train(training), x), outcome(converted.train(training), x)
            if wanted[0] == "forward":
                assert actual[:2] == wanted[:2]
                assert_same_log(actual[2], wanted[2])
                return None
            assert actual[:2] == wanted[:2]
            for name, ours, theirs in (("value", actual[2], wanted[2]), ("buffer", actual[3], wanted[3])):
                for one, other in zip(ours, theirs, strict=True):
                    if not other.isfinite().all():
                        return None
                    assert_near(name, one, other)
            assert_same_log(actual[5], wanted[5])
            if wanted[4] is not None:  # a fused op saves less: it may have gradients where the original has none
                assert actual[4] is not None, "backward raises an error"
                scale = max([1.0, *(same_training.largest(g) for g in wanted[4] if g is not None)])
                for one, other in zip(actual[4], wanted[4], strict=True):
                    assert (one is None) == (other is None)
                    if other is not None:
                        same_training.assert_near("gradient", one, other, scale)
        return bnfused.fusion_report(converted)
    finally:
        linecache.cache.pop(filename, None)


SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@SETTINGS
@given(forwards())
def test_random_forwards(text):
    note(text)
    assume(check(text) is not None)


NOTICED = {
    "a write to the input of a batch norm": "a = self.bn(x)\nx += 1\nreturn F.relu(a)",
    "a write to a residual": "a = self.bn(x) + x\nx += 1\nreturn F.relu(a)",
    "a write to another name of the input": ("b = self.bn(x)\na = self.identity(x)\na += 1\nreturn F.relu(b) + a"),
    "the counter, in a comparison": (
        "n = self.bn.num_batches_tracked\ny = self.bn(x)\nif n == 1:\n    y = y * 3\nreturn F.relu(y)"
    ),
    "the counter, as a condition": (
        "n = self.bn.num_batches_tracked\ny = self.bn(x)\nif n:\n    x = x * 3\nreturn F.relu(y + x)"
    ),
    "the counter, negated": (
        "n = self.bn.num_batches_tracked\nz = x * 3\ny = self.bn(x)\nif not n:\n    z = x\nreturn F.relu(y + z)"
    ),
    "the counter, as a number of rounds": (
        "n = self.bn.num_batches_tracked\nz = x\ny = self.bn(x)\n"
        "for _ in range(n):\n    z = z * 3\nreturn F.relu(y + z)"
    ),
    "another name of the counter, as an index": (
        "n = self.bn.num_batches_tracked\nk = n\ny = self.bn(x)\nz = self.layers[k](x)\nreturn F.relu(y) + z"
    ),
    "the counter, in a choice before a sum": (
        "n = self.bn.num_batches_tracked\nz = x * 3\ny = self.bn(x)\nreturn F.relu((z if n else x) + y)"
    ),
    "the counter, in a choice": (
        "n = self.bn.num_batches_tracked\ny = self.bn(x)\nz = 3 if n > 1 and n else 2\nreturn F.relu(y) * z"
    ),
}


@pytest.mark.parametrize("what", NOTICED)
def test_a_forward_that_would_notice_a_batch_norm_that_has_not_run(what):
    """The batch norm runs before the statement that notices."""
    body = "".join(f"        {line}\n" for line in NOTICED[what].splitlines())
    method = "\n    def method(self, v):\n        return v\n"
    assert check(f"{HEADER}    def forward(self, x):\n{body}{method}") is not None
