"""Puts fastbn's modules in the place of stock's, and back.

A swap changes the class of a module and nothing else: parameters, buffers, hooks, mode and
``state_dict`` stay the very same objects, so optimizers that hold them go on working.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..modules import HALF_DTYPES, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .report import SwapReport

if TYPE_CHECKING:
    from collections.abc import Mapping

_logger = logging.getLogger("fastbn")

_FASTBN_OF_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
_STOCK_OF_FASTBN = {fast: stock for stock, fast in _FASTBN_OF_STOCK.items()}

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _reason_to_stay(module: nn.Module) -> str | None:
    """Why a module that looks like a batch norm is not swapped; None if it is no batch norm."""
    name = type(module).__name__
    if isinstance(module, LazyModuleMixin) and isinstance(module, nn.modules.batchnorm._NormBase):
        return f"{name} has no parameters yet; run a batch through the model first"
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm takes its statistics over several processes"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return f"{name} is not a batch norm"
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return None
    if is_parametrized(module):
        return f"{name} is parametrized, which gave it a class of its own"
    return f"{name} is a subclass ({type(module).__module__}.{name}) and may behave in its own way"


def _swap(
    model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]], dry_run: bool
) -> SwapReport:
    report = SwapReport()
    for name, module in model.named_modules():
        target = classes.get(type(module))
        if target is not None and "forward" in module.__dict__:
            report.left[name] = "its forward was replaced on the instance, which hides the class's"
        elif target is not None:
            report.swapped.append(name)
            if not dry_run:
                module.__class__ = target
        elif type(module) not in classes.values():
            reason = _reason_to_stay(module)
            if reason is not None:
                report.left[name] = reason
    return report


@overload
def convert(model: ModuleT, *, dry_run: Literal[False] = False) -> ModuleT: ...


@overload
def convert(model: nn.Module, *, dry_run: Literal[True]) -> SwapReport: ...


def convert(model: nn.Module, *, dry_run: bool = False) -> nn.Module | SwapReport:
    """Makes every ``nn.BatchNorm1d/2d/3d`` of a model a fastbn one, in place.

    Only modules of exactly these classes are swapped. Others that look alike (subclasses,
    parametrized, lazy and synchronized ones, instance norm) stay, and the report says why; it is
    logged at level INFO to the logger ``fastbn``.

    Args:
        model: the model; if it is a batch norm itself, its own class changes.
        dry_run: change nothing and return the report.

    Returns:
        ``model``, or with ``dry_run`` the :class:`SwapReport`.
    """
    report = _swap(model, _FASTBN_OF_STOCK, dry_run)
    modules = dict(model.named_modules())
    for name in report.swapped:
        running_mean = modules[name].running_mean
        if isinstance(running_mean, torch.Tensor) and running_mean.dtype in HALF_DTYPES:
            report.advice[name] = (
                f"running statistics are {running_mean.dtype}, which loses small updates; convert "
                "before the model becomes 16-bit and they stay float32"
            )
    if dry_run:
        return report
    _logger.info("convert: %s", report)
    return model


@overload
def revert(model: ModuleT, *, dry_run: Literal[False] = False) -> ModuleT: ...


@overload
def revert(model: nn.Module, *, dry_run: Literal[True]) -> SwapReport: ...


def revert(model: nn.Module, *, dry_run: bool = False) -> nn.Module | SwapReport:
    """Makes every fastbn batch norm of a model a stock one again, in place.

    For tools that look for stock's exact classes, and for machines without fastbn. Running
    statistics that fastbn kept in float32 beside 16-bit parameters take the parameters' dtype, the
    only one stock computes with.

    Args:
        model: the model; if it is a batch norm itself, its own class changes.
        dry_run: change nothing and return the report.

    Returns:
        ``model``, or with ``dry_run`` the :class:`SwapReport`.
    """
    report = _swap(model, _STOCK_OF_FASTBN, dry_run)
    if dry_run:
        return report
    modules = dict(model.named_modules())
    for name in report.swapped:
        module = modules[name]
        weight = module._parameters.get("weight")
        if weight is not None and weight.dtype in HALF_DTYPES:
            for statistic in ("running_mean", "running_var"):
                buffer = module._buffers.get(statistic)
                if buffer is not None:
                    module._buffers[statistic] = buffer.to(weight.dtype)
    _logger.info("revert: %s", report)
    return model
