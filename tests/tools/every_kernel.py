"""One small call of every CUDA kernel, for compute-sanitizer, under which the tests would take hours.

No results are compared here: the tool reports faulty memory accesses and barriers. ``--seconds`` sets the time after
which no further tensor is begun.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bnfused import functional, parts

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# A channel has few values, many, or too many for a cluster. Rows and planes have whole units of 8, or odd sizes. The
# masked planes of 63 x 65 take two launches, and so do the rows with copies of a channel in more blocks than a GPU has
# room for at once.
SHAPES = (
    *((4, 16, 8, 8), (3, 5, 7, 7), (0, 4, 2, 2), (16, 6, 64, 65), (16, 6, 63, 65), (2, 1, 512, 512)),
    *((3000, 65), (20000, 16), (24, 20011)),
)
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
FUSIONS = ((None, False), ("relu", False), ("relu", True), ("silu", True))


def placed(shape: tuple[int, ...], dtype: torch.dtype, device: str, place: torch.memory_format | str) -> Tensor:
    """Random values in a memory format, or at an address that is not a multiple of 16."""
    values = torch.randn(torch.Size(shape).numel() + 1, device=device).to(dtype)
    if isinstance(place, str):
        return values[1:].view(shape)
    return values[:-1].view(shape).contiguous(memory_format=place)


def step(x: Tensor) -> None:
    """Runs training, frozen and eval with every fusion, and the parts of a batch norm over processes."""
    own = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias, mean, var = (torch.rand(x.shape[1], device=x.device, dtype=own) + 0.5 for _ in range(4))
    count = torch.zeros((), dtype=torch.long, device=x.device)
    for activation, fused in FUSIONS:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, *([x.clone()] if fused else []))]
        residual = leaves[3] if fused else None
        for training in (True, False):
            # Half of the frozen calls need no gradients of the parameters. So kernels run with and without sums.
            of_parameters = training or fused
            wanted = leaves if of_parameters else leaves[:1]
            y = functional.batch_norm(
                leaves[0],
                mean,
                var,
                leaves[1] if of_parameters else weight,
                leaves[2] if of_parameters else bias,
                training,
                None if training else 0.1,
                residual=residual,
                activation=activation,
                num_batches_tracked=count if training else None,
            )
            torch.autograd.grad(y, wanted, torch.ones_like(y))
        with torch.no_grad():
            functional.batch_norm(x, mean, var, weight, bias, residual=residual, activation=activation)
    moments = torch.stack([parts.batch_norm_stats(x)] * 2)
    parts.merge_moments(moments)
    all_mean, all_var, rows = parts.batch_norm_gather_stats(moments, mean, var, count)
    _, invstd, mask = parts.batch_norm_apply(x, all_mean, all_var, weight, bias, activation="relu")
    saved = (torch.ones_like(x), x, all_mean, invstd)
    sums = parts.batch_norm_backward_reduce(*saved, weight, bias, mask=mask, activation="relu")
    parts.batch_norm_backward_apply(*saved, sums, rows, weight, bias, mask=mask, activation="relu")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", type=int, default=len(DTYPES), help="as many of the dtypes; default: all four")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing later than this")
    options = parser.parse_args(arguments)
    places = (CONTIGUOUS, CHANNELS_LAST, "misaligned")
    tensors = [
        (dtype, shape, place)
        for dtype, shape, place in itertools.product(DTYPES[: options.dtypes], SHAPES, places)
        if len(shape) == 4 or place != CHANNELS_LAST
    ]
    start = time.monotonic()
    for number, (dtype, shape, place) in enumerate(tensors):
        if time.monotonic() - start > options.seconds:
            print(f"out of time: {number} of {len(tensors)} tensors, and no error in these")
            return 0
        print(f"{number + 1}/{len(tensors)}: {tuple(shape)} {dtype} {place}", flush=True)
        step(placed(shape, dtype, options.device, place))
        if options.device == "cuda":
            torch.cuda.synchronize()  # so that an error belongs to this tensor
    return 0


if __name__ == "__main__":
    sys.exit(main())
