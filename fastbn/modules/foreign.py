"""Forwards for other libraries' modules, which stay what they are in all else.

Each class here is put in front of a library's own, by :mod:`fastbn.conversion`, so ``super()`` of a
frozen batch norm is that library's forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Proxy

from ..activations import IDENTITY, Activation
from ..fused import dispatch_act
from .activation_modules import activation_of_module
from .batchnorm import FastBatchNorm, is_exported
from .fused import NotForStocksConverter

if TYPE_CHECKING:
    from torch import Tensor


def fused_activation(module: nn.Module) -> Activation | None:
    """What a module of timm with ``drop`` and ``act`` computes after batch norm.

    It is asked at every call, as hooks and other activations may come at any time.

    Returns:
        None where these two have to be called.
    """
    drop, act = module._modules["drop"], module._modules["act"]
    assert drop is not None
    assert act is not None
    return activation_of_module(act) if activation_of_module(drop) == IDENTITY else None


def reason_without_drop_and_act(module: nn.Module) -> str | None:
    """Why a module is none of those above; None if it is."""
    missing = [name for name in ("drop", "act") if module._modules.get(name) is None]
    return f"it has no submodule {' and no submodule '.join(missing)}" if missing else None


def reason_not_to_fuse(module: nn.Module) -> str | None:
    """Why ``drop`` and ``act`` are called, in words; None if they are fused."""
    if fused_activation(module) is not None:
        return None
    drop, act = (type(module._modules[name]).__name__ for name in ("drop", "act"))
    return (
        f"its submodules drop ({drop}) and act ({act}) are called after batch norm, as one has "
        "hooks or a function that is not among fastbn's"
    )


class FastTimmBatchNormAct(NotForStocksConverter, FastBatchNorm):
    """Of ``timm.layers.BatchNormAct2d``: batch norm, ``drop`` and ``act``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Computes ``act(drop(batch_norm(x)))`` for x of shape (N, C, H, W)."""
        activation = fused_activation(self)
        if activation is not None or isinstance(x, Proxy):
            return self._forward(x, None, activation)
        y: Tensor = self.act(self.drop(self._forward(x)))
        return y

    def _instead_of_stocks_converter(self) -> str:
        return "use fastbn.convert_sync_batchnorm, or that of timm.layers"


class FastFrozenBatchNorm(nn.Module):
    """Of modules whose statistics, weight and bias are buffers, called ``FrozenBatchNorm2d``."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Batch norm of evaluation for x of shape (N, C, H, W) and the buffers' dtype.

        What else the module takes, in its own way, it goes on taking in that way: other ranks,
        dtypes that promote, symbolic traces and exporters.
        """
        if self._takes_its_own_way(x):
            y: Tensor = super().forward(x)
            return y
        return self._batch_norm(x, IDENTITY)

    def _takes_its_own_way(self, x: Tensor) -> bool:
        if isinstance(x, Proxy) or is_exported():
            return True
        return x.dim() != 4 or x.dtype != self.weight.dtype

    def _batch_norm(self, x: Tensor, activation: Activation) -> Tensor:
        vectors = (self.weight, self.bias, self.running_mean, self.running_var)
        return dispatch_act(x, None, *vectors, None, False, 0.0, self.eps, activation)


class FastTimmFrozenBatchNormAct(FastFrozenBatchNorm):
    """Of ``timm.layers.FrozenBatchNormAct2d``: the same, ``drop`` and ``act``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Computes ``act(drop(batch_norm(x)))``; see the class above."""
        if self._takes_its_own_way(x):
            y: Tensor = super(FastFrozenBatchNorm, self).forward(x)
            return y
        activation = fused_activation(self)
        if activation is not None:
            return self._batch_norm(x, activation)
        result: Tensor = self.act(self.drop(self._batch_norm(x, IDENTITY)))
        return result


def reason_frozen_stays(module: nn.Module) -> str | None:
    """Why a ``FrozenBatchNorm2d`` of no matter which library is not known to be one."""
    buffers = module._buffers
    needed = ("weight", "bias", "running_mean", "running_var")
    missing = [name for name in needed if buffers.get(name) is None]
    if missing:
        return f"it has no buffer {' and no buffer '.join(missing)}"
    if not isinstance(getattr(module, "eps", None), float):
        return "it has no number eps"
    return None
