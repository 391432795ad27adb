"""The modules beside torch.nn's: same state, same behaviour, same errors, in every mode and with every option."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import bnfused
from support import cases, checks, oracle

PAIRS = {
    "1d": (bnfused.BatchNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    "1d rows": (bnfused.BatchNorm1d, nn.BatchNorm1d, (9, 4)),
    "2d": (bnfused.BatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 2)),
    "3d": (bnfused.BatchNorm3d, nn.BatchNorm3d, (3, 4, 2, 5, 2)),
}
LAZY = {
    "1d": (bnfused.LazyBatchNorm1d, bnfused.BatchNorm1d, nn.LazyBatchNorm1d, (6, 4, 5)),
    "2d": (bnfused.LazyBatchNorm2d, bnfused.BatchNorm2d, nn.LazyBatchNorm2d, (3, 4, 5, 2)),
    "3d": (bnfused.LazyBatchNorm3d, bnfused.BatchNorm3d, nn.LazyBatchNorm3d, (3, 4, 2, 5, 2)),
}
OPTIONS = {
    "default": {},
    "eps and momentum": {"eps": 1e-3, "momentum": 0.4},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    # An argument that torch 2.11 does not have.
    **({"no bias": {"bias": False}} if "bias" in inspect.signature(nn.BatchNorm2d).parameters else {}),
    "no statistics": {"track_running_stats": False},
    "no statistics, cumulative": {"track_running_stats": False, "momentum": None},
    "neither": {"affine": False, "track_running_stats": False},
    "float64": {"dtype": torch.float64},
}


def twins(kind, **options):
    """Ours and torch's with the same random state."""
    ours, theirs, shape = PAIRS[kind]
    pair = ours(4, **options), theirs(4, **options)
    with torch.no_grad():
        for parameter in pair[1].parameters():
            parameter.normal_()
        if pair[1].running_var is not None:
            pair[1].running_mean.normal_()
            pair[1].running_var.uniform_(0.5, 2)
    pair[0].load_state_dict(pair[1].state_dict())
    return *pair, shape


def close(actual, wanted, what=""):
    """Two implementations: twice what each may be off."""
    checks.assert_alike(what, actual, wanted, 2)


def same_state(ours, theirs):
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(wanted)
    for name, value in wanted.items():
        close(state[name], value, name)


def both_step(ours, theirs, x, upstream=None):
    """Forward and backward of both; values, input gradients, parameter gradients and buffers agree."""
    results = []
    for module in (ours, theirs):
        module.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        y.backward(torch.ones_like(y) if upstream is None else upstream)
        results.append((y, leaf.grad))
    close(results[0][0], results[1][0], "y")
    close(results[0][1], results[1][1], "grad_x")
    for (name, mine), (_, yours) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        close(mine.grad, yours.grad, name)
    same_state(ours, theirs)


