"""Times the passes of all providers side by side, after checking results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

import fastbn

from .cases import PASSES, Case
from .correctness import Truth, WrongResultError
from .gpu_timing import input_sets, measure_on_gpu
from .rows import COPY, Row
from .timing import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

    from .cases import Inputs, Pass
    from .providers import Provider
    from .timing import Timing

    # The modules of a case by provider, and the sets of inputs of each.
    Prepared = dict[str, tuple[nn.Module, list[Inputs]]]


# More sets of inputs than this take longer to make than anyone would wait.
_MOST_SETS = 2048
# On a GPU calls on warm memory are repeated in a graph, so that its launch does not show; but not
# so often that their results, which all have memory of their own, take more than this.
_REPEATS = 20
_RESULTS_BYTES = 1 << 28


def _build(provider: Provider, case: Case, truth: Truth) -> nn.Module:
    module = provider.build(case).to(case.device, case.parameter_dtype)
    truth.load(module.norm)
    if case.on_gpu:
        # Kernels are compared, and counting batches costs stock one of its own.
        module.norm.num_batches_tracked = None
    return module


def _sets(case: Case) -> int:
    """On a GPU as many as its cache forgets, 1 if those are too many; on a CPU 1.

    A CPU has its caches in use as a network does.
    """
    if not case.on_gpu:
        return 1
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size
    sets = input_sets(case.tensor_bytes, cache)
    return sets if sets <= _MOST_SETS else 1


def _prepare(
    case: Case, providers: Mapping[str, Provider], inputs: list[Inputs]
) -> tuple[Prepared, list[str]]:
    """Modules whose results are right, with inputs to time them on, and what was wrong."""
    prepared: Prepared = {}
    wrong = []
    sets = {case.layout: inputs}
    truth = Truth(case, inputs[0])
    for name, provider in providers.items():
        if not provider.takes(case):
            continue
        layout = provider.layout or case.layout
        if layout not in sets:
            sets[layout] = [one.in_layout(layout) for one in inputs]
        try:
            module = _build(provider, case, truth)
            truth.check(name, module, truth.inputs.in_layout(layout))
        except WrongResultError as error:
            wrong.append(str(error))
        except Exception as error:
            wrong.append(f"{name}, {case}: {error}")
        else:
            own = [one.separate() if provider.in_place else one for one in sets[layout]]
            prepared[name] = (module, own)
    return prepared, wrong


def copy_of(inputs: Inputs, tensors: int) -> Callable[[], object]:
    """A copy that reads and writes together as much as so many tensors, 2 to 4, in new memory."""
    x, dy = (t.detach().as_strided((t.numel(),), (1,)) for t in (inputs.x, inputs.dy))
    parts = [x, dy[: (tensors - 2) * dy.numel() // 2]]
    return lambda: [part.clone() for part in parts if len(part)]


def stock_backend(norm: nn.Module, x: torch.Tensor) -> str:
    """Whose kernels stock takes in the mode that a module is in: ``native`` or ``cudnn``, say."""
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    select = torch._C._select_batch_norm_backend
    return str(select(x, *vectors, norm.training, norm.eps).name).lower()


def _details(case: Case, measured: Pass, prepared: Prepared) -> dict[str, str]:
    found = {}
    for name, (module, (inputs, *_)) in prepared.items():
        if name.startswith("stock"):
            found[name] = stock_backend(module.norm, inputs.x)
        elif name == "fastbn" and case.on_gpu:
            plan = fastbn.plan(inputs.x, op=measured.op)
            found[name] = f"{plan.algorithm} {plan.mapping} {plan.grid}x{plan.block}"
    return found


def _time(
    case: Case, calls: Mapping[str, list[Callable[[], object]]], budget: float
) -> dict[str, dict[str, Timing]]:
    """Timings by the state of the cache and by provider."""
    first = {name: one for name, (one, *_) in calls.items()}
    if not case.on_gpu:
        return {"warm": measure(first, budget)}
    repeats = max(1, min(_REPEATS, _RESULTS_BYTES // case.tensor_bytes))
    warm = measure_on_gpu({name: [call] * repeats for name, call in first.items()}, budget / 2)
    if len(calls[COPY]) == 1:
        return {"warm": warm}
    return {"cold": measure_on_gpu(calls, budget), "warm": warm}


def _measure_case(
    case: Case, providers: Mapping[str, Provider], passes: Iterable[Pass], budget: float
) -> tuple[list[Row], list[str]]:
    torch.manual_seed(0)
    sets = [case.inputs() for _ in range(_sets(case))]
    prepared, wrong = _prepare(case, providers, sets)
    rows = []
    for measured in passes:
        calls = {
            name: [measured.prepare(module, inputs) for inputs in own]
            for name, (module, own) in prepared.items()
        }
        calls[COPY] = [copy_of(inputs, measured.traffic(case.ending)) for inputs in sets]
        details = _details(case, measured, prepared)
        for cache, timings in _time(case, calls, budget).items():
            moved = measured.traffic(case.ending) * case.tensor_bytes
            subject = case.subject("kernels", measured.name, cache=cache, bytes=moved)
            rows += [
                Row(subject, name, timing, details.get(name, ""))
                for name, timing in timings.items()
            ]
    return rows, wrong


def measure_case(
    case: Case,
    providers: Mapping[str, Provider],
    budget: float,
    passes: Iterable[Pass] = PASSES,
) -> tuple[list[Row], list[str]]:
    """Times all providers that are right, and a copy, on one case.

    Args:
        case: the input.
        providers: whose batch norms; those that do not take the case are left out.
        budget: seconds for each pass.
        passes: what to time.

    Returns:
        The rows, and a sentence for each provider that failed or was wrong, and was not timed.
    """
    if not case.on_gpu:
        return _measure_case(case, providers, passes, budget)
    # Graphs are not captured on the default stream, and backward goes where forward went.
    with torch.cuda.stream(torch.cuda.Stream()):
        found = _measure_case(case, providers, passes, budget)
    torch.cuda.empty_cache()  # a graph's memory is of no use to the next one
    return found


def measure_cases(
    cases: Sequence[Case],
    providers: Mapping[str, Provider],
    budget: float,
    passes: Iterable[Pass] = PASSES,
) -> tuple[list[Row], list[str]]:
    """Times all cases under a progress bar on stderr; see :func:`measure_case`."""
    rows, wrong = [], []
    progress = tqdm(cases, desc="kernels", unit="case")
    for case in progress:
        progress.set_postfix_str(str(case))
        more, sentences = measure_case(case, providers, budget, passes)
        rows += more
        wrong += sentences
    return rows, wrong
