"""The specification: batch norm, residual and activation in plain torch, to be read beside the paper.

It is the oracle that the kernels are compared with, the path that torch.func transforms and forward-mode AD take, the
formula that higher derivatives come from, and what runs where the extension is not there. Arithmetic is in float64,
whatever the input. Source: Ioffe & Szegedy, "Batch Normalization", 2015, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnfused import activations

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the usual ones first: every call looks


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """What ``bnfused.functional.batch_norm`` computes; see there for arguments, errors and meaning."""
    code, param = activations.resolve(activation, activation_param)
    check_input(input)
    check_values(input, training, eps)
    check_arguments(input, weight, bias, running_mean, running_var, residual, num_batches_tracked, training)
    values = input.to(arithmetic_dtype(input))
    if training:
        mean, var = statistics(values)
        rows = rows_of(input)
        update_running(running_mean, running_var, num_batches_tracked, mean, var, momentum, rows)
    else:
        assert running_mean is not None and running_var is not None  # check_arguments saw to it
        mean, var = running_mean.to(values.dtype), running_var.to(values.dtype)
    invstd = (var + eps).rsqrt()
    return transform(values, mean, invstd, weight, bias, residual, code, param, input.dtype)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float64, so that the specification is exact to the last bit of float32; MPS has float32 at most."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def rows_of(x: Tensor) -> int:
    """The number of values per channel."""
    rows = x.shape[0]
    for size in x.shape[2:]:
        rows *= size
    return rows


def channels_of(x: Tensor) -> int:
    """The number of channels. torch's batch norm takes shape ``(0,)`` too: nothing, of no channels."""
    return x.shape[1] if x.dim() > 1 else 0


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, both ``(C,)``; zeros where there are no values."""
    if values.numel() == 0:
        empty = values.new_zeros(channels_of(values))
        return empty, empty
    dims = [0, *range(2, values.dim())]
    mean = values.mean(dims)
    # What rounding left, so that equal values have their own mean.
    mean = mean + (values - per_channel(mean, values)).mean(dims)
    return mean, (values - per_channel(mean, values)).square().mean(dims)


def transform(
    values: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    activation_param: float,
    dtype: torch.dtype,
) -> Tensor:
    """``act((values - mean) * invstd * weight + bias + residual)``, rounded to ``dtype`` once."""
    z = (values - per_channel(mean, values)) * per_channel(invstd, values)
    if weight is not None:
        z = z * per_channel(weight.to(values.dtype), values)
    if bias is not None:
        z = z + per_channel(bias.to(values.dtype), values)
    if residual is not None:
        z = z + residual
    if activation == activations.RELU_CODE:
        z = z.to(dtype)  # the same y, and a gradient exactly where y is positive, also where z rounds to zero
    return activations.apply(activation, activation_param, z).to(dtype)


@torch.no_grad()
def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    rows: int,
) -> None:
    """Count the batch and move the running statistics toward this batch's mean and *unbiased* variance, in place.

    ``momentum`` is the weight of the new batch; None means 1 / num_batches_tracked, the cumulative average. An empty
    batch is counted and leaves the statistics alone.
    """
    if rows > 0:
        factor: float | Tensor = 0.0 if momentum is None else momentum
        if momentum is None and num_batches_tracked is not None:
            factor = (num_batches_tracked + 1).to(mean.dtype).reciprocal()
        unbiased = var * (rows / (rows - 1))
        pairs = [(old, new) for old, new in ((running_mean, mean), (running_var, unbiased)) if old is not None]
        for running, batch in pairs:
            _check_batched_alike(running, batch)
        for running, batch in pairs:
            running.copy_((1 - factor) * running.to(batch.dtype) + factor * batch)
    # Last: a transform of torch.func that may not write to the statistics has raised by now.
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


def _check_batched_alike(running: Tensor, batch: Tensor) -> None:
    """Refuse statistics of many batches for one running statistic; torch would tell of some in-place operation."""
    if torch.compiler.is_compiling():  # cannot ask; torch raises on its own
        return
    level = torch._C._functorch.maybe_get_level
    if torch._C._functorch.is_batchedtensor(batch) and level(running) < level(batch):
        raise RuntimeError(
            "batch_norm: expected running_mean and running_var with the batch dimension of input under vmap, which "
            "would update them for each; got them without. Pass them through vmap too, or turn track_running_stats off"
        )


def check_values(x: Tensor, training: bool, eps: float) -> None:
    """Refuse what has no value to return, in torch's own words.

    Raises:
        ValueError: training with one value per channel, or an ``eps`` that is not positive (eval: negative).
    """
    if not training:
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return
    # numel first: the usual case, without a loop over the sizes
    if x.dim() >= 2 and x.numel() == x.shape[1] and rows_of(x) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


def check_input(x: Tensor) -> None:
    """Refuse what is no dense tensor of at least two dimensions and a dtype that batch norm knows.

    Raises:
        TypeError: not a tensor.
        RuntimeError: sparse, of too few dimensions, or of another dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"batch_norm: expected input to be a Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise RuntimeError(f"batch_norm: expected input to be a dense (strided) tensor, got {x.layout}")
    if x.dim() < 2 and x.shape != (0,):
        raise RuntimeError(f"batch_norm: expected input of shape [N, C, ...], got {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise RuntimeError(f"batch_norm: expected input of float16, bfloat16, float32 or float64, got {x.dtype}")


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
    """Refuse what plain torch would broadcast or cast in silence; csrc/ops/ops.h does the same for the kernels.

    Raises:
        TypeError: an argument that is neither a tensor nor None.
        RuntimeError: a shape, dtype or device that does not fit ``x``, or running statistics that are missing in eval
            or require grad.
    """
    channels = (channels_of(x),)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = [wide] if x.dtype == wide else [wide, x.dtype]
    wanted = {
        "weight": (weight, channels, statistics),
        "bias": (bias, channels, statistics),
        "running_mean": (running_mean, channels, statistics),
        "running_var": (running_var, channels, statistics),
        "residual": (residual, x.shape, [x.dtype]),
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        if tensor is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"batch_norm: expected {name} when not training, got None")
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
    """Refuse running statistics that require grad, as torch does: a caller who wants a gradient would get none.

    Raises:
        RuntimeError: one of them requires grad, and gradients are enabled.
    """
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{op}: expected {name} that does not require grad, as batch norm has no gradient for it, got one that "
                "does; detach() it"
            )


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``(C,)`` to be broadcast against ``x``."""
    return values.view(-1, *[1] * (x.dim() - 2))
