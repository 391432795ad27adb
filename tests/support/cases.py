"""The inputs of the checks: shapes, layouts, data regimes, dtypes. And the tolerances, each with its derivation.

The data are random and fresh in every run (conftest.py prints the seed); a regime is a recipe, not a stored tensor.
``x`` is made in the dtype under test. The expected results are computed from exactly these values in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from support import oracle

# ------------------------------------------------------------------------------------------- shapes

# Channel counts: below, at and above the vector widths (8 and 16 float32, 32 float16), primes, multiples that are not
# powers of two (a grid rounded down to one would leave half of 65, 96 and 320 undone), and many channels of few rows.
CHANNELS = (1, 2, 3, 5, 8, 12, 16, 31, 33, 48, 64, 65, 96, 320, 2048, 4099)

# Planes (H, W) of 1, 2, 4, 7, 9, 49, 50, 196 values and an odd number: shorter than a vector, and every remainder.
SPATIAL = ((1, 1), (1, 2), (2, 2), (7, 1), (3, 3), (7, 7), (5, 10), (14, 14), (13, 17))

# One below, at, and one above the sizes at which the CPU flushes or merges an accumulator: 32768 values of a
# plane and 524 rows (kBlockValues and kBlockRows in csrc/cpu/tuning.h), 4 rows (kLaneValues in
# csrc/cpu/leaves_sums.h); and twice as many. A block on a GPU has 256 threads.
BLOCK_ELEMENTS = (32767, 32768, 32769, 65535, 65537)
BLOCK_ROWS = (3, 4, 5, 7, 8, 9, 255, 256, 257, 523, 524, 525, 1047, 1049)

RANKS = {2: (24, 5), 3: (6, 5, 7), 4: (4, 5, 3, 6), 5: (3, 5, 2, 3, 4), 6: (2, 5, 2, 3, 2, 2)}

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "hardswish", "sigmoid", "tanh")
PARAMS = {"leaky_relu": 0.2, "elu": 0.7}  # not the defaults, which would hide that activation_param is ignored

# ------------------------------------------------------------------------------------------ layouts


def _permuted(x: Tensor, source: int, target: int) -> Tensor:
    """``x`` with its dimension ``source`` at ``target`` in memory; the shape stays."""
    return x.movedim(source, target).contiguous().movedim(target, source)


def _holes(x: Tensor, dim: int) -> Tensor:
    """``x`` in every second place along ``dim`` of a buffer. The other places hold NaN, so that reading them shows."""
    sizes = list(x.shape)
    sizes[dim] *= 2
    buffer = x.new_full(sizes, math.nan)
    return buffer[(slice(None),) * dim + (slice(None, None, 2),)].copy_(x)


def _window(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """A window along ``dim`` of a wider buffer of NaN."""
    sizes = list(x.shape)
    sizes[dim] += before + after
    return x.new_full(sizes, math.nan).narrow(dim, before, x.shape[dim]).copy_(x)


def _offset(x: Tensor) -> Tensor:
    """Dense, with the strides of ``x``, but one element after the aligned beginning of the allocation."""
    buffer = x.new_full((x.numel() + 1,), math.nan)
    return buffer.as_strided(x.shape, torch.empty_like(x).stride(), 1).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: _permuted(x, 1, -1),  # NLC view, channels_last, channels_last_3d by rank
    "channels_outermost": lambda x: _permuted(x, 1, 0),
    "batch_innermost": lambda x: _permuted(x, 0, -1),
    "last_two_swapped": lambda x: _permuted(x, -2, -1),
    "offset": lambda x: _offset(x.contiguous()),
    "offset_channels_last": lambda x: _offset(_permuted(x, 1, -1)),
    "holes_in_last": lambda x: _holes(x, x.dim() - 1),
    "holes_in_batch": lambda x: _holes(x, 0),
    "channel_window": lambda x: _window(x, 1, 2, 1),
    "channel_window_channels_last": lambda x: _window(x.movedim(1, -1), x.dim() - 1, 1, 2).movedim(-1, 1),
    "padded_rows": lambda x: _window(x, x.dim() - 1, 0, 1),
    # These repeat values, so they change the data. The expected results are computed from the changed data.
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_last": lambda x: x[..., :1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
}


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides promised for y and grad_x: those of a dense x; otherwise those that torch gives a like tensor."""
    return torch.empty_like(x).stride()


