"""What a call costs when there is next to nothing to compute."""

from __future__ import annotations

from functools import partial
from timeit import Timer

import torch

from .layers import PROVIDERS
from .timing import Timing, measure

SHAPE = (2, 8, 2, 2)
_CALLS = 200


def measure_overhead(budget: float) -> dict[str, float]:
    """Times a training forward that records its graph on a tensor of ``SHAPE``.

    Args:
        budget: seconds to spend.

    Returns:
        Microseconds per call of each provider: medians over interleaved runs of 200 calls.
    """
    x = torch.randn(SHAPE, requires_grad=True)
    runs = {
        name: partial(Timer(partial(provider(SHAPE[1]), x)).timeit, _CALLS)
        for name, provider in PROVIDERS.items()
    }
    timings: dict[str, Timing] = measure(runs, budget)
    return {name: timing.median / _CALLS * 1e6 for name, timing in timings.items()}
