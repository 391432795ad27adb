"""The parts of torch that bnfused uses below its public API: each is named here, with a test of what bnfused expects.

Torch may change them in any release. If a new torch fails here, the test says which use has to change.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import _jit_internal, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

import bnfused

ROOT = Path(__file__).resolve().parents[2]


def any_requires_grad() -> None:
    leaf = torch.ones(1, requires_grad=True)
    assert torch._C._any_requires_grad(None, torch.ones(1), leaf)
    assert not torch._C._any_requires_grad(None, torch.ones(1), leaf.detach())


def functorch_transforms_active() -> None:
    inside = []
    torch.func.vmap(lambda x: inside.append(torch._C._are_functorch_transforms_active()) or x)(torch.ones(2))
    assert inside == [True]
    assert not torch._C._are_functorch_transforms_active()


def functorch_tensors() -> None:
    functorch = torch._C._functorch
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((functorch.is_functorch_wrapped_tensor(x), functorch.is_batchedtensor(x)))
        seen.append(functorch.maybe_get_level(x))
        return x

    torch.func.vmap(look)(torch.ones(2))
    plain = torch.ones(2)
    assert seen == [(True, True), 1]
    assert not functorch.is_functorch_wrapped_tensor(plain)
    assert not functorch.is_batchedtensor(plain)
    assert functorch.maybe_get_level(plain) < 1


def legacy_batchedtensor() -> None:
    """The batches of ``torch.autograd.grad(is_grads_batched=True)``."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            seen.append(torch._C._functorch.is_legacy_batchedtensor(grad))
            return grad

    leaf = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Look.apply(leaf), leaf, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [True]
    assert not torch._C._functorch.is_legacy_batchedtensor(leaf)


def tracing_state() -> None:
    inside = []

    def look(x: torch.Tensor) -> torch.Tensor:
        inside.append(torch._C._get_tracing_state())
        return x + 1

    torch.jit.trace(look, torch.ones(1), check_trace=False)
    assert inside[0] is not None
    assert torch._C._get_tracing_state() is None


def assert_async() -> None:
    torch._assert_async(torch.tensor(True), "right")
    with pytest.raises(RuntimeError, match="wrong"):
        torch._assert_async(torch.tensor(False), "wrong")


def functional_collectives() -> None:
    """The order of arguments; what they compute is in test_sync.py."""
    ops = torch.ops._c10d_functional
    names = {
        op: [argument.name for argument in op.default._schema.arguments] for op in (ops.all_reduce, ops.wait_tensor)
    }
    assert names == {ops.all_reduce: ["input", "reduce_op", "group_name"], ops.wait_tensor: ["tensor"]}


def scripting() -> None:
    """The compiler of torch.jit.script knows this very function, and skips what it guards."""
    assert torch.jit.is_scripting is _jit_internal.is_scripting
    assert not _jit_internal.is_scripting()


def forward_levels() -> None:
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0
    assert forward_ad._current_level < 0


def batch_norm_base() -> None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, bnfused.BatchNorm2d)
    assert all(issubclass(kind, _BatchNorm) for kind in kinds)
    assert not issubclass(nn.InstanceNorm2d, _BatchNorm)


def module_dictionaries() -> None:
    module = nn.BatchNorm1d(3)
    module.add_module("child", nn.ReLU())
    assert module._modules["child"] is module.child
    assert module._parameters["weight"] is module.weight
    assert module._buffers["running_mean"] is module.running_mean


def module_hooks() -> None:
    module = nn.ReLU()
    assert nn.ReLU._call_impl is nn.Module._call_impl
    assert module._compiled_call_impl is None
    own = {
        "_forward_hooks": module.register_forward_hook,
        "_forward_pre_hooks": module.register_forward_pre_hook,
        "_backward_hooks": module.register_full_backward_hook,
        "_backward_pre_hooks": module.register_full_backward_pre_hook,
    }
    of_all = {
        "_global_forward_hooks": torch_module.register_module_forward_hook,
        "_global_forward_pre_hooks": torch_module.register_module_forward_pre_hook,
        "_global_backward_hooks": torch_module.register_module_full_backward_hook,
        "_global_backward_pre_hooks": torch_module.register_module_full_backward_pre_hook,
    }
    for holder, hooks in ((module, own), (torch_module, of_all)):
        for name, register in hooks.items():
            assert not getattr(holder, name), name
            handle = register(lambda *args: None)
            assert getattr(holder, name), name
            handle.remove()


