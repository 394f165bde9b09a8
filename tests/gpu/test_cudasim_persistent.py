"""Kernels that keep tensors in shared memory, on the simulated GPU.

On a device with few multiprocessors and little shared memory small tensors do what large ones do on
a whole one: several channel tiles to a CTA group, stages that are used again, vectors that find no
room in shared memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import cudasim
from tests.cudasim import Scale
from tests.cudasim.__main__ import outcome_of
from tests.cudasim.verify import Verdict, verify_backward, verify_forward
from tests.gpu.test_cudasim import assert_right
from tests.support import tables
from tests.support.pairs import pairs
from tests.support.tolerances import CONDITION

if TYPE_CHECKING:
    from collections.abc import Callable

ALGORITHMS = ("persistent_block", "persistent_cluster", "persistent_grid")
SCHEDULES = range(3)
SMALL = Scale(multiprocessors=8, shared_bytes=48 << 10)
OPERATIONS: dict[str, Callable[..., Verdict]] = {
    "forward": verify_forward,
    "backward": verify_backward,
}

# By the mapping that they are for.
INPUTS = {
    "contiguous": ((6, 40, 16, 24), "contiguous"),
    "contiguous, one vector": ((40, 24, 8), "contiguous"),
    "small channels": ((8, 64, 7, 7), "contiguous"),
    "small channels, last tile narrow": ((6, 36, 14, 14), "contiguous"),
    "channels last": ((6, 72, 9, 9), "channels_last"),
    "channels last, 3-D": ((2, 64, 5, 6, 7), "channels_last"),
    "folded": ((4, 5, 16, 16), "channels_last"),
    "matrix": ((300, 264), "contiguous"),
    # The last channel tile has 12 of 16 channels, or 24 of 32: no whole rows of a warp.
    "channels last, last tile narrow": ((4, 44, 7, 7), "channels_last"),
    "channels last, last tile narrower": ((4, 56, 7, 7), "channels_last"),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(
    op: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, **options: Any
) -> Verdict:
    case = tables.Case("persistent", shape, layout, dtype)
    return OPERATIONS[op](tables.make(case), **{"scale": SMALL, "seeds": SCHEDULES, **options})


@pytest.mark.parametrize(
    ("op", "algorithm", "name", "dtype"),
    pairs(
        OPERATIONS,  # which read one tensor or two
        ALGORITHMS,  # which let blocks talk each in its own way
        INPUTS,
        DTYPES,  # which decide how many elements a vector has
    ),
    ids=str,
)
def test_results(op: str, algorithm: str, name: str, dtype: torch.dtype) -> None:
    shape, layout = INPUTS[name]
    verdict = run(op, shape, layout, dtype, algorithm=algorithm)
    assert_right(verdict)
    report = verdict.report
    assert report.algorithm == algorithm
    (launch,) = report.launches
    assert (launch["cluster"] > 1) == (algorithm == "persistent_cluster")
    assert launch["cooperative"] == (algorithm == "persistent_grid")
    # The copy engine stores what it has loaded, and threads what is read twice.
    assert set(report.activations["stores"]) <= {"16"}
    engine = report.activations["bulk_copies"] > 0
    assert (report.activations["bulk_stores"] > 0) == engine
    assert engine or report.activations["stores"]


@pytest.mark.parametrize(
    ("op", "device", "name"), pairs(OPERATIONS, ("t4", "a100", "rtx4090"), INPUTS), ids=str
)
def test_persistent_block_without_a_copy_engine(op: str, device: str, name: str) -> None:
    """Threads copy vector by vector."""
    shape, layout = INPUTS[name]
    verdict = run(op, shape, layout, torch.bfloat16, algorithm="persistent_block", device=device)
    assert_right(verdict)
    assert verdict.report.activations["bulk_copies"] == 0


# Of a device, multiprocessors and kilobytes of shared memory; and a tensor.
CLUSTERS = [
    (8, 48, (8, 64, 14, 14), "contiguous"),
    (8, 48, (8, 64, 14, 14), "channels_last"),
    (128, 64, (40, 24, 32, 32), "contiguous"),
    (128, 64, (5, 96, 16, 16), "channels_last"),
]


def test_sizes_of_clusters() -> None:
    """Few channels on a large device take many blocks each, and many on a small one few."""
    sizes = set()
    for multiprocessors, kilobytes, shape, layout in CLUSTERS:
        scale = Scale(multiprocessors, kilobytes << 10)
        for op in OPERATIONS:
            verdict = run(
                op, shape, layout, torch.bfloat16, algorithm="persistent_cluster", scale=scale
            )
            assert_right(verdict)
            sizes.add(verdict.report.launches[0]["cluster"])
    assert sizes == {2, 4, 8, 16}


@pytest.mark.parametrize(
    ("op", "algorithm", "kind"), pairs(OPERATIONS, ALGORITHMS, tables.HARD_KINDS), ids=str
)
def test_hard_numbers(op: str, algorithm: str, kind: tuple[str, torch.dtype]) -> None:
    """Data that ruins careless arithmetic."""
    data, dtype = kind
    case = tables.Case("hard", (6, 40, 16, 24), "contiguous", dtype, data)
    condition = CONDITION.get((data, dtype), 1.0)
    options: dict[str, Any] = {"scale": SMALL, "seeds": SCHEDULES, "condition": condition}
    assert_right(OPERATIONS[op](tables.make(case), algorithm=algorithm, **options))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_not_a_number_stays_in_its_channel(algorithm: str) -> None:
    x = torch.randn(6, 40, 16, 24)
    right, _ = cudasim.forward(x, scale=SMALL, algorithm=algorithm)
    x[3, 7, 2, 5] = float("nan")
    found, _ = cudasim.forward(x, scale=SMALL, algorithm=algorithm)
    others = torch.arange(40) != 7
    for before, after in zip(right, found, strict=True):
        per_channel = (
            (before.transpose(0, 1), after.transpose(0, 1))
            if before.dim() > 1
            else (
                before[:, None],
                after[:, None],
            )
        )
        assert torch.equal(per_channel[0][others], per_channel[1][others])
        assert bool(per_channel[1][7].isnan().all())


# --- Vectors that find no room --------------------------------------------------------------------

# Ever more of them: a split is as large as all shared memory, or up to four times that.
LARGE = {
    "contiguous": [(96, 16, 64, 64), (160, 8, 64, 64)],
    "channels_last": [(12, 64, 32, 32), (16, 64, 32, 32)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("op", OPERATIONS)
def test_what_does_not_fit_is_read_twice(op: str, layout: str, dtype: torch.dtype) -> None:
    tensors = 2 if op == "backward" else 1
    for shape in LARGE[layout]:
        scale = Scale(multiprocessors=8, shared_bytes=80 << 10)
        verdict = run(
            op, shape, layout, dtype, algorithm="persistent_grid", scale=scale, seeds=range(2)
        )
        assert_right(verdict)
        size = torch.Size(shape).numel() * dtype.itemsize
        read = verdict.report.activations["read_bytes"] / size
        assert tensors < read < 2 * tensors
        assert verdict.report.activations["written_bytes"] == size


# --- Traffic --------------------------------------------------------------------------------------

# Tensors of 1.6 MB or more in bfloat16, whose splits fit.
FITTING = [
    ("persistent_block", "contiguous", "32,128,28,28"),
    ("persistent_block", "channels_last", "8,512,14,14"),
    ("persistent_cluster", "contiguous", "16,64,56,56"),
    ("persistent_cluster", "channels_last", "32,256,14,14"),
    ("persistent_grid", "contiguous", "16,64,56,56"),
    ("persistent_grid", "channels_last", "32,64,28,28"),
]
# Where all blocks of a device talk about a tensor as small as this, their words count.
FEW = ["--multiprocessors", "16"]


@pytest.mark.parametrize(
    ("op", "input_", "dtype"), pairs(OPERATIONS, FITTING, ("bfloat16", "float32")), ids=str
)
def test_traffic(op: str, input_: tuple[str, str, str], dtype: str) -> None:
    """Each input read once and each output written once, everything else within 2%."""
    algorithm, layout, shape = input_
    options = ["--op", op, "--shape", shape, "--dtype", dtype, "--layout", layout]
    options += FEW if algorithm == "persistent_grid" else []
    outcome = outcome_of([*options, "--algorithm", algorithm, "--seeds", "2"])
    assert not outcome["failures"]
    assert outcome["schedules_differ"] == 0
    assert outcome["algorithm"] == algorithm
    assert outcome["launches"] == 1
    itemsize = getattr(torch, dtype).itemsize
    reads = 2 if op == "backward" else 1
    assert outcome["activation_read_bytes_per_element"] == reads * itemsize
    assert outcome["activation_write_bytes_per_element"] == itemsize
    assert outcome["read_bytes_per_element"] <= 1.02 * reads * itemsize
    assert outcome["write_bytes_per_element"] <= 1.02 * itemsize


@pytest.mark.parametrize(
    ("shape", "layout", "in_bulk"),
    [
        ((8, 64, 28, 28), "contiguous", True),
        ((8, 64, 14, 14), "contiguous", True),
        # Rows of 64 bytes.
        ((8, 64, 28, 28), "channels_last", False),
        # All channels in one tile, whose rows lie one after another.
        ((4, 32, 16, 16), "channels_last", True),
        ((4, 5, 16, 16), "channels_last", True),
    ],
    ids=str,
)
def test_runs_are_copied_in_bulk(shape: tuple[int, ...], layout: str, in_bulk: bool) -> None:
    """By the copy engine where it has half a kilobyte to copy at once."""
    verdict = run("backward", shape, layout, torch.bfloat16, algorithm="persistent_cluster")
    assert_right(verdict)
    activations = verdict.report.activations
    if in_bulk:
        # But for what found no room.
        assert activations["bulk_bytes"] >= activations["read_bytes"] / 2
        assert activations["bulk_bytes"] / activations["bulk_copies"] >= 512
    else:
        assert activations["bulk_copies"] == 0
        assert set(activations["loads"]) == {"16"}


@pytest.mark.parametrize(
    ("op", "algorithm", "shape", "dtype"),
    [
        ("forward", "persistent_grid", (6, 200, 9, 9), torch.bfloat16),
        ("backward", "persistent_cluster", (4, 44, 7, 7), torch.float32),
    ],
    ids=str,
)
def test_short_rows_are_copied_in_boxes(
    op: str, algorithm: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """A box to a tile, and a row that some tiles have more; each byte once.

    The last box of a row reaches beyond the matrix.
    """
    verdict = run(op, shape, "channels_last", dtype, algorithm=algorithm)
    assert_right(verdict)
    activations = verdict.report.activations
    tensors = 2 if op == "backward" else 1
    size = torch.Size(shape).numel() * dtype.itemsize
    assert activations["read_bytes"] == activations["bulk_bytes"] == tensors * size
    assert activations["written_bytes"] == activations["bulk_stored_bytes"] == size
    boxes = activations["box_stores"]
    assert boxes > 0
    assert activations["box_copies"] == tensors * boxes
    assert boxes < activations["bulk_stores"] <= 2 * boxes


AUTO = [
    ((8, 44, 7, 7), "channels_last", torch.float32),
    ((16, 108, 7, 7), "channels_last", torch.float32),
    ((256, 56, 6), "contiguous", torch.bfloat16),
    ((32, 120, 7, 7), "channels_last", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("op", "algorithm", "input_", "device"),
    pairs(
        OPERATIONS,
        ("auto", "persistent_cluster", "persistent_grid"),
        AUTO,
        # Their sizes of clusters and of shared memory cut tensors in other ways.
        ("h200", "rtx5090", "b200"),
    ),
    ids=str,
)
def test_odd_numbers_of_channels(
    op: str, algorithm: str, input_: tuple[tuple[int, ...], str, torch.dtype], device: str
) -> None:
    """On whole devices, as the planner would have it."""
    options: dict[str, Any] = {
        "scale": Scale(),
        "device": device,
        "algorithm": algorithm,
        "seeds": range(2),
    }
    assert_right(run(op, *input_, **options))
