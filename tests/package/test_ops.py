"""The ops behind the functional: schema, fake kernels, validation of every argument, and what they hand back."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref

import pytest
import torch

from bnfused import ops
from support import cases, checks, oracle

pytestmark = pytest.mark.usefixtures("extension")

RELU = 1
SILU = 5
NO_ACTIVATION = (0, 0.0)
ALL = (True, True, True, True)

SCHEMAS = {
    "batch_norm_train": (
        "bnfused::batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, float? momentum, float eps, "
        "int activation, float activation_param) -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)"
    ),
    "batch_norm_frozen": (
        "bnfused::batch_norm_frozen(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
        "Tensor? residual, float eps, int activation, float activation_param) "
        "-> (Tensor y, Tensor mean, Tensor invstd, Tensor mask)"
    ),
    "batch_norm_eval": (
        "bnfused::batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
        "Tensor? residual, float eps, int activation, float activation_param) -> Tensor y"
    ),
    "batch_norm_stats": "bnfused::batch_norm_stats(Tensor x) -> Tensor moments",
    "batch_norm_gather_stats": (
        "bnfused::batch_norm_gather_stats(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor(c!)? num_batches_tracked, Tensor(d!)? merged, float? momentum) -> (Tensor batch_mean, "
        "Tensor batch_var, Tensor batch_count)"
    ),
    "batch_norm_apply": (
        "bnfused::batch_norm_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? residual, "
        "float eps, int activation, float activation_param) -> (Tensor y, Tensor invstd, Tensor mask)"
    ),
    "batch_norm_backward_reduce": (
        "bnfused::batch_norm_backward_reduce(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
        "Tensor mean, Tensor invstd, Tensor? mask, int activation, float activation_param) -> Tensor sums"
    ),
    "batch_norm_backward_apply": (
        "bnfused::batch_norm_backward_apply(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
        "Tensor mean, Tensor invstd, Tensor? mask, Tensor sums, Tensor count, int activation, "
        "float activation_param, bool[2] output_mask) -> (Tensor grad_x, Tensor grad_residual)"
    ),
    "batch_norm_backward": (
        "bnfused::batch_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
        "Tensor mean, Tensor invstd, Tensor? mask, int activation, float activation_param, bool training, "
        "bool[4] output_mask) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
    ),
}


def op(name):
    return getattr(torch.ops.bnfused, name).default


def train_args(p, activation=NO_ACTIVATION):
    return (
        p.x,
        p.weight,
        p.bias,
        p.running_mean,
        p.running_var,
        p.num_batches_tracked,
        p.residual,
        p.momentum,
        p.eps,
        *activation,
    )


def eval_args(p, activation=NO_ACTIVATION):
    return (p.x, p.weight, p.bias, p.running_mean, p.running_var, p.residual, p.eps, *activation)


def backward_args(p, activation=NO_ACTIVATION, output_mask=ALL):
    """The arguments that a training forward leads to."""
    _, mean, invstd, mask = op("batch_norm_train")(*train_args(p, activation))
    return (p.grad_y, p.x, p.weight, p.bias, p.residual, mean, invstd, mask, *activation, True, output_mask)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    """The text is the contract: which arguments may be None and which three are written to."""
    assert str(op(name)._schema) == SCHEMAS[name]


ARGUMENTS = {
    "batch_norm_train": train_args,
    "batch_norm_frozen": eval_args,
    "batch_norm_eval": eval_args,
    "batch_norm_backward": backward_args,
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual-relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "holes_in_last"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name, layout, fused, grad):
    """torch.library.opcheck: declared mutation, fake kernel (strides too), autograd registration, AOT dispatch.

    opcheck passes an op without an autograd kernel with a mere warning; here that is an error.
    """
    p = cases.make((3, 4, 2, 5), layout=layout, residual=fused)
    if grad and name == "batch_norm_backward":
        leaves = p.but(x=p.x.detach().requires_grad_())
        with pytest.raises(RuntimeError, match="batch_norm_backward: expected inputs that do not require grad"):
            op(name)(*backward_args(leaves))
        return
    if grad:
        leaves = {n: getattr(p, n).detach().requires_grad_() for n in checks.LEAVES if getattr(p, n) is not None}
        p = p.but(**leaves)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered")
        torch.library.opcheck(op(name), ARGUMENTS[name](p, (RELU if fused else 0, 0.0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_dtypes(name, dtype):
    """The dtypes that the fake kernels promise, with parameters of another dtype than x's."""
    p = cases.make((3, 4, 2, 5), dtype=dtype, layout="channels_last", residual=True)
    torch.library.opcheck(op(name), ARGUMENTS[name](p, (SILU, 0.0)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_with_everything_absent(name):
    """Every optional argument None, every gradient refused."""
    p = cases.make((3, 4, 2), weight=False, bias=False, counter=None)
    if name == "batch_norm_train":
        p = p.but(running_mean=None, running_var=None)
    args = ARGUMENTS[name](p)
    if name == "batch_norm_backward":
        args = (*args[:7], None, *args[8:-1], (False,) * 4)
    torch.library.opcheck(op(name), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("rank", cases.RANKS)
def test_fake_kernels_agree_on_shapes_and_strides(rank, layout):
    """What torch.compile is told is what comes: y, mean, invstd, mask and the gradients, in every layout.

    Trap: a mask buffer sized by elements times channels, or by another rule in two places.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    for shape in (cases.RANKS[rank], (2, 1, *cases.RANKS[rank][2:]), (1, 9, *cases.RANKS[rank][2:])):
        if rank == 2 and shape[0] == 1:
            continue
        p = cases.make(shape, layout=layout, residual=True)
        for name, arguments in ARGUMENTS.items():
            args = arguments(p, (RELU, 0.0))
            real = op(name)(*args)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = op(name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
            real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
            for r, f in zip(real, fake, strict=True):
                assert (f.shape, f.dtype) == (r.shape, r.dtype), (name, shape)
                strides = [cases.strides_that_matter(r, t.stride()) for t in (r, f)]
                assert strides[0] == strides[1], (name, shape)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mask_is_one_bit_an_element(layout):
    """A byte holds eight elements; planes may be padded to whole bytes, nothing more.

    Trap: bnp's mask of up to 8 bytes an element.
    """
    p = cases.make((4, 64, 9, 9), layout=layout, residual=True)
    mask = op("batch_norm_train")(*train_args(p, (RELU, 0.0)))[3]
    assert p.x.numel() <= 8 * mask.numel() <= p.x.numel() + 7 * 4 * 64
    for args in (train_args(p, (SILU, 0.0)), train_args(p.but(residual=None), (RELU, 0.0))):
        assert op("batch_norm_train")(*args)[3].numel() == 0


@pytest.mark.parametrize("regime", ["standard", "mean_1e4_std_0.01", "outlier_first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_statistics(dtype, regime):
    """mean and invstd are float64 and good to float32's last place, in units of the std."""
    regime = regime if dtype != torch.bfloat16 else "standard"
    p = cases.make((6, 5, 40), dtype=dtype, regime=regime)
    _, mean, invstd, _ = op("batch_norm_train")(*train_args(p))
    wanted_mean, wanted_var = oracle.statistics(p.x.double())
    wanted = (wanted_var + p.eps).rsqrt()
    assert mean.dtype == invstd.dtype == torch.float64
    assert ((mean - wanted_mean).abs() <= 1e-6 * wanted_var.sqrt()).all()
    assert ((invstd - wanted).abs() <= 1e-6 * wanted).all()


@pytest.mark.parametrize("bits", range(16))
def test_output_mask(bits):
    """Only the gradients asked for are computed; the others come back with no elements."""
    p = cases.make((3, 4, 2), residual=True)
    wanted = op("batch_norm_backward")(*backward_args(p, (SILU, 0.0)))
    mask = tuple(bool(bits >> i & 1) for i in range(4))
    actual = op("batch_norm_backward")(*backward_args(p, (SILU, 0.0), mask))
    for needed, got, full in zip(mask, actual, wanted, strict=True):
        if needed:
            assert checks.same_bits(got, full)
        else:
            assert got.numel() == 0


def _replaced(args, index, value):
    return (*args[:index], value, *args[index + 1 :])


BACKWARD_REFUSED = {
    "grad_y of another shape": (0, lambda p, t: t[:1], r"grad_y.*\[4, 3, 5\].*\[1, 3, 5\]"),
    "grad_y of another dtype": (0, lambda p, t: t.double(), r"grad_y of float32, got float64"),
    "weight too short": (2, lambda p, t: t[:2], r"weight.*\[3\].*\[2\]"),
    "residual too small": (4, lambda p, t: t[:1], r"residual.*\[4, 3, 5\].*\[1, 3, 5\]"),
    "mean too short": (5, lambda p, t: t[:2], r"mean.*\[3\].*\[2\]"),
    "mean empty": (5, lambda p, t: t[:0], r"mean.*\[3\].*\[0\]"),
    "mean of another dtype": (5, lambda p, t: t.float(), r"mean .* float64, got .* of float32"),
    "mean strided": (5, lambda p, t: torch.stack([t, t], 1)[:, 0], r"mean"),
    "invstd too short": (6, lambda p, t: t[:1], r"invstd.*\[3\].*\[1\]"),
    "invstd of two dimensions": (6, lambda p, t: t.view(3, 1), r"invstd.*\[3\].*\[3, 1\]"),
    "mask missing": (7, lambda p, t: None, r"mask.*ReLU"),
    "mask too short": (7, lambda p, t: t[:-1], r"mask.*bytes"),
    "mask of another dtype": (7, lambda p, t: t.int(), r"mask"),
    "activation unknown": (8, lambda p, t: 10, r"activation.*10"),
    "activation negative": (8, lambda p, t: -1, r"activation.*-1"),
}


@pytest.mark.parametrize("what", BACKWARD_REFUSED)
def test_backward_refuses(what):
    """Arguments of the backward op are validated too.

    Trap: kernels that read null or short saved statistics out of bounds.
    """
    index, change, message = BACKWARD_REFUSED[what]
    p = cases.make((4, 3, 5), residual=True)
    args = backward_args(p, (RELU, 0.0))
    with pytest.raises(RuntimeError, match=f"bnfused::batch_norm_backward: expected {message}"):
        op("batch_norm_backward")(*_replaced(args, index, change(p, args[index])))


FORWARD_REFUSED = {
    "activation unknown": ({}, (99, 0.0), "activation"),
    "activation negative": ({}, (-1, 0.0), "activation"),
    "weight too short": ({"weight": torch.ones(2)}, NO_ACTIVATION, r"weight of shape \[3\], got \[2\]"),
    "residual elsewhere": (
        {"residual": torch.ones(4, 3, 5, device="meta")},
        NO_ACTIVATION,
        "residual on cpu, got meta",
    ),
    "running_mean elsewhere": (
        {"running_mean": torch.ones(3, device="meta")},
        NO_ACTIVATION,
        "running_mean on cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", ["batch_norm_train", "batch_norm_frozen", "batch_norm_eval"])
@pytest.mark.parametrize("what", FORWARD_REFUSED)
def test_forward_refuses(name, what):
    """Called directly, without the functional in front, the ops check what they get."""
    changes, activation, message = FORWARD_REFUSED[what]
    p = cases.make((4, 3, 5))
    before = p.running_var.clone()
    with pytest.raises(RuntimeError, match=f"bnfused::{name}: expected {message}"):
        op(name)(*ARGUMENTS[name](p.but(**changes), activation))
    assert checks.same_bits(p.running_var, before)
    assert int(p.num_batches_tracked) == 3


def test_cumulative_average_needs_a_counter():
    """At the op, momentum None without a counter is an error; the functional makes it 0.0."""
    p = cases.make((4, 3, 5), momentum=None, counter=None)
    with pytest.raises(RuntimeError, match="expected num_batches_tracked if momentum is None"):
        op("batch_norm_train")(*train_args(p))


def test_train_op_refuses_one_value_per_channel():
    """As the functional does, in torch's words."""
    p = cases.make((1, 3, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        op("batch_norm_train")(*train_args(p))


@pytest.mark.parametrize("name", ["batch_norm_train", "batch_norm_frozen", "batch_norm_eval"])
def test_ops_have_gradients_of_their_own(name):
    """torch.ops.bnfused.* called directly is differentiable: the dispatcher knows the formula."""
    p = cases.make((4, 3, 5), residual=True, training=name == "batch_norm_train")
    p = p.but(activation="silu")
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in checks.LEAVES}
    result = op(name)(*ARGUMENTS[name](p.but(**leaves), (SILU, 0.0)))
    y = result if name == "batch_norm_eval" else result[0]
    grads = torch.autograd.grad(y, list(leaves.values()), p.grad_y)
    truth = oracle.expected(p)
    for leaf, grad in zip(leaves, grads, strict=True):
        wanted, scale = truth.values[f"grad_{leaf}"], truth.scales[f"grad_{leaf}"]
        checks.assert_within(leaf, grad, wanted, cases.limit(wanted, scale, torch.float32))
    if name != "batch_norm_eval":
        assert not any(t.requires_grad for t in result[1:])


@pytest.mark.parametrize("how", ["forward_ad", "jvp"])
@pytest.mark.parametrize("which", ["x", "weight", "residual"])
@pytest.mark.parametrize("name", ["batch_norm_train", "batch_norm_frozen", "batch_norm_eval"])
def test_ops_refuse_tangents(name, which, how):
    """The ops themselves have no forward-mode derivative and say so. Trap: a tangent dropped without a word."""
    p = cases.make((4, 3, 5), residual=True)

    def call(tensor):
        result = op(name)(*ARGUMENTS[name](p.but(**{which: tensor})))
        return result if name == "batch_norm_eval" else result[0]

    tensor = getattr(p, which)
    with pytest.raises(RuntimeError, match=f"bnfused::{name}: expected inputs without a tangent"):
        if how == "jvp":
            torch.func.jvp(call, (tensor,), (tensor,))
        else:
            with torch.autograd.forward_ad.dual_level():
                call(torch.autograd.forward_ad.make_dual(tensor, tensor))


def test_meta_tensors():
    """The ops run on the meta device: shapes without values."""
    p = cases.make((4, 3, 5), residual=True)
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in train_args(p, (RELU, 0.0))]
    y, mean, _, mask = op("batch_norm_train")(*args)
    assert y.is_meta
    assert y.shape == p.x.shape
    assert mean.dtype == torch.float64
    assert mask.dtype == torch.uint8


def call_with(name):
    """Arguments for any of the ops, each of which may be written to."""
    p = cases.make((4, 3, 5), layout="channels_last", residual=True)
    if name in ARGUMENTS:
        return list(ARGUMENTS[name](p, (RELU, 0.0)))
    moments = ops.batch_norm_stats(p.x)
    mean, var, count = ops.batch_norm_gather_stats(moments[None], None, None, None, None, 0.0)
    _, invstd, mask = ops.batch_norm_apply(p.x, p.weight, p.bias, mean, var, p.residual, p.eps, RELU, 0.0)
    backward = (p.grad_y, p.x, p.weight, p.bias, p.residual, mean, invstd, mask)
    sums = ops.batch_norm_backward_reduce(*backward, RELU, 0.0)
    return {
        "batch_norm_stats": [p.x],
        "batch_norm_gather_stats": [moments[None], p.running_mean, p.running_var, p.num_batches_tracked, None, 0.1],
        "batch_norm_apply": [p.x, p.weight, p.bias, mean, var, p.residual, p.eps, RELU, 0.0],
        "batch_norm_backward_reduce": [*backward, RELU, 0.0],
        "batch_norm_backward_apply": [*backward, sums, count, RELU, 0.0, [True, False]],
    }[name]


def tensors_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", SCHEMAS)
def test_functions_are_the_ops(name):
    """bnfused.ops.* does what torch.ops.bnfused.* does, to its arguments too, and builds no graph."""
    args = call_with(name)
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    expected = tensors_of(op(name)(*copies))
    leaves = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    if any(argument.alias_info for argument in op(name)._schema.arguments):  # running statistics are no leaves
        leaves = [leaves[0], *(a.detach() if isinstance(a, torch.Tensor) else a for a in leaves[1:])]
    results = tensors_of(getattr(ops, name)(*leaves))
    for result, wanted in zip(results, expected, strict=True):
        assert checks.same_bits(result, wanted)
        assert not result.requires_grad
    for arg, copy in zip(args, copies, strict=True):
        if isinstance(arg, torch.Tensor):
            assert checks.same_bits(arg.detach(), copy)


@pytest.mark.parametrize("name", SCHEMAS)
def test_functions_refuse_what_is_no_such_argument(name):
    """Each argument that is of a wrong type is named, with what was wanted and what came, and nothing is written."""
    args = call_with(name)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    for i, argument in enumerate(op(name)._schema.arguments):
        message = rf"bnfused::{name}: expected {argument.name} to be (a|an|\d) [a-zN ]+, got object"
        with pytest.raises(TypeError, match=message):
            getattr(ops, name)(*args[:i], object(), *args[i + 1 :])
    if isinstance(args[-1], (tuple, list)):
        with pytest.raises(TypeError, match=f"bnfused::{name}: expected output_mask to be a bool, got int"):
            getattr(ops, name)(*args[:-1], [1] * len(args[-1]))
    for wrong in (args[:-1], [*args, None]):
        with pytest.raises(TypeError, match=f"bnfused::{name}: expected {len(args)} arguments, got {len(wrong)}"):
            getattr(ops, name)(*wrong)
    for arg, copy in zip(args, before, strict=True):
        assert checks.same_bits(arg, copy) if isinstance(arg, torch.Tensor) else arg == copy


@pytest.mark.parametrize("name", SCHEMAS)
def test_functions_keep_no_reference(name):
    """Neither to what they are given nor to what they return, whether they succeed or not."""
    args = call_with(name)
    function = getattr(ops, name)

    def counts():
        return [sys.getrefcount(a) for a in args if isinstance(a, torch.Tensor)]

    before = counts()
    results = [weakref.ref(t) for t in tensors_of(function(*args))]
    with pytest.raises(TypeError):
        function(*args[:-1], object())
    assert counts() == before
    assert all(result() is None for result in results)


def test_functions_let_other_threads_run():
    """The interpreter is free while an op runs."""
    x = torch.randn(64, 64, 16, 16)
    results = []  # kept, since torch lets the interpreter go where a tensor is freed
    done = threading.Event()

    def work():
        while len(results) < 1000 and not done.is_set():
            results.append(ops.batch_norm_stats(x))

    thread = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # seconds: who has the interpreter keeps it, unless he lets go
    try:
        thread.start()
        done.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(results) < 1000
