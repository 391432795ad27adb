"""Which GPUs a build serves, and what it answers to the others and to CUDA tensors that it has no kernels for.

No GPU is needed: the decisions are functions of their arguments, and fake tensors stand for CUDA tensors.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bnfused
from bnfused import _extension, functional, parts, without_cuda


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 6), True),  # machine code runs on later GPUs of its major version
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),  # and on no other
        (["8.0+PTX"], (9, 0), True),  # PTX is compiled by the driver
        (["8.0+PTX"], (12, 0), True),  # as text "12" < "8"
        (["8.0+PTX"], (7, 5), False),
        (["7.5", "9.0+PTX"], (7, 5), True),
        (["7.5", "9.0+PTX"], (8, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a+PTX"], (10, 0), False),  # what is specific to one GPU stays there, as PTX too
        (["10.0f"], (10, 3), True),
        (["10.0f+PTX"], (12, 0), False),
        ([], (9, 0), False),
    ],
)
def test_what_a_build_runs_on(archs: list[str], capability: tuple[int, int], fits: bool) -> None:
    assert _extension.runs_on(archs, capability) is fits


def test_a_gpu_that_was_not_built_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the GPU, what was built, and the command; another GPU of the machine passes."""
    capability = {0: (7, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda_archs": ("8.0", "9.0+PTX")})
    _extension.check_gpu.cache_clear()
    for _ in range(2):  # an error must not be remembered as an answer
        with pytest.raises(RuntimeError, match=r"expected a GPU .*8\.0, 9\.0\+PTX.* got cuda:0, A GPU.* 7\.0") as error:
            _extension.check_gpu(0)
    assert f"TORCH_CUDA_ARCH_LIST=7.0 {_extension.REBUILD}" in str(error.value)
    _extension.check_gpu(1)
    _extension.check_gpu.cache_clear()


@pytest.fixture
def cuda_tensors() -> Iterator[torch.Tensor]:
    """Makes CUDA tensors without values, on any machine."""
    with FakeTensorMode():
        yield torch.empty(4, 3, 5, device="cuda")


def test_a_build_without_kernels_warns_once(
    cuda_tensors: torch.Tensor, extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And runs the reference, which keeps training; the warning says how to get the kernels."""
    monkeypatch.setattr(_extension, "_has_cuda", False)
    monkeypatch.setattr(_extension, "_warned", set())
    monkeypatch.setattr(functional.ops, "batch_norm_train", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = functional.batch_norm(cuda_tensors, None, None, training=True, activation="relu")
    assert y.device.type == "cuda" and y.shape == cuda_tensors.shape
    (warning,) = caught
    for part in ("no kernels for cuda tensors", "reference path", "nvcc", f"BNFUSED_CUDA=1 {_extension.REBUILD}"):
        assert part in str(warning.message)


def test_a_build_with_kernels_takes_cuda_tensors(
    cuda_tensors: torch.Tensor, extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has looked at the GPU that they are on, and only for CUDA: other devices go to the reference."""
    asked: list[int] = []
    monkeypatch.setattr(_extension, "_has_cuda", True)
    monkeypatch.setattr(_extension, "check_gpu", asked.append)
    assert functional._has_kernel(cuda_tensors, compiling=False)
    assert asked == [0]
    with FakeTensorMode(), pytest.warns(RuntimeWarning, match="no kernels for mps tensors"):
        assert not functional._has_kernel(torch.empty(4, 3, 5, device="mps"), compiling=False)


class Block(torch.nn.Module):
    """Runs as generated code, which stands between the caller and the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x).relu()


CALLERS = {
    "function": functools.partial(functional.batch_norm, running_mean=None, running_var=None, training=True),
    "part": parts.batch_norm_stats,
    "module": bnfused.BatchNorm1d(3),
    "block": bnfused.convert(Block()),
    "whole graph": torch.compile(bnfused.BatchNorm1d(3), backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_the_warning_is_of_the_line_that_called(caller: str, extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a line of bnfused's or torch's: it is there that something can be done about it."""
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_warned", set())
    with pytest.warns(RuntimeWarning, match="slow reference path") as caught:
        CALLERS[caller](torch.randn(4, 3, 5))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.usefixtures("extension")
class TestOpsWithoutCuda:
    X = torch.zeros(4, 3)

    def test_every_op_answers_cuda_tensors_in_every_build(self) -> None:
        """By kernels, or by an error that says what to do: else the dispatcher's own error would come."""
        for op in _extension.OPS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bnfused::{op}", "CUDA")

    def test_the_list_of_ops_is_whole(self) -> None:
        names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bnfused::")}
        assert {f"bnfused::{op}" for op in _extension.OPS} == names

    def test_says_what_to_build(self) -> None:
        arguments = [self.X, *[None] * 4, torch.zeros(3), None, 0.1, 1e-5, 0, 0.0]
        with pytest.raises(RuntimeError, match="bnfused::batch_norm_train: expected an extension with CUDA") as error:
            without_cuda.refuse("batch_norm_train", *arguments)
        assert _extension.BUILD_CUDA in str(error.value)

    def test_says_which_argument_is_elsewhere(self) -> None:
        """A CPU tensor with one parameter left on the GPU is not a matter of the build."""
        backward = [torch.zeros(4, 3, device="meta"), self.X, *[None] * 10]
        with pytest.raises(RuntimeError, match="batch_norm_backward: expected grad_y on cpu, got meta"):
            without_cuda.refuse("batch_norm_backward", *backward)


@pytest.mark.usefixtures("extension")
def test_build_info_says_for_which_gpus() -> None:
    """A version and compute capabilities that ``runs_on`` understands, or neither."""
    info = bnfused.build_info()
    assert (info["cuda"] is None) == (info["cuda_archs"] == ())
    assert all(_extension.runs_on([arch], (int(arch.split(".")[0]), 9)) for arch in info["cuda_archs"])
