"""What fused forwards call: batch norm, addition and activation, as one where nobody can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

from ...activations import IDENTITY, Activation
from ...modules.activation_modules import activation_of_module, is_observed
from ...modules.batchnorm import FastBatchNorm
from ...modules.foreign import FastTimmBatchNormAct, fused_activation
from ...modules.fused import FastBatchNormAct

if TYPE_CHECKING:
    from collections.abc import Iterable


def is_plain(norm: nn.Module) -> TypeGuard[FastBatchNorm]:
    """Whether it is a batch norm of fastbn's that nothing of its own follows."""
    if type(norm).forward is FastBatchNorm.forward:
        return True
    if isinstance(norm, FastTimmBatchNormAct):
        return fused_activation(norm) == IDENTITY
    return isinstance(norm, FastBatchNormAct) and norm._activation == IDENTITY


def _function(activation: nn.Module | Activation) -> Activation | None:
    """What the compiled function takes; None where the module has to be called."""
    return activation if isinstance(activation, Activation) else activation_of_module(activation)


def norm_act(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    activation: nn.Module | Activation,
    in_place: bool = False,
) -> Tensor:
    """``activation(norm(x) + residual)``, in one pass over memory.

    One after the other where one pass would be seen: by hooks of the modules, by symbolic
    tracing, by subclasses of tensors; and where a module has been replaced by another.

    Args:
        norm: a batch norm.
        x: (N, C, ...).
        residual: added to the result of batch norm; None for nothing.
        activation: a module or function.
        in_place: the residual is added in place, so that it does not widen the result.
    """
    function = _function(activation)
    if (
        function is not None
        and is_plain(norm)
        and type(x) is Tensor
        and (residual is None or not in_place or residual.dtype == x.dtype)
        and not is_observed(norm)
    ):
        return norm._forward(x, residual, function)
    y: Tensor = norm(x)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    result: Tensor = activation(y)
    return result


def run_sequential(modules: Iterable[nn.Module], x: Any) -> Any:
    """Calls modules in turn; each batch norm together with the activation right after it."""
    norm: nn.Module | None = None
    for module in modules:
        if norm is not None:
            function = activation_of_module(module)
            if function == IDENTITY:
                continue
            if function is not None:
                x, norm = norm_act(norm, x, None, module), None
                continue
            x, norm = norm(x), None
        if is_plain(module):
            norm = module
        else:
            x = module(x)
    return x if norm is None else norm(x)