# ---------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", PAIRS)
def test_trains_and_evaluates_like_torch(kind, options):
    """Three training steps, an eval step with gradients, training again."""
    ours, theirs, shape = twins(kind, **OPTIONS[options])
    dtype = OPTIONS[options].get("dtype", torch.float32)
    for mode in (True, True, True, False, True):
        ours.train(mode)
        theirs.train(mode)
        x = (torch.randn(shape) * 2 + 1).to(dtype)
        both_step(ours, theirs, x, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("kind", PAIRS)
def test_fused_call(kind):
    """residual, activation and activation_param, by position and by keyword, are the separate operations."""
    ours, theirs, shape = twins(kind)
    x, residual = torch.randn(shape), torch.randn(shape)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    wanted = nn.functional.leaky_relu(theirs(x) + residual, 0.3)
    close(ours(x, residual, "leaky_relu", 0.3), wanted)
    ours.load_state_dict(state)
    keywords = {"residual": residual, "activation": "leaky_relu", "activation_param": 0.3}
    close(ours(x, **keywords), wanted)
    same_state(ours, theirs)


def test_fusion_is_not_stored():
    """The next call is a plain one again."""
    ours, theirs, shape = twins("2d")
    x = torch.randn(shape)
    ours.eval()
    theirs.eval()
    plain = ours(x)
    ours(x, torch.randn(shape), "relu")
    assert checks.same_bits(ours(x), plain)
    assert set(vars(ours)) == set(vars(theirs))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_outermost"])
def test_layout_is_kept(layout):
    """y lies in memory as x does, in training and in eval."""
    ours, _, shape = twins("2d")
    x = cases.LAYOUTS[layout](torch.randn(shape))
    for mode in (True, False):
        assert ours.train(mode)(x).stride() == x.stride()


def test_called_twice_before_backward():
    """Trap: statistics saved on the module, so that the first call's gradient uses the second's."""
    ours, theirs, shape = twins("2d")
    a, b = torch.randn(shape), torch.randn(shape) * 5 + 3
    grads = []
    for module in (ours, theirs):
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        ya, yb = (module(leaf) for leaf in leaves)
        (ya * yb).sum().backward()
        grads.append([leaves[0].grad, leaves[1].grad, module.weight.grad, module.bias.grad])
    for mine, yours in zip(*grads, strict=True):
        close(mine, yours)
    same_state(ours, theirs)


def test_weight_shared_by_two_modules():
    """One Parameter in two modules collects both gradients."""
    grads = []
    x = torch.randn(5, 4)
    for kind in (bnfused.BatchNorm1d, nn.BatchNorm1d):
        torch.manual_seed(7)
        first, second = kind(4), kind(4)
        second.weight = first.weight
        with torch.no_grad():
            first.weight.normal_()
        second(first(x).tanh()).square().sum().backward()
        grads.append([first.weight.grad, first.bias.grad, second.bias.grad])
    for mine, yours in zip(*grads, strict=True):
        close(mine, yours)


def test_track_running_stats_toggled():
    """Turning tracking off after construction leaves the buffers alone in training, and uses them in eval."""
    ours, theirs, shape = twins("2d")
    for module in (ours, theirs):
        module.track_running_stats = False
    both_step(ours, theirs, torch.randn(shape))
    ours.eval()
    theirs.eval()
    both_step(ours, theirs, torch.randn(shape))
    assert int(ours.num_batches_tracked) == 0


def test_buffers_set_to_none():
    """running_mean = running_var = None makes eval use the batch, as in torch."""
    ours, theirs, shape = twins("2d")
    for module in (ours, theirs):
        module.running_mean = module.running_var = module.num_batches_tracked = None
        module.eval()
    both_step(ours, theirs, torch.randn(shape))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_counter_set_to_none(momentum):
    """num_batches_tracked = None: statistics still move with momentum, and not at all without one."""
    ours, theirs, shape = twins("2d", momentum=momentum)
    for module in (ours, theirs):
        module.num_batches_tracked = None
    both_step(ours, theirs, torch.randn(shape))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_counter_of_another_dtype(dtype, momentum):
    """``Module.type()`` casts every buffer, the counter too; ``load_state_dict(assign=True)`` takes what there is."""
    ours, theirs, shape = twins("2d", momentum=momentum)
    for module in (ours, theirs):
        if dtype.is_floating_point:
            module.type(dtype)
        else:
            module.num_batches_tracked = module.num_batches_tracked.to(dtype)
    for _ in range(2):
        both_step(ours, theirs, torch.randn(shape, dtype=ours.weight.dtype))
    assert ours.num_batches_tracked.dtype == dtype
    assert ours.num_batches_tracked == 2


def test_buffers_are_written_in_place():
    """Trap: ``.data =`` or rebound buffers, which CUDA graphs, DDP and views of the state would not see."""
    ours, _, shape = twins("2d")
    before = {name: (buffer, buffer.data_ptr()) for name, buffer in ours.named_buffers()}
    view = ours.state_dict()["running_mean"]
    ours(torch.randn(shape))
    for name, buffer in ours.named_buffers():
        assert buffer is before[name][0]
        assert buffer.data_ptr() == before[name][1]
    assert torch.equal(view, ours.running_mean)


def test_frozen_parameters():
    """requires_grad_(False) on weight and bias, as fine-tuning does: x still gets its gradient, they get none."""
    ours, theirs, shape = twins("2d")
    for module in (ours, theirs):
        module.eval().requires_grad_(False)
    x = torch.randn(shape)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((ours, theirs), leaves, strict=True):
        module(leaf).square().sum().backward()
        assert module.weight.grad is None
    close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True], ids=["float32 module", "16-bit module"])
