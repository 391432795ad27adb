"""convert, revert, fusion_report: what is swapped and fused, what is left alone, and that no result changes."""

from __future__ import annotations

import copy
import cProfile
import functools
import io
import os
import pickle
import random
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfused
from support import same_training

CLASSES = {
    nn.BatchNorm1d: bnfused.BatchNorm1d,
    nn.BatchNorm2d: bnfused.BatchNorm2d,
    nn.BatchNorm3d: bnfused.BatchNorm3d,
    nn.LazyBatchNorm1d: bnfused.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: bnfused.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: bnfused.LazyBatchNorm3d,
    nn.SyncBatchNorm: bnfused.SyncBatchNorm,
}
C = 4
SHAPE = (3, C, 5, 6)


def images(*shape):
    return torch.randn(shape or SHAPE, dtype=torch.float64)


def ops(model):
    """What the report says runs, without the plain ones."""
    return dict(bnfused.fusion_report(model).counts)


def check(original, wanted_ops, x=None, mode=True):
    """Convert; what runs is what the report says and what is wanted; training and eval are the original's."""
    original = original.double().train(mode)
    converted = bnfused.convert(original)
    x = images() if x is None else x
    assert ops(converted) == wanted_ops, str(bnfused.fusion_report(converted))
    with same_training.ops_that_run() as ran:
        same_training.loss_and_gradients(copy.deepcopy(converted), x, 0)
    assert ran == wanted_ops
    same_training.assert_same_training(converted, original, x)
    return converted


def reason(converted, name):
    return next(entry.reason for entry in bnfused.fusion_report(converted).entries if entry.name == name)


# ------------------------------------------------------------------------------------------------------ the swap


@pytest.mark.parametrize("theirs", CLASSES)
def test_every_class_is_swapped_and_reverted(theirs):
    """By class alone: the object, its tensors and its hooks stay."""
    module = theirs() if "Lazy" in theirs.__name__ else theirs(C, eps=1e-3, momentum=None, dtype=torch.float64)
    module.register_forward_hook(lambda *args: None)
    module.eval()
    module.note = "kept"
    before = dict(vars(module))
    same = bnfused.convert(module, inplace=True)
    assert same is module
    assert type(module) is CLASSES[theirs]
    assert vars(module) == before
    assert bnfused.revert(module, inplace=True) is module
    assert type(module) is theirs
    assert vars(module) == before


def test_the_original_is_left_alone_unless_asked_for():
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU())
    converted = bnfused.convert(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert "forward" not in vars(model)
    assert converted[0].weight is not model[0].weight
    reverted = bnfused.revert(converted)
    assert type(converted[1]) is bnfused.BatchNorm2d
    assert type(reverted[1]) is nn.BatchNorm2d
    assert bnfused.convert(model, inplace=True) is model
    assert bnfused.convert(model, inplace=True) is model  # twice is once
    assert ops(model) == {"batch_norm+relu": 1}
    assert bnfused.revert(model, inplace=True) is model
    assert "forward" not in vars(model)


def test_state_dict_names_and_classes_stay():
    model = nn.Sequential(Residual(), nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()))
    converted = bnfused.convert(model)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert repr(converted) == repr(model)
    for (name, theirs), (other, ours) in zip(model.named_modules(), converted.named_modules(), strict=True):
        assert name == other
        assert isinstance(ours, type(theirs))
        assert type(ours) is CLASSES.get(type(theirs), type(theirs))
    converted.load_state_dict(model.state_dict(), strict=True)


def test_without_fuse():
    """fuse=False swaps the classes and no more."""
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()).double()
    converted = bnfused.convert(model, fuse=False)
    assert ops(converted) == {"batch_norm": 1}
    assert "fuse=False" in reason(converted, "0")
    assert "forward" not in vars(converted)
    same_training.assert_same_training(converted, model, images())


def test_lazy_modules_fuse_once_they_are_known():
    model = nn.Sequential(nn.LazyConv2d(C, 1), nn.LazyBatchNorm2d(), nn.ReLU()).double()
    bnfused.convert(model, inplace=True)  # torch cannot copy a module that is still lazy
    x = images()
    first = model(x)  # a hook of the lazy module makes the first call a plain one
    assert type(model[1]) is bnfused.BatchNorm2d
    assert ops(model) == {"batch_norm+relu": 1}
    wanted = bnfused.revert(model)(x)
    same_training.assert_near("first call", first, wanted, same_training.largest(wanted))
    same_training.assert_near("second call", model(x), wanted, same_training.largest(wanted))


class Renamed(nn.BatchNorm2d):
    """Inherits forward."""


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_without_a_forward_of_its_own_keeps_its_class():
    model = nn.Sequential(Renamed(C), nn.ReLU())
    converted = check(model, {"batch_norm+relu": 1})
    assert type(converted[0]) is Renamed
    assert "forward" not in vars(bnfused.revert(converted)[0])


def test_synchronized_and_back():
    """Every class of torch's becomes SyncBatchNorm, others compute as one; each gets its own class and dict again."""
    model = nn.Sequential(
        *(nn.BatchNorm1d(C), nn.BatchNorm2d(C), nn.BatchNorm3d(C), nn.SyncBatchNorm(C, process_group="its own")),
        *(Renamed(C), bnfused.BatchNorm2d(C), Scaled(C)),
    )
    before = [(type(m), dict(vars(m))) for m in model]
    converted = bnfused.convert(model, sync=True)
    assert [type(m) is bnfused.SyncBatchNorm for m in converted] == [True, True, True, True, False, True, False]
    assert [type(m) for m in converted[4:7:2]] == [Renamed, Scaled]
    assert ops(converted) == {"sync_batch_norm": 6, "torch": 1}
    assert converted[3].process_group == "its own"
    assert [type(m) for m in model] == [cls for cls, _ in before]
    assert list(converted.state_dict()) == list(model.state_dict())

    again = bnfused.convert(bnfused.convert(model, inplace=True), sync=True, process_group="ours", inplace=True)
    assert [m.process_group for m in again if isinstance(m, bnfused.SyncBatchNorm)] == ["ours"] * 5
    assert vars(again[4])["forward"].process_group == "ours"
    bnfused.convert(bnfused.convert(again, inplace=True), sync=True, inplace=True)  # keeps what it has
    assert again[0].process_group == "ours" == vars(again[4])["forward"].process_group
    bnfused.revert(again, inplace=True)
    classes = [nn.BatchNorm2d if cls is bnfused.BatchNorm2d else cls for cls, _ in before]
    assert [type(m) for m in again] == classes
    assert again[3].process_group == "ours"
    again[3].process_group = "its own"
    assert [vars(m) for m in again] == [attributes for _, attributes in before]


def test_sync_is_asked_for_plainly():
    """A group without sync, or a layer that would not be synchronized in its first call, is an error."""
    with pytest.raises(ValueError, match="expected sync=True with process_group"):
        bnfused.convert(nn.BatchNorm2d(C), process_group="ours")
    model = nn.Sequential(nn.BatchNorm1d(C), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="got LazyBatchNorm1d at 1; run the model once first"):
        bnfused.convert(model, sync=True, inplace=True)
    assert type(model[0]) is nn.BatchNorm1d


