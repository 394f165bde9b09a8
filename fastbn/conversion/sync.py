"""Has the batch norms of a model share their statistics with those of other processes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules.sync import Synchronized
from .adapters import adapter_of, reason_unknown_stays, synchronized_of
from .convert import HIDDEN
from .report import SwapReport

if TYPE_CHECKING:
    from ..collectives import Group

_logger = logging.getLogger("fastbn")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@overload
def convert_sync_batchnorm(
    model: ModuleT, process_group: Group = None, *, dry_run: Literal[False] = False
) -> ModuleT: ...


@overload
def convert_sync_batchnorm(
    model: nn.Module, process_group: Group = None, *, dry_run: Literal[True]
) -> SwapReport: ...


def convert_sync_batchnorm(
    model: nn.Module, process_group: Group = None, *, dry_run: bool = False
) -> nn.Module | SwapReport:
    """Makes every batch norm of a model a synchronized one of fastbn's, in place.

    Unlike ``nn.SyncBatchNorm.convert_sync_batchnorm`` it changes the class of modules and makes no
    new ones, so it may come before or after ``DistributedDataParallel``, an optimizer or
    :func:`fastbn.fuse`. Batch norms stay ``nn.BatchNorm2d``, say, and go on checking the rank of
    their input; what :func:`fastbn.convert` takes besides, and ``fastbn.BatchNormAct1d/2d/3d``,
    keep their activation. :func:`fastbn.revert` undoes it.

    Those that are synchronized already get the process group. Batch norms that cannot be
    synchronized stay as they are, which changes results: what stays and why is in the report,
    which is logged to the logger ``fastbn``, at level WARNING where something stays.

    Args:
        model: the model; if it is a batch norm itself, its own class changes.
        process_group: the processes that share statistics: None for all, looked up at every
            forward; a process group; or a mesh of one dimension. See :func:`fastbn.sync_group`.
        dry_run: change nothing and return the report.

    Returns:
        ``model``, or with ``dry_run`` the :class:`SwapReport`.
    """
    report = SwapReport()
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        reason = _reason_to_stay(module)
        if reason is not None:
            report.left[name] = reason
            continue
        if not isinstance(module, Synchronized):
            report.swapped.append(name)
        if not dry_run:
            _synchronize(module, process_group, name)
    if dry_run:
        return report
    level = logging.WARNING if report.left else logging.INFO
    _logger.log(level, "convert_sync_batchnorm: %s", report)
    return model


def _synchronize(module: nn.Module, process_group: Group, name: str) -> None:
    kind = synchronized_of(type(module))
    assert kind is not None
    module.__class__ = kind
    assert isinstance(module, Synchronized)
    module.process_group, module.layer_name = process_group, name


def _reason_to_stay(module: nn.Module) -> str | None:
    """Why a batch norm is not synchronized; None if it is."""
    if isinstance(module, Synchronized):
        return None
    if "forward" in module.__dict__:
        return HIDDEN
    if "_frozen" in module.__dict__:
        return "it is frozen, so its statistics are fixed; unfreeze it first"
    adapter = adapter_of(type(module))
    reason = adapter.reason_to_stay(module) if adapter else reason_unknown_stays(module)
    if reason is None and synchronized_of(type(module)) is None:
        return f"fastbn knows no synchronized {type(module).__name__}"
    return reason
