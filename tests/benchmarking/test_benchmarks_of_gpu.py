"""What benchmarks do on a GPU runs through, on a processor that takes itself for one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fastbn
from fastbn import _C

# Behind everything else, so that fastbn is the one under test.
pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("tabulate", reason="benchmarks need the extra [bench]")

from benchmarks import algorithms, gpu_timing, pieces, report
from benchmarks.cases import BACKWARD, EPILOGUES, FORWARD, BenchmarkCase, Epilogue
from benchmarks.kernels import measure_case
from benchmarks.memory import peak_bytes
from benchmarks.providers import PROVIDERS, Provider, WithEpilogue
from benchmarks.rows import COPY, Results, coldest, groups
from benchmarks.shapes import Shape, shape_sets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What torch takes for the processor, and benchmarks for something else.
DEVICE = "cpu:0"
BOTH = {name: PROVIDERS[name] for name in ("fastbn", "stock")}
CACHE_BYTES = 40_000


class Clock:
    """Time that passes by replays of graphs alone, a millisecond each."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.recording: list[Graph] = []


class Graph:
    """Captures nothing, as long as it is begun and ended and only then replayed."""

    clock: Clock

    def capture_begin(self, pool: tuple[int, int]) -> None:
        assert pool == (0, 1)
        self.clock.recording.append(self)

    def capture_end(self) -> None:
        assert self.clock.recording.pop() is self

    def replay(self) -> None:
        assert not self.clock.recording
        self.clock.milliseconds += 1


class Event:
    clock: Clock

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.milliseconds

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for what benchmarks ask of torch.cuda."""
    Graph.clock = Event.clock = Clock()
    stream = SimpleNamespace(synchronize=lambda: None)
    parts: dict[str, Any] = {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda: stream,
        "_sleep": lambda cycles: None,
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "graph_pool_handle": lambda: (0, 1),
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=CACHE_BYTES),
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    plan: Callable[..., Any] = fastbn.plan

    def plan_for_h200(x: torch.Tensor, **question: Any) -> Any:
        layout = "contiguous" if x.is_contiguous() else "channels_last"
        return plan(tuple(x.shape), dtype=x.dtype, layout=layout, device="h200", **question)

    monkeypatch.setattr(fastbn, "plan", plan_for_h200)


def small(epilogue: Epilogue = "plain", **change: Any) -> BenchmarkCase:
    case = BenchmarkCase(
        "resnet50", Shape((4, 16, 6, 6), 3), torch.bfloat16, "contiguous", epilogue, DEVICE
    )
    return replace(case, **change)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels_are_timed_cold_and_warm(epilogue: Epilogue, layout: str) -> None:
    """A replay takes as long whatever is in it: so the more calls in a graph, the less each."""
    case = small(epilogue, layout=layout)
    rows, wrong = measure_case(case, BOTH, 0.0)
    assert wrong == []
    found = groups(rows)
    assert [(g.subject.measured, g.subject.cache) for g in found] == [
        (measured, cache)
        for measured in ("forward", "backward", "eval")
        for cache in ("cold", "warm")
    ]
    sets = gpu_timing.input_sets(case.tensor_bytes, CACHE_BYTES)
    for group in found:
        assert list(group.rows) == ["fastbn", "stock", COPY]
        # Four results take half the cache.
        calls = sets if group.subject.cache == "cold" else 4
        for row in group.rows.values():
            assert row.value.median == pytest.approx(1e-3 / calls)
        assert group.rows["stock"].detail == "native"
    assert found[0].rows["fastbn"].detail.split()[0] in (
        "one_block",
        "two_pass",
        "persistent_block",
        "persistent_cluster",
        "persistent_grid",
    )
    results = Results({"gpu": "made up"}, rows)
    lines = report.kernels(results, shape_sets(4)).splitlines()
    assert sum(" 4x16x6x6 " in line for line in lines) == len(coldest(found)) == 3


def test_what_is_too_small_to_be_cold_is_warm() -> None:
    rows, _ = measure_case(small(shape=Shape((2, 1, 2, 2))), BOTH, 0.0)
    assert {row.subject.cache for row in rows} == {"warm"}
    assert len(coldest(groups(rows))) == 3


def test_what_is_too_large_to_be_warm_is_cold() -> None:
    rows, _ = measure_case(small(shape=Shape((64, 64, 14, 14))), BOTH, 0.0)
    assert {row.subject.cache for row in rows} == {"cold"}
    assert [row.value.median for row in rows] == pytest.approx([1e-3] * len(rows))


def test_what_fits_the_cache_but_a_few_times_is_cold() -> None:
    """Of fewer repeats than four too many begin with a cold cache."""
    case = small(shape=Shape((8, 16, 6, 6)))
    rows, _ = measure_case(case, BOTH, 0.0)
    sets = gpu_timing.input_sets(case.tensor_bytes, CACHE_BYTES)
    assert {row.subject.cache for row in rows} == {"cold"}
    assert [row.value.median for row in rows] == pytest.approx([1e-3 / sets] * len(rows))


def test_what_no_graph_can_hold_is_left_out() -> None:
    class Waiting(WithEpilogue):
        def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            if Graph.clock.recording:
                raise RuntimeError("operation not permitted\nwhen stream is capturing")
            return super().forward(x, residual)

    waiting = Provider(lambda case: Waiting(fastbn.BatchNorm2d(case.channels), case.epilogue))
    rows, wrong = measure_case(small(), {**BOTH, "waiting": waiting}, 0.0, (FORWARD,))
    assert wrong == ["waiting, 4x16x6x6 bfloat16 contiguous: operation not permitted"] * 2
    assert {row.provider for row in rows} == {"fastbn", "stock", COPY}


@pytest.mark.parametrize("measured", [FORWARD, BACKWARD], ids=lambda measured: measured.name)
def test_all_algorithms_that_fit_are_compared(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is forced in the pass that is measured alone, where others may have no room."""
    forced: list[str] = ["auto"]
    monkeypatch.setattr(_C, "force_algorithm", forced.append)
    took: dict[str, set[str]] = {"forward": set(), "backward": set(), "eval": set()}
    operators = {
        "batch_norm_training": "forward",
        "batch_norm_backward": "backward",
        "batch_norm_eval": "eval",
    }

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
        ) -> Any:
            name = str(function).removeprefix("fastbn.").partition(".")[0]
            if name in operators:
                took[operators[name]].add(forced[-1])
            return function(*arguments, **(keywords or {}))

    case = small(shape=Shape((64, 64, 14, 14)))
    with Watch():  # type: ignore[no-untyped-call]
        comparison = algorithms.compare(case, measured, 0.0)
    assert list(comparison.timings) == [*comparison.plans, COPY]
    assert comparison.chosen in comparison.plans
    assert "two_pass" in comparison.plans
    assert forced[-1] == "auto"
    # Backward is prepared by a forward, which nothing is forced in.
    others = {"auto"}
    assert took["eval"] == others
    if measured is FORWARD:
        assert took["forward"] == set(comparison.plans)
        assert took["backward"] == others
    else:
        assert took["forward"] == others
        assert took["backward"] == set(comparison.plans)
    assert len(algorithms.table([comparison]).splitlines()) == 2 + len(comparison.plans)


