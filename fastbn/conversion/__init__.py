"""Changes the batch norms of a model: to fastbn's and back, fused, frozen, folded."""

from .adapters import Adapter, register
from .convert import convert, revert
from .fold import fold
from .freeze import freeze, unfreeze
from .fuse import fuse
from .fusion.report import Fusion, FusionReport
from .report import FoldReport, SwapReport

__all__ = [
    "Adapter",
    "FoldReport",
    "Fusion",
    "FusionReport",
    "SwapReport",
    "convert",
    "fold",
    "freeze",
    "fuse",
    "register",
    "revert",
    "unfreeze",
]
