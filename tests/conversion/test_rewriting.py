"""A rewritten forward is the user's own code: what changes while it runs is seen, and everything runs in its order."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnfused
from support import same_training

C = 4


def images():
    return torch.randn(3, C, 5, 6, dtype=torch.float64)


def pair(model):
    original = model.double()
    return bnfused.convert(original), original


def assert_same(converted, original):
    same_training.assert_same_training(converted, original, images())


# --------------------------------------------------------------------------------- what changes while a forward runs


class Gated(nn.Module):
    """A skip connection that somebody switches on while the block runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.skip = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), False

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.skip:
            y = y + x
        return F.relu(y)


def test_a_flag_that_a_hook_sets_during_the_call():
    """It is read behind the call of the child, not on entry."""
    converted, original = pair(Gated())
    for model in (converted, original):
        model.conv.register_forward_hook(lambda *_, model=model: setattr(model, "skip", not model.skip))
    for _ in range(2):  # with and without the skip connection
        assert_same(converted, original)
    assert bnfused.fusion_report(converted).counts


GATE = {"open": False}


def by_global(self, x):
    y = self.bn(self.conv(x))
    if GATE["open"]:
        y = y * 2
    return F.relu(y)


class Opening(nn.Module):
    def forward(self, x):
        GATE["open"] = not GATE["open"]
        return x


def test_a_global_that_a_child_sets_during_the_call():
    model = type("ByGlobal", (Gated,), {"forward": by_global})()
    model.conv = Opening()
    converted, original = pair(model)
    for _ in range(2):
        results = []
        for network in (converted, original):
            GATE["open"] = False
            torch.manual_seed(0)
            results.append(network(images()))
        same_training.assert_near("y", *results, 10)


def test_a_slope_that_a_hook_changes_during_the_call():
    """The parameters of an activation are read when it is its turn."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)), nn.LeakyReLU(0.8))
    converted, original = pair(model)
    for network in (converted, original):
        network[0][0].register_forward_hook(lambda *_, network=network: setattr(network[1], "negative_slope", 0.1))
    assert_same(converted, original)


@pytest.mark.parametrize("place", [(F, "relu"), (nn.ReLU, "forward"), (nn.Module, "__call__"), (torch, "relu")])
def test_a_function_of_torch_that_is_replaced_after_conversion(place, monkeypatch):
    """A profiler or a quantiser that replaces it sees the calls that it sees of the original."""

    class Block(Gated):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return torch.relu(self.bn(F.relu(self.bn(self.relu(self.bn(self.conv(x)))))))

    converted, original = pair(Block())
    owner, name = place
    usual, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(name)
        return usual(*args, **kwargs)

    counts, x = [], images()
    for network in (converted, original):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, watched)
            calls.clear()
            network(x)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    assert_same(converted, original)


RETURNS_TRIPLE = """
import torch
from torch import nn