def strides_that_matter(x: Tensor, strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides without those of dimensions of size 1, which are never used."""
    return tuple(stride for size, stride in zip(x.shape, strides, strict=True) if size > 1)


# ------------------------------------------------------------------------------------------ regimes


def _first_sample(x: Tensor, value: float) -> Tensor:
    """The first value of each channel is ``value``."""
    x = x.clone()
    x[(0, slice(None), *[0] * (x.dim() - 2))] = value
    return x


def _drift(x: Tensor) -> Tensor:
    """The mean moves by 100 std from the first sample to the last, so a shift taken at the start does not fit."""
    ramp = torch.linspace(0.0, 100.0, x.shape[0], dtype=x.dtype)
    return x + ramp.view(-1, *[1] * (x.dim() - 1))


def _constant(x: Tensor) -> Tensor:
    """A random constant per channel. It has float32 precision, so that its sums are exact in float64."""
    values = (10_000.1 * torch.randn(x.shape[1])).to(x.dtype)
    return values.view(-1, *[1] * (x.dim() - 2)).expand_as(x).clone()


# Each makes the data from N(0, 1) in float64. They are cast to the dtype under test afterwards.
REGIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "standard": lambda x: x,
    "mean_1e4_std_0.1": lambda x: 1e4 + 0.1 * x,
    "mean_1e4_std_0.01": lambda x: 1e4 + 0.01 * x,
    "mean_-30_std_1e-3": lambda x: -30 + 1e-3 * x,
    "scale_1e4": lambda x: 1e4 * x,
    "scale_1e-4": lambda x: 1e-4 * x,
    "drift": _drift,
    "outlier_first": lambda x: _first_sample(x, 1e4),
    "outlier_first_at_1e4": lambda x: _first_sample(1e4 + 0.01 * x, 2e4),
    "constant": _constant,
}
# bfloat16 has 8 bits and float16 ends at 65504: these keep several values per std in 16 bits.
REGIMES_16 = {
    "standard": REGIMES["standard"],
    "mean_100_std_10": lambda x: 100 + 10 * x,
    "mean_1e4_std_100": lambda x: 1e4 + 100 * x,
    "scale_1e-2": lambda x: 1e-2 * x,
    "constant": lambda x: _constant(x) / 10,
}

# --------------------------------------------------------------------------------------- tolerances

# All are relative to the largest expected value. float32: y = (x - mean) * scale + bias has three roundings of 6e-8,
# and sums of up to 1e5 products, in blocks, add a few more. 5e-6 leaves a factor of ten. It is thousands of times
# below the error from a float32 mean for data with mean 1e4 and std 0.01: that mean is off by up to 5e-4, a twentieth
# of a std.
FLOAT32 = 5e-6
# float64: as many roundings of 1.1e-16, and the oracle's own. At mean 1e4 and std 0.01 both lose a factor of 1e6.
FLOAT64 = 1e-12
FLOAT64_HARD = 1e-9
# z is right to 5e-6. Nearer to a kink float32 cannot tell on which side z is, so gradients are not compared there.
KINK_MARGIN = 1e-5

KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "elu": (0.0,), "hardswish": (-3.0, 3.0)}


def limit(expected: Tensor, scale: float | Tensor, dtype: torch.dtype, *, hard: bool = False) -> Tensor:
    """The largest error allowed at each element of ``expected`` (float64), for a result stored in ``dtype``.

    ``scale`` is the largest expected value, or the size of the terms if they cancel; see oracle.py. ``hard`` is for
    float64 data with a mean of a million times their std.
    A 16-bit result is the float32 result rounded once. That adds half a unit in the last place of *this* element (half
    the smallest subnormal near 0) to the float32 error.
    """
    if dtype == torch.float64:
        return torch.zeros_like(expected) + (FLOAT64_HARD if hard else FLOAT64) * scale
    limits = torch.zeros_like(expected) + FLOAT32 * scale
    if dtype == torch.float32:
        return limits
    info = torch.finfo(dtype)
    smallest_subnormal = info.smallest_normal * info.eps
    return limits + info.eps / 2 * expected.abs() + smallest_subnormal / 2


def no_worse_than_torch(torch_error: float, dtype: torch.dtype) -> float:
    """The largest relative error allowed if torch's own error against float64 is ``torch_error``.

    The margin above torch's own is half of it or one rounding of the output (a unit in the last place of its largest
    value), whichever is more. The worst of thousands of equally good values differs by that much by chance.
    """
    return torch_error + max(torch_error / 2, torch.finfo(dtype).eps)


# ----------------------------------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """The arguments of one call of batch_norm, and the gradient of its output."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    residual: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    activation: str | None = None
    activation_param: float | None = None

    def but(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    @property
    def rows(self) -> int:
        return math.prod([self.x.shape[0], *self.x.shape[2:]])

    def __repr__(self) -> str:
        parts = []
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                value = f"{str(value.dtype)[6:]}{list(value.shape)}/{list(value.stride())}"
            parts.append(f"{name}={value}")
        return f"Problem({', '.join(parts)})"


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit activations, as in mixed-precision training."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    regime: str | Callable[[Tensor], Tensor] = "standard",
    param_dtype: torch.dtype | None = None,
    weight: bool = True,
    bias: bool = True,
    running: bool = True,
    zero_stats: bool = False,
    counter: int | None = 3,
    residual: bool = False,
    grad_layout: str | None = None,
    activation: str | None = None,
    activation_param: float | None = None,
    **settings: Any,
) -> Problem:
    """A random problem. Weights have both signs and are at least 0.5 in size. ``zero_stats`` starts the running
    statistics at 0, so that an error of their update shows.
    """
    param_dtype = parameter_dtype(dtype) if param_dtype is None else param_dtype
    recipe = REGIMES[regime] if isinstance(regime, str) else regime
    channels = shape[1]

    def activations_like(values: Tensor) -> Tensor:
        return LAYOUTS[layout](values.to(dtype))

    def normal() -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    sign = torch.randint(0, 2, (channels,)) * 2 - 1
    stats = (
        (torch.zeros(channels), torch.zeros(channels))
        if zero_stats
        else (torch.randn(channels), torch.rand(channels) + 0.5)
    )
    if activation is not None and activation_param is None:
        activation_param = PARAMS.get(activation)
    problem = Problem(
        x=activations_like(recipe(normal())),
        grad_y=LAYOUTS[grad_layout or "contiguous"](normal().to(dtype)),
        weight=((torch.rand(channels) + 0.5) * sign).to(param_dtype) if weight else None,
        bias=torch.randn(channels).to(param_dtype) if bias else None,
        running_mean=stats[0].to(param_dtype) if running else None,
        running_var=stats[1].to(param_dtype) if running else None,
        num_batches_tracked=None if counter is None else torch.tensor(counter),
        residual=activations_like(normal()) if residual else None,
        activation=activation,
        activation_param=activation_param,
        **settings,
    )
    return away_from_kinks(problem)


def away_from_kinks(problem: Problem) -> Problem:
    """The problem with grad_y set to 0 where z is too near a kink for float32 to know its side."""
    kinks = KINKS.get(problem.activation or "", ())
    if not kinks or problem.x.numel() == 0:
        return problem
    z = oracle.before_activation(problem)
    margin = KINK_MARGIN * max(1.0, oracle.finite_max(z))
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in kinks:
        near |= (z - kink).abs() <= margin
    if not near.any():
        return problem
    return problem.but(grad_y=problem.grad_y.clone().masked_fill_(near, 0.0))
