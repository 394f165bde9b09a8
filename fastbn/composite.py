"""Batch norm composed of PyTorch's own differentiable operators.

Slower than the compiled operators, and transparent to autograd: it serves double backward,
forward-mode differentiation and ``torch.func`` transforms (``vmap``, ``grad``, ``jvp``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd import forward_ad

from ._backend import masked_bytes
from .activations import IDENTITY, Activation
from .ops import accumulate_dtype, check_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def _axes(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.dim())]


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """``vector`` (C) in the dtype of sums, broadcastable against ``x`` (N, C, ...)."""
    return vector.to(accumulate_dtype(x.dtype)).reshape(1, -1, *[1] * (x.dim() - 2))


def _check_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor) -> None:
    """Refuses transforms under which running statistics have no meaning."""
    is_batched = torch._C._functorch.is_batchedtensor
    if is_batched(x) and not (is_batched(running_mean) and is_batched(running_var)):
        raise RuntimeError(
            "Batch norm got a batched tensor as input while the running_mean or running_var, "
            "which will be updated in place, were not batched.\nIf you are using a module and do "
            "not need eval mode, please set `track_running_stats` to be False."
        )


def _has_tangent(tensor: Tensor | None) -> bool:
    if tensor is None or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def _update(running: Tensor, batch: Tensor, factor: Tensor | float) -> None:
    """Blends the batch in: running = (1 - factor) * running + factor * batch."""
    if torch._C._functorch.is_functorch_wrapped_tensor(running):
        running.copy_((1 - factor) * running.to(batch.dtype) + factor * batch)
        return
    # Captured by a function that is being differentiated, perhaps: updated by value, as stock does.
    batch = torch.func.debug_unwrap(batch)
    blended = (1 - factor) * running.to(batch.dtype) + factor * batch
    torch.add(blended.to(running.dtype), 0, out=running)


def batch_norm(
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
    """Same arguments, result, effects and errors as :func:`fastbn.functional.dispatch`."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    check_forward(x, weight, bias, running_mean, running_var, training, eps)
    if _has_tangent(x) and (_has_tangent(running_mean) or _has_tangent(running_var)):
        raise RuntimeError(
            "batch_norm is not differentiable wrt running_mean and running_var, they cannot have "
            "forward grad defined"
        )
    wide = x.to(accumulate_dtype(x.dtype))
    if training:
        var, mean = torch.var_mean(wide, _axes(x), correction=0, keepdim=True)
        if running_mean is not None and running_var is not None and x.numel() > 0:
            _check_statistics(x, running_mean, running_var)
            factor: Tensor | float = 0.0 if momentum is None else momentum
            if momentum is None and num_batches_tracked is not None:
                factor = 1.0 / num_batches_tracked.to(wide.dtype)
            count = x.numel() // x.shape[1]
            with torch.no_grad():
                shape = running_mean.shape
                _update(running_mean, mean.detach().reshape(shape), factor)
                _update(running_var, var.detach().reshape(shape) * (count / (count - 1)), factor)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = _per_channel(running_mean, x), _per_channel(running_var, x)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * _per_channel(weight, x)
    y = (wide - mean) * scale
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y.to(x.dtype)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, weight and bias as differentiable functions of dy, x and weight.

    Training: ``dx = weight * invstd * (dy - mean(dy) - x_hat * mean(dy * x_hat))`` with
    ``x_hat = (x - mean) * invstd`` (Ioffe and Szegedy, 2015, section 3), the statistics being
    computed again as functions of x. Otherwise ``mean`` and ``invstd`` (C) are constants and
    ``dx = weight * invstd * dy``.
    """
    axes = _axes(x)
    wide, wide_dy = x.to(accumulate_dtype(x.dtype)), dy.to(accumulate_dtype(x.dtype))
    if training:
        var, center = torch.var_mean(wide, axes, correction=0, keepdim=True)
        inverse = torch.rsqrt(var + eps)
    else:
        center, inverse = _per_channel(mean, x), _per_channel(invstd, x)
    x_hat = (wide - center) * inverse
    scale = inverse if weight is None else inverse * _per_channel(weight, x)
    dbias = wide_dy.sum(axes)
    dweight = (wide_dy * x_hat).sum(axes)
    if training:
        count = x.numel() // x.shape[1]
        offset = _per_channel(dbias, x) + x_hat * _per_channel(dweight, x)
        dx = scale * (wide_dy - offset / count)
    else:
        dx = scale * wide_dy
    if weight is not None:
        dweight = dweight.to(weight.dtype)
    return dx.to(x.dtype), dweight, dbias


def sync_batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    count: Tensor,
    eps: float,
    all_reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of training where several processes have a part of the batch each.

    Those of weight and bias are by dy and x of this process alone.

    Args:
        dy: like x.
        x: (N, C, ...), of which this process may have none.
        weight: (C) or None.
        mean: (C), of all parts and of the same bits in all processes: the pivot.
        count: of values of a channel in all parts, float64 of one element.
        eps: added to the variance.
        all_reduce: the sum over processes of float64 of any shape, differentiable.
    """
    axes = _axes(x)
    wide_dy = dy.to(accumulate_dtype(x.dtype))
    deviations = x.to(wide_dy.dtype) - _per_channel(mean, x)
    moments = torch.stack((deviations.sum(axes), deviations.square().sum(axes))).double()
    first, second = (all_reduce(moments) / count).unbind()
    inverse = _per_channel(torch.rsqrt(second - first.square() + eps), x)
    x_hat = (deviations - _per_channel(first, x)) * inverse
    scale = inverse if weight is None else inverse * _per_channel(weight, x)
    dbias = wide_dy.sum(axes)
    dweight = (wide_dy * x_hat).sum(axes)
    sums = all_reduce(torch.stack((dbias, dweight)).double()) / count
    offset = _per_channel(sums[0], x) + x_hat * _per_channel(sums[1], x)
    dx = scale * (wide_dy - offset)
    if weight is not None:
        dweight = dweight.to(weight.dtype)
    return dx.to(x.dtype), dweight, dbias


