"""Times candidates side by side: memory warm, every candidate in every round, medians."""

from __future__ import annotations

import ctypes
import platform
import random
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Parameters of glibc's mallopt(3): serve large blocks from the heap, never hand its end back to
# the system, and grow it by 64 MiB at a time.
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 << 20)}

_MIN_ROUNDS = 5
_MAX_ROUNDS = 100


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile, and of how many calls."""

    median: float
    p20: float
    p80: float
    rounds: int

    def divided(self, parts: int) -> Timing:
        """The timing of one of so many equal parts of the call."""
        return Timing(self.median / parts, self.p20 / parts, self.p80 / parts, self.rounds)


class Disturbance:
    """Watches how often a processor was taken from this process, from its construction on.

    On a busy machine threads wait for each other's turn, and medians become multiples of it.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._before = self._switches()

    @staticmethod
    def _switches() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def per_second(self) -> float:
        """Involuntary context switches per second."""
        return (self._switches() - self._before) / (time.perf_counter() - self._start)


def keep_memory_warm() -> str:
    """Makes malloc reuse the pages of freed tensors, for everything in this process.

    Otherwise each large result comes in fresh pages, and what is timed is the kernel clearing them.

    Returns:
        A sentence that says whether it does.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        if all(mallopt(parameter, value) for parameter, value in _MALLOPT.values()):
            return "kept warm for all sides: freed pages are reused (mallopt)"
    return "not kept warm (that needs glibc): large results pay for fresh pages, on all sides"


def summarize(seconds: Sequence[float]) -> Timing:
    """The timing of a candidate from those of its calls."""
    p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    return Timing(median, p20, p80, len(seconds))


def measure(candidates: Mapping[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
    """Times calls in turns, so that all of them meet the same disturbances.

    Args:
        candidates: what to call, by name.
        budget: seconds to spend on all of them together; a few rounds are timed in any case.

    Returns:
        The timing of each candidate.
    """
    order = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for call in candidates.values():
        call()
    # A random order, since a call finds the caches as the one before it left them.
    shuffle = random.Random(0).shuffle
    deadline = time.perf_counter() + budget
    for done in range(_MAX_ROUNDS):
        if done >= _MIN_ROUNDS and time.perf_counter() > deadline:
            break
        shuffle(order)
        for name in order:
            call = candidates[name]
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: summarize(values) for name, values in seconds.items()}
