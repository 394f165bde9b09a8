"""Fuses batch norms with what follows them, in models as they are."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from torch import Tensor, nn

from .convert import convert
from .fusion.checking import first_difference, results
from .fusion.rewriting import rewrite, rewrite_sequential, unfuse, unfused_class
from .fusion.search import Search

if TYPE_CHECKING:
    from .fusion.report import FusionReport

_logger = logging.getLogger("fastbn")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _fuse(model: nn.Module) -> FusionReport:
    unfuse(model)
    convert(model)
    search = Search(model)
    for block in search.blocks:
        if block.trace is None:
            rewrite_sequential(block.module)
        else:
            rewrite(block.module, block.trace, block.kept)
    return search.report


def _dry_run(model: nn.Module) -> FusionReport:
    classes = {module: type(module) for module in model.modules() if unfused_class(module)}
    unfuse(model)
    try:
        return Search(model).report
    finally:
        for module, kind in classes.items():
            module.__class__ = kind


def _check(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    before = copy.deepcopy(model).double()
    before.zero_grad()
    after = copy.deepcopy(before)
    report = _fuse(after)
    difference = first_difference(results(before, inputs), results(after, inputs))
    if difference is not None:
        raise RuntimeError(
            f"fusing {', '.join(report.fused)} changes what the model computes: {difference}; the "
            "model was left as it is"
        )


@overload
def fuse(
    model: ModuleT,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    dry_run: Literal[False] = False,
) -> ModuleT: ...


@overload
def fuse(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    dry_run: Literal[True],
) -> FusionReport: ...


def fuse(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    dry_run: bool = False,
) -> nn.Module | FusionReport:
    """Has batch norms compute the addition and activation that follow them, in place.

    The model is converted, as by :func:`fastbn.convert`. Then each module whose forward calls a
    batch norm and applies an activation to its result, with or without an addition before, gets a
    subclass of its own class whose forward has one call for them. Parameters, buffers, names,
    ``state_dict`` and hooks stay what they are; ``fastbn.revert`` gives back all classes.

    Modules mean what they did when they are called by themselves, and hooks that are put on a fused
    batch norm or activation later see what they would have seen, as these then take turns again.
    What is fused, and what is left and why, is logged at level INFO to the logger ``fastbn``.

    Args:
        model: the model.
        example_inputs: what to call it with: a tensor, or all positional arguments. Outputs,
            gradients and buffers of the model before and after are compared on it, in copies in
            float64, in the mode that the model is in.
        dry_run: change nothing and return the report.

    Returns:
        ``model``, or with ``dry_run`` the :class:`FusionReport`.

    Raises:
        RuntimeError: the fused model computes something else on ``example_inputs``; the model is
            what it was.
    """
    if example_inputs is not None:
        _check(model, example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))
    if dry_run:
        return _dry_run(model)
    report = _fuse(model)
    _logger.info("fuse: %s", report)
    return model
