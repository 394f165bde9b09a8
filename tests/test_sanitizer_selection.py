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
    """Each algorithm over each mapping, and for those that share channels, in several parts."""
    taken = set()
    for case in CASES:
        if case.dtype == dtype:
            plan = fastbn.plan(selection.inputs(case).x, op=op, device=gpu_name)
            vectors = plan.vector_bytes == 16
            taken.add((plan.algorithm, plan.mapping, plan.layout, vectors, plan.parts > 1))
    mappings = {
        ("columns", "nsc", True),
        ("columns", "nsc", False),
        ("columns", "ncs", True),
        ("segments", "ncs", True),
        ("strided", "strided", False),
    }
    wanted = {("tiny", *mapping, False) for mapping in mappings}
    wanted |= {("split", *mapping, True) for mapping in mappings}
    assert wanted <= taken
