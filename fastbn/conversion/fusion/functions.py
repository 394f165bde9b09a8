"""Which calls of functions and methods are an activation that the compiled operators have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import fx

from ...activations import Activation, activation_of

if TYPE_CHECKING:
    from collections.abc import Callable

# Names of the activations, and of the arguments that may follow the input.
_FUNCTIONS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.relu: ("relu", ("inplace",)),
    F.relu_: ("relu", ()),
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.relu6: ("relu6", ("inplace",)),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.elu: ("elu", ("alpha", "inplace")),
    F.elu_: ("elu", ("alpha",)),
    F.silu: ("silu", ("inplace",)),
    F.gelu: ("gelu", ("approximate",)),
    F.hardswish: ("hardswish", ("inplace",)),
    F.hardsigmoid: ("hardsigmoid", ("inplace",)),
    F.sigmoid: ("sigmoid", ()),
    torch.sigmoid: ("sigmoid", ()),
    torch.sigmoid_: ("sigmoid", ()),
    F.tanh: ("tanh", ()),
    torch.tanh: ("tanh", ()),
    torch.tanh_: ("tanh", ()),
    F.mish: ("mish", ("inplace",)),
}
_METHODS = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}


def function_of_call(node: fx.Node) -> Activation | None:
    """The activation that a call of a function or method computes; None if it is none of those."""
    name, keywords = "", tuple[str, ...]()
    if isinstance(node.target, str):
        name = _METHODS.get(node.target, "") if node.op == "call_method" else ""
    else:
        name, keywords = _FUNCTIONS.get(node.target, (name, keywords))
    kwargs = {**dict(zip(keywords, node.args[1:], strict=False)), **node.kwargs}
    takes_input_first = len(node.args) in range(1, len(keywords) + 2)
    if not name or not takes_input_first or any(isinstance(v, fx.Node) for v in kwargs.values()):
        return None
    return activation_of(name, kwargs)
