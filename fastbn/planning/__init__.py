"""What the CUDA backend would do, on GPUs that need not be there."""

from .plan import (
    ALGORITHM_VARIABLE,
    DEFAULT_DEVICE,
    DEVICES,
    DTYPES,
    Algorithm,
    Layout,
    Op,
    Plan,
    dtype_name,
    plan,
)

__all__ = [
    "ALGORITHM_VARIABLE",
    "DEFAULT_DEVICE",
    "DEVICES",
    "DTYPES",
    "Algorithm",
    "Layout",
    "Op",
    "Plan",
    "dtype_name",
    "plan",
]
