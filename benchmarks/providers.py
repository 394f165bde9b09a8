"""Whose batch norm is measured: each as someone would use it who wants the same result."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastbn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .cases import Case, Ending

_STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FASTBN = (fastbn.BatchNorm1d, fastbn.BatchNorm2d, fastbn.BatchNorm3d)


class Followed(nn.Module):
    """A batch norm with PyTorch's own add and ReLU behind it, in place as networks have them."""

    def __init__(self, norm: nn.Module, ending: Ending) -> None:
        super().__init__()
        self.norm = norm
        self.ending = ending

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x (N, C, ...), and a residual like it where the ending adds one."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return y if self.ending == "plain" else y.relu_()


class _Apex(nn.Module):
    """apex's batch norm for N, H, W, C, which has add and ReLU inside."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        kind = import_module("apex.contrib.groupbn").BatchNorm2d_NHWC
        self.norm = kind(case.channels, fuse_relu=case.ending != "plain")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps x (N, C, H, W) that is channels last, which apex takes for contiguous."""
        added = None if residual is None else residual.permute(0, 2, 3, 1)
        y: Tensor = self.norm(x.permute(0, 2, 3, 1), added)
        return y.permute(0, 3, 1, 2)


def _stock(case: Case) -> nn.Module:
    return Followed(_STOCK[case.dimensions - 1](case.channels), case.ending)


def _fastbn(case: Case) -> nn.Module:
    return Followed(_FASTBN[case.dimensions - 1](case.channels), case.ending)


def _compiled(case: Case, **options: bool) -> Any:
    return torch.compile(_stock(case), dynamic=False, options=options)


def _cooperative(case: Case) -> Any:
    return _compiled(case, **{"triton.cooperative_reductions": True})


def _inplace_abn(case: Case) -> nn.Module:
    abn = import_module("inplace_abn").InPlaceABN
    return Followed(abn(case.channels, activation="identity"), case.ending)


def forget_compiled() -> None:
    """Drops what was compiled for other cases, which only makes the list of guards longer."""
    torch._dynamo.reset()


def _always(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Provider:
    """Someone's batch norm.

    Attributes:
        build: makes a module with an attribute ``norm`` that holds parameters and statistics; its
            forward takes x, and a residual where the ending adds one. Raises ImportError where a
            package is missing.
        takes: whether there is a point in giving it a case.
        layout: in which it gets its input, if not in that of the case.
        in_place: whether it overwrites x and dy, and so takes each only once.
        slow_to_build: whether that takes seconds.
    """

    build: Callable[[Case], nn.Module]
    takes: Callable[[Case], bool] = _always
    layout: str | None = None
    in_place: bool = False
    slow_to_build: bool = False


PROVIDERS = {
    "fastbn": Provider(_fastbn),
    "stock": Provider(_stock),
    # What users of contiguous tensors could change to.
    "stock nsc": Provider(
        _stock, lambda case: case.layout == "ncs" and case.dimensions > 1, layout="nsc"
    ),
    "compiled": Provider(_compiled, slow_to_build=True),
    "cooperative": Provider(_cooperative, lambda case: case.on_gpu, slow_to_build=True),
    "apex": Provider(
        _Apex,
        lambda case: case.on_gpu and case.dimensions == 2 and case.dtype == torch.float16,
        layout="nsc",
    ),
    # Its activations are invertible, which ReLU is not.
    "inplace_abn": Provider(
        _inplace_abn,
        lambda case: case.ending == "plain" and case.dtype in (torch.float32, torch.float16),
        in_place=True,
    ),
}

ABOUT = {
    "fastbn": "this project's modules",
    "stock": "nn.BatchNorm",
    "stock nsc": "nn.BatchNorm, given channels last where the case is contiguous",
    "compiled": "nn.BatchNorm and what follows it, as torch.compile makes them",
    "cooperative": "the same with Inductor's cooperative reductions",
    "apex": "apex.contrib.groupbn.BatchNorm2d_NHWC",
    "inplace_abn": "inplace_abn.InPlaceABN without an activation",
}
# What has to be there: a module, and in it, since apex swallows the error, a name.
_NEEDED = {
    "apex": ("apex.contrib.groupbn", "BatchNorm2d_NHWC"),
    "inplace_abn": ("inplace_abn", "InPlaceABN"),
}


def available(names: Iterable[str]) -> dict[str, Provider]:
    """Those whose package is there."""
    return {name: PROVIDERS[name] for name in names if _is_there(*_NEEDED.get(name, ()))}


def _is_there(module: str = "torch", attribute: str = "nn") -> bool:
    try:
        return hasattr(import_module(module), attribute)
    except ImportError:
        return False
