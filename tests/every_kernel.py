"""One small call of every CUDA kernel, for compute-sanitizer, under which all of the tests would take hours.

Nothing is compared here: what is wrong with a memory access or a barrier, the tool says.
"""

from __future__ import annotations

import itertools
import sys

import torch

from bnfused import functional

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The values of a channel are few, or many, or too many for a cluster; rows and planes of whole units of 8, and of odd
# sizes. Two launches have masked planes of 63 x 65, and rows whose copies of a channel lie in more blocks than a GPU
# has room for at once.
SHAPES = (
    *((4, 16, 8, 8), (3, 5, 7, 7), (0, 4, 2, 2), (16, 6, 64, 65), (16, 6, 63, 65), (2, 1, 512, 512)),
    *((3000, 65), (20000, 16), (24, 20011)),
)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
FUSIONS = ((None, False), ("relu", False), ("relu", True), ("silu", True))


def step(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, misaligned: bool) -> int:
    """Training, frozen and eval of every fusion on one tensor; the number of calls."""
    values = torch.randn(torch.Size(shape).numel() + 1, device="cuda").to(dtype)
    x = values[int(misaligned) :][: values.numel() - 1].view(shape)
    if not misaligned:
        x = x.contiguous(memory_format=layout)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, var = (torch.rand(shape[1], device="cuda", dtype=own) + 0.5 for _ in range(4))
    count = torch.zeros((), dtype=torch.long, device="cuda")
    for activation, fused in FUSIONS:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, *([x.clone()] if fused else []))]
        residual = leaves[3] if fused else None
        for training in (True, False):
            # Frozen, and without gradients of the parameters in half of it: what sums, and what has nothing to sum.
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
    return 3 * len(FUSIONS)


def main() -> int:
    calls = 0
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for layout in LAYOUTS if len(shape) == 4 else LAYOUTS[:1]:
            calls += step(shape, layout, dtype, misaligned=False)
        calls += step(shape, LAYOUTS[0], dtype, misaligned=True)
    torch.cuda.synchronize()
    print(f"{calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