# A name as the package writes it: the test of what it does.
PYTHON: dict[str, Callable[[], None]] = {
    "torch._C._any_requires_grad": any_requires_grad,
    "torch._C._are_functorch_transforms_active": functorch_transforms_active,
    "torch._C._functorch.is_batchedtensor": functorch_tensors,
    "torch._C._functorch.is_functorch_wrapped_tensor": functorch_tensors,
    "torch._C._functorch.is_legacy_batchedtensor": legacy_batchedtensor,
    "torch._C._functorch.maybe_get_level": functorch_tensors,
    "torch._C._get_tracing_state": tracing_state,
    "torch._assert_async": assert_async,
    "torch.ops._c10d_functional.all_reduce": functional_collectives,
    "torch.ops._c10d_functional.wait_tensor": functional_collectives,
    "torch._jit_internal": scripting,
    "torch._jit_internal.is_scripting": scripting,
    "torch.nn.modules.batchnorm._BatchNorm": batch_norm_base,
    "forward_ad._current_level": forward_levels,
    "_modules": module_dictionaries,
    "_parameters": module_dictionaries,
    "_buffers": module_dictionaries,
    "_call_impl": module_hooks,
    "_compiled_call_impl": module_hooks,
    **{f"_{kind}_hooks": module_hooks for kind in ("forward", "forward_pre", "backward", "backward_pre")},
    **{f"_global_{kind}_hooks": module_hooks for kind in ("forward", "forward_pre", "backward", "backward_pre")},
}
# Attributes with one underscore that belong to nn.Module, which any object may have.
MODULE_ATTRIBUTES = {name for name in PYTHON if "." not in name}

# Names in csrc. The build is the test that they exist; each test of an op in tests/package runs through them.
CPP = {
    "at::native::empty_cpu": "an uninitialized tensor, without the dispatcher",
    "at::native::empty_strided_cpu": "the same, with strides",
    "c10::impl::VirtualGuardImpl": "the current CUDA stream, without CUDA's part of torch",
    "c10::detail::f32_from_bits": "bfloat16 to float32",
    "c10::detail::fp16_ieee_to_fp32_value": "float16 to float32",
    "c10::detail::fp16_ieee_from_fp32_value": "float32 to float16",
    "GOMP_parallel": "the threads of torch's OpenMP, for compilers that would bring another",
    "omp_get_num_threads": "how many of them run",
    "omp_get_thread_num": "which of them this is",
    "at::AutoDispatchBelowAutograd": "a call of an op that records no gradient",
    "THPVariable_Check": "whether a Python object is a tensor",
    "THPVariable_Unpack": "its C++ tensor",
    "THPVariable_Wrap": "the reverse",
    "THPObjectPtr": "an owned reference",
    "HANDLE_TH_ERRORS": "C++ exceptions become Python's",
    "python_error": "a Python exception that C++ passes on",
}
CPP_PATTERN = re.compile(
    r"\b(?:at::native|at::internal|c10::impl|c10::detail|torch::autograd|torch::jit)::\w+"
    r"|\bTHP\w+|\bGOMP_\w+|\bomp_\w+|\bat::AutoDispatch\w+|\bHANDLE_TH_ERRORS\b|\bpython_error\b"
)


@pytest.mark.parametrize("name", PYTHON)
def test_is_what_bnfused_expects(name: str) -> None:
    PYTHON[name]()


def python_uses(text: str) -> set[str]:
    """The private names of torch that a module of the package uses."""
    uses: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if "._" in name:
                    uses.add(name)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"(torch|forward_ad)\.[\w.]+", name) and re.search(r"\._[a-zA-Z]", name):
                uses.add(name)
            elif node.attr in MODULE_ATTRIBUTES:
                uses.add(node.attr)
    # torch._C is part of torch._C._any_requires_grad
    return {use for use in uses if not any(other.startswith(f"{use}.") for other in uses)}


def test_every_use_in_python_is_listed() -> None:
    found = set().union(*(python_uses(path.read_text()) for path in (ROOT / "bnfused").rglob("*.py")))
    assert found - set(PYTHON) == set(), "used, but without a test here"
    assert set(PYTHON) - found <= {"torch._jit_internal"}, "listed, but no longer used"


def test_every_use_in_cpp_is_listed() -> None:
    texts = [path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    assert {name for text in texts for name in CPP_PATTERN.findall(text)} == set(CPP)


def test_a_new_use_is_found() -> None:
    """The search itself."""
    assert python_uses("import torch\ndef f():\n    return torch._C._new(1)") == {"torch._C._new"}
    assert python_uses("from torch._dynamo import config") == {"torch._dynamo.config"}
    assert python_uses("from torch.fx import _pytree") == {"torch.fx._pytree"}
    assert python_uses("def f(m):\n    return m._forward_hooks") == {"_forward_hooks"}
    assert python_uses("import torch\ntorch.__version__, torch.nn.Module") == set()
    assert CPP_PATTERN.findall("return at::native::relu(x);") == ["at::native::relu"]