def test_layers_that_were_compared_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever ends the command before its last layer."""
    monkeypatch.setattr(_C, "force_algorithm", lambda name: None)
    comparison = algorithms.compare(small(), FORWARD, 0.0)
    both_passes = iter([comparison, comparison])

    def compare(*_: object) -> algorithms.AlgorithmComparison:
        for one in both_passes:
            return one
        raise KeyboardInterrupt

    monkeypatch.setattr(algorithms, "compare", compare)
    monkeypatch.setattr(algorithms, "environment", lambda device: {"gpu": "made up"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        algorithms.main(["--quick", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["algorithm"] for row in rows] == 2 * list(comparison.plans)


class Ticking(Event):
    """A millisecond from one to the next."""

    def record(self) -> None:
        self.clock.milliseconds += 1
        super().record()

    def synchronize(self) -> None:
        pass


def test_pieces_are_timed_that_make_up_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Ticking)
    matrix = torch.randn(8, 32, dtype=torch.complex128)
    target = torch.zeros_like(matrix)
    assert pieces.seconds_of(matrix, target, 64) == pytest.approx(1e-3)
    assert torch.equal(target, matrix)
    size = 1 << 14
    rows = pieces.measure(size, DEVICE)
    assert {(row["stride"], row["piece"]) for row in rows} == {
        (stride, piece) for stride in (512, 1024, 2048, 4096) for piece in (64, 128, 256, 512)
    }
    assert all(row["bytes_per_second"] == pytest.approx(2 * size / 1e-3) for row in rows)


def test_peak_is_what_the_allocator_says() -> None:
    assert peak_bytes(lambda: None, DEVICE) == 250
