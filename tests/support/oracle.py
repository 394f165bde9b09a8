"""The oracle: batch norm written out in float64, straight from the formulas.

Nothing here calls PyTorch's batch norm or its autograd, so it can judge stock as well as fastbn.
Ioffe and Szegedy, "Batch normalization", 2015, is the source of all formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Expected:
    """An exact value and what its error may be measured by.

    Attributes:
        value: float64.
        scale: size of the terms that `value` is put together from; broadcastable to it.
        held: how far `value` moves when the mean moves by all of itself. Where the mean is held in
            the dtype of sums, its rounding moves `value` by that share of this.
    """

    value: Tensor
    scale: Tensor
    held: Tensor


@dataclass(frozen=True)
class Statistics:
    """Mean, biased variance and 1 / sqrt(variance + eps) of each channel, float64 of shape (C).

    The exact mean is `mean` plus `residual`, what float64 could not hold of it.
    """

    mean: Tensor
    residual: Tensor
    var: Tensor
    invstd: Tensor
    count: int

    def deviations(self, x: Tensor) -> Tensor:
        """X minus the mean."""
        return x - _per_channel(self.mean, x) - _per_channel(self.residual, x)


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.reshape(1, -1, *[1] * (x.dim() - 2))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude in each channel, kept broadcastable; of no values, 0."""
    if values.numel() == 0:
        return values.sum(_axes(values), keepdim=True)
    return values.abs().amax(_axes(values), keepdim=True)


def _expected(value: Tensor, scale: Tensor, held: Tensor | None = None) -> Expected:
    return Expected(value, scale, torch.zeros_like(scale) if held is None else held)


def batch_statistics(x: Tensor, eps: float) -> Statistics:
    """Of the batch, by deviations from a first estimate of the mean."""
    x = _double(x)
    count = x.numel() // x.shape[1]
    estimate = x.sum(_axes(x)) / count
    correction = (x - _per_channel(estimate, x)).sum(_axes(x)) / count
    mean = estimate + correction
    residual = (x - _per_channel(mean, x)).sum(_axes(x)) / count
    deviations = x - _per_channel(mean, x) - _per_channel(residual, x)
    var = deviations.square().sum(_axes(x)) / count
    return Statistics(mean, residual, var, 1 / (var + eps).sqrt(), count)


def given_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> Statistics:
    """Those of eval."""
    mean, var = _double(running_mean).reshape(-1), _double(running_var).reshape(-1)
    count = x.numel() // x.shape[1]
    return Statistics(mean, 0 * mean, var, 1 / (var + eps).sqrt(), count)


def output(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics
) -> Expected:
    """``y = (x - mean) * invstd * weight + bias``."""
    wide = _double(x)
    ones = torch.ones_like(statistics.mean)
    scale = statistics.invstd * (ones if weight is None else _double(weight).reshape(-1))
    shift = _per_channel(0 * ones if bias is None else _double(bias).reshape(-1), x)
    scaled = statistics.deviations(wide) * _per_channel(scale, x)
    # Forward in a narrower dtype has the mean in float64, and in float64 nothing wider to have.
    held = (statistics.mean * scale).abs() if x.dtype == torch.float64 else 0 * ones
    return Expected(scaled + shift, _largest(scaled) + shift.abs(), _per_channel(held, x))


def saved_statistics(statistics: Statistics) -> dict[str, Expected]:
    """What the operators keep for backward."""
    return {
        "mean": _expected(statistics.mean, statistics.var.sqrt()),
        "invstd": _expected(statistics.invstd, statistics.invstd),
    }


def running_statistics(
    statistics: Statistics, running_mean: Tensor, running_var: Tensor, momentum: float
) -> dict[str, Expected]:
    """``(1 - momentum) * running + momentum * batch``, with the unbiased variance."""
    unbiased = statistics.var * statistics.count / (statistics.count - 1)
    blend = {}
    for name, running, batch, size in (
        ("running_mean", running_mean, statistics.mean, statistics.var.sqrt()),
        ("running_var", running_var, unbiased, unbiased),
    ):
        kept = (1 - momentum) * _double(running).reshape(-1)
        value = (kept + momentum * batch).reshape(running.shape)
        # The sum is float64: its terms' rounding shows only where the result is, too.
        terms = kept.abs() + batch.abs() if running.dtype == torch.float64 else 0
        blend[name] = _expected(value, abs(momentum) * size + terms)
    return blend


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, training: bool
) -> dict[str, Expected]:
    """The gradients with respect to x, weight and bias.

    ``dbias = sum(dy)``, ``dweight = sum(dy * x_hat)`` with ``x_hat = (x - mean) * invstd``. With
    given statistics ``dx = weight * invstd * dy``; in training, where they depend on x,
    ``dx = weight * invstd * (dy - mean(dy) - x_hat * mean(dy * x_hat))``.
    """
    x, dy = _double(x), _double(dy)
    invstd, count = statistics.invstd, statistics.count
    x_hat = statistics.deviations(x) * _per_channel(invstd, x)
    product = dy * x_hat
    dbias, dweight = dy.sum(_axes(x)), product.sum(_axes(x))
    scale = invstd if weight is None else invstd * _double(weight).reshape(-1)
    scale = _per_channel(scale, x)
    # A mean that is off by a share of itself moves x_hat by that share times this.
    held = (statistics.mean * invstd).abs()
    dx = scale * dy
    dx_scale, dx_held = _largest(dx), torch.zeros_like(_largest(dx))
    if training:
        along, across = _per_channel(dweight / count, x), _per_channel(dbias / count, x)
        dx = dx - scale * (across + x_hat * along)
        dx_scale = dx_scale + _largest(scale * across) + _largest(scale * x_hat * along)
        moved = along.abs() + _largest(x_hat) * across.abs()
        dx_held = scale.abs() * moved * _per_channel(held, x)
    return {
        "dx": _expected(dx, dx_scale, dx_held),
        "dweight": _expected(dweight, product.square().sum(_axes(x)).sqrt(), held * dbias.abs()),
        "dbias": _expected(dbias, dy.square().sum(_axes(x)).sqrt()),
    }