def test_isinstance_of_the_synchronized():
    """Not of torch's SyncBatchNorm, with which DistributedDataParallel would refuse to train on the CPU; of its base.

    If torch ever allows that, this fails, and ours can be a subclass.
    """
    from torch.nn.parallel import DistributedDataParallel

    assert issubclass(bnfused.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
    assert not issubclass(bnfused.SyncBatchNorm, nn.SyncBatchNorm)
    assert repr(bnfused.SyncBatchNorm(C)) == repr(nn.SyncBatchNorm(C))
    public = {name for name in vars(nn.SyncBatchNorm) if not name.startswith("_")}
    assert public <= {name for cls in bnfused.SyncBatchNorm.__mro__[:2] for name in vars(cls)}
    ddp = object.__new__(DistributedDataParallel)
    ddp.__dict__.update(device_type="cpu", logger=None)
    ddp._passing_sync_batchnorm_handle(nn.Sequential(bnfused.SyncBatchNorm(C)))
    with pytest.raises(ValueError, match="only work with GPU"):
        ddp._passing_sync_batchnorm_handle(nn.Sequential(type("Ours", (nn.SyncBatchNorm,), {})(C)))


def test_conversion_by_the_method_of_the_class():
    """What torch's makes of a model, in this class: the same parameters, buffers and group; others stay."""
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Linear(C, C), nn.Sequential(nn.BatchNorm1d(C, affine=False))).eval()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = bnfused.SyncBatchNorm.convert_sync_batchnorm(model, "ours")
    assert [type(m) for m in (converted[0], converted[1], converted[2][0])] == [
        bnfused.SyncBatchNorm,
        nn.Linear,
        bnfused.SyncBatchNorm,
    ]
    after = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert {name: id(t) for name, t in after.items()} == {name: id(t) for name, t in before.items()}
    assert (converted[0].process_group, converted[0].training, converted[0].check_ranks) == ("ours", False, True)


def test_torchs_conversion_of_the_synchronized():
    """It makes torch's of every batch norm, ours among them; convert makes ours of them again, in their group."""
    model = nn.Sequential(bnfused.SyncBatchNorm(C), nn.SyncBatchNorm(C))
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(model, "ours")
    assert [type(m) for m in theirs] == [nn.SyncBatchNorm] * 2
    again = bnfused.convert(theirs)
    assert [type(m) for m in again] == [bnfused.SyncBatchNorm] * 2
    assert [m.process_group for m in again] == ["ours"] * 2
    assert [type(m) for m in bnfused.revert(again)] == [nn.SyncBatchNorm] * 2


class Doubling(nn.Module):
    def forward(self, x):
        return x * 2


def parametrized():
    """Its class inherits forward, and what forward reads as ``weight`` is computed."""
    module = nn.BatchNorm2d(C).double()
    nn.utils.parametrize.register_parametrization(module, "weight", Doubling())
    return module


@pytest.mark.parametrize("make", [lambda: Scaled(C), parametrized])
def test_a_batch_norm_that_computes_something_else_is_left_alone(make):
    model = nn.Sequential(make(), nn.ReLU()).double().eval()
    converted = bnfused.convert(model)
    assert type(converted[0]) is type(model[0])
    assert ops(converted) == {"torch": 1}
    assert reason(converted, "0")
    same_training.assert_same_outputs(converted, model, images())


def test_what_is_no_module_is_refused():
    for function in (bnfused.convert, bnfused.revert, bnfused.fusion_report):
        with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
            function("resnet18")


# ------------------------------------------------------------------------------------------------- in a Sequential

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.3, inplace=True),
    "elu": nn.ELU(0.7),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    activation = copy.deepcopy(ACTIVATIONS[name])
    check(nn.Sequential(nn.BatchNorm2d(C), activation), {f"batch_norm+{name.split()[0]}": 1})


SHARED_RELU = nn.ReLU()
SEQUENCES = {
    "Identity between": ([nn.BatchNorm2d(C), nn.Identity(), nn.ReLU()], {"batch_norm+relu": 1}),
    "Dropout of nothing between": ([nn.BatchNorm2d(C), nn.Dropout2d(0.0), nn.ReLU()], {"batch_norm+relu": 1}),
    "Dropout between": ([nn.BatchNorm2d(C), nn.Dropout(0.5), nn.ReLU()], {"batch_norm": 1}),
    "the tail of a nested one": (
        [nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)), nn.ReLU()],
        {"batch_norm+relu": 1},
    ),
    "a nested one that is complete": (
        [nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()), nn.ReLU6()],
        {"batch_norm+relu": 1},
    ),
    "an empty one between": ([nn.BatchNorm2d(C), nn.Sequential(), nn.ReLU()], {"batch_norm": 1}),
    "one activation module twice": (
        [nn.BatchNorm2d(C), SHARED_RELU, nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), SHARED_RELU],
        {"batch_norm+relu": 2},
    ),
    "two activations": ([nn.BatchNorm2d(C), nn.Tanh(), nn.ReLU()], {"batch_norm+tanh": 1}),
    "gelu of another kind": ([nn.BatchNorm2d(C), nn.GELU("tanh")], {"batch_norm": 1}),
    "an unknown activation": ([nn.BatchNorm2d(C), nn.Softplus()], {"batch_norm": 1}),
    "a convolution": ([nn.BatchNorm2d(C), nn.Conv2d(C, C, 1), nn.ReLU()], {"batch_norm": 1}),
    "nothing": ([nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)], {"batch_norm": 1}),
    "batch norm alone": ([nn.BatchNorm2d(C)], {"batch_norm": 1}),
    "batch norm and batch norm": (
        [nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.ReLU()],
        {"batch_norm": 1, "batch_norm+relu": 1},
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name):
    modules, wanted = SEQUENCES[name]
    check(nn.Sequential(*copy.deepcopy(modules)), wanted)


def test_a_drop_layer_is_fused_over_in_eval_only():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Dropout(0.5), nn.ReLU()).double()
    converted = bnfused.convert(model)
    assert ops(converted) == {"batch_norm": 1}
    assert reason(converted, "0") == "Dropout drops values in training"
    assert ops(converted.eval()) == {"batch_norm+relu": 1}
    with same_training.ops_that_run() as ran:
        same_training.assert_same_outputs(converted, model.eval(), images())
    assert ran == {"batch_norm+relu": 1}


def test_a_subclass_of_sequential():
    class Tail(nn.Sequential):
        pass

    check(Tail(nn.BatchNorm2d(C), nn.ReLU()), {"batch_norm+relu": 1})


def test_other_ranks():
    check(nn.Sequential(nn.Linear(5, C), nn.BatchNorm1d(C), nn.ReLU()), {"batch_norm+relu": 1}, images(7, 5))
    check(nn.Sequential(nn.BatchNorm3d(C), nn.ReLU()), {"batch_norm+relu": 1}, images(2, C, 3, 4, 5))


# ---------------------------------------------------------------------------------------------------- in a block


class Block(nn.Module):
    """Two batch norms; each subclass below is one way to use them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)
        self.bn = nn.BatchNorm2d(C)
        self.other = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Identity()


class Residual(nn.Module):
    """torchvision's BasicBlock in small."""

    def __init__(self, downsample=False):
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(C)
        self.downsample = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)) if downsample else None

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


@pytest.mark.parametrize("downsample", [False, True])
def test_residual_block(downsample):
    """With a downsample path the batch norm that runs last takes the add."""
    plain = {"batch_norm": 1} if downsample else {}
    converted = check(Residual(downsample), {"batch_norm+relu": 1, "batch_norm+add+relu": 1} | plain)
    assert type(converted) is Residual
    if downsample:
        assert reason(converted, "bn2") == "downsample runs before its output is used"


def block(forward):
    """A Block with this forward."""
    return type(forward.__name__, (Block,), {"forward": forward})()


def functional_relu(self, x):
    return F.relu(self.bn(x), inplace=True) + self.other(x)


def tensor_methods(self, x):
    return self.bn(self.conv(x)).add_(x).relu_()


