"""Which classes of modules have a counterpart that runs on fastbn: one table for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..modules.batchnorm import FastBatchNorm
from ..modules.foreign import (
    FastFrozenBatchNorm,
    FastTimmBatchNormAct,
    FastTimmFrozenBatchNormAct,
    reason_frozen_stays,
    reason_not_to_fuse,
    reason_without_drop_and_act,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def _nothing(module: nn.Module) -> str | None:
    """For an adapter without objections or advice."""
    del module
    return None


@dataclass(frozen=True)
class Adapter:
    """How :func:`fastbn.convert` takes modules of one class, for :func:`fastbn.register`.

    A conversion changes the class of a module and nothing else, so all that the counterpart knows
    of a module has to be in the module already.

    Attributes:
        counterpart: the class that modules get; a subclass of theirs with another ``forward``.
        reason_to_stay: called with a module, why that one stays as it is, in words that follow
            "left NAME:"; None if it is converted.
        advice: called with a module that is converted, what its owner should know; or None.
    """

    counterpart: type[nn.Module]
    reason_to_stay: Callable[[nn.Module], str | None] = _nothing
    advice: Callable[[nn.Module], str | None] = _nothing


_ADAPTERS: dict[type[nn.Module], Adapter] = {}
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {}


def register(cls: type[nn.Module], adapter: Adapter) -> None:
    """Has :func:`fastbn.convert` take modules of another class, and ``fastbn.revert`` give it back.

    For a batch norm with the attributes of stock's, fastbn's forward is inherited::

        class FastMine(fastbn.BatchNorm2d, Mine):
            pass


        fastbn.register(Mine, fastbn.Adapter(FastMine))

    Others write a forward of their own, with :func:`fastbn.batch_norm` or
    :func:`fastbn.batch_norm_act`.

    Args:
        cls: the class; modules of its subclasses are not taken.
        adapter: says what they become.

    Raises:
        TypeError: the counterpart is no subclass, so ``isinstance`` would tell the two apart.
        ValueError: one of the classes is registered already.
    """
    counterpart = adapter.counterpart
    if not issubclass(counterpart, cls) or counterpart is cls:
        raise TypeError(
            f"{counterpart.__name__} is not a subclass of {cls.__name__}; derive it from that "
            "class, which code that asks isinstance() goes on expecting"
        )
    for known in (cls, counterpart):
        if known in _ADAPTERS or known in _ORIGINALS:
            raise ValueError(
                f"{known.__name__} is registered already; each class can be once, as what is "
                "converted or as what it becomes"
            )
    _ADAPTERS[cls] = adapter
    _ORIGINALS[counterpart] = cls


def fast_subclass(cls: type[nn.Module], forward: type[nn.Module]) -> type[nn.Module]:
    """The class ``cls`` with the forward of another in front.

    Its modules are pickled as an order to make this class again, as nobody can import it.
    """

    def refuse(self: nn.Module, *_: Any, **__: Any) -> None:
        del self
        raise TypeError(
            f"{cls.__name__} of fastbn has no constructor; make one of {cls.__module__} and have "
            "fastbn.convert convert it"
        )

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        stocks: Any = object.__reduce_ex__(self, protocol)
        _, _, *state = stocks
        return (_new, (cls,), *state)

    members = {
        "__doc__": f"{cls.__qualname__} of {cls.__module__} on fastbn's operators.",
        "__module__": __name__,
        "__init__": refuse,
        "__reduce_ex__": reduce,
    }
    return type(cls.__name__, (forward, cls), members)


def _new(cls: type[nn.Module]) -> nn.Module:
    """A module of the counterpart of a class, without any state yet."""
    adapter = adapter_of(cls)
    assert adapter is not None
    return adapter.counterpart.__new__(adapter.counterpart)


register(nn.BatchNorm1d, Adapter(BatchNorm1d))
register(nn.BatchNorm2d, Adapter(BatchNorm2d))
register(nn.BatchNorm3d, Adapter(BatchNorm3d))

# The same for classes that are known by name, so that their library need not be there: what is put
# in front of them, reason_to_stay and advice.
_BY_NAME = {
    ("timm.layers.norm_act", "BatchNormAct2d"): (
        FastTimmBatchNormAct,
        reason_without_drop_and_act,
        reason_not_to_fuse,
    ),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): (
        FastTimmFrozenBatchNormAct,
        reason_without_drop_and_act,
        reason_not_to_fuse,
    ),
}
_FROZEN = (FastFrozenBatchNorm, reason_frozen_stays, _nothing)


def adapter_of(cls: type[nn.Module]) -> Adapter | None:
    """What is registered for exactly this class, or known for its name."""
    if cls in _ADAPTERS or cls in _ORIGINALS:
        return _ADAPTERS.get(cls)
    default = _FROZEN if cls.__name__ == "FrozenBatchNorm2d" else None
    known = _BY_NAME.get((cls.__module__, cls.__qualname__), default)
    if known is None:
        return None
    forward, *judges = known
    adapter = Adapter(fast_subclass(cls, forward), *judges)
    register(cls, adapter)
    return adapter


def original_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class whose counterpart this is."""
    return _ORIGINALS.get(cls)


def reason_unknown_stays(module: nn.Module) -> str | None:
    """Why a module without an adapter is not converted; None if it looks like no batch norm."""
    name = type(module).__name__
    if isinstance(module, FastBatchNorm):
        return None
    if isinstance(module, LazyModuleMixin) and isinstance(module, _NormBase):
        return f"{name} has no parameters yet; run a batch through the model first"
    if isinstance(module, nn.SyncBatchNorm):
        return f"{name} takes its statistics over several processes"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return f"{name} is not a batch norm"
    if not isinstance(module, _BatchNorm):
        return None
    if is_parametrized(module):
        return f"{name} is parametrized, which gave it a class of its own"
    return (
        f"{name} is a subclass ({type(module).__module__}.{name}) and may behave in its own way; "
        "fastbn.register can tell how to convert it"
    )
