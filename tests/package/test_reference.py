"""``bnfused/reference.py`` is the specification: what it says of itself beyond what every backend is held to."""

from __future__ import annotations

import pytest
import torch

import bnfused
from support import cases, checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_readable_formula(dtype):
    """The reference is the textbook expression, written out here for one small tensor."""
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0], [8.0, 16.0]], dtype=dtype)
    running_mean, running_var = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    y = bnfused.reference.batch_norm(x, running_mean, running_var, training=True, momentum=0.5)
    # Channel 0: mean 4, deviations -3, -1, 4, biased variance 26/3. Channel 1: mean 12, -2, -2, 4, variance 8.
    std = torch.tensor([26 / 3 + 1e-5, 8 + 1e-5], dtype=torch.float64).sqrt()
    wanted = torch.tensor([[-3.0, -2.0], [-1.0, -2.0], [4.0, 4.0]], dtype=torch.float64) / std
    checks.assert_within("y", y, wanted, cases.limit(wanted, 2.0, dtype))
    assert running_mean.tolist() == [2.0, 6.0]
    assert running_var.tolist() == [0.5 + 0.5 * 13, 0.5 + 0.5 * 12]


def test_differentiable_to_any_order():
    """Fourth derivatives agree with finite differences of the third."""
    p = cases.make((3, 1, 2), dtype=torch.float64, running=False, activation="silu", counter=None)

    def third(x):
        grad = (checks.call(bnfused.reference.batch_norm, p, x=x) * p.grad_y).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(grad, x, create_graph=True)
            grad = (grad * p.grad_y).sum()
        return grad

    assert torch.autograd.gradcheck(third, p.x.detach().requires_grad_())