def torch_functions(self, x):
    return torch.tanh(torch.add(x, self.bn(x)))


def activation_with_parameter(self, x):
    return F.leaky_relu(self.bn(x), 0.3) + F.elu(self.other(x), alpha=0.6)


def gelu_by_name(self, x):
    return F.gelu(self.bn(x), approximate="none")


def reflected(self, x):
    return F.silu(x + self.drop(self.bn(x)))


def add_after_activation(self, x):
    return self.relu(self.bn(x)) + x


def both_are_batch_norms(self, x):
    return self.relu(self.bn(x) + self.other(self.conv(x)))


def in_place_on_the_other_one(self, x):
    y = self.bn(x)
    y += self.other(self.conv(x))
    return self.relu(y)


def identity_between(self, x):
    return self.relu(self.bn(self.conv(x)) + self.drop(x))


def identity_of_its_input(self, x):
    return self.relu(self.bn(x) + self.drop(x))


def add_of_itself(self, x):
    y = self.bn(x)
    return y + y


def used_twice(self, x):
    y = self.bn(x)
    return self.relu(y) * y


def add_of_a_number(self, x):
    return self.relu(self.bn(x) + 1)


def add_with_alpha(self, x):
    return torch.add(self.bn(x), x, alpha=2)


def gelu_of_another_kind(self, x):
    return F.gelu(self.bn(x), approximate="tanh")


def something_between(self, x):
    y = self.bn(self.conv(x))
    x.mul_(2)
    return y + x


def writes_into_its_input(self, x):
    x = x * 1
    z = x
    x += self.bn(self.conv(x))
    return x * z


def two_calls_of_one(self, x):
    return self.relu(self.bn(self.relu(self.bn(x))))


def dropping(self, x):
    return self.other(F.dropout(self.relu(self.bn(x)), 0.5, training=self.training))


def returned_twice(self, x):
    y = self.relu(self.bn(x))
    return y, [y, {"other": self.other(x)}]


def checked_input(self, x):
    torch._assert(x.dim() == 4, "four")
    b, c, h, w = x.shape
    return self.relu(self.bn(x)).view(b, c, h * w)


FUSED_BLOCKS = {
    functional_relu: {"batch_norm+relu": 1, "batch_norm+add": 1},
    tensor_methods: {"batch_norm+add+relu": 1, "batch_norm": 1},
    torch_functions: {"batch_norm+add+tanh": 1, "batch_norm": 1},
    activation_with_parameter: {"batch_norm+leaky_relu": 1, "batch_norm+elu": 1},
    gelu_by_name: {"batch_norm+gelu": 1, "batch_norm": 1},
    reflected: {"batch_norm+add+silu": 1, "batch_norm": 1},
    add_after_activation: {"batch_norm+relu": 1, "batch_norm": 1},
    both_are_batch_norms: {"batch_norm+add+relu": 1, "batch_norm": 1},
    in_place_on_the_other_one: {"batch_norm+add+relu": 1, "batch_norm": 1},
    identity_between: {"batch_norm+add+relu": 1, "batch_norm": 1},
    identity_of_its_input: {"batch_norm+add+relu": 1, "batch_norm": 1},
    dropping: {"batch_norm+relu": 1, "batch_norm": 1},
    returned_twice: {"batch_norm+relu": 1, "batch_norm": 1},
    checked_input: {"batch_norm+relu": 1, "batch_norm": 1},
}
UNFUSED_BLOCKS = [
    add_of_itself,
    used_twice,
    add_of_a_number,
    add_with_alpha,
    gelu_of_another_kind,
    something_between,
    writes_into_its_input,
]


def runs(model, x):
    with same_training.ops_that_run() as ran:
        same_training.loss_and_gradients(copy.deepcopy(model), x, 0)
    return ran


@pytest.mark.parametrize("forward", FUSED_BLOCKS, ids=lambda forward: forward.__name__)
def test_fused_blocks(forward):
    original = block(forward).double()
    converted = bnfused.convert(original)
    wanted = FUSED_BLOCKS[forward]
    assert ops(converted) == wanted, str(bnfused.fusion_report(converted))
    ran = runs(converted, images())
    assert {op: n for op, n in ran.items() if "+" in op} == {op: n for op, n in wanted.items() if "+" in op}
    same_training.assert_same_training(converted, original, images())


@pytest.mark.parametrize("forward", UNFUSED_BLOCKS, ids=lambda forward: forward.__name__)
def test_unfused_blocks(forward):
    original = block(forward).double()
    converted = bnfused.convert(original)
    assert ops(converted) == {"batch_norm": 2}
    assert reason(converted, "bn")
    for mode in (True, False):
        same_training.assert_same_outputs(converted.train(mode), original.train(mode), images())


def test_a_module_that_is_called_twice():
    converted = bnfused.convert(block(two_calls_of_one).double())
    assert runs(converted, images()) == {"batch_norm+relu": 2}
    same_training.assert_same_training(converted, block_like(converted, two_calls_of_one), images())


def block_like(converted, forward):
    """The unconverted block with the state of a converted one."""
    original = block(forward).double()
    original.load_state_dict(converted.state_dict())
    return original


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


class Half(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("residual", [Mean(), Half()])
def test_a_residual_that_does_not_fit_takes_the_plain_road(residual):
    """One that is broadcast, and one of another dtype."""

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(C)
            self.residual = residual

        def forward(self, x):
            residual = self.residual(x)
            return torch.relu(residual + self.bn(x))

    original = Added().double()
    converted = bnfused.convert(original)
    assert ops(converted) == {"batch_norm+add+relu": 1}  # as far as can be known without the tensors
    assert runs(converted, images()) == {"batch_norm": 1}
    same_training.assert_same_training(converted, original, images())


class InvertedResidual(nn.Module):
    """The add reaches into the Sequential, and a flag decides."""

    def __init__(self, use_add=True):
        super().__init__()
        self.use_add = use_add
        self.conv = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU6(), nn.BatchNorm2d(C))

    def forward(self, x):
        return x + self.conv(x) if self.use_add else self.conv(x)


def test_add_to_the_tail_of_a_sequential():
    check(InvertedResidual(), {"batch_norm+relu6": 1, "batch_norm+add": 1})
    check(InvertedResidual(False), {"batch_norm+relu6": 1, "batch_norm": 1})


def test_what_follows_a_block():
    """A block that ends in a batch norm, or in batch norm and add, takes the activation after it."""

    class ConvNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

        def forward(self, x):
            return self.bn(self.conv(x))

    check(nn.Sequential(ConvNorm(), nn.ReLU()), {"batch_norm+relu": 1})
    check(nn.Sequential(InvertedResidual(), nn.ReLU()), {"batch_norm+relu6": 1, "batch_norm+add+relu": 1})
    check(
        nn.Sequential(nn.Sequential(InvertedResidual(), nn.Identity()), nn.ReLU()),
        {"batch_norm+relu6": 1, "batch_norm+add+relu": 1},
    )


def test_a_drop_layer_at_the_end_of_a_block():
    """What follows the block comes after the drop layer, which is fused over in eval only."""

    class Dropping(Block):
        def forward(self, x):
            return self.drop(self.bn(x))

    model = nn.Sequential(Dropping(), nn.Sigmoid())
    model[0].drop = nn.Dropout(0.5)
    converted, original = pair(model)
    x = images()
    assert runs(converted, x) == {"batch_norm": 1}
    same_training.assert_same_training(converted, original, x)
    assert runs(converted, x) == {"batch_norm+sigmoid": 1}  # in eval by now


