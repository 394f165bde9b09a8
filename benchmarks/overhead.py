"""What a call costs when there is next to nothing to compute."""

from __future__ import annotations

from functools import partial
from timeit import Timer

import torch

from .layers import PROVIDERS
from .timing import Timing, measure

SHAPE = (2, 8, 2, 2)
_CALLS = 200


def measure_overhead(budget: float, device: str = "cpu") -> dict[str, float]:
    """Times a training forward that records its graph on a tensor of ``SHAPE``.

    On a GPU, too, that is what the host takes: kernels this small end before the next one comes.

    Args:
        budget: seconds to spend.
        device: where the tensor is.

    Returns:
        Microseconds per call of each provider: medians over interleaved runs of 200 calls.
    """
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    runs = {
        name: partial(Timer(partial(provider(SHAPE[1], device=device), x)).timeit, _CALLS)
        for name, provider in PROVIDERS.items()
    }
    timings: dict[str, Timing] = measure(runs, budget)
    return {name: timing.median / _CALLS * 1e6 for name, timing in timings.items()}
