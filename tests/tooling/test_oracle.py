"""The oracle itself, and the data: two independent float64 computations agree, and the regimes are what they say."""

from __future__ import annotations

import pytest
import torch

from support import cases, checks, oracle


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *cases.ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True])
def test_formula_is_torchs_in_float64(training, activation, residual):
    """The paper's formula and torch's batch norm, in float64, agree on values, gradients and running statistics."""
    p = cases.make((6, 4, 5), dtype=torch.float64, training=training, activation=activation, residual=residual)
    checks.check_against_oracle(oracle.torch_batch_norm, p)


@pytest.mark.parametrize("regime", cases.REGIMES)
def test_regimes_are_hard_where_they_say(regime):
    """The float32 values keep the mean and the std that the regime is named after."""
    x = cases.make((512, 3, 8), regime=regime).x.double()
    mean, var = oracle.statistics(x)
    wanted = {
        "standard": (0, 1),
        "mean_1e4_std_0.1": (1e4, 0.1),
        "mean_1e4_std_0.01": (1e4, 0.01),
        "mean_-30_std_1e-3": (-30, 1e-3),
        "scale_1e4": (0, 1e4),
        "scale_1e-4": (0, 1e-4),
        "drift": (50, 100 / 12**0.5),
        "outlier_first": (1e4 / 4096, 1e4 / 64),
        "outlier_first_at_1e4": (1e4 + 1e4 / 4096, 1e4 / 64),
        "constant": (None, 0),
    }[regime]
    if wanted[0] is not None:
        assert ((mean - wanted[0]).abs() < 0.2 * wanted[1]).all()
    assert ((var.sqrt() - wanted[1]).abs() <= 0.2 * wanted[1]).all()
    if regime.startswith("outlier"):
        assert (x[0, :, 0] == (1e4 if regime == "outlier_first" else 2e4)).all()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("rank", cases.RANKS)
def test_layouts_keep_values(layout, rank):
    """A layout moves memory, not values; the expanding ones repeat values and are told apart by a stride of 0."""
    values = torch.randn(cases.RANKS[rank])
    x = cases.LAYOUTS[layout](values)
    assert x.shape == values.shape
    if layout.startswith("expanded"):
        assert 0 in x.stride()
    else:
        assert torch.equal(x, values)
        assert 0 not in x.stride()
    if layout.startswith("offset"):
        assert x.data_ptr() % 16 == 4
