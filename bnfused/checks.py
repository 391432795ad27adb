"""The checks of arguments that are made in Python.

The kernels check their own arguments, in ``csrc/ops/ops.h``. The checks here are for the paths without a kernel: the
reference, the stand-ins of the kernels while torch.compile traces, and collectives, before which every rank has to know
that its own arguments are right. Nothing is written before all checks have passed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The usual dtypes come first, because every look-up compares from the left.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values_per_channel(x: Tensor) -> int:
    """The number of values in each channel of ``x``, ``(N, C, *)``."""
    count = x.shape[0]
    for size in x.shape[2:]:
        count *= size
    return count


def channels_of(x: Tensor) -> int:
    """The number of channels of ``x``. torch's batch norm also takes the shape ``(0,)``, which has no channels."""
    return x.shape[1] if x.dim() > 1 else 0


def check_input(x: Tensor) -> None:
    """Check that ``x`` is a dense tensor of at least two dimensions and of a dtype that batch norm takes.

    Raises:
        TypeError: ``x`` is not a tensor.
        RuntimeError: ``x`` is sparse, has too few dimensions, or has another dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"batch_norm: expected input to be a Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise RuntimeError(f"batch_norm: expected input to be a dense (strided) tensor, got {x.layout}")
    if x.dim() < 2 and x.shape != (0,):
        raise RuntimeError(f"batch_norm: expected input of shape [N, C, ...], got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise RuntimeError(f"batch_norm: expected input of float16, bfloat16, float32 or float64, got {x.dtype}")


def check_eps(eps: float, training: bool) -> None:
    """Check ``eps``, in the words of torch.

    Raises:
        ValueError: ``eps`` is negative, or zero in training.
    """
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not training and eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


def check_values(x: Tensor, training: bool, eps: float) -> None:
    """Check that the result is defined, in the words of torch.

    Raises:
        ValueError: training with one value per channel, whose variance is undefined; ``eps`` as in ``check_eps``.
    """
    if training and x.dim() >= 2 and x.numel() == x.shape[1] and values_per_channel(x) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    check_eps(eps, training)


def check_running(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Check that both running statistics exist, which eval needs.

    Raises:
        RuntimeError: one of them is None; the message names it.
    """
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is None:
            raise RuntimeError(f"batch_norm: expected {name} when not training, got None")


def check_call(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float) -> None:
    """Make the checks that ``torch.nn.functional.batch_norm`` makes too, in its order and with its exceptions.

    Raises:
        TypeError, RuntimeError, ValueError: as ``check_input``, ``check_values`` and, in eval, ``check_running``.
    """
    check_input(x)
    check_values(x, training, eps)
    if not training:
        check_running(running_mean, running_var)


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
) -> None:
    """Check every tensor against ``x``. Plain torch would broadcast or cast some of them without a word.

    ``csrc/ops/ops.h`` makes the same checks for the kernels.

    Raises:
        TypeError: an argument is neither a tensor nor None.
        RuntimeError: a shape, dtype or device does not fit ``x``, or running statistics require grad or, in eval, are
            missing. The message names the argument.
    """
    if not training:
        check_running(running_mean, running_var)
    channels = (channels_of(x),)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameter_dtypes = [wide] if x.dtype == wide else [wide, x.dtype]
    wanted = {
        "weight": (weight, channels, parameter_dtypes),
        "bias": (bias, channels, parameter_dtypes),
        "running_mean": (running_mean, channels, parameter_dtypes),
        "running_var": (running_var, channels, parameter_dtypes),
        "residual": (residual, x.shape, [x.dtype]),
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"batch_norm: expected {name} to be a Tensor or None, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise RuntimeError(f"batch_norm: expected {name} of shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(map(str, dtypes))
            raise RuntimeError(f"batch_norm: expected {name} of {allowed}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise RuntimeError(f"batch_norm: expected {name} on {x.device}, got {tensor.device}")
    check_no_gradient(running_mean, running_var)
    count = num_batches_tracked
    if count is not None and (count.dtype != torch.int64 or count.numel() != 1 or count.device != x.device):
        raise RuntimeError(
            f"batch_norm: expected num_batches_tracked to be one int64 on {x.device}, "
            f"got {list(count.shape)} of {count.dtype} on {count.device}"
        )


def check_no_gradient(running_mean: Tensor | None, running_var: Tensor | None, op: str = "batch_norm") -> None:
    """Check that no running statistic requires grad, as torch does: batch norm has no gradient for them.

    Raises:
        RuntimeError: one of them requires grad, and gradients are enabled.
    """
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: expected {name} that does not require grad, as batch norm has no gradient for it, got one that "
                "does; detach() it"
            )


def check_batched_alike(running: Tensor, batch: Tensor) -> None:
    """Check that vmap batches a running statistic where it batches the input.

    torch would refuse this too, but with a message about an in-place operation.

    Raises:
        RuntimeError: several batches would update one running statistic.
    """
    if torch.compiler.is_compiling():  # Dynamo cannot trace the question, and torch raises its own error
        return
    level = torch._C._functorch.maybe_get_level
    if torch._C._functorch.is_batchedtensor(batch) and level(running) < level(batch):
        raise RuntimeError(
            "batch_norm: expected running_mean and running_var with the batch dimension of input under vmap, which "
            "would update them for each; got them without. Pass them through vmap too, or turn track_running_stats off"
        )
