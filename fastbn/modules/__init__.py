"""Batch norm modules: stock's, with the compiled operators underneath."""

from .batchnorm import HALF_DTYPES, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .fused import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .sync import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

__all__ = [
    "HALF_DTYPES",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
]
