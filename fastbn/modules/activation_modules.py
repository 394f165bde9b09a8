"""Which modules are activation functions that the compiled operators have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules import module as module_of_stock

from ..activations import IDENTITY, Activation

if TYPE_CHECKING:
    from collections.abc import Callable

_OF_CLASS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.Identity: lambda _: IDENTITY,
    nn.ReLU: lambda _: Activation("relu"),
    nn.ReLU6: lambda _: Activation("relu6"),
    nn.LeakyReLU: lambda act: Activation("leaky_relu", act.negative_slope),
    nn.ELU: lambda act: Activation("elu", act.alpha),
    nn.SiLU: lambda _: Activation("silu"),
    nn.GELU: lambda act: Activation("gelu_tanh" if act.approximate == "tanh" else "gelu"),
    nn.Hardswish: lambda _: Activation("hardswish"),
    nn.Hardsigmoid: lambda _: Activation("hardsigmoid"),
    nn.Sigmoid: lambda _: Activation("sigmoid"),
    nn.Tanh: lambda _: Activation("tanh"),
    nn.Mish: lambda _: Activation("mish"),
}

# Classes of timm and transformers, by name so that these need not be there.
_OF_NAME = {
    ("timm.layers.activations", "Sigmoid"): Activation("sigmoid"),
    ("timm.layers.activations", "Tanh"): Activation("tanh"),
    ("timm.layers.activations", "GELU"): Activation("gelu"),
    ("timm.layers.activations", "GELUTanh"): Activation("gelu_tanh"),
    ("transformers.activations", "GELUActivation"): Activation("gelu"),
    ("transformers.activations", "GELUTanh"): Activation("gelu_tanh"),
    ("transformers.activations", "MishActivation"): Activation("mish"),
    ("transformers.activations", "SiLUActivation"): Activation("silu"),
}


def is_observed(module: nn.Module) -> bool:
    """Whether somebody takes part in calls of a module, by hooks or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_of_stock._global_forward_hooks
        or module_of_stock._global_forward_pre_hooks
        or module_of_stock._global_backward_hooks
        or module_of_stock._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def function_of_module(module: nn.Module) -> Activation | None:
    """The function that a module computes; None if the compiled operators do not have it."""
    cls = type(module)
    of = _OF_CLASS.get(cls)
    return of(module) if of else _OF_NAME.get((cls.__module__, cls.__qualname__))


def activation_of_module(module: nn.Module) -> Activation | None:
    """The function that a module computes; None where it has to be called instead.

    That is where the compiled operators do not have its function, or somebody hooked into it.
    """
    activation = function_of_module(module)
    return None if activation is None or is_observed(module) else activation