def _times_slope(dy: Tensor, x: Tensor, mask: Tensor, other: float) -> Tensor:
    """``dy`` where the mask of x has a bit, else ``dy`` times the ``other`` slope."""
    bits = torch.arange(masked_bytes // x.element_size(), device=x.device)
    is_one = (mask.unsqueeze(1) >> bits & 1).bool().reshape(-1).as_strided(x.shape, x.stride())
    return torch.where(is_one, dy, dy * other if other != 0 else 0)


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
    eps: float,
    activation: str,
    parameter: float,
) -> tuple[Tensor, ...]:
    """Gradients for x, residual, weight and bias as differentiable functions of all of these.

    Of no elements for what is None, unless there is a mask or no activation function: then neither
    residual nor bias is needed.

    Those of ``activation(batch_norm(x) + residual)``, by autograd: in training the statistics are
    computed again as functions of x, otherwise ``mean`` and ``invstd`` (C) are constants.
    """
    if mask is not None or activation == IDENTITY.name:
        dz = dy
        if mask is not None:
            dz = _times_slope(dy.to(accumulate_dtype(x.dtype)), x, mask, parameter)
        dx, dweight, dbias = batch_norm_backward(dz, x, weight, mean, invstd, training, eps)
        return dx, dz.to(dy.dtype), dweight, dbias
    with torch.enable_grad():
        # Aliases: gradients of these alone, whatever one of them is computed from.
        given = (x, residual, weight, bias)
        aliases = [t if t is None else t.view_as(t).requires_grad_() for t in given]
        x, residual, weight, bias = aliases  # type: ignore[assignment]
        wide = x.to(accumulate_dtype(x.dtype))
        if training:
            var, center = torch.var_mean(wide, _axes(x), correction=0, keepdim=True)
            inverse = torch.rsqrt(var + eps)
        else:
            center, inverse = _per_channel(mean, x), _per_channel(invstd, x)
        z = (wide - center) * (inverse if weight is None else inverse * _per_channel(weight, x))
        z = z if bias is None else z + _per_channel(bias, x)
        z = z if residual is None else z + residual
        # Kernels take derivatives at what the dtype of x holds of z.
        z = z + (z.to(x.dtype).to(z.dtype) - z).detach()
        y = Activation(activation, parameter)(z).to(x.dtype)
        wanted = [alias for alias in aliases if alias is not None]
        gradients = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(dy.new_empty(0) if alias is None else next(gradients) for alias in aliases)


# Kernels of the operators that csrc/ops/autograd.cpp asks for gradients of gradients.
_LIBRARY = torch.library.Library("fastbn", "FRAGMENT")
for _kernel in (batch_norm_backward, batch_norm_act_backward):
    _LIBRARY.impl(f"{_kernel.__name__}_composite", _kernel, "CompositeImplicitAutograd")
