"""What runs under compute-sanitizer computes right and leaves no way through the kernels out."""

from __future__ import annotations

from typing import Any

import pytest

import fastbn
from fastbn.planning import ALGORITHM_VARIABLE
from tests.support import sanitizer_selection as selection
from tests.support.tables import Case

CASES = list(selection.cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_right(case: Case, device: str) -> None:
    tensors = selection.inputs(case)
    selection.check_forward(tensors, device)
    selection.check_backward(tensors, device)


@pytest.mark.parametrize("gpu_name", ["t4", "a100", "h200"])
@pytest.mark.parametrize("dtype", selection.DTYPES, ids=str)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_every_way_is_taken(op: Any, dtype: object, gpu_name: str) -> None:
    """Each algorithm over each mapping that it knows."""
    taken = set()
    for case in CASES:
        if case.dtype == dtype:
            tensors = selection.inputs(case)
            chosen = fastbn.plan(tensors.x, op=op, device=gpu_name)
            forced = selection.ways(tensors, gpu_name)
            algorithms: set[Any] = {chosen.algorithm, *forced}
            for algorithm in algorithms:
                plan = fastbn.plan(tensors.x, op=op, device=gpu_name, algorithm=algorithm)
                taken.add((algorithm, plan.mapping, plan.layout, plan.vector_bytes == 16))
    narrow = {
        ("matrix_columns", "channels_last", False),
        ("generic", "generic", False),
        ("contiguous", "contiguous", True),
    }
    whole = {
        ("matrix_columns", "channels_last", True),
        ("matrix_columns", "contiguous", True),
        ("contiguous", "contiguous", True),
    }
    persistent = selection.PERSISTENT if gpu_name == "h200" else ("persistent_block",)
    wanted = {(name, *mapping) for name in ("two_pass", "one_block") for mapping in narrow}
    wanted |= {(name, *mapping) for name in persistent for mapping in whole}
    assert wanted <= taken, wanted - taken


def test_what_the_environment_forces_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (
        case for case in CASES if case.dtype == selection.DTYPES[0] and case.name == "columns"
    )
    tensors = selection.inputs(case)
    monkeypatch.delenv(ALGORITHM_VARIABLE, raising=False)
    assert selection.ways(tensors, "h200")
    monkeypatch.setenv(ALGORITHM_VARIABLE, "two_pass")
    assert not selection.ways(tensors, "h200")
