"""The one table of tolerances, and the comparison that uses it.

An element may be wrong by half a unit of the resolution of its own dtype, which no result that is
stored in that dtype can avoid, plus what arithmetic in the dtype of sums (float64 for float64,
else float32) costs. The latter is a number of epsilons of that dtype times the size of the terms
that the value is put together from, which the oracle supplies per channel. The same numbers serve
all dtypes, because the same algorithm computes them; they are about three times the largest error
seen over the table of cases with the narrowest vectors (fewest partial sums, so most error).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .oracle import Expected

# In epsilons of the dtype of sums.
ARITHMETIC = {
    # One multiply-add of rounded operands; invstd has half the relative error of the variance.
    "y": 12.0,
    # A sum over a block is taken in lanes, which round as often as they add; blocks are merged in
    # float64. Deviations from a pivot near the mean keep the terms small.
    "mean": 32.0,
    "running_mean": 32.0,
    # The same for squares, whose roundings weigh more because they all have one sign.
    "running_var": 48.0,
    "invstd": 24.0,
    # Sums like those of the mean, measured against the root of the sum of squares of their terms,
    # what a sum of terms of random sign amounts to.
    "dbias": 32.0,
    "dweight": 64.0,
    # A multiply-add of three terms that may cancel, two of which carry the errors above; these
    # were divided by the number of elements.
    "dx": 20.0,
    # A product with a derivative, which is put together from a few rounded terms.
    "dresidual": 16.0,
}

# How many times that some data makes it.
CONDITION = {
    # Sums are taken in one sweep where the pivot is within two deviations of the mean, which
    # costs up to 1 + 2 * 2 times the error.
    ("outlier", torch.float64): 5.0,
    ("outlier", torch.float32): 5.0,
    ("outlier", torch.bfloat16): 5.0,
    ("outlier", torch.float16): 5.0,
    # The means of blocks have nothing wider to be merged in, and their distance is what the
    # rounding of 1e4 leaves of it.
    ("far", torch.float64): 5.0,
}

# In epsilons of the dtype of sums, relative to the mean: how wrong the mean is that backward gets.
HELD = {
    # It was computed in float64; half a unit is what float32 cannot hold of it.
    torch.float32: 0.5,
    # Merging blocks in float64 rounds it several times.
    torch.float64: 2.0,
}

# Two correct float32 implementations against each other: stock's CPU kernels evaluate
# x * alpha + beta, whose terms cancel, so most of this is stock's error.
AGAINST_STOCK: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# The same for float64.
AGAINST_STOCK_FLOAT64: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arithmetic_error(
    dtype: torch.dtype, expected: Expected, quantity: str, condition: float
) -> Tensor:
    """What computing `quantity` may cost before its result is rounded to `dtype`."""
    dtype = accumulate_dtype(dtype)
    epsilon = torch.finfo(dtype).eps
    error = ARITHMETIC[quantity] * condition * expected.scale + HELD[dtype] * expected.held
    return epsilon * error


def rounding_error(dtype: torch.dtype, value: Tensor) -> Tensor:
    """Half a unit in the last place of `value` held in `dtype`, subnormals included."""
    info = torch.finfo(dtype)
    return info.eps / 2 * value.abs().clamp_min(info.tiny)


def assert_near(actual: Tensor, expected: Expected, quantity: str, condition: float = 1.0) -> None:
    """Fails where an element is farther from the oracle than the table allows."""
    assert actual.shape == expected.value.shape
    dtype = actual.dtype
    error = (actual.detach().to(expected.value) - expected.value).abs()
    allowed = rounding_error(dtype, expected.value)
    allowed = allowed + arithmetic_error(dtype, expected, quantity, condition)
    wrong = ~(error <= allowed)  # so that NaN counts as wrong
    if wrong.any():
        allowed = allowed.expand_as(error)
        # Where nothing is allowed, an error of zero is none.
        excess = torch.where(wrong, error / allowed, 0).nan_to_num(torch.inf)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), error.shape))
        raise AssertionError(
            f"{quantity}: {int(wrong.sum())} of {wrong.numel()} elements are off, in "
            f"{_channels(wrong)}; the worst, at {_place(worst)}, is {actual[worst].item()} instead "
            f"of {expected.value[worst].item()}: an error of {error[worst].item():.3g} where "
            f"{allowed[worst].item():.3g} is allowed"
        )


def _place(index: tuple[int, ...]) -> str:
    """An element of an activation, or of a vector, by its coordinates."""
    if len(index) == 1:
        return f"c={index[0]}"
    batch, channel, *position = index
    at = f", position={position}" if position else ""
    return f"n={batch}, c={channel}{at}"


def _channels(wrong: Tensor, most: int = 12) -> str:
    """Those with wrong elements, and with how many."""
    per_channel = wrong.sum([0, *range(2, wrong.dim())]) if wrong.dim() > 1 else wrong.long()
    channels = per_channel.nonzero().flatten().tolist()
    listed = [f"{c} ({int(per_channel[c])})" for c in channels[:most]]
    more = f", and {len(channels) - most} more" if len(channels) > most else ""
    return f"{len(channels)} of {len(per_channel)} channels: {', '.join(listed)}{more}"


def assert_no_worse(ours: Tensor, stock: Tensor, expected: Expected, quantity: str) -> None:
    """Fails where fastbn's largest error in a channel exceeds stock's.

    The floor is the arithmetic error alone: where both round a value that lies halfway between two
    neighbors, either may be the lucky one.
    """
    error = (ours.detach().to(expected.value) - expected.value).abs()
    theirs = (stock.detach().to(expected.value) - expected.value).abs()
    floor = arithmetic_error(ours.dtype, expected, quantity, condition=1.0)
    if error.dim() > 1:
        axes = [0, *range(2, error.dim())]
        error, theirs, floor = error.amax(axes), theirs.amax(axes), floor.amax(axes)
    wrong = ~(error <= theirs + floor)
    assert not wrong.any(), (
        f"{quantity}: channels {wrong.nonzero().flatten().tolist()} err by {error[wrong].tolist()}"
        f" and stock by {theirs[wrong].tolist()}"
    )
