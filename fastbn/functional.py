"""Batch norm as a function, and as a ``torch.autograd.Function``."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import composite
from ._multiprocessors import leave_multiprocessors_free
from .ops import batch_norm_backward, batch_norm_eval, batch_norm_training, operators

if TYPE_CHECKING:
    from torch import Tensor


class BatchNormFunction(torch.autograd.Function):
    """Batch norm with the compiled forward and backward, for who builds on autograd functions.

    What :func:`batch_norm` and the modules call does the same in fewer microseconds.

    ``BatchNormFunction.apply(x, weight, bias, running_mean, running_var, num_batches_tracked,
    training, momentum, eps)`` returns y. It saves x, weight and the statistics it used, never the
    running buffers: later forward passes through the same module leave its gradients right.
    Backward is differentiable again, by :mod:`fastbn.composite`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        """Runs the compiled forward; see :func:`dispatch` for the arguments."""
        if training:
            y, mean, invstd = batch_norm_training(
                x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps
            )
        else:
            y, mean, invstd = batch_norm_eval(x, weight, bias, running_mean, running_var, eps, True)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.training = training
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the compiled backward for the gradients that are wanted."""
        x, weight, mean, invstd = ctx.saved_tensors
        want_dx, want_dweight, want_dbias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            dx, dweight, dbias = composite.batch_norm_backward(
                dy, x, weight, mean, invstd, ctx.training, ctx.eps
            )
        else:
            dx, dweight, dbias = batch_norm_backward(
                dy, x, weight, mean, invstd, ctx.training, want_dx, want_dweight, want_dbias
            )
        return (
            dx if want_dx else None,
            dweight if want_dweight else None,
            dbias if want_dbias else None,
            *(None,) * 6,
        )


def _count(num_batches_tracked: Tensor | None) -> None:
    """Counts a batch that is about to be refused, as stock does."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)


def refuse_grad(name: str) -> None:
    """Says of running statistics that require a gradient that there is none, as stock does."""
    raise RuntimeError(
        "The function 'native_batch_norm' is not differentiable with respect to argument "
        f"'{name}'. This input cannot have requires_grad True."
    )


def number(name: str, position: int, value: object) -> float:
    """What stock takes for a number: Python's, NumPy's, and tensors of a single element."""
    if isinstance(value, Real) or (
        isinstance(value, torch.Tensor) and value.dim() == 0 and not value.requires_grad
    ):
        return float(value)
    raise TypeError(
        f"batch_norm(): argument '{name}' (position {position}) must be float, "
        f"not {type(value).__name__}"
    )


def dispatch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Chooses the way to y: the operator, or the composite formula.

    Args:
        x: (N, C, ...).
        weight: (C) or None.
        bias: (C) or None.
        running_mean: (C); in training updated, or None.
        running_var: (C); in training updated, or None.
        num_batches_tracked: int64 scalar, incremented; or None. Only in training.
        training: normalize with the statistics of x.
        momentum: weight of x in the running statistics; None for the average of all batches.
        eps: added to the variance.
    """
    if type(eps) is not float or not (momentum is None or type(momentum) is float):
        try:
            momentum = None if momentum is None else number("momentum", 7, momentum)
            eps = number("eps", 8, eps)
        except TypeError:
            _count(num_batches_tracked)
            raise
    if x.is_cuda and not torch.compiler.is_compiling():  # else fake implementations do it
        leave_multiprocessors_free()
    statistics = (running_mean, running_var, num_batches_tracked)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return composite.batch_norm(x, weight, bias, *statistics, training, momentum, eps)
    if torch.is_grad_enabled():
        for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
            if statistic is not None and statistic.requires_grad:
                _count(num_batches_tracked)
                refuse_grad(name)
    y: Tensor = operators.batch_norm(x, weight, bias, *statistics, training, momentum, eps)
    return y


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalizes each channel over the batch: :func:`torch.nn.functional.batch_norm`, faster.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` (Ioffe and Szegedy, "Batch normalization",
    2015), where mean and the biased variance are those of the batch in training and the running
    ones otherwise. In training ``running = (1 - momentum) * running + momentum * batch``, with the
    unbiased variance.

    Args:
        input: (N, C, ...) of rank 2 or more; float64, float32, bfloat16 or float16; any strides.
        running_mean: (C), updated in training; None only in training.
        running_var: (C), likewise.
        weight: (C), or None for ones.
        bias: (C), or None for zeros.
        training: use and record the statistics of ``input``.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; positive in training.

    Unlike stock's, vectors may have any of the narrower dtypes whatever the input has; float64
    goes with float64 alone.

    Returns:
        A tensor like ``input``, channels last where that is.

    Raises:
        ValueError: fewer than two values per channel in training; ``eps`` out of range; only one
            of the running statistics given.
        RuntimeError: a vector of other than C elements, of an unfitting dtype or on another
            device; no running statistics outside training.
        NotImplementedError: an input that is not of a supported floating-point dtype.
        TypeError: ``momentum`` or ``eps`` is not a number.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        y: Tensor = handle_torch_function(
            batch_norm,
            (input, running_mean, running_var, weight, bias),
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
        )
        return y
    if momentum is None:
        number("momentum", 7, momentum)
    return dispatch(input, weight, bias, running_mean, running_var, None, training, momentum, eps)