def test_lists_of_children():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(C) for _ in range(3)])
            self.by_name = nn.ModuleDict({"last": nn.BatchNorm2d(C)})

        def forward(self, x):
            for norm in self.norms:
                x = F.relu(norm(x))
            return torch.tanh(self.by_name["last"](x))

    original = Layers()
    converted = check(original, {"batch_norm+relu": 3, "batch_norm+tanh": 1})
    for model in (original, converted):  # one more than at the conversion
        model.norms.append(nn.BatchNorm2d(C, dtype=torch.float64))
        model.train()
    same_training.assert_same_training(converted, original, images())
    assert ops(converted) == {"batch_norm+relu": 3, "batch_norm+tanh": 1, "torch": 1}
    assert ops(bnfused.convert(converted, inplace=True)) == {"batch_norm+relu": 4, "batch_norm+tanh": 1}


def test_inputs_that_are_a_tensor_or_a_list_or_a_tuple():
    """As torchvision's dense layer."""

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(2 * C)

        def forward(self, x):
            features = [x] if isinstance(x, Tensor) else x
            return F.relu(self.bn(torch.cat(features, 1)))

    original = Dense().double()
    converted = bnfused.convert(original)
    parts = [images(), images()]
    for argument in (torch.cat(parts, 1), parts, tuple(parts)):
        with same_training.ops_that_run() as ran:
            y = converted(argument)
        wanted = original(argument)
        same_training.assert_near("y", y, wanted, same_training.largest(wanted))
        assert ran == {"batch_norm+relu": 1}


def test_inputs_that_can_only_be_a_list():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(2 * C)

        def forward(self, parts):
            return F.relu(self.bn(torch.cat(parts, 1)))

    converted, original = pair(Root())
    parts = [images(), images()]
    with same_training.ops_that_run() as ran:
        y = converted(parts)
    assert ran == {"batch_norm+relu": 1}
    same_training.assert_near("y", y, original(parts), 10)


# ------------------------------------------------------- forwards that decide by what only a call can tell, or do more

COUNTS: list[int] = []
SWITCH = {"on": True}


def by_value(self, x):
    return self.relu(self.bn(x)) if x.sum() > 0 else self.bn(x)


def by_shape(self, x):
    return self.relu(self.bn(x)) if x.shape[-1] == 6 else self.bn(x)


def by_rank(self, x):
    return self.relu(self.bn(x)) if x.dim() == 4 else self.bn(x)


def by_mode(self, x):
    return self.relu(self.bn(x)) if self.training else self.bn(x)


def by_chance(self, x):
    return self.relu(self.bn(x)) if random.random() < 2 else self.bn(x)


def by_gradient_mode(self, x):
    return self.relu(self.bn(x)) if torch.is_grad_enabled() else self.bn(x)


def by_global(self, x):
    return self.relu(self.bn(x)) if SWITCH["on"] else self.bn(x)


def by_type(self, x):
    return self.relu(self.bn(x)) if type(x) is Tensor else self.bn(x)


def by_child(self, x):
    return self.relu(self.bn(x)) if self.relu.inplace else self.bn(x)


def by_class_of_child(self, x):
    return self.relu(self.bn(x)) if isinstance(self.relu, nn.ReLU) else self.bn(x)


def by_environment(self, x):
    return self.relu(self.bn(x)) if os.environ.get("HOME") else self.bn(x)


def by_parameter(self, x):
    return self.relu(self.bn(x)) if self.bn.weight.sum() > 0 else self.bn(x)


def counting(self, x):
    COUNTS.append(1)
    return self.relu(self.bn(x))


def remembering(self, x):
    y = self.relu(self.bn(x))
    self.last = y.shape
    return y


def without_gradient(self, x):
    with torch.no_grad():
        y = self.relu(self.bn(x))
    return y * self.conv(x)


def with_noise(self, x):
    return self.relu(self.bn(x)) + torch.rand(1)


def with_a_constant(self, x):
    return self.relu(self.bn(x)) + torch.tensor(2.0)


def hiding_the_error(self, x):
    try:
        positive = bool(x.sum() > 0)
    except Exception:
        positive = False
    return self.relu(self.bn(x)) if positive else self.bn(x)


def with_checkpoint(self, x):
    return torch.utils.checkpoint.checkpoint(lambda t: self.relu(self.bn(t)), x, use_reentrant=False)


def printing(self, x):
    print("called", end="")
    return self.relu(self.bn(x))


@torch.no_grad()
def decorated(self, x):
    return self.relu(self.bn(x))


def iterating(self, x):
    return torch.stack([self.relu(self.bn(row)) for row in x[None]])


def by_identity_of_a_result(self, x):
    y = self.drop(x)
    return self.relu(self.bn(x)) if y is x else self.bn(x)


def by_absence_of_a_result(self, x):
    x = self.drop(x)
    return self.relu(self.bn(x)) if x is not None else self.bn(x)


def with_an_exception_handled(self, x):
    try:
        return self.relu(self.bn(x))
    except ValueError:
        return x


def by_pattern(self, x):
    match self.drop(x):
        case None:
            return self.bn(x)
        case y:
            return self.relu(self.bn(y))


class Settings:
    on = True


def helper(x, seen=[]):  # noqa: B006
    seen.append(1)
    return x


def switched(x):
    return x


switched.on = True


def mask_of(x):
    return x.grad is None


def by_setting(self, x):
    settings = Settings
    return self.relu(self.bn(x)) if settings.on else self.bn(x)


def by_own_class(self, x):
    return self.relu(self.bn(x)) if self.__class__.training_mode else self.bn(x)


def counting_in_its_class(self, x):
    Settings.calls = 1
    return self.relu(self.bn(x))


def with_a_default_that_changes(self, x):
    return self.relu(self.bn(helper(x)))


def by_text(self, x):
    return self.relu(self.bn(x)) if f"{x.dtype}" == "torch.float64" else self.bn(x)


def by_set(self, x):
    return self.relu(self.bn(x)) if x.dtype in {torch.float64} else self.bn(x)


def by_lookup(self, x):
    return self.relu(self.bn(x)) if {4: True}.get(x.dim(), False) else self.bn(x)


def by_attribute(self, x):
    return self.bn(x) if hasattr(x, "mask") else self.relu(self.bn(x))


def by_attribute_or_default(self, x):
    return self.relu(self.bn(x)) * getattr(x, "scale", 2.0)


def by_absence_in_a_helper(self, x):
    return self.relu(self.bn(x)) if mask_of(x) else self.bn(x)


def writing_data(self, x):
    x = x * 1
    x.data = x.data * 2 + 1
    return self.relu(self.bn(x) + x)


def by_absence_in_a_loop(self, x):
    for layer in (self.drop, self.drop):
        y = self.relu(self.bn(x)) if x is not None else self.bn(x)
        x = layer(y)
    return x


DECIDING = [
    by_setting,
    by_own_class,
    counting_in_its_class,
    with_a_default_that_changes,
    by_text,
    by_set,
    by_lookup,
    by_attribute,
    by_attribute_or_default,
    by_absence_in_a_helper,
    writing_data,
    by_absence_in_a_loop,
    by_identity_of_a_result,
    by_absence_of_a_result,
    with_an_exception_handled,
    by_value,
    by_shape,
    by_rank,
    by_mode,
    by_chance,
    by_gradient_mode,
    by_global,
    by_type,
    by_child,
    by_class_of_child,
    by_environment,
    by_parameter,
    counting,
    remembering,
    without_gradient,
    with_noise,
    with_a_constant,
    hiding_the_error,
    with_checkpoint,
    printing,
    iterating,
]
# The batch norm is called from a nested function, which is left as it is.
NOT_FUSED_HERE = {with_checkpoint, iterating}


