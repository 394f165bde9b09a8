"""The steps of batch norm apart, on the simulated GPU: right, in one launch each, byte by byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import cudasim
from tests.cudasim import Report, Scale
from tests.cudasim.verify import step_operators, verify_steps
from tests.support.pairs import pairs
from tests.support.step_checks import EPS, check, exchange, forward, parts_of
from tests.support.tables import DTYPES, Case, make

if TYPE_CHECKING:
    pass


# As many splits as blocks fit the device are merged by whichever comes last: a small one has few.
SMALL = Scale(multiprocessors=4)
# Rows of vectors and of single elements; segments with ends of vectors; one channel or many.
SHAPES = {
    "matrix": (300, 72),
    "odd matrix": (300, 37),
    "image": (8, 24, 9, 11),
    "one channel": (8, 1, 31, 33),
    "many channels": (6, 264, 4, 4),
}
# Each with a mapping of its own; the last begins off a vector.
LAYOUTS = ("contiguous", "channels_last", "batch_minor", "offset")
# Shares of processes in a batch, whether rows are added up, and momentum. Rows of no values change
# nothing, even in front.
EXCHANGES: list[tuple[tuple[int, ...], bool, float | None]] = [
    ((1,), False, 0.1),
    ((1, 5, 2), True, None),
    ((0, 3, 0, 5), False, None),
    ((0, 3, 0, 5), True, 0.1),
]


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "exchanged"),
    pairs(
        SHAPES,
        LAYOUTS,
        DTYPES,
        EXCHANGES,
        where=lambda name, layout, *_: len(SHAPES[name]) > 2 or layout != "channels_last",
    ),
    ids=str,
)
def test_parts_make_one_batch(
    name: str,
    layout: str,
    dtype: torch.dtype,
    exchanged: tuple[tuple[int, ...], bool, float | None],
) -> None:
    shares, additive, momentum = exchanged
    reports: list[Report] = []
    tensors = make(Case(name, SHAPES[name], layout, dtype))
    sizes = parts_of(SHAPES[name][0], shares)
    steps = step_operators(reports, scale=SMALL)
    check(steps, tensors, sizes, additive=additive, momentum=momentum)


# Threads in another order, as on a GPU that is shared.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_schedules_do_not_change_a_bit(layout: str) -> None:
    tensors = make(Case("schedules", SHAPES["image"], layout, torch.float32))
    verdict = verify_steps(tensors, scale=SMALL, seeds=range(4))
    assert verdict.wrong == []
    assert verdict.schedules_differ == 0


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("batch", [0, 1])
def test_fewer_than_two_values_leave_running_statistics_alone(
    batch: int, momentum: float | None
) -> None:
    tensors = make(Case("few", (2, 24), "contiguous", torch.float32))
    parts = tensors.x[:batch].split([batch, 0])
    found = forward(step_operators([]), tensors, parts, momentum=momentum)
    assert float(found.count) == batch
    assert torch.equal(found.running_mean, tensors.running_mean)
    assert torch.equal(found.running_var, tensors.running_var)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    pairs(("contiguous", "channels_last", "batch_minor"), (torch.float32, torch.bfloat16)),
    ids=str,
)
def test_launches_and_traffic(layout: str, dtype: torch.dtype) -> None:
    """Each step is one launch that reads its inputs once and writes its output once."""
    shape = (16, 64, 14, 14)
    tensors = make(Case("traffic", shape, layout, dtype))
    x = tensors.x
    dy = torch.empty_like(x).copy_(tensors.dy)
    vectors = (tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var)
    row, stats = cudasim.stats(x, additive=False)
    rows = exchange([row, row, row], additive=False)
    (_, mean, invstd, count), combine_apply = cudasim.combine_apply(
        x, rows, False, *vectors, None, 0.1, EPS
    )
    given = (dy, x, tensors.weight, mean, invstd)
    (sums, _, _), reduced = cudasim.backward_reduce(*given, True, True)
    _, applied = cudasim.backward_combine_apply(*given, exchange([sums] * 3, additive=False), count)
    size = x.numel() * x.element_size()
    for report, reads, writes in (
        (stats, 1, 0),
        (combine_apply, 1, 1),
        (reduced, 2, 0),
        (applied, 2, 1),
    ):
        assert len(report.launches) == 1
        # The first element of each channel is read once more per block, to count means from.
        blocks = report.launches[0]["blocks"]
        extra = blocks * shape[1] * x.element_size() if report is stats else 0
        read = report.activations["read_bytes"]
        assert reads * size <= read <= reads * size + extra
        assert report.activations["written_bytes"] == writes * size
    assert set(combine_apply.activations["stores"]) == (
        {"16"} if layout != "batch_minor" else {str(x.element_size())}
    )


def test_empty_parts_reduce_without_a_launch() -> None:
    x, vector = torch.empty(0, 24, 3, 3), torch.ones(24)
    row, report = cudasim.stats(x, additive=False)
    assert (row.tolist(), report.launches) == ([0.0] * 49, [])
    (row, _, _), report = cudasim.backward_reduce(x, x, vector, vector, vector, True, True)
    assert (row.tolist(), report.launches) == ([0.0] * 48, [])
