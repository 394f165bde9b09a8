"""Makes batch norms of evaluation part of the convolutions and linear layers in front of them."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..activations import IDENTITY
from ..modules import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from ..modules.activation_modules import is_observed
from ..modules.epilogue import Epilogue
from .adapters import adapter_of, original_of
from .neighbors import layers_before
from .report import FoldReport

if TYPE_CHECKING:
    from collections.abc import Mapping

_logger = logging.getLogger("fastbn")

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OF_TIMM = ("BatchNormAct2d", "FrozenBatchNormAct2d", "SyncBatchNormAct")
_WITH_ACTIVATION = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)


def _looks_like_batch_norm(module: nn.Module) -> bool:
    cls = type(module)
    return isinstance(module, _BatchNorm) or bool(adapter_of(cls) or original_of(cls))


def _what_follows(norm: nn.Module, after_linear: bool) -> nn.Module | None:
    """The module that a batch norm leaves in its place; None for a class of unknown forward."""
    rank = 2 if after_linear else None
    cls = original_of(type(norm)) or type(norm)
    if isinstance(norm, _WITH_ACTIVATION) and cls in _WITH_ACTIVATION:
        return Epilogue(norm._activation, rank)
    if cls in _STOCK:
        return Epilogue(IDENTITY, rank) if after_linear else nn.Identity()
    if cls.__module__ == "timm.layers.norm_act" and cls.__name__ in _OF_TIMM:
        children = dict(norm.named_children())
        calls = [(name, children[name]) for name in ("drop", "act") if name in children]
        return nn.Sequential(OrderedDict(calls))
    if cls.__name__ == "FrozenBatchNorm2d":
        return nn.Identity()
    return None


def _reason_against(norm: nn.Module, layer: nn.Module, parameters: Mapping[int, int]) -> str | None:
    """Why a batch norm cannot become part of the layer that it follows; None if it can."""
    name, layers = type(norm).__name__, type(layer).__name__
    adapter = adapter_of(type(norm))
    if norm.training:
        return f"{name} is in training mode"
    if type(layer) not in (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear):
        return f"it follows {layers}, which is neither a convolution nor a linear layer of stock"
    if adapter is not None and adapter.reason_to_stay(norm) is not None:
        return adapter.reason_to_stay(norm)
    if _what_follows(norm, after_linear=False) is None:
        return f"what {name} computes is not known"
    if type(layer) is nn.Linear and not isinstance(norm, nn.BatchNorm1d):
        return f"{name} normalizes along another dimension than the results of Linear"
    if isinstance(layer, _TRANSPOSED) and layer.groups != 1:
        return f"{layers} has groups"
    if is_observed(norm) or is_observed(layer):
        return f"{name} or the {layers} in front has hooks or another forward"
    if norm._buffers["running_mean"] is None or norm._buffers["running_var"] is None:
        return f"{name} has no running statistics"
    weight = layer._parameters.get("weight")
    if weight is None:
        return f"the weight of {layers} is computed"
    if parameters[id(weight)] > 1:
        return f"the weight of {layers} is another module's, too"
    features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm._buffers["running_mean"].numel() != features:
        return f"{layers} does not have as many channels as {name}"
    return None


def _merge(norm: nn.Module, layer: nn.Module) -> None:
    """Gives a layer the weight and bias with which it computes both."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert weight is not None
    assert mean is not None
    assert var is not None
    merged = fuse_conv_bn_weights(
        weight,
        bias,
        mean,
        var,
        norm.eps,  # type: ignore[arg-type]
        norm.weight,  # type: ignore[arg-type]
        norm.bias,  # type: ignore[arg-type]
        transpose=isinstance(layer, _TRANSPOSED),
    )
    layer.weight, layer.bias = merged
    if bias is None:
        merged[1].requires_grad_(weight.requires_grad)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, wherever that is registered."""
    new.train(old.training)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@overload
def fold(model: ModuleT, *, dry_run: Literal[False] = False) -> ModuleT: ...


@overload
def fold(model: nn.Module, *, dry_run: Literal[True]) -> FoldReport: ...


def fold(model: nn.Module, *, dry_run: bool = False) -> nn.Module | FoldReport:
    """Makes batch norms part of the convolution or linear layer in front of them, in place.

    In evaluation both are linear, and one layer can do what two did, by
    :func:`torch.nn.utils.fusion.fuse_conv_bn_weights`. The batch norm's place is taken by what it
    had behind it (residual, activation, timm's ``drop`` and ``act``), or by ``nn.Identity``. The
    result is for evaluation; it cannot be undone, so fold a copy of a model that is to be trained.

    A pair is folded where each call of the layer is followed by one of the batch norm, each call of
    the batch norm follows one of the layer, and nothing else reads what is between the two. That is
    told by ``torch.fx``; of a model that it cannot trace, only pairs are folded that stand next to
    each other in an ``nn.Sequential``. What stays is in the report, with the reason; it is logged
    at level INFO to the logger ``fastbn``.

    Args:
        model: the model, in eval. Stock's modules, fastbn's, and others' that
            :func:`fastbn.convert` knows, converted or not.
        dry_run: change nothing and return the report.

    Returns:
        ``model``, or with ``dry_run`` the :class:`FoldReport`.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError(
            "the model is in training mode, in which statistics are those of each batch; "
            "call model.eval() first"
        )
    modules = dict(model.named_modules())
    counts = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    report = FoldReport()
    for name, before in layers_before(model, _looks_like_batch_norm).items():
        if before.layer is None:
            report.left[name] = before.reason
            continue
        norm, layer = modules[name], modules[before.layer]
        reason = _reason_against(norm, layer, counts)
        if reason is not None:
            report.left[name] = reason
            continue
        report.folded[name] = before.layer
        if not dry_run:
            _merge(norm, layer)
            follower = _what_follows(norm, isinstance(layer, nn.Linear))
            assert follower is not None
            _replace(model, norm, follower)
    if dry_run:
        return report
    _logger.info("fold: %s", report)
    return model