def effects(model, x, capsys):
    """The output, and everything else that a call changes."""
    COUNTS.clear()
    helper.__defaults__[0].clear()
    Settings.calls = 0
    torch.manual_seed(0)
    y = model(x)
    changed = len(COUNTS), len(helper.__defaults__[0]), Settings.calls, getattr(model, "last", None)
    return y, *changed, capsys.readouterr()


@pytest.mark.parametrize("forward", DECIDING, ids=lambda forward: forward.__name__)
def test_a_forward_that_decides_or_does_more(forward, capsys, monkeypatch):
    """Its own code runs in every call, with the same decisions and effects; conversion and report run none of it."""
    COUNTS.clear()
    helper.__defaults__[0].clear()
    monkeypatch.setattr(Block, "training_mode", True, raising=False)
    monkeypatch.setattr(Settings, "calls", 0, raising=False)
    original = block(forward).double()
    converted = bnfused.convert(original)
    assert reason(converted, "other")
    assert not COUNTS
    assert not helper.__defaults__[0]
    assert Settings.calls == 0
    assert not hasattr(converted, "last")
    assert not capsys.readouterr().out
    for mode in (True, False):
        x = images()
        results = [effects(model.train(mode), x.clone(), capsys) for model in (converted, original)]
        (y, *ours), (wanted, *theirs) = results
        same_training.assert_near("y", y, wanted, same_training.largest(wanted))
        assert ours == theirs
    converted.train()
    with same_training.ops_that_run() as ran:
        converted(images().abs())
    assert any("+" in op for op in ran) == (forward not in NOT_FUSED_HERE)


@pytest.mark.parametrize("forward", [by_pattern, decorated], ids=lambda forward: forward.__name__)
def test_a_forward_that_cannot_be_rewritten_is_left_alone(forward):
    """The report says what stood in the way."""
    original = block(forward).double()
    converted = bnfused.convert(original)
    assert "forward" not in vars(converted)
    assert ops(converted) == {"batch_norm": 2}
    assert f"the forward of {forward.__name__}" in reason(converted, "bn")
    same_training.assert_same_outputs(converted, original, images())
    same_training.assert_same_outputs(converted.eval(), original.eval(), images())


def make_forward(counter):
    def closed_over(self, x):
        counter.append(1)
        return self.relu(self.bn(x))

    return closed_over


def test_a_forward_with_state_in_its_closure():
    """It is the same variable: conversion calls nothing, and each call counts."""
    calls = []
    original = block(make_forward(calls)).double()
    converted = bnfused.convert(original)
    assert not calls
    same_training.assert_same_outputs(converted, original, images())
    assert len(calls) == 2
    assert runs(converted, images()) == {"batch_norm+relu": 1}


def test_a_switch_in_a_closure_or_behind_a_class_method():
    """It is read in every call, where it stands."""
    flag = True

    def closed_over(self, x):
        return self.relu(self.bn(x)) if flag else self.bn(x)

    class Asking(Block):
        flag = True

        @classmethod
        def is_on(cls):
            return cls.flag

        def forward(self, x):
            return self.relu(self.bn(x)) if self.is_on() else self.bn(x)

    for model in (block(closed_over).double(), Asking().double()):
        converted = bnfused.convert(model)
        flag = Asking.flag = True
        assert runs(converted, images()) == {"batch_norm+relu": 1}
        flag = Asking.flag = False
        assert runs(converted, images()) == {"batch_norm": 1}
        same_training.assert_same_training(converted, model, images())


class Shortcut(Block):
    """Called with one argument or two, as timm's DLA calls its blocks."""

    def forward(self, x, shortcut=None):
        if shortcut is None:
            shortcut = x
        return self.relu(self.bn(self.conv(x)) + shortcut)


class Options(Block):
    def forward(self, x, scale=1, *rest, flag=False, **more):
        return self.relu(self.bn(x)) * scale + len(rest) + flag + len(more)


ONE = torch.ones((), dtype=torch.float64)
CALLS = {
    "as it is": (Options, (), {}),
    "a number": (Options, (2,), {}),
    "a tensor for the number": (Options, (ONE,), {}),
    "more": (Options, (ONE, ONE), {}),
    "by name": (Options, (), {"scale": 3}),
    "a flag": (Options, (), {"flag": True}),
    "another name": (Options, (), {"new": 1}),
    "one tensor": (Shortcut, (), {}),
    "two tensors": (Shortcut, (images(),), {}),
    "None": (Shortcut, (None,), {}),
}


@pytest.mark.parametrize("what", CALLS)
def test_calls_with_other_arguments(what):
    """By position and by name, with and without the ones that have defaults: all of them are fused."""
    cls, args, kwargs = CALLS[what]
    converted, original = pair(cls())
    x = images()
    with same_training.ops_that_run() as ran:
        y = converted(x, *args, **kwargs)
    assert ran == {"batch_norm+add+relu" if cls is Shortcut else "batch_norm+relu": 1}
    wanted = original(x, *args, **kwargs)
    same_training.assert_near("y", y, wanted, same_training.largest(wanted))


def test_one_tensor_for_two_arguments():
    """A forward that asks whether its arguments are one object goes the way that it goes with torch."""

    class Two(Block):
        def forward(self, x, y):
            if x is y:
                return self.bn(x) * 3
            return self.relu(self.bn(x)) + y

    converted, original = pair(Two())
    x = images()
    for y, op in ((images(), "batch_norm+relu"), (x, "batch_norm")):
        with same_training.ops_that_run() as ran:
            actual = converted(x, y)
        assert ran == {op: 1}
        same_training.assert_near("y", actual, original(x, y), 10)


def test_missing_arguments():
    converted, _ = pair(Options())
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        converted()


# ------------------------------------------------------------------------------------ decided at call time


def pair(model):
    original = model.double()
    return bnfused.convert(original), original


MODELS = {
    "block": Residual,
    "sequence": lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()),
}
TARGETS = {"block": ("bn1", "relu"), "sequence": ("1", "2")}
HOOKS = {
    "forward hook": lambda module, seen: module.register_forward_hook(lambda *a: seen.append(1)),
    "forward pre-hook": lambda module, seen: module.register_forward_pre_hook(lambda *a: seen.append(1)),
    "backward hook": lambda module, seen: module.register_full_backward_hook(lambda *a: seen.append(1)),
    "backward pre-hook": lambda module, seen: module.register_full_backward_pre_hook(lambda *a: seen.append(1)),
    "hook that changes the result": lambda module, seen: module.register_forward_hook(
        lambda m, args, y: seen.append(1) or y * 2
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("target", [0, 1], ids=["batch norm", "activation"])
@pytest.mark.parametrize("kind", MODELS)
def test_hooks_are_called(kind, target, hook):
    """A hook on any module that would be fused sees its calls."""
    converted, original = pair(MODELS[kind]())
    seen: dict[int, list[int]] = {0: [], 1: []}
    handles = []
    for which, model in enumerate((converted, original)):
        model.get_submodule(TARGETS[kind][1]).inplace = False  # torch allows no backward hook beside it
        handles.append(HOOKS[hook](model.get_submodule(TARGETS[kind][target]), seen[which]))
    if kind == "sequence":
        assert ops(converted) == {"batch_norm": 1}
        assert "has hooks" in reason(converted, "1")
    same_training.assert_same_training(converted, original, images())
    assert len(seen[0]) == len(seen[1]) > 0
    for handle in handles:
        handle.remove()
    assert ops(converted) == ops(bnfused.convert(original))


def test_global_hooks_are_called():
    converted, _ = pair(MODELS["sequence"]())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *a: seen.append(type(module)))
    try:
        converted(images())
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, bnfused.BatchNorm2d, nn.ReLU, nn.Sequential]


