"""The compiled operators, declared by their fake implementations.

A fake implementation tells tracing (``torch.compile``, ``torch.export``, meta tensors) the shapes,
strides and dtypes of results without computing them. Its signature is the operator's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch._prims_common import suggest_memory_format

from ._backend import (  # the import registers the operators
    activation_functions,
    functions_with_two_slopes,
    masked_bytes,
    max_mask_bytes,
    messages,
)
from ._multiprocessors import leave_multiprocessors_free

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    ThreeTensors = tuple[Tensor, Tensor, Tensor]
    FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]

Parameters = ParamSpec("Parameters")
Results = TypeVar("Results")

# The channels-last memory formats, by the number of dimensions of their tensors.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# All of them, by name: those below, and batch_norm and batch_norm_act, which have their gradients
# and no fake implementation, as they are composed of others.
operators = torch.ops.fastbn

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and saved statistics: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _say(message: str, *arguments: object) -> str:
    return messages[message].format(*arguments)


def check_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Refuses what the compiled operators refuse, in their words; for x that has only a shape."""
    if training and math.prod(x.shape[:1] + x.shape[2:]) == 1:
        raise ValueError(_say("one_value_per_channel", x.size()))
    if training and eps <= 0.0:
        raise ValueError(_say("training_eps", eps))
    if eps < 0.0:
        raise ValueError(_say("eps", eps))
    if x.numel() > 0:
        _check_vectors(x, weight, bias, running_mean, running_var, training)


def _check_vectors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> None:
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    channels = x.shape[1] if x.dim() > 1 else 0
    for name, vector in vectors.items():
        if vector is not None and vector.numel() != channels:
            raise RuntimeError(_say("elements", name, channels, vector.numel()))
        if vector is None and not training and name.startswith("running"):
            raise RuntimeError(_say("no_statistics", name))
    if (running_mean is None) != (running_var is None):
        raise ValueError(_say("one_statistic"))
    _check_activation(x)
    device = "CPU" if x.is_cpu else "CUDA"
    for vector in vectors.values():
        if vector is None:
            continue
        if x.dtype == torch.float64 and vector.dtype != torch.float64:
            raise RuntimeError(_say("mixed_with_float64", device))
        if x.dtype != torch.float64 and vector.dtype not in _DTYPES[1:]:
            raise RuntimeError(_say("mixed_dtypes", device))


