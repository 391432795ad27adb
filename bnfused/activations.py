"""The activations that batch norm can fuse: their names, their codes in the kernels, and their functions in torch.

``enum class Activation`` in ``csrc/batch_norm.h`` has the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    code: int
    default: float  # value of activation_param if None is passed; unused by an activation without a parameter
    takes_param: bool
    function: Callable[[Tensor, float], Tensor]


IDENTITY = "identity"
RELU_CODE = 1

ACTIVATIONS: dict[str, Activation] = {
    IDENTITY: Activation(0, 0.0, False, lambda z, _: z),
    "relu": Activation(RELU_CODE, 0.0, False, lambda z, _: F.relu(z)),
    "relu6": Activation(2, 0.0, False, lambda z, _: F.relu6(z)),
    "leaky_relu": Activation(3, 0.01, True, lambda z, slope: F.leaky_relu(z, slope)),
    "elu": Activation(4, 1.0, True, lambda z, alpha: F.elu(z, alpha)),
    "silu": Activation(5, 0.0, False, lambda z, _: F.silu(z)),
    "gelu": Activation(6, 0.0, False, lambda z, _: F.gelu(z)),
    "hardswish": Activation(7, 0.0, False, lambda z, _: F.hardswish(z)),
    "sigmoid": Activation(8, 0.0, False, lambda z, _: z.sigmoid()),
    "tanh": Activation(9, 0.0, False, lambda z, _: z.tanh()),
}

_BY_CODE = {activation.code: activation for activation in ACTIVATIONS.values()}


def resolve(name: str | None, param: float | None) -> tuple[int, float]:
    """The code and the parameter that the kernels take, for a name in ``ACTIVATIONS`` or None.

    Raises:
        ValueError: the name is unknown, or the activation takes no parameter.
        TypeError: the parameter requires grad; it would not get a gradient.
    """
    if name is None:
        if param is not None:
            raise ValueError("batch_norm: activation_param was given without an activation")
        return 0, 0.0
    activation = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if activation is None:
        raise ValueError(f"batch_norm: expected activation to be None or one of {', '.join(ACTIVATIONS)}; got {name!r}")
    if param is None:
        return activation.code, activation.default
    if not activation.takes_param:
        raise ValueError(f"batch_norm: activation {name!r} takes no activation_param, got {param}")
    if isinstance(param, Tensor) and param.requires_grad:
        raise TypeError("batch_norm: expected activation_param to be a number, got a tensor that requires grad")
    return activation.code, float(param)


def apply(code: int, param: float, z: Tensor) -> Tensor:
    """The activation in plain, differentiable torch."""
    return _BY_CODE[code].function(z, param)
