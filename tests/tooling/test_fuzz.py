"""The random calls of ``make fuzz``: a moment of them, and that what is wrong is found and can be run again."""

from __future__ import annotations

import re

import pytest

from bnfused import functional
from tools import fuzz

pytestmark = pytest.mark.usefixtures("extension")

right = functional.batch_norm


def wrong_value(x, *args, residual=None, activation=None, **kwargs):
    """One of many epilogues is off by a thousandth."""
    y = right(x, *args, residual=residual, activation=activation, **kwargs)
    return y * 1.001 if residual is not None and activation == "silu" else y


def written_before_the_check(x, running_mean, *args, **kwargs):
    """An error that comes after the statistics have moved."""
    try:
        return right(x, running_mean, *args, **kwargs)
    except RuntimeError:
        if running_mean is not None and running_mean.is_floating_point():
            running_mean += 1
        raise


def raises_for_nothing(x, *args, activation=None, **kwargs):
    """A refusal that torch does not share."""
    if activation == "gelu" and x.dim() == 5:
        raise RuntimeError("expected another rank")
    return right(x, *args, activation=activation, **kwargs)


def test_calls_agree_with_torch(seed):
    """A second of them."""
    assert fuzz.main(["--seconds", "1", "--seed", str(seed)]) == 0


@pytest.mark.parametrize("wrong", [wrong_value, written_before_the_check, raises_for_nothing])
def test_what_is_wrong_is_found(monkeypatch, capsys, seed, wrong):
    """And printed as a call that fails again, and does not where nothing is wrong.

    About one call of a hundred shows it; a loaded machine makes as many in a second.
    """
    monkeypatch.setattr(functional, "batch_norm", wrong)
    assert fuzz.main(["--seconds", "300", "--seed", str(seed)]) == 1
    (call,) = re.findall(r"--call ([0-9a-f]*)", capsys.readouterr().out)
    with pytest.raises(AssertionError):
        fuzz.main(["--call", call])
    monkeypatch.undo()
    assert fuzz.main(["--call", call]) == 0
