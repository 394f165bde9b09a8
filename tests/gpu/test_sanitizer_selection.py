"""What runs under compute-sanitizer computes right and leaves no way through the kernels out."""

from __future__ import annotations

import pytest
import sanitizer_selection as selection
from tables import Case

import fastbn

CASES = list(selection.cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_right(case: Case, device: str) -> None:
    tensors = selection.inputs(case)
    selection.check_forward(tensors, device)
    selection.check_backward(tensors, device)


@pytest.mark.parametrize("gpu_name", ["t4", "a100", "h200"])
@pytest.mark.parametrize("dtype", selection.DTYPES, ids=str)
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_every_way_is_taken(op: str, dtype: object, gpu_name: str) -> None:
    """Each algorithm over each mapping that it knows."""
    taken = set()
    for case in CASES:
        if case.dtype == dtype:
            tensors = selection.inputs(case)
            chosen = fastbn.plan(tensors.x, op=op, device=gpu_name)
            forced = selection.ways(tensors, gpu_name)
            for algorithm in {chosen.algorithm, *forced}:
                plan = fastbn.plan(tensors.x, op=op, device=gpu_name, algorithm=algorithm)
                taken.add((algorithm, plan.mapping, plan.layout, plan.vector_bytes == 16))
    narrow = {("columns", "nsc", False), ("strided", "strided", False), ("segments", "ncs", True)}
    whole = {("columns", "nsc", True), ("columns", "ncs", True), ("segments", "ncs", True)}
    on_chip = selection.ON_CHIP if gpu_name == "h200" else ("resident",)
    wanted = {(name, *mapping) for name in ("split", "tiny") for mapping in narrow}
    wanted |= {(name, *mapping) for name in on_chip for mapping in whole}
    assert wanted <= taken, wanted - taken
