"""Batch normalization for PyTorch that moves as few bytes as the math allows.

``fastbn.convert(model)`` puts it in place of every ``torch.nn.BatchNorm*`` of a model.
"""

from ._backend import build_info
from .collectives import sync_group
from .conversion import (
    Adapter,
    FoldReport,
    Fusion,
    FusionReport,
    SwapReport,
    convert,
    convert_sync_batchnorm,
    fold,
    freeze,
    fuse,
    register,
    revert,
    unfreeze,
)
from .functional import BatchNormFunction, batch_norm
from .fused import batch_norm_act
from .modules import (
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
from .planning import Plan, plan
from .recompute import recompute_activations

__version__ = str(build_info()["fastbn"])

__all__ = [
    "Adapter",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormFunction",
    "FoldReport",
    "Fusion",
    "FusionReport",
    "Plan",
    "SwapReport",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "batch_norm",
    "batch_norm_act",
    "build_info",
    "convert",
    "convert_sync_batchnorm",
    "fold",
    "freeze",
    "fuse",
    "plan",
    "recompute_activations",
    "register",
    "revert",
    "sync_group",
    "unfreeze",
]
