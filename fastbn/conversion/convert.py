"""Puts fastbn's modules in the place of others, and back.

A swap changes the class of a module and nothing else: parameters, buffers, hooks, mode and
``state_dict`` stay the very same objects, so optimizers that hold them go on working.
"""

from __future__ import annotations

import logging
from typing import Literal, TypeVar, overload

from torch import nn

from ..modules import HALF_DTYPES
from ..modules.fused import FastBatchNormAct
from ..modules.sync import Synchronized
from .adapters import adapter_of, original_of, reason_unknown_stays
from .fusion.rewriting import unfuse
from .report import SwapReport

_logger = logging.getLogger("fastbn")

ModuleT = TypeVar("ModuleT", bound=nn.Module)

HIDDEN = "its forward was replaced on the instance, which hides the class's"


def _advice(module: nn.Module) -> str | None:
    """What the owner of a converted module should know of its statistics."""
    running_mean = module._buffers.get("running_mean")
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return None
    if running_mean is None or running_mean.dtype not in HALF_DTYPES:
        return None
    return (
        f"running statistics are {running_mean.dtype}, which loses small updates; convert "
        "before the model becomes 16-bit and they stay float32"
    )


@overload
def convert(model: ModuleT, *, dry_run: Literal[False] = False) -> ModuleT: ...


@overload
def convert(model: nn.Module, *, dry_run: Literal[True]) -> SwapReport: ...


def convert(model: nn.Module, *, dry_run: bool = False) -> nn.Module | SwapReport:
    """Makes every batch norm of a model a fastbn one, in place.

    Those of stock, ``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm``; of timm, ``BatchNormAct2d``,
    ``SyncBatchNormAct`` (whose activation is fused where fastbn has it and nobody hooked into it)
    and ``FrozenBatchNormAct2d``; every ``FrozenBatchNorm2d`` with the buffers of torchvision's and
    detectron2's; and what was told to :func:`fastbn.register`.

    Only modules of exactly these classes are swapped, and are instances of them still. Others that
    look alike (subclasses, parametrized and lazy ones, instance norm) stay, and the report says
    why; it is logged at level INFO to the logger ``fastbn``.

    Args:
        model: the model; if it is a batch norm itself, its own class changes.
        dry_run: change nothing and return the report.

    Returns:
        ``model``, or with ``dry_run`` the :class:`SwapReport`.
    """
    report = SwapReport()
    for name, module in model.named_modules():
        adapter = adapter_of(type(module))
        reason = adapter.reason_to_stay(module) if adapter else reason_unknown_stays(module)
        if adapter and "forward" in module.__dict__:
            reason = HIDDEN
        if reason is not None:
            report.left[name] = reason
        elif adapter is not None:
            report.swapped.append(name)
            advice = [each for each in (_advice(module), adapter.advice(module)) if each]
            if advice:
                report.advice[name] = "; ".join(advice)
            if not dry_run:
                module.__class__ = adapter.counterpart
    if dry_run:
        return report
    _logger.info("convert: %s", report)
    return model


@overload
def revert(model: ModuleT, *, dry_run: Literal[False] = False) -> ModuleT: ...


@overload
def revert(model: nn.Module, *, dry_run: Literal[True]) -> SwapReport: ...


def revert(model: nn.Module, *, dry_run: bool = False) -> nn.Module | SwapReport:
    """Makes every module that :func:`convert` takes what it was, in place.

    For tools that look for exact classes, and for machines without fastbn. What
    :func:`fastbn.fuse` and :func:`fastbn.convert_sync_batchnorm` did is undone, too. fastbn's own
    ``BatchNorm1d/2d/3d`` become stock's.
    Running statistics that fastbn kept in float32 beside 16-bit parameters take the parameters'
    dtype, the only one stock computes with.

    Args:
        model: the model; if it is a batch norm itself, its own class changes.
        dry_run: change nothing and return the report.

    Returns:
        ``model``, or with ``dry_run`` the :class:`SwapReport`.
    """
    report = SwapReport()
    for name, module in model.named_modules():
        original = original_of(type(module))
        if original is not None and "forward" in module.__dict__:
            report.left[name] = HIDDEN
        elif original is not None and "_frozen" in module.__dict__:
            report.left[name] = "it is frozen, which its own class would forget; unfreeze it first"
        elif original is not None:
            report.swapped.append(name)
            if not dry_run:
                restore(module, original)
        elif isinstance(module, FastBatchNormAct):
            report.left[name] = (
                f"{type(module).__name__} was not converted, and nothing of stock does what it does"
            )
    if dry_run:
        return report
    unfuse(model)
    _logger.info("revert: %s", report)
    return model


def restore(module: nn.Module, original: type[nn.Module]) -> None:
    """Gives a module its class back, and statistics beside 16-bit parameters their dtype."""
    if isinstance(module, Synchronized):
        module.__dict__.pop("layer_name", None)
        if not issubclass(original, nn.SyncBatchNorm):
            module.__dict__.pop("process_group", None)
    module.__class__ = original
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in HALF_DTYPES:
        return
    for statistic in ("running_mean", "running_var"):
        buffer = module._buffers.get(statistic)
        if buffer is not None:
            module._buffers[statistic] = buffer.to(weight.dtype)