REPLACEMENTS = {
    "another activation": ("relu", lambda: nn.Softplus(), None),
    "a known activation": ("relu", lambda: nn.SiLU(), {"batch_norm+silu": 1, "batch_norm+add+silu": 1}),
    "an Identity for the activation": ("relu", lambda: nn.Identity(), {"batch_norm": 1, "batch_norm+add": 1}),
    "torch's batch norm": ("bn2", lambda: nn.BatchNorm2d(C), {"batch_norm+relu": 1, "torch": 1}),
    "an Identity for the batch norm": ("bn2", lambda: nn.Identity(), {"batch_norm+relu": 1}),
    "another module for the batch norm": ("bn2", Doubling, {"batch_norm+relu": 1}),
    "instance norm": ("bn1", lambda: nn.InstanceNorm2d(C), {"batch_norm+add+relu": 1}),
    "a downsample path": ("downsample", lambda: nn.Conv2d(C, C, 1), None),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_replaced_modules(what):
    """What is found at the call counts, not what was there at conversion."""
    name, make, wanted = REPLACEMENTS[what]
    converted, original = pair(Residual())
    new = make().double()
    setattr(converted, name, copy.deepcopy(new))
    setattr(original, name, copy.deepcopy(new))
    if wanted is not None:
        assert ops(converted) == wanted
    same_training.assert_same_training(converted, original, images())


def test_a_child_taken_out():
    """A block that asks for it goes another way."""
    converted, original = pair(Residual(downsample=True))
    for model in (converted, original):
        model.downsample = None
    same_training.assert_same_training(converted, original, images())


@pytest.mark.parametrize("name", ["conv2", "relu"])
def test_a_child_replaced_while_its_block_runs(name):
    """As a module does that makes its neighbour at the first call: each child is looked up where it is called."""
    converted, original = pair(Residual())
    for model in (converted, original):

        def replace(*_, model=model):
            setattr(model, name, Doubling().double())

        model.bn1.register_forward_pre_hook(replace)
    same_training.assert_same_training(converted, original, images())


@pytest.mark.parametrize("name", ["conv2", "relu"])
@pytest.mark.parametrize("place", ["the module", "its class", "the class behind it"])
def test_a_child_hidden_by_an_attribute(monkeypatch, place, name):
    """Python finds a child only where neither the module nor a class has an attribute of that name."""

    class Derived(Residual):
        pass

    converted, original = pair(Derived())
    if place == "the module":
        for model in (converted, original):
            vars(model)[name] = torch.tanh
    else:
        cls = Derived if place == "its class" else Residual
        monkeypatch.setattr(cls, name, staticmethod(torch.tanh), raising=False)
    same_training.assert_same_outputs(converted, original, images())


@pytest.mark.parametrize("method", ["__getattr__", "__getattribute__"])
def test_a_class_that_learns_to_look_attributes_up(monkeypatch, method):
    converted, original = pair(Residual())
    usual = getattr(nn.Module, method)

    def other(self, name):
        return self._modules["conv1"] if name == "conv2" else usual(self, name)

    monkeypatch.setattr(Residual, method, other, raising=False)
    same_training.assert_same_outputs(converted, original, images())


def test_overwritten_result_that_is_not_new():
    """out += identity where out is the result of a module that returns its input."""
    converted, original = pair(block(in_place_on_the_other_one))
    for model in (converted, original):
        model.bn = nn.Identity()
    x = images()
    outputs = []
    for model in (converted, original):
        mine = x.clone()
        outputs.append((model(mine).detach(), mine))
    for actual, wanted in zip(*outputs, strict=True):
        same_training.assert_near("y and x", actual, wanted, same_training.largest(wanted))


class DoublingInPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_moved_call_of_an_identity_that_is_none_any_more():
    """The batch norm reads its input before that changes."""
    converted, original = pair(block(identity_of_its_input))
    for model in (converted, original):
        model.drop = DoublingInPlace()
    same_training.assert_same_outputs(converted, original, images())


def test_an_activation_before_the_add():
    """Where an Identity was: relu(bn(x)) + x is no fused op."""
    converted, original = pair(block(reflected))
    for model in (converted, original):
        model.drop = nn.ReLU()
    same_training.assert_same_training(converted, original, images())


def test_changed_attributes():
    converted, original = pair(InvertedResidual())
    for model in (converted, original):
        model.use_add = False
    assert reason(converted, "conv.3") == "nothing follows it in its module"
    same_training.assert_same_training(converted, original, images())
    for model in (converted.train(), original.train()):
        model.use_add = True
    assert ops(converted) == {"batch_norm+relu6": 1, "batch_norm+add": 1}
    same_training.assert_same_training(converted, original, images())


def test_method_given_to_the_instance():
    class TwoStage(Block):
        def features(self, x):
            return self.relu(self.bn(x))

        def forward(self, x):
            return self.features(x) * 2

    converted, original = pair(TwoStage())
    assert ops(converted) == {"batch_norm+relu": 1, "batch_norm": 1}
    for model in (converted, original):
        model.features = lambda x, model=model: model.bn(x)
    same_training.assert_same_training(converted, original, images())


def one_relu_twice(self, x):
    return self.other_relu(self.bn(self.relu(x)))


def test_shared_children_that_are_shared_no_more():
    """Each is looked up by its own name."""
    model = block(one_relu_twice)
    model.other_relu = model.relu
    converted, original = pair(model)
    assert ops(converted) == {"batch_norm+relu": 1, "batch_norm": 1}
    for other in (converted, original):
        other.other_relu = nn.Tanh()
    same_training.assert_same_training(converted, original, images())


def by_truth_of_a_child(self, x):
    return self.relu(self.bn(x)) if self.drop else self.bn(x)


def test_a_child_that_becomes_false():
    """An empty Sequential has the length 0."""
    converted, original = pair(block(by_truth_of_a_child))
    assert ops(converted) == {"batch_norm+relu": 1, "batch_norm": 1}
    for model in (converted, original):
        model.drop = nn.Sequential()
    same_training.assert_same_training(converted, original, images())


def by_settings(self, x):
    return self.relu(self.bn(x)) if Settings.on and switched.on else self.bn(x)


@pytest.mark.parametrize("place", [Settings, switched])
def test_changed_setting(monkeypatch, place):
    """An attribute of a class or a function that forward names."""
    converted, original = pair(block(by_settings))
    assert ops(converted) == {"batch_norm+relu": 1, "batch_norm": 1}
    monkeypatch.setattr(place, "on", False)
    same_training.assert_same_training(converted, original, images())


def test_forward_behind_super_changed(monkeypatch):
    class Child(Residual):
        def forward(self, x):
            return torch.relu(super().forward(x))

    converted, original = pair(Child())
    monkeypatch.setattr(Residual, "forward", lambda self, x: self.bn1(x) * -3)
    same_training.assert_same_training(converted, original, images())


def test_a_shape_is_read_where_it_stands():
    def shape_before(self, x):
        x = x * 1
        shape = x.shape
        x.unsqueeze_(0)
        return self.relu(self.bn(x.squeeze(0))).view(shape)

    converted, original = pair(block(shape_before))
    assert ops(converted) == {"batch_norm+relu": 1, "batch_norm": 1}
    same_training.assert_same_training(converted, original, images())


class Keyed(nn.Module):
    def forward(self, x):
        return {0: x, 1: 2 * x}


def test_unpacking_is_pythons():
    """The keys of a dict, and an error where the number is not that of the names."""

    class Unpacking(Block):
        def forward(self, x):
            first, second = self.drop(x)
            return self.relu(self.bn(x)) + first + second

    converted, original = pair(Unpacking())
    assert ops(converted) == {"batch_norm+relu": 1, "batch_norm": 1}
    with pytest.raises(ValueError, match="too many values to unpack"):
        converted(images())
    for model in (converted, original):
        model.drop = Keyed()
    same_training.assert_same_training(converted, original, images())


class OwnTensor(Tensor):
    pass


def by_tensor_class(self, x):
    return self.bn(x) if isinstance(x, OwnTensor) else self.relu(self.bn(x))


def test_a_subclass_of_tensor_that_forward_may_ask_for():
    converted, original = pair(block(by_tensor_class))
    same_training.assert_same_outputs(converted.eval(), original.eval(), images().as_subclass(OwnTensor))
    assert runs(converted, images()) == {"batch_norm+relu": 1}


def added_to_another_layout(self, x):
    return self.relu(x + self.bn(self.conv(x)))


def written_into_another_layout(self, x):
    y = self.other(x)
    y += self.bn(self.conv(x))
    return self.relu(y)


@pytest.mark.parametrize("forward", [added_to_another_layout, written_into_another_layout])
def test_strides_of_a_sum(forward):
    """A convolution in channels_last, and a residual that is not: the sum has the strides of what stands first."""
    converted, original = pair(block(forward).to(memory_format=torch.channels_last))
    x = images()
    assert converted(x).stride() == original(x).stride()
    same_training.assert_same_training(converted, original, x)


def added_to_a_slice(self, x):
    half, _ = torch.cat([x, x + 1], 1).split(C, 1)
    return self.relu(self.bn(x) + half)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_residual_that_is_a_slice(memory_format):
    """Its strides are others, their order the same."""
    converted, original = pair(block(added_to_a_slice))
    x = images().contiguous(memory_format=memory_format)
    assert runs(converted, x) == {"batch_norm+add+relu": 1}
    assert converted(x).stride() == original(x).stride()
    same_training.assert_same_training(converted, original, x)


class Calling(nn.BatchNorm2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class CallingSequence(nn.Sequential):
    def __call__(self, x):
        return 2 * super().__call__(x) - 1


@pytest.mark.parametrize("make", [lambda: Calling(C), lambda: CallingSequence(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))])
def test_a_call_that_is_more_than_forward(make):
    converted = check(nn.Sequential(make(), nn.ReLU()), {"batch_norm": 1})
    if isinstance(converted[0], Calling):
        assert "a __call__ of its own" in reason(converted, "0")


def test_a_scripted_child():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).double().eval())
    model = nn.Sequential(scripted, nn.BatchNorm2d(C).double(), nn.ReLU()).eval()
    converted = bnfused.convert(model)
    assert ops(converted) == {"batch_norm+relu": 1}
    same_training.assert_same_outputs(converted, model, images())


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()), Residual])
def test_scripting_says_what_to_script(make):
    """torch.jit.script takes no converted forward; the message says so, and the network is as it was."""
    network = bnfused.convert(nn.Sequential(make()))
    report = bnfused.fusion_report(network)
    with pytest.raises(AttributeError, match=r"bnfused\.revert"):
        torch.jit.script(network)
    assert bnfused.fusion_report(network) == report