def test_16_bit_input(dtype, whole):
    """16-bit activations through a float32 module (mixed precision), and through module.to(dtype)."""
    ours, _, shape = twins("2d")
    if whole:
        ours.to(dtype)
    p = cases.make(shape, dtype=dtype)
    p = p.but(
        weight=ours.weight,
        bias=ours.bias,
        running_mean=ours.running_mean.clone(),
        running_var=ours.running_var.clone(),
        num_batches_tracked=None,
    )
    truth = oracle.expected(p)
    y = ours(p.x)
    assert y.dtype == dtype
    checks.assert_within("y", y, truth.values["y"], cases.limit(truth.values["y"], truth.scales["y"], dtype))
    wanted = truth.values["running_var"]
    checks.assert_within(
        "running_var",
        ours.running_var,
        wanted,
        cases.limit(wanted, wanted.abs(), ours.running_var.dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Under autocast batch norm keeps the dtype of its input, as torch's does, with float32 parameters."""
    ours, theirs, shape = twins("2d")
    conv = nn.Conv2d(4, 4, 1)
    x = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        mine, yours = ours(x), theirs(x)
        assert mine.dtype == yours.dtype == dtype
        through = ours(conv(x.float()), activation="relu")
        assert through.dtype == torch.bfloat16
        through.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert ours.weight.grad.dtype == torch.float32
    close(mine, yours)


@pytest.mark.parametrize("shape", [(0, 4, 5, 2), (3, 4, 0, 2)])
def test_empty_batch(shape):
    """Counted, and nothing else; zero gradients."""
    ours, theirs, _ = twins("2d")
    both_step(ours, theirs, torch.randn(shape))
    assert int(ours.num_batches_tracked) == 1


# ------------------------------------------------------------------------------------------- errors


WRONG = {
    "rank too low": ("2d", lambda: torch.randn(3, 4, 5)),
    "rank too high": ("2d", lambda: torch.randn(3, 4, 5, 2, 2)),
    "rank of 1d": ("1d", lambda: torch.randn(3, 4, 5, 2)),
    "rank of 3d": ("3d", lambda: torch.randn(3, 4, 5, 2)),
    "channels": ("2d", lambda: torch.randn(3, 5, 5, 2)),
    "one value per channel": ("2d", lambda: torch.randn(1, 4, 1, 1)),
    "one row": ("1d rows", lambda: torch.randn(1, 4)),
    "integers": ("2d", lambda: torch.ones(3, 4, 5, 2, dtype=torch.long)),
    "float64 into float32": ("2d", lambda: torch.randn(3, 4, 5, 2).double()),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_of_torch(what):
    """What torch's module refuses, ours does with the same kind of exception; and changes no buffer."""
    kind, make = WRONG[what]
    ours, theirs, _ = twins(kind)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x = make()
    with pytest.raises((RuntimeError, ValueError, TypeError)) as wanted:
        theirs(x)
    kinds = RuntimeError if isinstance(wanted.value, NotImplementedError) else type(wanted.value)
    with pytest.raises(kinds) as raised:
        ours(x)
    if isinstance(wanted.value, ValueError):
        assert str(raised.value) == str(wanted.value)
    for name, value in ours.state_dict().items():
        assert checks.same_bits(value, before[name]), name


def test_residual_of_another_shape_is_refused():
    """A residual that torch's add would broadcast is a mistake here."""
    ours, _, shape = twins("2d")
    with pytest.raises(RuntimeError, match="residual"):
        ours(torch.randn(shape), residual=torch.randn(1, 4, 1, 1))
    assert int(ours.num_batches_tracked) == 0


# ----------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", PAIRS)
def test_is_torchs_module(kind, options):
    """isinstance, constructor, repr, parameters, buffers, version: nothing that a tool could trip over."""
    ours, theirs, _ = twins(kind, **OPTIONS[options])
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert ours._version == theirs._version
    assert set(vars(ours)) == set(vars(theirs))


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_both_ways(options):
    """Ours into torch's and torch's into ours, strictly, through weights_only loading."""
    ours, theirs, shape = twins("2d", **OPTIONS[options])
    x = torch.randn(shape).to(OPTIONS[options].get("dtype", torch.float32))
    ours(x)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    same_state(ours, theirs)
    fresh = bnfused.BatchNorm2d(4, **OPTIONS[options])
    assert not fresh.load_state_dict(theirs.state_dict(), strict=True).missing_keys
    same_state(fresh, theirs)
    assert ours.state_dict()._metadata[""]["version"] == 2


def test_old_state_dict():
    """A version-1 dict has no num_batches_tracked; it loads, and the counter keeps its value."""
    ours, theirs, shape = twins("2d")
    for module in (ours, theirs):
        module(torch.randn(shape))
        old = module.state_dict()
        del old["num_batches_tracked"]
        old._metadata[""]["version"] = 1
        module.load_state_dict(old, strict=True)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked)
    del old["running_var"]
    with pytest.raises(RuntimeError, match="running_var"):
        ours.load_state_dict(old, strict=True)


def test_old_pickles():
    """Modules that were pickled when ``bnfused.sync`` was one file: the same classes, settings, state and output.

    Made with ``pickle.dumps({"modules": Sequential(BatchNorm2d(3), SyncBatchNorm(3, momentum=None, check_ranks=False),
    LazyBatchNorm2d()), "input": x, "output": y})``, where y is what the first two make of x in eval.
    """
    file = Path(__file__).parents[1] / "data" / "modules_before_sync_was_a_package.pickle"
    old = pickle.loads(file.read_bytes())
    plain, sync, lazy = old["modules"]
    assert (type(plain), type(sync), type(lazy)) == (
        bnfused.BatchNorm2d,
        bnfused.SyncBatchNorm,
        bnfused.LazyBatchNorm2d,
    )
    assert (sync.momentum, sync.process_group, sync.check_ranks) == (None, None, False)
    assert int(plain.num_batches_tracked) == int(sync.num_batches_tracked) == 1
    torch.testing.assert_close(sync(plain(old["input"])), old["output"])
    lazy(old["input"])
    assert type(lazy) is bnfused.BatchNorm2d


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("kind", PAIRS)
def test_copies(kind, how):
    """A copy has the class, the state and a life of its own."""
    ours, _, shape = twins(kind)
    ours(torch.randn(shape))
    if how == "deepcopy":
        twin = copy.deepcopy(ours)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(ours)
    x = torch.randn(shape)
    assert checks.same_bits(twin(x), ours(x))
    twin(x)
    assert int(twin.num_batches_tracked) == int(ours.num_batches_tracked) + 1


def test_convert_sync_batchnorm_sees_a_batch_norm():
    """torch's own conversion takes ours for the batch norm it is, and loses nothing by it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bnfused.BatchNorm2d(4, eps=1e-3))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], nn.SyncBatchNorm)
    assert converted[1].eps == 1e-3


def test_hooks():
    """Forward hooks and pre-hooks see the call, keyword arguments included."""
    ours, _, shape = twins("2d")
    seen = []
    ours.register_forward_pre_hook(lambda m, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
    ours.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    ours(torch.randn(shape), activation="relu")
    assert seen == [["activation"], torch.Size(shape)]


# --------------------------------------------------------------------------------------------- lazy


@pytest.mark.parametrize("options", [o for o in OPTIONS if o != "float64"])
@pytest.mark.parametrize("kind", LAZY)
def test_lazy(kind, options):
    """The first call reads the channels off x and turns the module into the plain one, equal to torch's."""
    lazy, plain, theirs, shape = LAZY[kind]
    ours, theirs = lazy(**OPTIONS[options]), theirs(**OPTIONS[options])
    assert type(ours) is lazy
    x = torch.randn(shape)
    close(ours(x), theirs(x))
    assert type(ours) is plain
    assert ours.num_features == theirs.num_features
    assert repr(ours) == repr(theirs)
    same_state(ours, theirs)
    both_step(ours, theirs, torch.randn(shape))


@pytest.mark.parametrize("by", ["position", "keyword"])
def test_lazy_first_call_with_residual(by):
    """The first call may be a fused one."""
    ours = bnfused.LazyBatchNorm2d()
    x, residual = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    y = ours(x, residual, "relu") if by == "position" else ours(x, residual=residual, activation="relu")
    close(y, torch.relu(nn.BatchNorm2d(4)(x) + residual))
    assert type(ours) is bnfused.BatchNorm2d


def test_lazy_state_dict():
    """An initialised state loads into a lazy module, and a lazy one says what it lacks."""
    ours, theirs, shape = twins("2d")
    lazy = bnfused.LazyBatchNorm2d()
    lazy.load_state_dict(theirs.state_dict())
    lazy.eval()
    theirs.eval()
    x = torch.randn(shape)
    close(lazy(x), theirs(x))


def test_lazy_refuses_wrong_rank_and_stays_lazy():
    """A wrong first input does not decide the number of features."""
    ours, theirs = bnfused.LazyBatchNorm2d(), nn.LazyBatchNorm2d()
    messages = []
    for module in (ours, theirs):
        with pytest.raises(ValueError, match="expected 4D input") as raised:
            module(torch.randn(3, 4, 5))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


# ----------------------------------------------------------------------------------------- training


def test_network_trains_like_torchs():
    """Five SGD steps of a small residual network: the same losses, the same state.

    In float64, where no input of a ReLU is above 0 for one and below it for the other, and five steps make 1e-12 of a
    rounding.
    """

    def network(batch_norm):
        torch.manual_seed(3)
        return nn.ModuleDict(
            {
                "stem": nn.Conv2d(3, 8, 3, padding=1),
                "first": batch_norm(8),
                "conv": nn.Conv2d(8, 8, 3, padding=1, bias=False),
                "second": batch_norm(8),
                "head": nn.Linear(8, 5),
            }
        ).double()

    def forward(net, x, fused):
        if fused:
            h = net["first"](net["stem"](x), activation="relu")
            h = net["second"](net["conv"](h), residual=h, activation="relu")
        else:
            h = net["first"](net["stem"](x)).relu()
            h = (net["second"](net["conv"](h)) + h).relu()
        return net["head"](h.mean((2, 3)))

    nets = network(bnfused.BatchNorm2d), network(nn.BatchNorm2d)
    optimisers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    for _ in range(5):
        x, target = torch.randn(6, 3, 7, 9, dtype=torch.float64), torch.randint(0, 5, (6,))
        losses = []
        for net, optimiser, fused in zip(nets, optimisers, (True, False), strict=True):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(forward(net, x, fused), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for name, value in nets[1].state_dict().items():
        assert torch.allclose(nets[0].state_dict()[name], value, rtol=1e-8, atol=1e-10), name
