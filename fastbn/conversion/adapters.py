"""Which classes of modules have a counterpart that runs on fastbn: one table for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from ..modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)
from ..modules.batchnorm import FastBatchNorm
from ..modules.foreign import (
    FastFrozenBatchNorm,
    FastTimmBatchNormAct,
    FastTimmFrozenBatchNormAct,
    reason_frozen_stays,
    reason_not_to_fuse,
    reason_without_drop_and_act,
)
from ..modules.sync import (
    SyncBatchNormAct1d,
    SyncBatchNormAct2d,
    SyncBatchNormAct3d,
    Synchronized,
    SyncTimmBatchNormAct,
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
        synchronized: the class that :func:`fastbn.convert_sync_batchnorm` gives them, another
            subclass of theirs; None where there is none.
    """

    counterpart: type[nn.Module]
    reason_to_stay: Callable[[nn.Module], str | None] = _nothing
    advice: Callable[[nn.Module], str | None] = _nothing
    synchronized: type[nn.Module] | None = None


# fastbn's own, which are not converted, and what synchronizes them.
_WITH_ACTIVATION: dict[type[nn.Module], type[nn.Module]] = {
    BatchNormAct1d: SyncBatchNormAct1d,
    BatchNormAct2d: SyncBatchNormAct2d,
    BatchNormAct3d: SyncBatchNormAct3d,
}

_ADAPTERS: dict[type[nn.Module], Adapter] = {}
# Those of synchronized batch norms that are no counterparts, too.
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {
    synchronized: cls for cls, synchronized in _WITH_ACTIVATION.items()
}


# By the class and by what is in front of it.
_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


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
    becomes = {adapter.counterpart, adapter.synchronized or adapter.counterpart}
    for other in becomes:
        if not issubclass(other, cls) or other is cls:
            raise TypeError(
                f"{other.__name__} is not a subclass of {cls.__name__}; derive it from that "
                "class, which code that asks isinstance() goes on expecting"
            )
    for known in (cls, *becomes):
        if known in _ADAPTERS or known in _ORIGINALS:
            raise ValueError(
                f"{known.__name__} is registered already; each class can be once, as what is "
                "converted or as what it becomes"
            )
    _ADAPTERS[cls] = adapter
    _ORIGINALS.update(dict.fromkeys(becomes, cls))


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
        reduced: Any = forward.__reduce_ex__(self, protocol)
        _, _, *state = reduced
        return (_new, (cls, forward), *state)

    members = {
        "__doc__": f"{cls.__qualname__} of {cls.__module__} on fastbn's operators.",
        "__module__": __name__,
        "__init__": refuse,
        "__reduce_ex__": reduce,
    }
    kind = type(cls.__name__, (forward, cls), members)
    return _MADE.setdefault((cls, forward), kind)


def _new(cls: type[nn.Module], forward: type[nn.Module]) -> nn.Module:
    """A module of :func:`fast_subclass`, without any state yet."""
    adapter_of(cls)  # makes it, where nobody has
    kind = _MADE[cls, forward]
    return kind.__new__(kind)


register(nn.BatchNorm1d, Adapter(BatchNorm1d, synchronized=SyncBatchNorm1d))
register(nn.BatchNorm2d, Adapter(BatchNorm2d, synchronized=SyncBatchNorm2d))
register(nn.BatchNorm3d, Adapter(BatchNorm3d, synchronized=SyncBatchNorm3d))
register(nn.SyncBatchNorm, Adapter(SyncBatchNorm, synchronized=SyncBatchNorm))

# The same for classes that are known by name, so that their library need not be there: what is put
# in front of them, reason_to_stay, advice, and what is put in front if they are synchronized.
_BY_NAME = {
    ("timm.layers.norm_act", "BatchNormAct2d"): (
        FastTimmBatchNormAct,
        reason_without_drop_and_act,
        reason_not_to_fuse,
        SyncTimmBatchNormAct,
    ),
    ("timm.layers.norm_act", "SyncBatchNormAct"): (
        SyncTimmBatchNormAct,
        reason_without_drop_and_act,
        reason_not_to_fuse,
        SyncTimmBatchNormAct,
    ),
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): (
        FastTimmFrozenBatchNormAct,
        reason_without_drop_and_act,
        reason_not_to_fuse,
        None,
    ),
}
_FROZEN = (FastFrozenBatchNorm, reason_frozen_stays, _nothing, None)


def adapter_of(cls: type[nn.Module]) -> Adapter | None:
    """What is registered for exactly this class, or known for its name."""
    if cls in _ADAPTERS or cls in _ORIGINALS:
        return _ADAPTERS.get(cls)
    default = _FROZEN if cls.__name__ == "FrozenBatchNorm2d" else None
    known = _BY_NAME.get((cls.__module__, cls.__qualname__), default)
    if known is None:
        return None
    forward, reason_to_stay, advice, synchronized = known
    adapter = Adapter(
        fast_subclass(cls, forward),
        reason_to_stay,
        advice,
        None if synchronized is None else fast_subclass(cls, synchronized),
    )
    register(cls, adapter)
    return adapter


def original_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class whose counterpart, synchronized or not, this is."""
    return _ORIGINALS.get(cls)


def synchronized_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that modules of this one, converted or not, get to share their statistics."""
    if issubclass(cls, Synchronized):
        return cls
    if cls in _WITH_ACTIVATION:
        return _WITH_ACTIVATION[cls]
    adapter = adapter_of(original_of(cls) or cls)
    return None if adapter is None else adapter.synchronized


def reason_unknown_stays(module: nn.Module) -> str | None:
    """Why a module without an adapter is not converted; None if it looks like no batch norm."""
    name = type(module).__name__
    if isinstance(module, FastBatchNorm):
        return None
    if isinstance(module, LazyModuleMixin) and isinstance(module, _NormBase):
        return f"{name} has no parameters yet; run a batch through the model first"
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
