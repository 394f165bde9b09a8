"""Measures what a call costs when there is next to nothing to compute."""

from __future__ import annotations

from functools import partial
from timeit import Timer
from typing import TYPE_CHECKING

import torch

from .cases import EVAL, FORWARD, BenchmarkCase
from .correctness import Truth, WrongResultError
from .providers import forget_compiled, norm_of
from .rows import Row
from .shapes import Shape
from .timing import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from .cases import Inputs
    from .providers import Provider

_SHAPE = Shape((2, 8, 2, 2))
_REPEATS = 200


def _step(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    wanted = (inputs.x, *module.train().parameters())
    return lambda: torch.autograd.grad(module(inputs.x), wanted, inputs.dy)


# Backward is timed with a forward, since it needs one each time.
_CALLS: dict[str, Callable[[nn.Module, Inputs], Callable[[], object]]] = {
    "forward": FORWARD.prepare,
    "forward and backward": _step,
    "eval": EVAL.prepare,
}


def measure_overhead(
    providers: Mapping[str, Provider], budget: float, device: str = "cpu"
) -> tuple[list[Row], list[str]]:
    """Times calls on a tensor of 64 elements, which record a graph but for evaluation.

    On a GPU, too, that is the time of the host: kernels this small end before the next is launched.

    Args:
        providers: whose batch norms.
        budget: seconds for each call.
        device: where the tensor is.

    Returns:
        Rows of seconds per call: medians over interleaved runs of 200 calls; and a sentence for
        each provider that failed or was wrong. Providers that overwrite inputs have no rows, since
        inputs are the same for all calls.
    """
    case = BenchmarkCase("overhead", _SHAPE, torch.float32, "contiguous", device=device)
    rows = []
    forget_compiled()
    truth = Truth(case, case.inputs())
    able, wrong = {}, []
    for name, provider in providers.items():
        if not provider.takes(case) or provider.layout is not None or provider.in_place:
            continue
        module = provider.build(case).to(device)
        truth.load(norm_of(module))
        try:
            truth.check(name, module, case.layout, in_place=False)
        except (WrongResultError, RuntimeError) as error:
            wrong.append(f"{name}, overhead: {error}")
        else:
            able[name] = provider
    for call, prepare in _CALLS.items():
        runs = {}
        for name, provider in able.items():
            module = provider.build(case).to(device)
            runs[name] = partial(Timer(prepare(module, case.inputs())).timeit, _REPEATS)
        subject = case.subject("overhead", call)
        for name, timing in measure(runs, budget).items():
            rows.append(Row(subject, name, timing.divided(_REPEATS)))
    return rows, wrong