def test_a_sequence_with_nothing_in_a_place():
    """It cannot be called, and the model around it can be converted."""
    sequence = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    sequence.add_module("nothing", None)
    assert ops(bnfused.convert(nn.ModuleList([sequence]))) == {"batch_norm": 1}


FLAG = True


def by_flag(self, x):
    return self.relu(self.bn(x)) if FLAG else self.bn(x)


def test_changed_global(monkeypatch):
    converted, original = pair(block(by_flag))
    assert ops(converted) == {"batch_norm+relu": 1, "batch_norm": 1}
    monkeypatch.setattr(sys.modules[__name__], "FLAG", False)
    same_training.assert_same_training(converted, original, images())


def test_class_given_another_forward(monkeypatch):
    converted, original = pair(Residual())
    monkeypatch.setattr(Residual, "forward", lambda self, x: self.bn1(x) * 3)
    same_training.assert_same_training(converted, original, images())


def test_modules_put_into_a_sequence():
    converted, original = pair(MODELS["sequence"]())
    for model in (converted, original):
        model.insert(2, nn.Conv2d(C, C, 1, dtype=torch.float64))
        model[2].weight.data.fill_(0.5)
        model[2].bias.data.fill_(0.5)
    assert ops(converted) == {"batch_norm": 1}
    same_training.assert_same_training(converted, original, images())


def test_a_forward_given_by_somebody_else_is_kept():
    """On the model before conversion, and on a child after."""
    model = Residual().double()
    model.forward = lambda x: model.bn1(x)
    converted = bnfused.convert(model, inplace=True)
    assert ops(converted) == {"batch_norm": 2}
    same_training.assert_near("y", converted(x := images()), model.bn1(x), 10)

    for make, name in ((Residual, "relu"), (lambda: block(reflected), "drop")):
        converted, original = pair(make())
        for other in (converted, original):
            other.get_submodule(name).forward = lambda x: x * 2
        same_training.assert_same_training(converted, original, images())


def test_parametrized_after_conversion():
    converted, original = pair(Residual())
    for model in (converted, original):
        nn.utils.parametrize.register_parametrization(model.bn2, "weight", Doubling())
        assert "bn2.parametrizations.weight.original" in model.state_dict()
    same_training.assert_same_training(converted, original, images())


def test_converted_to_sync_batch_norm():
    """torch's own conversion of the converted model: its batch norms are SyncBatchNorm, and nothing is lost."""
    converted, original = pair(Residual())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(converted)
    assert type(synced.bn2) is nn.SyncBatchNorm
    assert ops(synced) == {"torch": 2}
    same_training.assert_same_training(synced, original, images())
    again = bnfused.convert(synced)
    assert ops(again) == {"sync_batch_norm+relu": 1, "sync_batch_norm+add+relu": 1}
    same_training.assert_same_training(again, original, images())


def test_frozen_and_mixed_precision():
    """Frozen batch norms, and autocast, in which the residual may have another dtype."""
    converted, original = pair(Residual())
    for model in (converted, original):
        model.bn1.eval()
        model.bn2.eval().requires_grad_(False)
    same_training.assert_same_training(converted, original, images())
    model = nn.Sequential(nn.Conv2d(C, C, 1), Residual())
    converted = bnfused.convert(model)
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = converted(x), model(x)
    # A rounding of bfloat16 is 1/256 of a value up to 5, and some ten of them meet; a residual that is lost is about 1.
    torch.testing.assert_close(y, wanted, rtol=0, atol=0.2)


# --------------------------------------------------------------------------------------- copies and compilers


def networks():
    model = nn.Sequential(
        nn.Conv2d(3, C, 3),
        nn.BatchNorm2d(C),
        nn.ReLU(),
        Residual(),
        Residual(True),
        Renamed(C),
        nn.SiLU(),
        InvertedResidual(),
    )
    return pair(model)


NETWORK_OPS = {
    "batch_norm+relu": 3,
    "batch_norm+add+relu": 2,
    "batch_norm": 1,
    "batch_norm+silu": 1,
    "batch_norm+relu6": 1,
    "batch_norm+add": 1,
}


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
    "copy of a copy": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model)))),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how):
    """A copy is fused as well, computes with its own parameters, and is reverted as well."""
    converted, original = networks()
    twin = COPIES[how](converted)
    for mine, other in zip(twin.parameters(), converted.parameters(), strict=True):
        assert mine.data_ptr() != other.data_ptr()
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    x = images(2, 3, 7, 7)
    assert runs(twin, x) == NETWORK_OPS == ops(twin)
    same_training.assert_same_training(twin, original, x)
    assert [type(module) for module in bnfused.revert(twin).modules()] == [type(m) for m in original.modules()]


