"""torch's own samples of its batch norms, through ours: module_db for the modules, the OpInfo for the function.

They are those of the torch that is installed (``torch.testing._internal``). What is expected is torch's own result on
the same values in float64; dtypes and strides are torch's in the dtype under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnfused
from support import cases, checks, oracle

pytest.importorskip("expecttest", reason="expecttest is not installed, which torch's samples import")
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402
from torch.testing._internal.common_utils import noncontiguous_like  # noqa: E402

MODULES = {
    nn.BatchNorm1d: bnfused.BatchNorm1d,
    nn.BatchNorm2d: bnfused.BatchNorm2d,
    nn.BatchNorm3d: bnfused.BatchNorm3d,
}
MODULE_INFOS = [info for info in module_db if info.module_cls in MODULES]
(OP_INFO,) = [
    info for info in op_db if info.name == "nn.functional.batch_norm" and "cudnn" not in info.variant_test_name
]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": cases.LAYOUTS["channels_last"],
    "strided": lambda x: noncontiguous_like(x) if x.dim() > 1 else x,
}

DTYPE = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=["float32", "float64", "bfloat16", "float16"],
)
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
INFO = pytest.mark.parametrize("info", MODULE_INFOS, ids=lambda info: info.name.replace(".", "_"))


def in_layout(x: Tensor, layout: str) -> Tensor:
    """A leaf with the values of ``x``."""
    if x.numel() == 0:
        return x.detach().clone().requires_grad_()
    return LAYOUTS[layout](x.detach()).detach().requires_grad_()


def close(name: str, actual: Tensor | None, exact: Tensor | None, of: torch.dtype) -> None:
    """Within the bound of cases.py of the float64 result; what reaches into the thousands, relative to that."""
    assert (actual is None) == (exact is None), name
    if actual is None or exact is None:
        return
    assert actual.dtype == of, f"{name} is {actual.dtype}, torch's {of}"
    exact = exact.detach().double()
    scale = max(1.0, oracle.finite_max(exact))
    checks.assert_within(name, actual, exact, cases.limit(exact, scale, of))


def same_layout(actual: Tensor, wanted: Tensor, layout: str) -> None:
    """Strides as torch's, where they mean anything; torch makes (N, C, L) contiguous, ours keeps it as it is."""
    assert actual.shape == wanted.shape
    if actual.numel() and not (actual.dim() == 3 and layout == "channels_last"):
        found, torchs = (cases.strides_that_matter(t, t.stride()) for t in (actual, wanted))
        assert found == torchs, f"strides {found}, torch's {torchs}"


