"""What is tried first on a GPU finds faults that only full shared memory brings about."""

from __future__ import annotations

import math
from typing import Any

import pytest

import fastbn
from tests.support import smoke

PERSISTENT = [name for name in smoke.ALGORITHMS if name.startswith("persistent")]


@pytest.mark.parametrize("gpu_name", ["h100", "h200"])
@pytest.mark.parametrize("layout", smoke.SHAPES)
@pytest.mark.parametrize("op", smoke.PASSES)
@pytest.mark.parametrize("algorithm", PERSISTENT)
def test_stages_are_used_more_than_once(
    algorithm: Any, op: Any, layout: Any, gpu_name: str
) -> None:
    shape = smoke.shape_of(algorithm, layout)
    question = {"dtype": "bfloat16", "layout": layout, "op": op}
    plan = fastbn.plan(shape, **question, device=gpu_name, algorithm=algorithm)
    tensors = 1 if op == "forward" else 2
    bytes_of_a_block = tensors * 2 * math.prod(shape) / plan.grid
    assert bytes_of_a_block > 1.5 * plan.shared_bytes


@pytest.mark.parametrize("layout", smoke.SHAPES)
@pytest.mark.parametrize("op", smoke.PASSES)
@pytest.mark.parametrize("algorithm", smoke.ALGORITHMS)
def test_all_are_tried_on_hopper(algorithm: str, op: Any, layout: Any) -> None:
    assert smoke.fits(algorithm, op, layout, "h200")


def test_what_a_gpu_lacks_is_known_beforehand() -> None:
    assert not smoke.fits("persistent_cluster", "forward", "contiguous", "a100")
