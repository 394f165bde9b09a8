"""Changes the batch norms of a model: to fastbn's and back, frozen, folded."""

from .adapters import Adapter, register
from .convert import convert, revert
from .fold import fold
from .freeze import freeze, unfreeze
from .report import FoldReport, SwapReport

__all__ = [
    "Adapter",
    "FoldReport",
    "SwapReport",
    "convert",
    "fold",
    "freeze",
    "register",
    "revert",
    "unfreeze",
]
