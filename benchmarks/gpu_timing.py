"""Times calls on a GPU side by side, as CUDA graphs."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import torch

from .timing import Timing, summarize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# How much other data, in sizes of the L2 cache, must pass through it before a tensor counts as
# forgotten. One would do if the cache always dropped what was not used for longest.
_FORGOTTEN = 4
# Cycles that the GPU waits at the start of several rounds, so that all of them are enqueued by the
# time it begins; and how many rounds that is.
_HEAD_START_CYCLES = 400_000
_ROUNDS_TOGETHER = 5
_MIN_ROUNDS = 10
_MAX_ROUNDS = 200


def input_sets(tensor_bytes: int, cache_bytes: int) -> int:
    """How many sets of tensors to take in turn, so that each is new to the cache every time.

    Args:
        tensor_bytes: size of the input; a call reads or writes twice as much at least.
        cache_bytes: size of the L2 cache.
    """
    others = -(-_FORGOTTEN * cache_bytes // (2 * tensor_bytes))
    return 1 + max(1, others)


def _capture(calls: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """A graph of all calls in turn, and their results, which must stay to have memory each.

    Raises:
        RuntimeError: a call does what no graph can hold.
    """
    for call in calls:
        call()
    torch.cuda.current_stream().synchronize()
    # The memory of graphs that are gone is out of reach once a capture has begun.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle()
    graph.capture_begin(pool=pool)
    try:
        results = [call() for call in calls]
    except BaseException:
        try:
            graph.capture_end()
        except RuntimeError:
            # The capture is broken, and has left its memory pool open, in the way of later ones.
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise
    graph.capture_end()
    return graph, results


def measure_on_gpu(
    candidates: Mapping[str, Sequence[Callable[[], object]]], budget: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times calls in turns, without what they cost on the host.

    Each candidate becomes a graph of its calls, which is replayed between two events, in random
    order with those of the others. Must run on a stream that is not the default one, and so must
    whatever made the inputs of the calls.

    Args:
        candidates: the same call on several sets of tensors, by name.
        budget: seconds to spend on all of them together; a few rounds are timed in any case.

    Returns:
        The timing of one call of each candidate, and why there is none of the others.
    """
    captured, failed = {}, {}
    for name, calls in candidates.items():
        try:
            captured[name] = _capture(calls)
        except RuntimeError as error:
            failed[name] = str(error).partition("\n")[0]
    order = list(captured)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    deadline = time.perf_counter() + budget
    for done in range(0, _MAX_ROUNDS, _ROUNDS_TOGETHER):
        if done >= _MIN_ROUNDS and time.perf_counter() > deadline:
            break
        torch.cuda._sleep(_HEAD_START_CYCLES)
        spans = []
        for _ in range(_ROUNDS_TOGETHER):
            shuffle(order)
            for name in order:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                captured[name][0].replay()
                end.record()
                spans.append((name, start, end))
        torch.cuda.current_stream().synchronize()
        for name, start, end in spans:
            elapsed = start.elapsed_time(end) / 1e3  # given in milliseconds
            seconds[name].append(elapsed / len(candidates[name]))
    return {name: summarize(values) for name, values in seconds.items()}, failed
