"""Times the passes of all providers side by side, after checking results."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch._functorch.config
from tqdm import tqdm

import fastbn

from .cases import PASSES, BenchmarkCase
from .correctness import Truth, WrongResultError
from .gpu_timing import input_sets, measure_on_gpu
from .providers import forget_compiled, norm_of
from .rows import COPY, Row
from .timing import measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    from .cases import Inputs, Pass
    from .providers import Provider
    from .timing import Timing

    # A provider's module, and the sets of inputs to time it on.
    Prepared = tuple[Provider, nn.Module, list[Inputs]]

# More sets of inputs than this take longer to make than anyone would wait.
_MAX_SETS = 2048
# A tensor so many times as large as the cache finds nothing of itself there, even alone.
_ALWAYS_COLD = 16
# On a GPU calls on warm memory are repeated in a graph, so that its launch does not show.
_REPEATS = 20
# Fewer repeats than this are not warm: the first call of a graph is cold.
_MIN_REPEATS = 4


def _build(provider: Provider, case: BenchmarkCase, truth: Truth) -> nn.Module:
    module = provider.build(case).to(case.device, case.parameter_dtype)
    norm = norm_of(module)
    truth.load(norm)
    if case.on_gpu:
        # Kernels are compared, and counting batches costs stock one of its own.
        norm.num_batches_tracked = None
    return module


@dataclass(frozen=True)
class _Caching:
    """Which calls find their inputs in a cache, and which do not.

    Attributes:
        sets: how many sets of inputs are taken in turn.
        states: ``cold``, ``warm`` or both: what can be measured with these sets.
        repeats: how often a graph has a call, where inputs are warm.
    """

    sets: int
    states: tuple[str, ...]
    repeats: int = 1

    @staticmethod
    def of(case: BenchmarkCase) -> _Caching:
        """Chooses as many sets as a GPU's cache forgets; a CPU has one, in use as in a network."""
        if not case.on_gpu:
            return _Caching(1, ("warm",))
        size = case.tensor_bytes
        cache = torch.cuda.get_device_properties(case.device).L2_cache_size
        if size >= _ALWAYS_COLD * cache:
            return _Caching(1, ("cold",))
        sets = input_sets(size, cache)
        # Each result has memory of its own, and all of them should not drive the inputs out.
        repeats = min(_REPEATS, cache // 2 // size)
        if repeats < _MIN_REPEATS:
            return _Caching(sets, ("cold",))
        if sets > _MAX_SETS:
            return _Caching(1, ("warm",), repeats)
        return _Caching(sets, ("cold", "warm"), repeats)


def _prepare(
    case: BenchmarkCase, providers: Mapping[str, Provider], inputs: list[Inputs]
) -> tuple[dict[str, Prepared], list[str]]:
    """Modules whose results are right, with inputs to time them on, and what was wrong."""
    prepared: dict[str, Prepared] = {}
    wrong = []
    sets = {case.layout: inputs}
    truth = Truth(case, inputs[0])
    forget_compiled()
    for name, provider in providers.items():
        if not provider.takes(case):
            continue
        layout = provider.layout or case.layout
        if layout not in sets:
            sets[layout] = [one.in_layout(layout) for one in inputs]
        try:
            module = _build(provider, case, truth)
            truth.check(name, module, layout, in_place=provider.in_place)
        except WrongResultError as error:
            wrong.append(str(error))
        except Exception as error:  # whatever another package comes up with
            wrong.append(f"{name}, {case}: {error}")
        else:
            prepared[name] = (provider, module, sets[layout])
    return prepared, wrong


def copy_of(inputs: Inputs, tensors: int) -> Callable[[], object]:
    """A copy that reads and writes together as much as so many tensors, 2 to 4, in new memory."""
    x, dy = (t.detach().as_strided((t.numel(),), (1,)) for t in (inputs.x, inputs.dy))
    parts = [x, dy[: (tensors - 2) * dy.numel() // 2]]
    return lambda: [part.clone() for part in parts if len(part)]


def stock_backend(norm: _BatchNorm, x: torch.Tensor) -> str:
    """The kernels that stock takes in the mode of a module: ``native`` or ``cudnn``, say."""
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    select = torch._C._select_batch_norm_backend
    return str(select(x, *vectors, norm.training, norm.eps).name).lower()


def _details(
    case: BenchmarkCase, measured: Pass, prepared: Mapping[str, Prepared]
) -> dict[str, str]:
    found = {}
    for name, (_, module, (inputs, *_)) in prepared.items():
        if name.startswith("stock"):
            found[name] = stock_backend(norm_of(module), inputs.x)
        elif name == "fastbn" and case.on_gpu:
            plan = fastbn.plan(inputs.x, op=measured.op)
            found[name] = f"{plan.algorithm} {plan.mapping} {plan.grid}x{plan.block}"
    return found


def _calls(measured: Pass, prepared: Prepared) -> list[Callable[[], object]]:
    provider, module, sets = prepared
    own = [inputs.separate() if provider.in_place else inputs for inputs in sets]
    return [measured.prepare(module, inputs) for inputs in own]


def _time(
    case: BenchmarkCase,
    calls: Mapping[str, list[Callable[[], object]]],
    caching: _Caching,
    budget: float,
) -> tuple[dict[str, dict[str, Timing]], list[str]]:
    """Timings by the state of the cache and by provider, and what could not be timed."""
    if not case.on_gpu:
        return {"warm": measure({name: only for name, (only,) in calls.items()}, budget)}, []
    timings, wrong = {}, []
    for state in caching.states:
        warm = {name: [call] * caching.repeats for name, (call, *_) in calls.items()}
        timings[state], failed = measure_on_gpu(warm if state == "warm" else calls, budget)
        wrong += [f"{name}, {case}: {error}" for name, error in failed.items()]
    return timings, wrong


def _measure_case(
    case: BenchmarkCase, providers: Mapping[str, Provider], passes: Iterable[Pass], budget: float
) -> tuple[list[Row], list[str]]:
    torch.manual_seed(0)
    caching = _Caching.of(case)
    sets = [case.inputs() for _ in range(caching.sets)]
    prepared, wrong = _prepare(case, providers, sets)
    rows = []
    for measured in passes:
        calls = {name: _calls(measured, one) for name, one in prepared.items()}
        calls[COPY] = [copy_of(inputs, measured.traffic(case.epilogue)) for inputs in sets]
        details = _details(case, measured, prepared)
        found, failed = _time(case, calls, caching, budget)
        wrong += failed
        for cache, timings in found.items():
            moved = measured.traffic(case.epilogue) * case.tensor_bytes
            subject = case.subject("kernels", measured.name, cache=cache, bytes=moved)
            rows += [
                Row(subject, name, timing, details.get(name, ""))
                for name, timing in timings.items()
            ]
    return rows, wrong


def measure_case(
    case: BenchmarkCase,
    providers: Mapping[str, Provider],
    budget: float,
    passes: Iterable[Pass] = PASSES,
) -> tuple[list[Row], list[str]]:
    """Times all providers that are right, and a copy, on one case.

    Args:
        case: the input.
        providers: by name; those that do not take the case are left out.
        budget: seconds for each pass and state of the cache.
        passes: what to time.

    Returns:
        The rows, and a sentence for each provider that failed or was wrong, and was not timed.
    """
    # Graphs are not captured on the default stream, and backward goes where forward went.
    stream = torch.cuda.stream(torch.cuda.Stream()) if case.on_gpu else nullcontext()
    # A compiled backward is run more than once, and must not reuse the memory of what it needs.
    with stream, torch._functorch.config.patch(donated_buffer=False):
        return _measure_case(case, providers, passes, budget)


def measure_cases(
    cases: Sequence[BenchmarkCase],
    providers: Mapping[str, Provider],
    budget: float,
    passes: Iterable[Pass] = PASSES,
) -> tuple[list[Row], list[str]]:
    """Times all cases under a progress bar on stderr; see :func:`measure_case`."""
    rows, wrong = [], []
    progress = tqdm(cases, desc="kernels", unit="case")
    for case in progress:
        progress.set_postfix_str(str(case))
        try:
            more, sentences = measure_case(case, providers, budget, passes)
        except RuntimeError as error:  # out of memory, say: the other cases may fit
            wrong.append(f"{case}: {error}")
        else:
            rows += more
            wrong += sentences
    return rows, wrong
