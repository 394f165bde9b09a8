"""Stand-ins for batch norms of timm, torchvision and detectron2, known by their libraries' names.

Where timm and torchvision are installed it is the real ones.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Class = type[nn.Module]

# What Python wants to find on the way to those libraries' modules when it unpickles.
PACKAGES = (
    "timm",
    "timm.layers",
    "torchvision",
    "torchvision.ops",
    "detectron2",
    "detectron2.layers",
)


def _named(module: str) -> Callable[[Class], Class]:
    """Gives a class the place that it would have in its library, so that it can be pickled."""

    def place(cls: Class) -> Class:
        cls.__module__ = module
        cls.__qualname__ = cls.__name__
        setattr(sys.modules.setdefault(module, ModuleType(module)), cls.__name__, cls)
        return cls

    return place


class _DropAndAct(nn.Module):
    """The submodules behind batch norm in both of timm's classes."""

    drop: nn.Module
    act: nn.Module

    def follow_with(self, act_layer: Any, act_kwargs: Any, inplace: bool, drop_layer: Any) -> None:
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer(**(act_kwargs or {}))
        if hasattr(self.act, "inplace"):
            setattr(self.act, "inplace", inplace)  # noqa: B010 - mypy takes it for a module


def _frozen(self: Any, x: Tensor) -> Tensor:
    scale = self.weight / (self.running_var + self.eps).sqrt()
    shift = self.bias - self.running_mean * scale
    y: Tensor = x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
    return y


def _register_frozen_buffers(self: nn.Module, channels: int) -> None:
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        self.register_buffer(name, torch.full((channels,), float(value)))


def _stand_ins() -> tuple[Class, ...]:
    @_named("timm.layers.norm_act")
    class BatchNormAct2d(_DropAndAct, nn.BatchNorm2d):
        def __init__(
            self,
            num_features: int,
            act_layer: Any = nn.ReLU,
            act_kwargs: Any = None,
            inplace: bool = True,
            drop_layer: Any = None,
            **stocks: Any,
        ) -> None:
            nn.BatchNorm2d.__init__(self, num_features, **stocks)
            self.follow_with(act_layer, act_kwargs, inplace, drop_layer)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(self.drop(nn.BatchNorm2d.forward(self, x)))
            return y

    @_named("timm.layers.norm_act")
    class SyncBatchNormAct(nn.SyncBatchNorm):
        """Stock's, followed by the submodules it was given."""

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            y = super().forward(input)
            for child in self.children():
                y = child(y)
            return y

    @_named("timm.layers.norm_act")
    class FrozenBatchNormAct2d(_DropAndAct):
        def __init__(
            self,
            num_features: int,
            eps: float = 1e-5,
            act_layer: Any = nn.ReLU,
            act_kwargs: Any = None,
            inplace: bool = True,
            drop_layer: Any = None,
        ) -> None:
            nn.Module.__init__(self)
            self.eps = eps
            _register_frozen_buffers(self, num_features)
            self.follow_with(act_layer, act_kwargs, inplace, drop_layer)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(self.drop(_frozen(self, x)))
            return y

    @_named("timm.layers.activations")
    class Sigmoid(nn.Module):
        def __init__(self, inplace: bool = False) -> None:
            super().__init__()
            self.inplace = inplace

        def forward(self, x: Tensor) -> Tensor:
            return x.sigmoid_() if self.inplace else x.sigmoid()

    @_named("torchvision.ops.misc")
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, num_features: int, eps: float = 1e-5) -> None:
            super().__init__()
            self.eps = eps
            _register_frozen_buffers(self, num_features)

        def forward(self, x: Tensor) -> Tensor:
            return _frozen(self, x)

    return BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d, Sigmoid, FrozenBatchNorm2d


def _real() -> tuple[Class, ...]:
    norms, activations, frozen = map(
        import_module, ("timm.layers", "timm.layers.activations", "torchvision.ops")
    )
    return (
        norms.BatchNormAct2d,
        norms.SyncBatchNormAct,
        norms.FrozenBatchNormAct2d,
        activations.Sigmoid,
        frozen.FrozenBatchNorm2d,
    )


(
    TimmBatchNormAct2d,
    TimmSyncBatchNormAct,
    TimmFrozenBatchNormAct2d,
    TimmSigmoid,
    TorchvisionFrozenBatchNorm2d,
) = _real() if find_spec("timm") and find_spec("torchvision") else _stand_ins()


@_named("detectron2.layers.batch_norm")
class FrozenBatchNorm2d(nn.Module):
    """Detectron2's: it takes batches of any rank, by stock's batch norm where it can."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        _register_frozen_buffers(self, num_features)

    def forward(self, x: Any) -> Any:
        """Batch norm of evaluation."""
        state: Any = self
        vectors = (state.running_mean, state.running_var, state.weight, state.bias)
        return nn.functional.batch_norm(x, *vectors, eps=self.eps)


DetectronFrozenBatchNorm2d = FrozenBatchNorm2d
