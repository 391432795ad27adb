"""What must be refused is refused before anything is written, and the message says what was wanted and what came."""

from __future__ import annotations

import pytest
import torch

import bnfused
from support import cases, checks

TENSOR_ERRORS = (RuntimeError, TypeError, ValueError)


# what: (changes to a good problem, exception, what the message says: the argument, what was wanted, what came)
REFUSED = {
    "x is a list": (lambda p: {"x": p.x.tolist()}, TypeError, r"input.*Tensor.*list"),
    "x of integers": (lambda p: {"x": p.x.long()}, TENSOR_ERRORS, r"float.*(int64|Long)"),
    "x complex": (lambda p: {"x": p.x.cfloat()}, TENSOR_ERRORS, r"float.*(complex64|ComplexFloat)"),
    "x sparse": (lambda p: {"x": p.x.to_sparse()}, TENSOR_ERRORS, r"(?i)(strided|dense|layout).*sparse"),
    "x of one dimension": (lambda p: {"x": p.x[0, :, 0]}, TENSOR_ERRORS, r"\[N, C.*\].*\[3\]"),
    "x of no dimension": (lambda p: {"x": p.x[0, 0, 0]}, TENSOR_ERRORS, r"\[N, C.*\].*\[\]"),
    "weight too short": (lambda p: {"weight": p.weight[:2]}, RuntimeError, r"weight.*\[3\].*\[2\]"),
    "weight too long": (lambda p: {"weight": torch.ones(4)}, RuntimeError, r"weight.*\[3\].*\[4\]"),
    "weight of two dimensions": (lambda p: {"weight": p.weight.view(1, 3)}, RuntimeError, r"weight.*\[3\].*\[1, 3\]"),
    "weight of one value": (lambda p: {"weight": torch.ones(1)}, RuntimeError, r"weight.*\[3\].*\[1\]"),
    "bias too short": (lambda p: {"bias": p.bias[:1]}, RuntimeError, r"bias.*\[3\].*\[1\]"),
    "running_mean too short": (lambda p: {"running_mean": torch.zeros(2)}, RuntimeError, r"running_mean.*\[3\].*\[2\]"),
    "running_var too long": (lambda p: {"running_var": torch.ones(5)}, RuntimeError, r"running_var.*\[3\].*\[5\]"),
    "weight float64": (
        lambda p: {"weight": p.weight.double()},
        RuntimeError,
        r"weight of (torch\.)?float32( with x of float32)?, got (torch\.)?float64",
    ),
    "weight float16 with float32": (
        lambda p: {"weight": p.weight.half()},
        RuntimeError,
        r"weight of (torch\.)?float32( with x of float32)?, got (torch\.)?float16",
    ),
    "running_var of integers": (
        lambda p: {"running_var": torch.ones(3, dtype=torch.long)},
        RuntimeError,
        r"running_var of (torch\.)?float32.*, got (torch\.)?int64",
    ),
    "bias is a number": (lambda p: {"bias": 1.0}, TENSOR_ERRORS, r"bias.*float"),
    "weight elsewhere": (lambda p: {"weight": p.weight.to("meta")}, TENSOR_ERRORS, r"weight on (cpu|cuda:0), got meta"),
    # Trap: a gradient that is asked for and silently missing.
    "running_mean that requires grad": (
        lambda p: {"running_mean": p.running_mean.clone().requires_grad_()},
        RuntimeError,
        r"running_mean that does not require grad.*got one that does",
    ),
    "running_var that requires grad": (
        lambda p: {"running_var": p.running_var * torch.ones((), requires_grad=True)},
        RuntimeError,
        r"running_var that does not require grad.*got one that does",
    ),
    "residual that would broadcast": (
        lambda p: {"residual": p.residual[:1]},
        RuntimeError,
        r"residual.*\[4, 3, 5\].*\[1, 3, 5\]",
    ),
    "residual of another dtype": (
        lambda p: {"residual": p.residual.double()},
        RuntimeError,
        r"residual of (torch\.)?float32, got (torch\.)?float64",
    ),
    "residual of another rank": (
        lambda p: {"residual": p.residual.unsqueeze(-1)},
        RuntimeError,
        r"residual.*\[4, 3, 5\].*\[4, 3, 5, 1\]",
    ),
    "counter of int32": (
        lambda p: {"num_batches_tracked": torch.tensor(3, dtype=torch.int32)},
        RuntimeError,
        r"num_batches_tracked.*int64.*int32",
    ),
    "counter of two elements": (
        lambda p: {"num_batches_tracked": torch.tensor([3, 4])},
        RuntimeError,
        r"num_batches_tracked.*\[2\]",
    ),
    "unknown activation": (lambda p: {"activation": "swoosh"}, ValueError, r"relu.*hardswish.*'swoosh'"),
    "activation that is a function": (
        lambda p: {"activation": torch.relu},
        (ValueError, TypeError),
        r"activation.*relu",
    ),
    "parameter of an activation that has none": (
        lambda p: {"activation": "relu", "activation_param": 0.5},
        ValueError,
        r"relu.*activation_param.*0\.5",
    ),
    "parameter of an activation that is to be learned": (
        lambda p: {"activation": "leaky_relu", "activation_param": torch.nn.PReLU().weight},
        TypeError,
        r"activation_param to be a number, got a tensor that requires grad",
    ),
    "one value per channel": (
        lambda p: {"x": p.x[:1, :, :1], "residual": None},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size (torch\.Size\()?\[1, 3, 1\]",
    ),
    "eps 0 in training": (lambda p: {"eps": 0.0}, ValueError, r"eps must be positive during training.*0\.0"),
    "eps negative in training": (lambda p: {"eps": -1.0}, ValueError, r"eps must be positive.*-1\.0"),
    "eps negative": (lambda p: {"eps": -1e-3, "training": False}, ValueError, r"eps must be non-negative.*-0\.001"),
    "no statistics in eval": (
        lambda p: {"running_mean": None, "training": False},
        TENSOR_ERRORS,
        r"running_mean.*None",
    ),
    "no variance in eval": (lambda p: {"running_var": None, "training": False}, TENSOR_ERRORS, r"running_var.*None"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(backend, what, grad):
    """The right exception, the message, and running statistics and counter untouched; with and without a graph.

    Traps: errors swallowed on one path; assert() for a user's mistake; kernels that read a parameter past its end.
    """
    changes, error, message = REFUSED[what]
    p = cases.make((4, 3, 5), residual=True)
    if grad:
        p = p.but(bias=p.bias.requires_grad_())
    checks.check_state_kept_on_error(backend.batch_norm, p.but(**changes(p)), error, message)


@pytest.mark.parametrize(
    "what", [w for w in REFUSED if any(word in w for word in ("weight", "bias", "residual", "requires grad"))]
)
def test_refused_in_eval(backend, what):
    """The same arguments are refused when nothing is trained."""
    changes, error, message = REFUSED[what]
    p = cases.make((4, 3, 5), residual=True, training=False)
    checks.check_state_kept_on_error(backend.batch_norm, p.but(**changes(p)), error, message)


def test_message_names_the_op(backend):
    """An error of the op is one that can be searched for."""
    p = cases.make((4, 3, 5))
    with pytest.raises(RuntimeError, match="batch_norm.*: expected running_mean of shape"):
        checks.call(backend.batch_norm, p, running_mean=torch.zeros(2))


def test_one_row_of_spatial_size_is_enough(backend):
    """(1, C, 1, 2) trains; (1, C, 1, 1) does not."""
    checks.check_against_oracle(backend.batch_norm, cases.make((1, 3, 1, 2)))


def test_one_value_per_channel_is_fine_in_eval(backend):
    """Only training needs a variance."""
    checks.check_against_oracle(backend.batch_norm, cases.make((1, 3, 1), training=False))


def test_statistics_that_require_grad_are_fine_without_gradients(backend):
    """As with torch: nobody asks for a gradient there."""
    p = cases.make((4, 3, 5))
    with torch.no_grad():
        y = checks.call(backend.batch_norm, p, running_mean=p.running_mean.clone().requires_grad_())
    assert checks.same_bits(y, checks.call(backend.batch_norm, p))


@pytest.mark.parametrize("training", [True, False])
def test_op_refuses_statistics_that_require_grad(training):
    """The dispatcher's way, which torch.compile takes; with no other argument that requires grad."""
    x, mean, var = torch.randn(4, 3), torch.zeros(3, requires_grad=True), torch.ones(3)
    bn = bnfused.BatchNorm1d(3, affine=False).train(training)
    bn.running_mean = mean
    calls = [lambda: torch.compile(bn, backend="aot_eager")(x)]
    if training:
        calls.append(
            lambda: torch.ops.bnfused.batch_norm_train(x, *[None] * 2, mean, var, *[None] * 2, 0.1, 1e-5, 0, 0.0)
        )
    else:
        calls.append(lambda: torch.ops.bnfused.batch_norm_eval(x, None, None, mean, var, None, 1e-5, 0, 0.0))
        calls.append(lambda: torch.ops.bnfused.batch_norm_frozen(x, None, None, mean, var, None, 1e-5, 0, 0.0))
    for call in calls:
        torch._dynamo.reset()
        with pytest.raises(Exception, match="expected running_mean that does not require grad"):
            call()
    assert not mean.any()


def test_running_statistics_that_overlap_themselves(backend):
    """An expanded running_mean has one cell for all channels: refused, not raced."""
    p = cases.make((4, 3, 5))
    mean = torch.zeros(1)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        checks.call(backend.batch_norm, p, running_mean=mean.expand(3))
    assert mean.item() == 0.0