def _check_activation(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise NotImplementedError(_say("dtype", x.dtype))
    if x.dim() < 2:
        raise IndexError(_say("dimensions", x.dim()))


def _check_rows(x: Tensor, rows: Tensor, row_length: int) -> None:
    if rows.dim() != 2 or rows.shape[0] == 0 or rows.shape[1] != row_length:
        raise RuntimeError(_say("rows", row_length, list(x.shape), list(rows.shape)))
    if rows.dtype != torch.float64:
        raise RuntimeError(_say("float64", "rows", rows.dtype))


def _check_devices(x: Tensor, *others: Tensor | None) -> None:
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(_say("device", other.device, x.device))


def memory_format_of(x: Tensor) -> torch.memory_format:
    """That of x and of all results, as ``format_of`` in csrc/ops/ops.cpp has it.

    Strides of dimensions of size one mean nothing and are not looked at where there is a choice;
    contiguous comes first.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    channels_last = CHANNELS_LAST.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return suggest_memory_format(x)


def _result_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _vector(x: Tensor, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
    elements = x.shape[1] if wanted and x.dim() > 1 else 0
    return x.new_empty(elements, dtype=dtype or accumulate_dtype(x.dtype))


def _operator(fake: Callable[Parameters, Results]) -> Callable[Parameters, Results]:
    """The compiled operator that has the name of its fake implementation, which it gets."""
    torch.library.register_fake(f"fastbn::{fake.__name__}", fake)
    operator: Callable[Parameters, Results] = getattr(torch.ops.fastbn, fake.__name__).default
    return operator


@_operator
def batch_norm_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> ThreeTensors:
    """Returns (y, mean, invstd); updates the running statistics and the counter."""
    leave_multiprocessors_free()
    _check_devices(x, weight, bias, running_mean, running_var, num_batches_tracked)
    check_forward(x, weight, bias, running_mean, running_var, True, eps)
    return _result_like(x), _vector(x, True), _vector(x, True)


@_operator
def batch_norm_eval(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    save: bool,
) -> ThreeTensors:
    """Returns (y, mean, invstd); the statistics are copies, of no elements unless ``save``."""
    _check_devices(x, weight, bias, running_mean, running_var)
    check_forward(x, weight, bias, running_mean, running_var, False, eps)
    return _result_like(x), _vector(x, save), _vector(x, save)


@_operator
def batch_norm_backward(
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
    """Returns (dx, dweight, dbias), of no elements where not wanted."""
    leave_multiprocessors_free()
    _check_devices(x, dy, weight, mean, invstd)
    dtype = None if weight is None else weight.dtype
    dx = _result_like(x) if want_dx else x.new_empty(0)
    return dx, _vector(x, want_dweight, dtype), _vector(x, want_dbias)


# The same with an activation function and a residual behind; see csrc/ops/ops.h.


def _check_epilogue(x: Tensor, residual: Tensor | None, activation: str) -> None:
    if residual is not None:
        _check_devices(x, residual)
        if residual.shape != x.shape:
            raise RuntimeError(_say("residual_shape", list(residual.shape), list(x.shape)))
        if residual.dtype != x.dtype:
            raise RuntimeError(_say("residual_dtype", residual.dtype, x.dtype))
    if activation not in activation_functions:
        raise ValueError(_say("activation", activation))


def _mask(x: Tensor, residual: Tensor | None, activation: str, wanted: bool) -> Tensor:
    """That of forward, as ``mask_bytes`` in csrc/core/mask.h has it."""
    none = x.new_empty(0, dtype=torch.uint8)
    if not wanted or residual is None or activation not in functions_with_two_slopes:
        return none
    memory_format = memory_format_of(x)
    if x.numel() == 0 or not x.is_contiguous(memory_format=memory_format):
        return none
    together = masked_bytes // x.element_size()
    spatial = x.numel() // (x.shape[0] * x.shape[1])
    rows_are_channels = memory_format == torch.contiguous_format and spatial != 1
    row = spatial if rows_are_channels else x.shape[1]
    count = x.numel() // together
    return none if row % together != 0 or count > max_mask_bytes else none.new_empty(count)


@_operator
def batch_norm_act_training(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    parameter: float,
    want_mask: bool,
) -> FourTensors:
    """Returns (y, mean, invstd, mask), the statistics in float64; see batch_norm_training."""
    leave_multiprocessors_free()
    _check_devices(x, weight, bias, running_mean, running_var, num_batches_tracked)
    check_forward(x, weight, bias, running_mean, running_var, True, eps)
    _check_epilogue(x, residual, activation)
    mean, invstd = (_vector(x, True, torch.float64) for _ in range(2))
    return _result_like(x), mean, invstd, _mask(x, residual, activation, want_mask)


@_operator
def batch_norm_act_eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    save: bool,
    activation: str,
    parameter: float,
) -> FourTensors:
    """Returns (y, mean, invstd, mask), the statistics in float64; see batch_norm_eval."""
    _check_devices(x, weight, bias, running_mean, running_var)
    check_forward(x, weight, bias, running_mean, running_var, False, eps)
    _check_epilogue(x, residual, activation)
    mean, invstd = (_vector(x, save, torch.float64) for _ in range(2))
    return _result_like(x), mean, invstd, _mask(x, residual, activation, save)


@_operator
def batch_norm_act_apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    parameter: float,
) -> Tensor:
    """Returns y of batch_norm_act_training or batch_norm_act_eval again, bitwise.

    Mean and invstd, float64 of shape (C), are those that it returned.
    """
    _check_devices(x, weight, bias, mean, invstd)
    _check_epilogue(x, residual, activation)
    return _result_like(x)


@_operator
def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    activation: str,
    parameter: float,
    want_dx: bool,
    want_dresidual: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> FourTensors:
    """Returns (dx, dresidual, dweight, dbias), of no elements where not wanted.

    It takes the mask that forward returned, or else the residual.
    """
    leave_multiprocessors_free()
    _check_devices(x, dy, mask, weight, bias, mean, invstd)
    _check_epilogue(x, residual, activation)
    dtype = None if weight is None else weight.dtype
    dx = _result_like(x) if want_dx else x.new_empty(0)
    dresidual = _result_like(x) if want_dresidual else x.new_empty(0)
    return dx, dresidual, _vector(x, want_dweight, dtype), _vector(x, want_dbias)


# The steps apart, for statistics that several processes share; csrc/ops/ops.h says what rows hold.


def check_combine_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    eps: float,
) -> None:
    """Refuses what batch_norm_combine_apply refuses, in its words; for who has no rows yet."""
    _check_devices(x, weight, bias, running_mean, running_var, num_batches_tracked)
    if eps <= 0.0:
        raise ValueError(_say("training_eps", eps))
    _check_vectors(x, weight, bias, running_mean, running_var, True)
    counter = num_batches_tracked
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1):
        raise RuntimeError(_say("counter", counter.numel(), counter.dtype))


@_operator
def batch_norm_stats(x: Tensor, additive: bool) -> Tensor:
    """Reduces x to a row, float64 of shape (1 + 2C)."""
    _check_activation(x)
    return x.new_empty(1 + 2 * x.shape[1], dtype=torch.float64)


@_operator
def batch_norm_combine_apply(
    x: Tensor,
    rows: Tensor,
    additive: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> FourTensors:
    """Combines rows of shape (R, 1 + 2C), finalizes them and applies them to x.

    Returns (y, mean, invstd, count).
    """
    check_combine_apply(x, weight, bias, running_mean, running_var, num_batches_tracked, eps)
    _check_devices(x, rows)
    _check_rows(x, rows, 1 + 2 * x.shape[1])
    return _result_like(x), _vector(x, True), _vector(x, True), rows.new_empty(1)


@_operator
def batch_norm_backward_reduce(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    want_dweight: bool,
    want_dbias: bool,
) -> ThreeTensors:
    """Reduces the gradients; returns (row, dweight, dbias).

    The row is float64 of shape (2C); those of the parameters are by dy and x alone.
    """
    _check_devices(x, dy, weight, mean, invstd)
    row = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    dtype = None if weight is None else weight.dtype
    return row, _vector(x, want_dweight, dtype), _vector(x, want_dbias)


@_operator
def batch_norm_backward_combine_apply(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    rows: Tensor,
    count: Tensor,
) -> Tensor:
    """Combines rows of shape (R, 2C) and applies them to dy and x; returns dx."""
    _check_devices(x, dy, weight, mean, invstd, rows, count)
    _check_rows(x, rows, 2 * x.shape[1])
    if count.numel() != 1:
        raise RuntimeError(_say("count", count.numel()))
    return _result_like(x)
