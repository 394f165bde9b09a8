"""The same bits for any number of threads and on every run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fastbn
from tests.support.pairs import EXHAUSTIVE, pairs
from tests.support.tables import DTYPES, SHARED, Case, make, streamed_cases

if TYPE_CHECKING:
    from torch import Tensor

# What threads share: channels, parts of a channel, blocks of rows. The second shape has enough
# channels for threads to take whole ones; the third rows that are joined, and a rest. Each layout
# has a partition of its own, and each dtype its width of vectors.
SHAPES = {**SHARED, "many-channels": (6, 70, 37, 31), "joined-rows": (50_001, 3)}
CASES = pairs(
    SHAPES,
    ("contiguous", "channels_last", "stepped"),
    DTYPES,
    where=lambda name, layout, _: len(SHAPES[name]) > 2 or layout != "channels_last",
    of=lambda name, layout, dtype: Case(name, SHAPES[name], layout, dtype),
)
# Outputs of each dtype that are written past the cache; the other cases of one layout differ from
# these in alignment alone.
STREAMED = [
    case if case.layout in ("contiguous", "channels_last") else pytest.param(case, marks=EXHAUSTIVE)
    for case in streamed_cases()
]


def results(case: Case, training: bool, device: str = "cpu") -> list[Tensor]:
    """y, the running statistics and all gradients."""
    torch.manual_seed(1)
    tensors = make(case, device).requiring_grad()
    vectors = (tensors.running_mean, tensors.running_var, tensors.weight, tensors.bias)
    y = fastbn.batch_norm(tensors.x, *vectors, training)
    gradients = torch.autograd.grad(y, (tensors.x, tensors.weight, tensors.bias), tensors.dy)
    return [y, tensors.running_mean, tensors.running_var, *gradients]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES + STREAMED, ids=str)
def test_threads_do_not_change_a_bit(case: Case, training: bool) -> None:
    torch.set_num_threads(1)
    alone = results(case, training)
    for threads in (2, 7):
        torch.set_num_threads(threads)
        for one, several in zip(alone, results(case, training), strict=True):
            assert torch.equal(one, several)


@pytest.mark.parametrize("case", [*CASES, *STREAMED[::4]], ids=str)
def test_runs_do_not_differ(case: Case, device: str) -> None:
    torch.set_num_threads(3)
    first = results(case, True, device)
    for _ in range(3):
        for one, another in zip(first, results(case, True, device), strict=True):
            assert torch.equal(one, another)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_does_not_change_a_bit(dtype: torch.dtype) -> None:
    """Streaming stores begin at an aligned address; what they store must not depend on it.

    Of the CPU only: which elements a thread of a GPU takes follows from where aligned vectors lie.
    """
    (contiguous,) = [
        case for case in streamed_cases() if case.layout == "contiguous" and case.dtype == dtype
    ]
    offset = Case(contiguous.name, contiguous.shape, "offset", dtype)
    for one, another in zip(results(contiguous, True), results(offset, True), strict=True):
        assert torch.equal(one, another)
