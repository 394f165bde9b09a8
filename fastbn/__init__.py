"""Batch normalization for PyTorch that moves as few bytes as the math allows.

``fastbn.convert(model)`` puts it in place of every ``torch.nn.BatchNorm*`` of a model.
"""

from ._backend import build_info
from .conversion import (
    Adapter,
    FoldReport,
    Fusion,
    FusionReport,
    SwapReport,
    convert,
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
    "batch_norm",
    "batch_norm_act",
    "build_info",
    "convert",
    "fold",
    "freeze",
    "fuse",
    "plan",
    "recompute_activations",
    "register",
    "revert",
    "unfreeze",
]