def test_compiled():
    """One graph, forward and backward, with the fused ops in it."""
    converted, original = networks()
    calls: Counter[str] = Counter()

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if "batch_norm" in str(node.target):
                calls[str(node.target)] += 1
        return graph

    torch._dynamo.reset()
    try:
        compiled = torch.compile(converted, fullgraph=True, backend=backend)
        x = images(2, 3, 7, 7)
        loss, gradients = same_training.loss_and_gradients(compiled, x, 0)
        wanted_loss, wanted = same_training.loss_and_gradients(original, x, 0)
        same_training.assert_near("loss", loss, wanted_loss, same_training.largest(wanted_loss))
        for name, gradient in wanted.items():
            same_training.assert_near(
                name, gradients[f"_orig_mod.{name}"], gradient, max(1.0, same_training.largest(gradient))
            )
        assert calls == {"bnfused.batch_norm_train.default": sum(NETWORK_OPS.values())}
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    converted, original = networks()
    x = images(2, 3, 7, 7)
    program = torch.export.export(converted.eval(), (x,), strict=strict)
    nodes = [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert len(nodes) == sum(NETWORK_OPS.values())
    assert not [node for node in program.graph.nodes if "relu" in str(node.target)]
    same_training.assert_same_outputs(program.module(), original.eval(), x)


def test_distributed_data_parallel(tmp_path):
    """DDP around a converted model, and a conversion of a model in DDP."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for convert_first in (True, False):
            converted, original = networks()
            if convert_first:
                ddp = nn.parallel.DistributedDataParallel(converted)
            else:
                ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(original))
                bnfused.convert(ddp, inplace=True)
            assert ops(ddp) == NETWORK_OPS
            x = images(2, 3, 7, 7)
            assert_same_in_ddp(ddp, original, x)
    finally:
        torch.distributed.destroy_process_group()


def assert_same_in_ddp(ddp, original, x):
    loss, gradients = same_training.step(ddp, x, 0)
    wanted_loss, wanted = same_training.step(original, x, 0)
    same_training.assert_near("loss", loss, wanted_loss, same_training.largest(wanted_loss))
    for name, gradient in wanted.items():
        same_training.assert_near(
            name, gradients[f"module.{name}"], gradient, max(1.0, same_training.largest(gradient))
        )


def test_transforms():
    """torch.func through a converted model."""
    converted, original = networks()
    x = images(2, 3, 7, 7)
    results = []
    for model in (converted.eval(), original.eval()):
        state = {name: value.detach() for name, value in model.named_parameters()}

        def loss(parameters, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().mean()

        results.append(torch.func.grad(loss)(state))
    for name, gradient in results[1].items():
        same_training.assert_near(name, results[0][name], gradient, max(1.0, same_training.largest(gradient)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced():
    """By torch.jit and torch.fx, which see the classes' own forwards or the fused ops."""
    converted, original = networks()
    converted.eval()
    x = images(2, 3, 7, 7)
    for traced in (torch.jit.trace(converted, (x,)), torch.fx.symbolic_trace(converted)):
        same_training.assert_same_outputs(traced, original.eval(), x)


def test_graph_of_fx_has_every_module():
    """With what each of them computes: tools ask for it by name, as torchvision's create_feature_extractor does."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()), Residual(downsample=True))
    graphs = [torch.fx.symbolic_trace(network).graph for network in (bnfused.convert(model), model)]
    nodes = [[(node.op, node.target, str(node.args), node.kwargs) for node in graph.nodes] for graph in graphs]
    assert nodes[0] == nodes[1]


def test_gradient_of_a_gradient():
    converted, original = networks()
    x = images(2, 3, 7, 7)
    penalties = []
    for model in (converted, original):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(leaf.grad)
    same_training.assert_near("penalty", penalties[0], penalties[1], same_training.largest(penalties[1]))


def test_errors_have_lines():
    """A traceback shows the user's own file and line."""
    converted, _ = pair(Residual())
    with pytest.raises(RuntimeError) as raised:
        converted(images(2, C + 1, 3, 3))
    (entry,) = [entry for entry in raised.traceback if "self.conv1(" in str(entry.statement)]
    assert str(entry.path) == __file__


def test_signature_is_the_class_one():
    import inspect

    converted, original = pair(Residual())
    assert inspect.signature(converted.forward) == inspect.signature(original.forward)


# ------------------------------------------------------------------------------------------------- the report


def test_report():
    converted, original = networks()
    report = bnfused.fusion_report(converted)
    assert report.counts == NETWORK_OPS
    assert [entry.name for entry in report.entries] == [
        name for name, module in original.named_modules() if isinstance(module, nn.BatchNorm2d)
    ]
    text = str(report)
    assert text.splitlines()[0].split() == ["1", "batch_norm+relu"]
    assert text.splitlines()[-1] == (
        "9 batch norms: 3 batch_norm+relu, 2 batch_norm+add+relu, 1 batch_norm, 1 batch_norm+silu, "
        "1 batch_norm+relu6, 1 batch_norm+add"
    )
    unconverted = bnfused.fusion_report(original)
    assert unconverted.counts == {"torch": 9}
    assert {entry.reason for entry in unconverted.entries} == {"not converted"}
    assert str(bnfused.fusion_report(nn.ReLU())) == "0 batch norms: none"


def test_report_changes_nothing():
    converted, original = networks()
    state = copy.deepcopy(converted.state_dict())
    generator = torch.get_rng_state()
    bnfused.fusion_report(converted)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in converted.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_batch_norm_that_nobody_calls():
    class Unused(Block):
        def forward(self, x):
            return self.relu(self.bn(x))

    converted = bnfused.convert(Unused())
    assert reason(converted, "other") == "no forward that could be rewritten calls it"


def test_conversion_runs_no_module():
    """Conversion calls no child, so that nothing is counted, drawn or updated."""

    class Loud(nn.Module):
        def forward(self, x):
            raise AssertionError("was called")

    class Calls(Block):
        def __init__(self):
            super().__init__()
            self.loud = Loud()

        def forward(self, x):
            return self.relu(self.bn(self.loud(x)))

    assert ops(bnfused.convert(Calls())) == {"batch_norm+relu": 1, "batch_norm": 1}


@pytest.mark.parametrize(
    "profiler", [cProfile.Profile, lambda: torch.profiler.profile(with_stack=True)], ids=["cProfile", "torch.profiler"]
)
def test_conversion_beside_a_profiler(profiler):
    """It goes on: one written in C could not be put back with sys.setprofile."""
    model = nn.Sequential(Residual(), Residual())
    with profiler():
        before = sys.getprofile()
        converted = bnfused.convert(model)
        assert sys.getprofile() is before
    with same_training.ops_that_run() as ran:
        converted(torch.randn(2, C, 5, 5))
    assert ran == bnfused.fusion_report(converted).counts == {"batch_norm+relu": 2, "batch_norm+add+relu": 2}


def test_partial_is_kept():
    """An attribute that is a function of torch is fused as one; what a partial computes is not known."""

    class Chosen(Block):
        def __init__(self, activation):
            super().__init__()
            self.activation = activation

        def forward(self, x):
            return self.activation(self.bn(x))

    assert ops(bnfused.convert(Chosen(F.relu))) == {"batch_norm+relu": 1, "batch_norm": 1}
    assert ops(bnfused.convert(Chosen(functools.partial(F.leaky_relu, negative_slope=0.2)))) == {"batch_norm": 2}
