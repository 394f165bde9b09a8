"""The compiled operators, typed, and their fake implementations.

A fake implementation tells tracing (``torch.compile``, ``torch.export``, meta tensors) the shapes,
strides and dtypes of results without computing them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._prims_common import suggest_memory_format

from . import _backend as _backend  # registers the operators

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    ThreeTensors = tuple[Tensor, Tensor, Tensor]

# (x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
#   -> (y, mean, invstd); updates the running statistics and the counter.
batch_norm_training: Callable[..., ThreeTensors] = torch.ops.fastbn.batch_norm_training.default

# (x, weight, bias, running_mean, running_var, eps, save) -> (y, mean, invstd); the statistics are
# copies, of no elements unless `save`.
batch_norm_inference: Callable[..., ThreeTensors] = torch.ops.fastbn.batch_norm_inference.default

# (dy, x, weight, mean, invstd, training, want_dx, want_dweight, want_dbias)
#   -> (dx, dweight, dbias), of no elements where not wanted.
batch_norm_backward: Callable[..., ThreeTensors] = torch.ops.fastbn.batch_norm_backward.default


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and saved statistics: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"Tensor on device {other.device} is not on the expected device {x.device}!"
            )


def _result_like(x: Tensor) -> Tensor:
    layout = torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)
    return torch.empty_like(x, memory_format=layout)


def _vector(x: Tensor, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
    elements = x.shape[1] if wanted and x.dim() > 1 else 0
    return x.new_empty(elements, dtype=dtype or accumulate_dtype(x.dtype))


@torch.library.register_fake("fastbn::batch_norm_training")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> ThreeTensors:
    _check_devices(x, weight, bias, running_mean, running_var, num_batches_tracked)
    return _result_like(x), _vector(x, True), _vector(x, True)


@torch.library.register_fake("fastbn::batch_norm_inference")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    save: bool,
) -> ThreeTensors:
    _check_devices(x, weight, bias, running_mean, running_var)
    return _result_like(x), _vector(x, save), _vector(x, save)


@torch.library.register_fake("fastbn::batch_norm_backward")  # type: ignore[untyped-decorator]
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> ThreeTensors:
    _check_devices(x, dy, weight, mean, invstd)
    dtype = None if weight is None else weight.dtype
    dx = _result_like(x) if want_dx else x.new_empty(0)
    return dx, _vector(x, want_dweight, dtype), _vector(x, want_dbias, dtype)
