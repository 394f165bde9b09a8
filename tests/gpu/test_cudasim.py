"""The CUDA kernels on the simulated GPU: right, free of races, and exact in the bytes they move."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import cudasim
from tests.cudasim import build
from tests.cudasim.__main__ import outcome_of
from tests.cudasim.verify import Verdict, verify_backward, verify_forward
from tests.support import tables
from tests.support.pairs import pairs
from tests.support.tolerances import CONDITION

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEDULES = range(2)
# Elements of a channel up to which a block of its own is ever given to it.
ONE_BLOCK = 32 << 10


def assert_right(verdict: Verdict) -> None:
    assert verdict.wrong == []
    assert verdict.schedules_differ == 0


def named(value: object) -> str:
    """In a test's name."""
    return getattr(value, "__name__", str(value))


def sizes(case: tables.Case) -> tuple[int, int]:
    """Elements of a tensor and of a channel."""
    numel = torch.Size(case.shape).numel()
    return numel, numel // case.shape[1]


# Pairs of a shape and a layout, which choose how threads are laid over memory, and a dtype, which
# decides how wide vectors are.
@pytest.mark.parametrize("case", tables.small_cases() + tables.hard_cases(), ids=str)
def test_results(case: tables.Case) -> None:
    """Every algorithm, training and eval, forward and backward, under two schedules."""
    tensors = tables.make(case)
    condition = CONDITION.get((case.data, case.dtype), 1.0)
    options: dict[str, Any] = {"condition": condition, "seeds": SCHEDULES}
    for operation in (verify_forward, verify_backward):
        for training in (True, False):
            verdict = operation(tensors, training=training, algorithm="two_pass", **options)
            assert_right(verdict)
        if sizes(case)[1] <= ONE_BLOCK:
            verdict = operation(tensors, algorithm="one_block", **options)
            assert_right(verdict)
            assert len(verdict.report.launches) == 1


@pytest.mark.parametrize(
    ("device", "layout", "operation"),
    pairs(
        ("t4", "a100", "h200", "rtx5090", "b200"),
        # Each has splits of its own: of segments, of rows, of elements.
        ("contiguous", "channels_last", "offset"),
        (verify_forward, verify_backward),
    ),
    ids=named,
)
def test_devices(device: str, layout: str, operation: Callable[..., Verdict]) -> None:
    """Their numbers of multiprocessors cut the same tensor into other splits."""
    case = tables.Case("splits", (16, 24, 56, 56), layout, torch.bfloat16)
    assert_right(operation(tables.make(case), device=device, algorithm="two_pass"))


MIXES = [
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float16),
    (torch.float16, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.parametrize("algorithm", ["two_pass", "one_block"])
def test_dtypes_of_vectors(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], algorithm: str
) -> None:
    dtype, parameters, statistics = dtypes
    case = tables.Case("mix", (4, 24, 9, 8), "channels_last", dtype)
    tensors = tables.make(case, parameters=parameters, statistics=statistics)
    assert_right(verify_forward(tensors, algorithm=algorithm))
    assert_right(verify_forward(tensors, training=False))
    assert_right(verify_backward(tensors, algorithm=algorithm))


@pytest.mark.parametrize("algorithm", ["two_pass", "one_block"])
def test_no_parameters(algorithm: str) -> None:
    case = tables.Case("bare", (4, 24, 9, 8), "contiguous", torch.float32)
    tensors = replace(tables.make(case), weight=None, bias=None)
    assert_right(verify_forward(tensors, algorithm=algorithm))
    assert_right(verify_backward(tensors, algorithm=algorithm))


WANTED = [(dx, dw, db) for dx in (0, 1) for dw in (0, 1) for db in (0, 1) if dx + dw + db > 0]


