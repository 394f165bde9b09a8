"""The implementations that are measured, each as one would use it to get the same result."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastbn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .cases import BenchmarkCase, Epilogue

_STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FASTBN = (fastbn.BatchNorm1d, fastbn.BatchNorm2d, fastbn.BatchNorm3d)
_FUSED = (fastbn.BatchNormAct1d, fastbn.BatchNormAct2d, fastbn.BatchNormAct3d)


def norm_of(module: nn.Module) -> _BatchNorm:
    """The batch norm in a module that a provider has built."""
    return cast("_BatchNorm", module.norm)


class WithEpilogue(nn.Module):
    """A batch norm followed by PyTorch's own add and ReLU, in place as networks have them."""

    def __init__(self, norm: nn.Module, epilogue: Epilogue) -> None:
        super().__init__()
        self.norm = norm
        self.epilogue = epilogue

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x (N, C, ...), and a residual like it where the epilogue adds one."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return y if self.epilogue == "plain" else y.relu_()


class WithFusedEpilogue(nn.Module):
    """A batch norm that adds and applies ReLU itself."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x (N, C, ...), and a residual like it where the epilogue adds one."""
        y: Tensor = self.norm(x, residual)
        return y


class _Apex(nn.Module):
    """apex's batch norm for N, H, W, C, which has add and ReLU inside."""

    def __init__(self, case: BenchmarkCase) -> None:
        super().__init__()
        kind = import_module("apex.contrib.groupbn").BatchNorm2d_NHWC
        self.norm = kind(case.channels, fuse_relu=case.epilogue != "plain")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x (N, C, H, W) that is channels last, which apex takes for contiguous."""
        added = None if residual is None else residual.permute(0, 2, 3, 1)
        y: Tensor = self.norm(x.permute(0, 2, 3, 1), added)
        return y.permute(0, 3, 1, 2)


def _stock(case: BenchmarkCase) -> nn.Module:
    return WithEpilogue(_STOCK[case.dimensions - 1](case.channels), case.epilogue)


def _fastbn(case: BenchmarkCase) -> nn.Module:
    if case.epilogue == "plain":
        return WithEpilogue(_FASTBN[case.dimensions - 1](case.channels), case.epilogue)
    return WithFusedEpilogue(_FUSED[case.dimensions - 1](case.channels, activation="relu"))


def _compiled(case: BenchmarkCase, **options: str | int | bool | Callable[..., Any]) -> Any:
    return torch.compile(_stock(case), dynamic=False, options=options)


def _cooperative(case: BenchmarkCase) -> Any:
    return _compiled(case, **{"triton.cooperative_reductions": True})


def _inplace_abn(case: BenchmarkCase) -> nn.Module:
    abn = import_module("inplace_abn").InPlaceABN
    return WithEpilogue(abn(case.channels, activation="identity"), case.epilogue)


def forget_compiled() -> None:
    """Drops what was compiled for other cases: it would only make the list of guards longer."""
    torch._dynamo.reset()


def _always(case: BenchmarkCase) -> bool:
    return True


@dataclass(frozen=True)
class Provider:
    """An implementation of batch norm.

    Attributes:
        build: makes a module with an attribute ``norm`` that holds parameters and statistics; its
            forward takes x, and a residual where the epilogue adds one. Raises ImportError where a
            package is missing.
        takes: whether there is a point in giving it a case.
        layout: of its input, if not that of the case.
        in_place: whether it overwrites x and dy, so that each can be given to it only once.
        slow_to_build: whether building takes seconds.
    """

    build: Callable[[BenchmarkCase], nn.Module]
    takes: Callable[[BenchmarkCase], bool] = _always
    layout: str | None = None
    in_place: bool = False
    slow_to_build: bool = False


PROVIDERS = {
    "fastbn": Provider(_fastbn),
    "stock": Provider(_stock),
    # What users of contiguous tensors could change to, without another package.
    "stock channels_last": Provider(
        _stock,
        lambda case: case.layout == "contiguous" and case.dimensions > 1,
        layout="channels_last",
    ),
    "compiled": Provider(_compiled, slow_to_build=True),
    "cooperative": Provider(_cooperative, lambda case: case.on_gpu, slow_to_build=True),
    "apex": Provider(
        _Apex,
        lambda case: case.on_gpu and case.dimensions == 2 and case.dtype == torch.float16,
        layout="channels_last",
    ),
    # inplace_abn takes invertible activations alone, which ReLU is not.
    "inplace_abn": Provider(
        _inplace_abn,
        lambda case: case.epilogue == "plain" and case.dtype in (torch.float32, torch.float16),
        in_place=True,
    ),
}

ABOUT = {
    "fastbn": "this project's modules",
    "stock": "nn.BatchNorm",
    "stock channels_last": "nn.BatchNorm, given channels last where the case is contiguous",
    "compiled": "nn.BatchNorm and what follows it, as torch.compile makes them",
    "cooperative": "compiled, with Inductor's cooperative reductions",
    "apex": "apex.contrib.groupbn.BatchNorm2d_NHWC",
    "inplace_abn": "inplace_abn.InPlaceABN without an activation",
}
# A module that has to be there, and since apex swallows the error of a missing one, a name in it.
_NEEDED = {
    "apex": ("apex.contrib.groupbn", "BatchNorm2d_NHWC"),
    "inplace_abn": ("inplace_abn", "InPlaceABN"),
}


def available(names: Iterable[str]) -> dict[str, Provider]:
    """The providers whose package is installed."""
    return {name: PROVIDERS[name] for name in names if _is_there(*_NEEDED.get(name, ()))}


def _is_there(module: str = "torch", attribute: str = "nn") -> bool:
    try:
        return hasattr(import_module(module), attribute)
    except ImportError:
        return False
