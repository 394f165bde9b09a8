"""Persistent grids leave room for kernels of other streams, such as those of an all-reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbn.functional
import fastbn.ops
from fastbn import _C, _multiprocessors
from fastbn.planning import DEVICES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Layers that a grid is chosen for, and forward and backward of them.
QUESTIONS: list[dict[str, Any]] = [
    {"x": (256, 64, 112, 112), "dtype": "bfloat16", "op": "forward"},
    {"x": (256, 256, 14, 14), "dtype": "bfloat16", "layout": "channels_last", "op": "backward"},
]


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the backend is told, which nobody has told anything yet."""
    numbers: list[int] = []
    monkeypatch.delenv("FASTBN_CUDA_ALGORITHM", raising=False)
    monkeypatch.delenv("FASTBN_CUDA_FREE_SMS", raising=False)
    monkeypatch.setattr(_C, "leave_free", numbers.append)
    monkeypatch.setattr(_multiprocessors, "_told", 0)
    _multiprocessors._from_environment.cache_clear()
    return numbers


@pytest.fixture(autouse=True)
def _forget_the_environment() -> Iterator[None]:
    yield
    _multiprocessors._from_environment.cache_clear()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    if not distributed.is_available():
        pytest.skip("torch has no torch.distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def grid_blocks(question: dict[str, Any]) -> float:
    """Multiprocessors that the persistent grid for a question occupies."""
    plan = fastbn.plan(**question, device="h200", algorithm="persistent_grid")
    return plan.grid / plan.blocks_per_multiprocessor


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["op"])
def test_alone_a_grid_may_take_all(question: dict[str, Any]) -> None:
    plan = fastbn.plan(**question, device="h200")
    assert plan.algorithm == "persistent_grid"
    assert plan.free_multiprocessors == 0
    assert grid_blocks(question) > DEVICES["h200"].multiprocessors - 8


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["op"])
def test_beside_torch_distributed_a_grid_leaves_some(
    question: dict[str, Any], process_group: None
) -> None:
    plan = fastbn.plan(**question, device="h200")
    assert plan.free_multiprocessors == _multiprocessors.BESIDE_COLLECTIVES == 32
    assert grid_blocks(question) <= DEVICES["h200"].multiprocessors - 32


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["op"])
@pytest.mark.parametrize("free", [0, 1, 8, 66, 130])
def test_the_environment_decides(
    question: dict[str, Any], free: int, monkeypatch: pytest.MonkeyPatch, process_group: None
) -> None:
    monkeypatch.setenv("FASTBN_CUDA_FREE_SMS", str(free))
    plan = fastbn.plan(**question, device="h200")
    assert plan.free_multiprocessors == free
    if "persistent_grid" in dict(plan.considered):
        assert 1 <= grid_blocks(question) <= DEVICES["h200"].multiprocessors - free


@pytest.mark.parametrize("free", [132, 999_999])
def test_without_room_there_is_no_grid(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBN_CUDA_FREE_SMS", str(free))
    for question in QUESTIONS:
        plan = fastbn.plan(**question, device="h200")
        assert plan.algorithm != "persistent_grid"
        assert "persistent_grid" not in dict(plan.considered)
        with pytest.raises(ValueError, match="FASTBN_CUDA_FREE_SMS leaves it none of the 132"):
            fastbn.plan(**question, device="h200", algorithm="persistent_grid")


def test_other_plans_leave_nothing_and_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    question: dict[str, Any] = {"x": (32, 256, 14, 14), "device": "h200"}
    names: tuple[Any, ...] = ("two_pass", "persistent_block", "persistent_cluster")
    before = [fastbn.plan(**question, algorithm=name) for name in names]
    monkeypatch.setenv("FASTBN_CUDA_FREE_SMS", "100")
    _multiprocessors._from_environment.cache_clear()
    after = [fastbn.plan(**question, algorithm=name) for name in names]
    for one, other in zip(before, after, strict=True):
        assert (one.grid, one.splits, one.microseconds) == (
            other.grid,
            other.splits,
            other.microseconds,
        )


@pytest.mark.parametrize("value", ["-1", "some", "1.5", " 8", "9999999"])
def test_other_values_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBN_CUDA_FREE_SMS", value)
    with pytest.raises(ValueError, match=f"FASTBN_CUDA_FREE_SMS is '{value}', but it takes"):
        fastbn.plan((4, 6), device="h200")


# --- What the backend is told ---------------------------------------------------------------------


def trace_forward() -> None:
    with FakeTensorMode():
        x, vector = torch.empty(4, 6, 5, 5, device="cuda"), torch.empty(6, device="cuda")
        fastbn.ops.batch_norm_training(x, vector, vector, vector, vector, None, 0.1, 1e-5)


def trace_backward() -> None:
    with FakeTensorMode():
        x, vector = torch.empty(4, 6, 5, 5, device="cuda"), torch.empty(6, device="cuda")
        fastbn.ops.batch_norm_backward(x, x, vector, vector, vector, True, True, True, True)


def run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one: nothing is computed, and only the function has something to say."""
    for name in ("batch_norm_training", "batch_norm_eval"):
        monkeypatch.setattr(fastbn.functional, name, lambda x, *_: (x,))
    with FakeTensorMode():
        x, vector = torch.empty(4, 6, 5, 5, device="cuda"), torch.empty(6, device="cuda")
        fastbn.batch_norm(x, vector, vector, training=True)


def test_nothing_is_said_of_nothing(told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_a_gpu(monkeypatch)
    trace_forward()
    trace_backward()
    assert told == []


def test_backend_hears_of_each_change_once(
    told: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a process group that comes after plans have been made, and of its end."""
    run_on_a_gpu(monkeypatch)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        run_on_a_gpu(monkeypatch)
        run_on_a_gpu(monkeypatch)
    finally:
        distributed.destroy_process_group()
    assert told == [32]
    run_on_a_gpu(monkeypatch)
    assert told == [32, 0]


@pytest.mark.parametrize("trace", [trace_forward, trace_backward])
def test_backend_hears_of_it_by_tracing(
    trace: Callable[[], None], told: list[int], process_group: None
) -> None:
    """A compiled model calls the operators alone."""
    trace()
    assert told == [32]


def test_backend_hears_of_the_environment(told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBN_CUDA_FREE_SMS", "12")
    run_on_a_gpu(monkeypatch)
    assert told == [12]
