"""Batch norm and what follows it, an activation function and a residual, as one function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ._multiprocessors import leave_multiprocessors_free
from .activations import IDENTITY, Activation, activation_of
from .functional import dispatch, number
from .ops import operators
from .recompute import active

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def _has_kernels(
    x: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    eps: float,
) -> bool:
    """Whether one operator does it all; else batch norm, addition and activation take turns."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if type(eps) is not float or not (momentum is None or type(momentum) is float):
        return False  # batch norm alone converts or refuses them
    if any(
        running is not None and running.requires_grad for running in (running_mean, running_var)
    ):
        return False  # and refuses these
    return residual is None or (
        isinstance(residual, torch.Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def dispatch_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: Activation,
) -> Tensor:
    """Chooses the way to y: one operator, or one after the other.

    Args:
        x: (N, C, ...).
        residual: added to the result of batch norm; None for nothing. What broadcasts against x
            or promotes its dtype is added by PyTorch's own addition.
        weight: see :func:`fastbn.functional.dispatch`, and so on until ``eps``.
        bias: (C) or None.
        running_mean: (C) or None.
        running_var: (C) or None.
        num_batches_tracked: int64 scalar or None.
        training: normalize with the statistics of x.
        momentum: weight of x in the running statistics.
        eps: added to the variance.
        activation: the function of the sum.
    """
    statistics = (running_mean, running_var, num_batches_tracked)
    if residual is None and activation == IDENTITY:
        return dispatch(x, weight, bias, *statistics, training, momentum, eps)
    if not _has_kernels(x, residual, running_mean, running_var, momentum, eps):
        y = dispatch(x, weight, bias, *statistics, training, momentum, eps)
        return activation(y if residual is None else y + residual)
    recorder = None
    if not torch.compiler.is_compiling():  # else fake implementations do it, and nothing records
        if x.is_cuda:
            leave_multiprocessors_free()
        recorder = active.recorder
    operator = operators.batch_norm_act if recorder is None else recorder.batch_norm_act
    result: Tensor = operator(
        x, residual, weight, bias, *statistics, training, momentum, eps, *activation
    )
    return result


def batch_norm_act(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    activation_kwargs: Mapping[str, object] | None = None,
) -> Tensor:
    """``activation(batch_norm(input) + residual)`` in one pass over memory for all three.

    The value is not rounded to the dtype of ``input`` in between. The gradient is that of the
    activation at the rounded sum, as if it followed as an operation of its own. ``input`` and
    ``weight`` must not change before backward, as in batch norm alone. Nor must the residual and
    ``bias``, of which backward computes the sum again, unless it has no use for that: there is no
    activation, or one whose derivative takes two values (``relu``, ``relu6``, ``leaky_relu``). Then
    forward keeps a bit of each element if there is a residual, and ``input`` is contiguous or
    channels last with rows of a multiple of 16 bytes.

    Args:
        input: (N, C, ...); see :func:`fastbn.batch_norm`, and so on until ``eps``.
        running_mean: (C), updated in training; None only in training.
        running_var: (C), likewise.
        weight: (C), or None for ones.
        bias: (C), or None for zeros.
        training: use and record the statistics of ``input``.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance; positive in training.
        residual: like ``input``. One that broadcasts against it, or has another dtype, is added by
            PyTorch's own addition, which may widen the result.
        activation: ``relu``, ``relu6``, ``leaky_relu``, ``elu``, ``silu``, ``gelu``, ``gelu_tanh``,
            ``hardswish``, ``hardsigmoid``, ``sigmoid``, ``tanh``, ``mish``, or None.
        activation_kwargs: keyword arguments as PyTorch's module of that name takes them.

    Returns:
        A tensor like ``input``, channels last where that is.

    Raises:
        ValueError: no activation of that name; and what :func:`fastbn.batch_norm` raises.
        TypeError: a keyword argument that the activation does not have.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors):
        y: Tensor = handle_torch_function(
            batch_norm_act,
            tensors,
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            activation=activation,
            activation_kwargs=activation_kwargs,
        )
        return y
    if momentum is None:
        number("momentum", 7, momentum)
    function = activation_of(activation, activation_kwargs)
    return dispatch_act(
        input,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        None,
        training,
        momentum,
        eps,
        function,
    )