class Edited(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        z = self.bn(x)
        y = {y}
        if z is y:
            return y * 3
        return torch.relu(y)
"""


def test_a_file_that_was_edited_after_its_import(tmp_path, monkeypatch):
    """The code that runs counts. A text that is not its source is not rewritten, and the report says so."""
    file = tmp_path / "edited_by_the_test.py"
    file.write_text(RETURNS_TRIPLE.format(y="z"))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("edited_by_the_test")
    try:
        file.write_text(RETURNS_TRIPLE.format(y="self.bn(x) + 0"))
        converted, original = pair(module.Edited())
        same_training.assert_same_outputs(converted, original, images())
        (entry,) = bnfused.fusion_report(converted).entries
        assert "the file has changed since it was imported" in entry.reason
        file.write_text(RETURNS_TRIPLE.format(y="z"))  # as it was
        again = bnfused.convert(original)
        assert "forward" in vars(again)
        same_training.assert_same_outputs(again, original, images())
    finally:
        del sys.modules["edited_by_the_test"]


# A method that Python may call by itself, and a condition for which the call of a forward would run it.
RUN_BY_PYTHON = [
    ("__bool__", "self.other"),
    ("__bool__", "not self.other"),
    ("__len__", "self.other"),
    ("__len__", "len(self.other) == 0"),
    ("__iter__", "list(self.other) == []"),
    ("__iter__", "max(self.other) is None"),
    ("__iter__", "1 in self.other"),
    ("__reversed__", "list(reversed(self.other)) == []"),
    ("__getitem__", "self.other[0] is None"),
    ("__contains__", "1 in self.other"),
    ("__eq__", "1 in [self.other]"),
    ("__eq__", "self.other == 1"),
    ("__eq__", "1 == self.other"),
    ("__ne__", "self.other != 1"),
    ("__lt__", "self.other < 1"),
    ("__ge__", "1 <= self.other"),
    ("__neg__", "(-self.other) is None"),
    ("__invert__", "(~self.other) is None"),
    ("__add__", "(self.other + 1) is None"),
    ("__radd__", "(1 + self.other) is None"),
    ("__matmul__", "(self.other @ 1) is None"),
    ("__or__", "(self.other | 1) is None"),
    ("__repr__", "str(self.other) == ''"),
    ("__getattr__", "hasattr(self.other, 'missing')"),
    ("__getattr__", "getattr(self.other, 'missing', None)"),
    ("__getattr__", "self.other.missing"),
    ("computed", "hasattr(self.other, 'computed')"),
    ("computed", "getattr(self.other, 'computed', None)"),
    ("computed", "self.other.computed"),
]
ASKING = """
import torch
from torch import nn


class Asking(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.conv, self.bn, self.bn2, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4), other

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        if {condition}:
            y = y * 2
        return torch.relu(self.bn2(y))
"""


@pytest.mark.parametrize(("method", "condition"), RUN_BY_PYTHON)
def test_a_report_runs_no_code_of_the_users(method, condition, tmp_path, monkeypatch):
    ran = []

    def run(self, *args):
        ran.append(method)
        return {"__len__": 0, "__iter__": iter(()), "__reversed__": iter(()), "__repr__": ""}.get(method, True)

    own = {method: property(run) if method == "computed" else run, "__hash__": nn.Module.__hash__}
    (tmp_path / "asking_module.py").write_text(ASKING.format(condition=condition))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("asking_module")
    try:
        converted = bnfused.convert(module.Asking(nn.ReLU()))
        converted.other = type("Other", (nn.Module,), own)()
        ran.clear()
        report = bnfused.fusion_report(converted)
        assert ran == []
        assert report.counts == {"batch_norm+relu": 2}, str(report)
        with contextlib.suppress(TypeError, ValueError):  # what the method returns may be no answer to the condition
            converted(images().float())
        assert ran, "a call of the forward does not run it either"
    finally:
        del sys.modules["asking_module"]


def test_a_class_given_another_forward_is_reported(monkeypatch):
    converted, original = pair(Gated())
    monkeypatch.setattr(Gated, "forward", lambda self, x: self.bn(self.conv(x)) * 3)
    assert_same(converted, original)
    (entry,) = bnfused.fusion_report(converted).entries
    assert "changed after conversion" in entry.reason


# ------------------------------------------------------------------------------------------- order, and where it ends


class Noting(nn.Module):
    """Notes its call and how far the running statistics of a batch norm have moved."""

    def __init__(self, norm, notes, scale=1.0):
        super().__init__()
        self._norm, self._notes, self.scale = [norm], notes, scale

    def forward(self, x):
        self._notes.append((self.scale, self._norm[0].running_mean.clone()))
        return x * self.scale


def order_in_an_add(self, x):
    return F.relu(self.bn(x) + self.note(x))


def order_in_arguments(self, x):
    return torch.add(self.bn(x), self.note(x))


def order_in_a_list(self, x):
    return torch.stack([self.bn(x), self.note(x)]).sum(0)


def order_in_a_method(self, x):
    return self.bn(x).add_(self.note(x)).relu_()


def order_between_statements(self, x):
    y = self.bn(x)
    z = self.note(x)
    return F.relu(y + z)


def order_with_an_augmented_add(self, x):
    y = self.bn(x)
    y += self.note(x)
    return F.relu(y)


def order_in_a_branch(self, x):
    y = self.bn(x)
    if self.note(x).sum() is None:
        return y
    return F.relu(y)


def order_before_a_dead_value(self, x):
    y = self.bn(x)
    if self.training is None:
        return F.relu(y)
    return self.note(x)


def order_before_an_unused_result(self, x):
    self.bn(x)
    return self.note(x)


def order_in_a_loop(self, x):
    y = x
    for layer in (self.bn, self.note, self.bn, self.note):
        y = layer(y)
    return y


def order_in_a_with(self, x):
    with torch.enable_grad():
        y = self.bn(x)
    return self.note(x) + F.relu(y)


def order_in_a_finally(self, x):
    try:
        return self.bn(x)
    finally:
        self.note(x)


def order_of_a_deleted_variable(self, x):
    y = self.bn(x)
    del y
    return self.note(x)


def order_in_a_conditional_expression(self, x):
    y = self.bn(x)
    z = self.note(x) if self.training is not None else y
    return F.relu(z)


def order_before_a_write(self, x):
    x = x * 1
    y = self.bn(x)
    x[:] = 0
    return F.relu(self.note(y) + x)


def order_before_an_attribute(self, x):
    y = self.bn(x)
    self.kept = self.note(x)
    return F.relu(y) + self.kept


def order_in_a_closure(self, x):
    y = self.bn(x)

    def later():
        return y

    return self.note(x) + later()


def order_before_a_statement_that_raises(self, x):
    y = self.bn(x)
    if self.training is None:
        raise ValueError(self.note(x))
    self.note(x)
    return F.relu(y)


ORDERS = [function for name, function in sorted(globals().items()) if name.startswith("order_")]


@pytest.mark.parametrize("forward", ORDERS, ids=lambda forward: forward.__name__)
def test_a_batch_norm_has_run_where_the_next_module_runs(forward):
    """The running statistics that other code can see are those that it sees with torch."""

    class Block(nn.Module):
        def __init__(self, notes):
            super().__init__()
            self.bn = nn.BatchNorm2d(C)
            self.note = Noting(self.bn, notes, 0.5)

    Block.forward = forward
    seen = []
    for convert in (True, False):
        torch.manual_seed(0)
        notes = []
        model = Block(notes).double()
        if convert:
            bnfused.convert(model, inplace=True)
            assert "forward" in vars(model)
        model(images())
        assert notes
        seen.append([*notes, ("at the end", model.bn.running_mean)])
    for (name, ours), (_, theirs) in zip(*seen, strict=True):
        same_training.assert_near(str(name), ours, theirs, 1.0)


def test_an_inplace_write_to_the_input_of_a_batch_norm():
    class Writing(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.write = nn.BatchNorm2d(C), Writing()

        def forward(self, x):
            x = x * 1
            return F.relu(self.bn(x) + self.write(x))

    converted, original = pair(Block())
    with torch.no_grad():
        same_training.assert_same_outputs(converted, original, images())


def test_a_property_sees_that_the_batch_norm_has_run():
    """It runs code when it is read, as a call does."""

    class Block(nn.Module):
        def __init__(self, seen):
            super().__init__()
            self.bn, self.seen = nn.BatchNorm2d(C), seen

        @property
        def active(self):
            self.seen.append(int(self.bn.num_batches_tracked))
            return True

        def forward(self, x):
            y = self.bn(x)
            if self.active:
                y = y + x
            return F.relu(y) if getattr(self, "active") else y  # noqa: B009

    for convert in (True, False):
        seen = []
        model = Block(seen).double()
        if convert:
            bnfused.convert(model, inplace=True)
        model(images())
        assert seen == [1, 1]


def test_a_forward_that_reads_the_counter_of_its_batch_norm():
    """The batch norm has run where its counter is read, also in a comparison."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(C)

        def forward(self, x):
            y = self.bn(x)
            if self.bn.num_batches_tracked == 1:
                y = y + x
            return F.relu(y)

    converted, original = pair(Block())
    x = images()
    for _ in range(2):  # with the add and without
        same_training.assert_near("y", converted(x), original(x), 10)


def test_an_alias_of_the_output_keeps_its_value():
    """An add in place writes into the one tensor that both names have."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(C)

        def forward(self, x):
            y = self.bn(x)
            z = y
            y += x
            return F.relu(y) * z

    assert_same(*pair(Block()))


# ------------------------------------------------------------------------------------------------ what Python promises


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x, scale=1.0, *, shift=0.0):
        return self.bn(self.conv(x)) * scale + shift


class Derived(Base):
    def forward(self, x, scale=2.0, *, shift=1.0):
        def doubled(y):
            return 2 * y

        return doubled(F.relu(super().forward(x, scale, shift=shift)))


def test_super_defaults_and_nested_functions():
    converted, original = pair(Derived())
    assert "forward" in vars(converted)
    assert_same(converted, original)
    for args, kwargs in (((3.0,), {}), ((), {"shift": -1.0}), ((0.5,), {"shift": 2.0})):
        x = images()
        same_training.assert_near("y", converted(x, *args, **kwargs), original(x, *args, **kwargs), 10)
    assert inspect.signature(converted.forward) == inspect.signature(original.forward)


class Ending(Base):
    def forward(self, x):
        return self.bn(self.conv(x))


class Tail(Ending):
    def forward(self, x):
        return F.relu(super().forward(x))


def test_what_follows_a_call_of_super_is_fused():
    converted, original = pair(Tail())
    assert bnfused.fusion_report(converted).counts == {"batch_norm+relu": 1}
    with same_training.ops_that_run() as ran:
        bnfused.convert(original)(images())
    assert ran == {"batch_norm+relu": 1}
    assert_same(converted, original)


def test_a_traceback_names_the_line_of_the_user():
    class Failing(Base):
        def forward(self, x):
            y = F.relu(self.bn(self.conv(x)))
            return y @ None  # this line

    converted, original = pair(Failing())
    frames = []
    for model in (converted, original):
        with pytest.raises(TypeError) as raised:
            model(images())
        frames.append([frame for frame in traceback.extract_tb(raised.tb) if frame.filename == __file__][-1])
    assert (frames[0].lineno, frames[0].name, frames[0].line) == (frames[1].lineno, frames[1].name, frames[1].line)
    assert "# this line" in frames[0].line


def generator(self, x):
    yield self.bn(x)


def with_locals(self, x):
    y = self.bn(x)
    return F.relu(locals()["y"])


def with_a_class(self, x):
    class Local:
        scale = 2

    return F.relu(self.bn(x)) * Local.scale


@pytest.mark.parametrize("forward", [generator, with_locals, with_a_class], ids=lambda forward: forward.__name__)
def test_what_is_not_rewritten(forward):
    model = type("Refused", (Base,), {"forward": forward})().double()
    converted = bnfused.convert(model)
    assert "forward" not in vars(converted)
    (entry,) = bnfused.fusion_report(converted).entries
    assert entry.reason.startswith("the forward of Refused ")


def test_a_function_without_a_source():
    namespace = {"F": F}
    exec("def forward(self, x):\n    return F.relu(self.bn(x))", namespace)
    converted, original = pair(type("Typed", (Base,), {"forward": namespace["forward"]})())
    assert "has no source to read" in bnfused.fusion_report(converted).entries[0].reason
    same_training.assert_same_outputs(converted, original, images())


# ------------------------------------------------------------------------------------------------------- old pickles

OLD = Path(__file__).resolve().parents[1] / "data" / "converted_by_0_1_0.pt"


def test_a_model_that_was_pickled_by_version_0_1_0(timm):
    """The classes of its forwards stood in other modules then. It computes, converts and reverts as ever."""
    old = torch.load(OLD, weights_only=False)
    model = old["model"]
    assert dict(bnfused.fusion_report(model).counts) == old["counts"]
    with torch.no_grad():
        torch.testing.assert_close(model(old["x"]), old["y"], rtol=1e-5, atol=1e-5)
    assert dict(bnfused.fusion_report(bnfused.convert(model)).counts) == old["counts"]
    reverted = bnfused.revert(model)
    assert not any("forward" in vars(module) for module in reverted.modules())
    with torch.no_grad():
        torch.testing.assert_close(reverted(old["x"]), old["y"], rtol=1e-4, atol=1e-4)
