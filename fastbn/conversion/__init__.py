"""Changes the batch norms of a model: to fastbn's and back, synchronized, fused, frozen, folded."""

from .adapters import Adapter, register
from .convert import convert, revert
from .fold import fold
from .freeze import freeze, unfreeze
from .fuse import fuse
from .fusion.report import Fusion, FusionReport
from .report import FoldReport, SwapReport
from .sync import convert_sync_batchnorm

__all__ = [
    "Adapter",
    "FoldReport",
    "Fusion",
    "FusionReport",
    "SwapReport",
    "convert",
    "convert_sync_batchnorm",
    "fold",
    "freeze",
    "fuse",
    "register",
    "revert",
    "unfreeze",
]
