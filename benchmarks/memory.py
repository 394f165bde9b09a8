"""Measures the memory that a forward saves for backward, and the peak of both."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from .providers import forget_compiled
from .rows import Row, exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from .cases import BenchmarkCase, Inputs
    from .providers import Provider


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that a call has at a time beyond what there was before.

    Args:
        call: has been called before, so that what it allocates only once is there.
        device: the one whose memory is measured.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    # torch keeps no count for the CPU; the profiler sees all that goes through its allocator.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def saved_bytes(call: Callable[[], object]) -> int:
    """The memory behind all tensors that a forward saves for backward, parameters included.

    A tensor that something else keeps anyway, such as the input, counts as well.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
        # Now, while the result keeps them: what is freed leaves its address to others.
        size = sum(storages.values())
    del result
    return size


def _step(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    """A forward and a backward, in which nothing outlives its use."""
    edges: list[Any] = [get_gradient_edge(tensor) for tensor in inputs.arguments]

    def step() -> object:
        y: Tensor = module(*inputs.arguments)
        return torch.autograd.grad(y, (*edges, *module.parameters()), inputs.dy)

    return step


def _measure(case: BenchmarkCase, provider: Provider) -> dict[str, int]:
    module = provider.build(case).to(case.device, case.parameter_dtype).train()
    # Each call has inputs of its own, since some providers overwrite them.
    first, second, third = (case.inputs().separate() for _ in range(3))
    _step(module, first)()
    return {
        "saved": saved_bytes(partial(module, *second.arguments)),
        "peak": peak_bytes(_step(module, third), case.device),
    }


def measure_memory(
    cases: Iterable[BenchmarkCase], providers: Mapping[str, Provider]
) -> tuple[list[Row], list[str]]:
    """Rows of bytes for each case and provider that takes it, and a sentence for each failure."""
    rows, wrong = [], []
    for case in tqdm(list(cases), desc="memory", unit="case"):
        forget_compiled()
        for name, provider in providers.items():
            if not provider.takes(case) or provider.layout is not None:
                continue
            try:
                sizes = _measure(case, provider)
            except RuntimeError as error:
                wrong.append(f"{name}, {case}: {error}")
                continue
            for measured, size in sizes.items():
                subject = case.subject("memory", measured, unit="bytes", bytes=case.tensor_bytes)
                rows.append(Row(subject, name, exact(size)))
    return rows, wrong