def upstream(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient of values that ``dtype`` has, in the dtype of ``y``."""
    return torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape).to(y.dtype)


def module_inputs(info: Any, dtype: torch.dtype, training: bool) -> Iterator[Any]:
    return info.module_inputs_func(info, "cpu", dtype, True, training)


def test_every_module_has_samples():
    """The names under which torch keeps them have not changed."""
    assert {info.module_cls for info in MODULE_INFOS} == set(MODULES)
    assert all(len(module_inputs(info, torch.float32, True)) >= 6 for info in MODULE_INFOS)


@pytest.mark.usefixtures("extension")
@DTYPE
@LAYOUT
@TRAINING
@INFO
def test_module_samples(info, training, layout, dtype):
    """Two calls of each sample: outputs, all gradients, buffers, dtypes and strides."""
    for sample in module_inputs(info, dtype, training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        classes = (MODULES[info.module_cls], info.module_cls, info.module_cls)
        ours, theirs, exact = (cls(*args, **kwargs).train(training) for cls in classes)
        for module in (ours, theirs):
            module.to(dtype)
        exact.double()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_()
        theirs.load_state_dict(ours.state_dict())
        exact.load_state_dict(ours.state_dict())
        for _ in range(2):
            results = []
            for module in (ours, theirs, exact):
                x = sample.forward_input.args[0]
                leaf = in_layout(x.double() if module is exact else x, layout)
                y = module(leaf)
                module.zero_grad()
                y.backward(upstream(y, dtype))
                results.append((y, leaf.grad))
            (y, grad), (their_y, their_grad), (exact_y, exact_grad) = results
            close("y", y, exact_y, their_y.dtype)
            close("grad_x", grad, exact_grad, their_grad.dtype)
            same_layout(y, their_y, layout)
            same_layout(grad, their_grad, layout)
            for (name, p), (_, q), (_, e) in zip(*(m.named_parameters() for m in (ours, theirs, exact)), strict=True):
                close(f"grad of {name}", p.grad, e.grad, q.grad.dtype)
            for (name, b), (_, c), (_, e) in zip(*(m.named_buffers() for m in (ours, theirs, exact)), strict=True):
                if name == "num_batches_tracked":
                    assert torch.equal(b, c)
                else:
                    close(name, b, e, c.dtype)
                    # Rounded to 16 bits in every call: from here on both start with ours.
                    e.copy_(b)


@pytest.mark.usefixtures("extension")
@TRAINING
@INFO
def test_module_error_samples(info, training):
    """What torch says must raise does, with its exception and its words, and leaves the buffers alone."""
    samples = info.module_error_inputs_func(info, "cpu", torch.float32, False, training)
    assert samples
    for sample in samples:
        inputs = sample.module_error_input
        theirs, ours = (
            cls(*inputs.constructor_input.args, **inputs.constructor_input.kwargs).train(training)
            for cls in (info.module_cls, MODULES[info.module_cls])
        )
        x = inputs.forward_input.args[0]
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        try:
            wanted = theirs(x)
        except sample.error_type as error:
            message = str(error)
            if "eps must be positive, but got" in message:  # torch 2.11, in training and in eval alike
                if not training and message.endswith(" 0.0"):
                    continue
                message = message.replace("positive,", "positive during training," if training else "non-negative,")
            with pytest.raises(type(error)) as raised:
                ours(x)
            assert str(raised.value) == message
            for name, value in ours.state_dict().items():
                assert checks.same_bits(value, before[name]), name
        else:  # eps of 0 is only an error in training
            close("y", ours(x), wanted.double(), wanted.dtype)


def op_samples(dtype: torch.dtype) -> Iterator[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """Input, statistics and parameters, keywords of each sample."""
    samples = list(OP_INFO.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 12
    for sample in samples:
        yield sample.input, sample.args, sample.kwargs


def fresh(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A copy of an argument, still wanting a gradient where it did."""
    if tensor is None:
        return None
    return tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)


@DTYPE
@LAYOUT
def test_op_samples(backend, layout, dtype):
    """Values, gradients and running statistics of every sample, (0,) and negative momenta included."""
    for x, args, kwargs in op_samples(dtype):
        results = []
        for function, own in ((backend.batch_norm, dtype), (nn.functional.batch_norm, torch.float64)):
            leaf = in_layout(x.detach().to(own), layout)
            tensors = [fresh(t, own) for t in args]
            y = function(leaf, *tensors, **kwargs)
            y.backward(upstream(y, dtype))
            grads = [None if t is None else t.grad for t in tensors[2:]]
            results.append([y, leaf.grad, *grads, *tensors[:2]])
        theirs = nn.functional.batch_norm(in_layout(x, layout), *map(fresh, args), **kwargs)
        same_layout(results[0][0], theirs, layout)
        names = ("y", "grad_x", "grad_weight", "grad_bias", "running_mean", "running_var")
        for name, actual, exact in zip(names, *results, strict=True):
            close(name, actual, exact, dtype)


def test_op_samples_derivatives(backend):
    """Forward mode, reverse mode, and both orders of second derivatives, as torch's own tests take them."""
    for x, args, kwargs in op_samples(torch.float64):
        leaves = [t for t in (x, *args[2:]) if t is not None]
        running = args[:2]

        def function(x, *parameters, running=running, kwargs=kwargs):
            parameters = parameters or (None, None)
            return backend.batch_norm(x, *map(fresh, running), *parameters, **kwargs)

        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True)


@pytest.mark.usefixtures("extension")
def test_copy_on_write_inputs_stay_lazy():
    """A lazy clone that is only read is not copied: x, weight, bias and the residual; the statistics are written to."""
    p = cases.make((3, 4, 5), residual=True, activation="silu")
    names = ("x", "weight", "bias", "residual", "running_mean", "running_var")
    lazy = {name: torch._lazy_clone(getattr(p, name)) for name in names}
    for name in checks.LEAVES:
        lazy[name].requires_grad_()
    y = checks.call(bnfused.functional.batch_norm, p, **lazy)
    y.backward(p.grad_y)
    for name in checks.LEAVES:
        assert torch._C._is_cow_tensor(lazy[name]), f"{name} was copied"
    for name in ("running_mean", "running_var"):
        assert not torch._C._is_cow_tensor(lazy[name])
        assert not checks.same_bits(lazy[name], getattr(p, name)), f"{name} of the original was written to"
