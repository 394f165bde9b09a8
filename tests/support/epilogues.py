"""The oracle of what follows batch norm, in float64.

``y = function(z)``, z being batch norm's result plus a residual.

The values of functions are PyTorch's own in float64, and so are the derivatives, but for one that
versions of it take differently at kinks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fastbn.activations import Activation, activation_of

from . import oracle
from .tolerances import ARITHMETIC, accumulate_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from .oracle import Expected
    from .tables import Tensors

# Every function, with parameters that are not PyTorch's defaults where it has one.
ACTIVATIONS = {
    "identity": activation_of(None),
    "relu": activation_of("relu"),
    "relu6": activation_of("relu6"),
    "leaky_relu": activation_of("leaky_relu", {"negative_slope": 0.2}),
    "elu": activation_of("elu", {"alpha": 0.7}),
    "silu": activation_of("silu"),
    "gelu": activation_of("gelu"),
    "gelu_tanh": activation_of("gelu", {"approximate": "tanh"}),
    "hardswish": activation_of("hardswish"),
    "hardsigmoid": activation_of("hardsigmoid"),
    "sigmoid": activation_of("sigmoid"),
    "tanh": activation_of("tanh"),
    "mish": activation_of("mish"),
}

# The steepest slope of any of them is less.
STEEPEST = 1.6


def derivative(activation: Activation, z: Tensor) -> Tensor:
    """At z, float64."""
    if activation.name == "hardswish":
        return torch.where(z <= -3, 0, torch.where(z >= 3, 1, z / 3 + 0.5))
    z = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(activation(z).sum(), z)
    return slope


@dataclass(frozen=True)
class WithEpilogue:
    """What forward and backward should return, and the dy that this is of.

    Attributes:
        dy: the gradient of y; zero where the arithmetic of z decides on which side of a kink, or of
            a number that 16 bits hold, z lies.
        expected: of y, dx, dresidual, dweight and dbias.
    """

    dy: Tensor
    expected: dict[str, Expected]


def with_epilogue(
    tensors: Tensors,
    residual: Tensor | None,
    activation: Activation,
    statistics: oracle.Statistics,
    training: bool,
) -> WithEpilogue:
    """Both passes of batch norm with an epilogue."""
    x, dtype = tensors.x, tensors.x.dtype
    plain = oracle.output(x, tensors.weight, tensors.bias, statistics)
    z, size = plain.value, plain.scale
    if residual is not None:
        added = residual.detach().double()
        z, size = z + added, size + added.abs()
    y = oracle.Expected(activation(z), STEEPEST * size, STEEPEST * plain.held)

    epsilon = torch.finfo(accumulate_dtype(dtype)).eps
    uncertainty = epsilon * (ARITHMETIC["y"] * size + plain.held)
    slope, below, above = (
        derivative(activation, (z + shift).to(dtype).double())
        for shift in (torch.zeros_like(z), -uncertainty, uncertainty)
    )
    # No function's slope changes faster than z does, but for kinks.
    unsure = (above - below).abs() > 2 * uncertainty
    dy = torch.where(unsure, 0, tensors.dy)
    dz = dy.double() * slope
    gradients = oracle.gradients(dz, x, tensors.weight, statistics, training)
    # The slope errs as much as its terms and z do, and so does whatever is computed of it.
    terms = dy.double().abs() * (1 + slope.abs() + size)
    of_terms = oracle.gradients(terms, x, tensors.weight, statistics, training=False)
    for quantity, exact in gradients.items():
        gradients[quantity] = replace(exact, scale=exact.scale + of_terms[quantity].scale)
    # Besides, dx may be computed from dz as the dtype of x holds it.
    kept = torch.finfo(dtype).eps / 2 / epsilon / ARITHMETIC["dx"]
    of_dz = oracle.gradients(dz, x, tensors.weight, statistics, training=False)["dx"].scale
    dx = gradients["dx"]
    gradients["dx"] = replace(dx, scale=dx.scale + kept * of_dz)
    return WithEpilogue(
        dy, {"y": y, "dresidual": oracle.Expected(dz, terms, torch.zeros_like(terms)), **gradients}
    )
