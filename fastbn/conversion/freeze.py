"""Fixes the statistics of batch norms, whatever ``train()`` says, and lets them go again."""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules.batchnorm import FastBatchNorm, Frozen
from .adapters import adapter_of, original_of, reason_unknown_stays
from .convert import HIDDEN, restore

_logger = logging.getLogger("fastbn")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def freeze(model: ModuleT, parameters: bool = False) -> ModuleT:
    """Fixes the running statistics of every batch norm of a model, in place.

    From here on each computes what it computes in evaluation, and ``model.train()`` and ``eval()``
    change only what :func:`unfreeze` returns to. Modules that are not fastbn's yet are converted;
    they do not have to be converted before. A module that is frozen already stays so; with
    ``parameters`` it gets those frozen in addition.

    Batch norms that cannot be frozen stay as they are, each with a warning to the logger
    ``fastbn``: those that :func:`fastbn.convert` does not take, and those without running
    statistics. ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes new modules, which are not frozen;
    ``fastbn.convert_sync_batchnorm`` leaves frozen ones as they are.

    Args:
        model: the model, or a batch norm.
        parameters: weight and bias, too, get no gradients. Backward then reads the gradient of the
            output once and nothing else. An optimizer that holds gradients or momentum of them
            goes on applying those: set its gradients to None.

    Returns:
        ``model``.
    """
    for name, module in model.named_modules():
        reason = _reason_not_to_freeze(module)
        if reason is not None:
            _logger.warning("freeze: left %s: %s", name or "(model)", reason)
        adapter = adapter_of(type(module))
        counterpart = type(module) if adapter is None else adapter.counterpart
        if reason is None and issubclass(counterpart, FastBatchNorm):
            module.__class__ = counterpart
            _freeze(module, converted=adapter is not None, parameters=parameters)
    return model


def _reason_not_to_freeze(module: nn.Module) -> str | None:
    """Why a batch norm stays; None if it is frozen, or is none."""
    if not isinstance(module, _BatchNorm):
        return None
    adapter = adapter_of(type(module))
    reason = adapter.reason_to_stay(module) if adapter else reason_unknown_stays(module)
    if reason is not None:
        return reason
    if "forward" in module.__dict__:
        return HIDDEN
    if module.running_mean is None or module.running_var is None:
        return "it has no running statistics to be fixed"
    if adapter is not None and not issubclass(adapter.counterpart, FastBatchNorm):
        return f"{adapter.counterpart.__name__} is not one of fastbn's batch norms"
    return None


def _freeze(module: FastBatchNorm, converted: bool, parameters: bool) -> None:
    frozen = module._frozen or Frozen(module.training, converted, {})
    if parameters:
        # What was frozen before is not looked at again, as it has no gradients any more.
        flags = {
            name: parameter.requires_grad
            for name, parameter in module._parameters.items()
            if parameter is not None and name not in frozen.requires_grad
        }
        for name in flags:
            module.get_parameter(name).requires_grad_(False)
        frozen = frozen._replace(requires_grad={**frozen.requires_grad, **flags})
    module._frozen = frozen
    module.training = False


def unfreeze(model: ModuleT) -> ModuleT:
    """Undoes :func:`freeze`, in place.

    Modules get the mode back that ``train()`` and ``eval()`` gave their model meanwhile, parameters
    whether they have gradients, and what freezing converted its class.

    Args:
        model: the model, or a batch norm; what is not frozen in it stays as it is.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if not isinstance(module, FastBatchNorm) or module._frozen is None:
            continue
        frozen = module._frozen
        for name, flag in frozen.requires_grad.items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(flag)
        module.training = frozen.training
        del module._frozen
        original = original_of(type(module))
        if frozen.converted and original is not None:
            restore(module, original)
    return model
