"""The activation functions that may follow batch norm: their names, parameters, and PyTorch's own.

The compiled functions of these names are in csrc/core/activation_functions.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class _Parameter(NamedTuple):
    keyword: str
    default: float


class _Function(NamedTuple):
    """PyTorch's function of z, or of z and the parameter where there is one."""

    apply: Callable[..., Tensor]
    parameter: _Parameter | None = None


def _identity(z: Tensor) -> Tensor:
    return z


def _hardsigmoid(z: Tensor) -> Tensor:
    """Which PyTorch's own cannot differentiate twice, and differentiates with a float32 sixth."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return (F.relu6(wide + 3) / 6).to(z.dtype)


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


_FUNCTIONS = {
    "identity": _Function(_identity),
    "relu": _Function(F.relu),
    "relu6": _Function(F.relu6),
    "leaky_relu": _Function(F.leaky_relu, _Parameter("negative_slope", 0.01)),
    "elu": _Function(F.elu, _Parameter("alpha", 1.0)),
    "silu": _Function(F.silu),
    "gelu": _Function(F.gelu),
    "gelu_tanh": _Function(_gelu_tanh),
    "hardswish": _Function(F.hardswish),
    "hardsigmoid": _Function(_hardsigmoid),
    "sigmoid": _Function(torch.sigmoid),
    "tanh": _Function(torch.tanh),
    "mish": _Function(F.mish),
}

NAMES = tuple(_FUNCTIONS)


class Activation(NamedTuple):
    """An activation function as the compiled operators take it.

    Attributes:
        name: one of ``NAMES``.
        parameter: the slope of ``leaky_relu`` or the alpha of ``elu``; 0 for all others.
    """

    name: str
    parameter: float = 0.0

    @property
    def kwargs(self) -> dict[str, float]:
        """The keyword arguments of which :func:`activation_of` makes this, defaults included."""
        parameter = _FUNCTIONS[self.name].parameter
        return {} if parameter is None else {parameter.keyword: self.parameter}

    def __call__(self, z: Tensor) -> Tensor:
        """The same by PyTorch's own function."""
        function = _FUNCTIONS[self.name]
        if function.parameter is None:
            return function.apply(z)
        return function.apply(z, self.parameter)


IDENTITY = Activation("identity")


def activation_of(name: str | None, kwargs: Mapping[str, object] | None = None) -> Activation:
    """The activation function of that name, with keyword arguments as PyTorch's module takes them.

    Args:
        name: one of ``NAMES``; None for the identity.
        kwargs: ``negative_slope`` of ``leaky_relu``, ``alpha`` of ``elu``, ``approximate`` of
            ``gelu``. ``inplace`` is taken for all, and means nothing: nothing is kept that could be
            overwritten.

    Raises:
        ValueError: there is no function of that name.
        RuntimeError: ``approximate`` is neither ``none`` nor ``tanh``.
        TypeError: a keyword argument that the function does not have.
    """
    name = "identity" if name is None else name
    left = dict(kwargs or {})
    left.pop("inplace", None)
    given = name
    if name == "gelu":
        approximate = left.pop("approximate", "none")
        if approximate not in ("none", "tanh"):
            raise RuntimeError("approximate argument must be either none or tanh.")
        name = "gelu_tanh" if approximate == "tanh" else name
    if name not in _FUNCTIONS:
        raise ValueError(f"activation is {name!r}; it may be one of {', '.join(NAMES)}")
    parameter = _FUNCTIONS[name].parameter
    value = 0.0 if parameter is None else float(left.pop(*parameter))  # type: ignore[arg-type]
    if left:
        known = [*((parameter.keyword,) if parameter else ()), "inplace"]
        known[:0] = ["approximate"] if given == "gelu" else []
        raise TypeError(
            f"{name} got {', '.join(left)}; of keyword arguments it takes {' and '.join(known)}"
        )
    return Activation(name, value)