@pytest.mark.parametrize("want", WANTED, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_subsets_of_gradients(want: tuple[int, int, int], training: bool) -> None:
    tensors = tables.make(tables.Case("some", (5, 24, 9, 8), "channels_last", torch.float16))
    dx, dweight, dbias = map(bool, want)
    verdict = verify_backward(
        tensors, training=training, want=(dx, dweight, dbias), algorithm="two_pass"
    )
    assert_right(verdict)
    elements = tensors.x.numel() * tensors.x.element_size()
    reads = 4 if training and dx else 2 if dweight or dbias else 1
    assert verdict.report.activations["read_bytes"] == reads * elements
    assert verdict.report.activations["written_bytes"] == dx * elements


@pytest.mark.parametrize("counted", [True, False])
def test_cumulative_average(counted: bool) -> None:
    """The factor is one over the number of batches, this one among them; 0 if nobody counts."""
    x = torch.randn(8, 24, 10, dtype=torch.float64)
    running_mean, running_var = torch.randn(24).double(), torch.rand(24).double()
    batches = torch.tensor(3) if counted else None
    share = 1 / 4 if counted else 0.0
    mean = running_mean + share * (x.mean((0, 2)) - running_mean)
    var = running_var + share * (x.var((0, 2)) - running_var)
    statistics = (running_mean, running_var, batches)
    _, report = cudasim.forward(x, None, None, *statistics, momentum=None)
    assert report.algorithm == "two_pass"
    torch.testing.assert_close(running_mean, mean)
    torch.testing.assert_close(running_var, var)
    assert batches is None or int(batches) == 4


def test_strided_vectors() -> None:
    """Parameters and statistics that are columns of a matrix."""
    case = tables.Case("vectors", (4, 24, 9, 8), "contiguous", torch.float32)
    tensors = tables.make(case)
    columns = torch.randn(24, 4)
    tensors = replace(tensors, weight=columns[:, 1], bias=columns[:, 2])
    assert_right(verify_forward(tensors))
    assert_right(verify_backward(tensors))


# --- Traffic -------------------------------------------------------------------------------------

# Passes over memory: tensors read and written, each once.
PASSES = {"forward": (2, 1), "backward": (4, 1), "eval": (1, 1)}
# Large tensors of each layout; sizes that leave remainders of vectors, or fill none; few values.
TENSORS = [
    ("16,64,28,28", "bfloat16", "contiguous"),
    ("16,64,28,28", "bfloat16", "channels_last"),
    ("8,3,7,5", "float32", "contiguous"),
    ("64,100", "float16", "contiguous"),
    ("2,65,4,6,5", "bfloat16", "channels_last"),
    ("1,1,1,2", "float64", "contiguous"),
    ("4,32,57,57", "bfloat16", "contiguous"),
    ("4,32,57,57", "bfloat16", "channels_last"),
]


def covered(shape: list[int], itemsize: int) -> float:
    """Bytes of the aligned vectors that hold elements of a segment, for each byte of elements.

    A segment is the elements of one channel of one contiguous sample; vectors that two segments
    share are read for both.
    """
    width = 16 // itemsize
    length = torch.Size(shape[2:]).numel()
    begins = range(0, torch.Size(shape).numel(), length)
    vectors = sum(-(-(begin + length) // width) - begin // width for begin in begins)
    return vectors * width / torch.Size(shape).numel()


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.cudasim", *arguments, "--json"],
        cwd=build.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("op", "tensor", "algorithm"), pairs(PASSES, TENSORS, ("auto", "two_pass")), ids=str
)
def test_traffic(op: str, tensor: tuple[str, str, str], algorithm: str) -> None:
    """Activations to the vector; with everything else within 2% where there is anything to read."""
    shape, dtype, layout = tensor
    options = ["--op", op, "--shape", shape, "--dtype", dtype, "--layout", layout, "--seeds", "2"]
    outcome = outcome_of([*options, "--algorithm", algorithm, "--device", "h200"])
    assert not outcome["failures"]
    assert outcome["schedules_differ"] == 0
    assert outcome["launches"] <= PASSES[op][0] // 2 + 1
    itemsize = getattr(torch, dtype).itemsize
    elements = torch.Size(outcome["shape"]).numel()
    reads, writes = PASSES[op]
    # Each channel's first element is read once more per block, to count means from.
    extra = sum(outcome["grid"]) * outcome["shape"][1] * itemsize / elements
    read = outcome["activation_read_bytes_per_element"]
    # What stays in shared memory is read once.
    least = reads if outcome["algorithm"] in ("two_pass", "one_block", "elementwise") else reads / 2
    most: float = reads * itemsize
    if outcome["mapping"] == "contiguous":
        most *= covered(outcome["shape"], itemsize)
    assert least * itemsize <= read <= most + (extra if op == "forward" else 0)
    assert outcome["activation_write_bytes_per_element"] == writes * itemsize
    if elements * itemsize > 1 << 20 and algorithm == "two_pass":
        assert outcome["read_bytes_per_element"] <= 1.02 * reads * itemsize
        assert outcome["write_bytes_per_element"] <= 1.02 * writes * itemsize


def test_command_line() -> None:
    done = command_line("--shape", "8,3,7,5", "--dtype", "float32", "--seeds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["failures"] == []
    assert outcome["activation_write_bytes_per_element"] == 4


def test_command_line_says_why_it_fails() -> None:
    done = command_line("--shape", "4,4", "--algorithm", "none")
    assert done.returncode == 1
    assert "there is no algorithm 'none'" in json.loads(done.stdout)["failures"][0]


ALIGNED = ["16,64,28,28", "8,64,14,14", "8,64,7,7", "64,100"]


@pytest.mark.parametrize("shape", ALIGNED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_vectors_of_16_bytes(shape: str, layout: str) -> None:
    """Wherever sizes allow, which is nearly everywhere, activations move in whole vectors."""
    dimensions = tuple(int(size) for size in shape.split(","))
    layout = layout if len(dimensions) > 2 else "contiguous"
    tensors = tables.make(tables.Case("wide", dimensions, layout, torch.bfloat16))
    for operation in (verify_forward, verify_backward):
        report = operation(tensors).report
        in_bulk = report.activations["bulk_stores"] > 0
        assert set(report.activations["stores"]) == (set() if in_bulk else {"16"})
        narrow = sum(count for size, count in report.activations["loads"].items() if size != "16")
        assert narrow <= sum(launch["blocks"] for launch in report.launches) * dimensions[1]
