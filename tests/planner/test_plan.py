"""``fastbn.plan`` says what the kernels do: plans fit their device and move the bytes promised."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import FrozenInstanceError, dataclass
from itertools import product
from typing import Any

import pytest
import torch

import fastbn
from fastbn.planning import DEVICES
from fastbn.planning.networks import MODELS, RESNET50
from tests.support.devices import MISSING, REQUIRED

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")
OPS: tuple[Any, ...] = ("forward", "backward", "eval")
NAMES = ("t4", "a100", "h100", "h200", "rtx4090", "rtx5090", "b200")

VECTOR_BYTES = 16


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBN_CUDA_ALGORITHM", raising=False)


def test_networks_are_complete() -> None:
    """ResNet-50 as its paper builds it: bottlenecks of three convolutions, and shortcuts."""
    built = Counter({(64, 112): 1})
    size = 56
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
        for block in range(blocks):
            built[width, size] += 1
            size //= 2 if stage > 0 and block == 0 else 1
            built[width, size] += 1
            built[4 * width, size] += 1 if block > 0 else 2
    assert {(layer.channels, layer.height): layer.count for layer in RESNET50} == built
    assert all(layer.width == layer.height for layer in RESNET50)
    assert sum(layer.count for layer in RESNET50) == 53
    assert MODELS == {"resnet50": RESNET50}


def test_devices() -> None:
    assert tuple(DEVICES) == NAMES


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 64, 56, 56), "channels_last"),
        ((1, 3, 224, 224), "contiguous"),
        ((1, 8, 99, 99), "channels_last"),
    ],
)
def test_small_grids_are_cut_up(shape: tuple[int, ...], layout: Any) -> None:
    """Into blocks that read neither nothing nor so much that multiprocessors stand idle."""
    plan = fastbn.plan(shape, dtype="bfloat16", layout=layout, op="eval", device="h200")
    assert plan.splits > 1
    # What a full block has in flight at once is 32 or 64 KiB.
    assert 32 << 10 <= plan.bytes_read / plan.grid < 128 << 10
    # With half as many elements there are fewer blocks, which read no less.
    half = (shape[0], shape[1], shape[2] // 2, *shape[3:])
    smaller = fastbn.plan(half, dtype="bfloat16", layout=layout, op="eval", device="h200")
    assert smaller.grid < plan.grid


def test_plan_depends_on_its_arguments_alone() -> None:
    """Not on what was planned before, nor on the order."""
    questions = list(product(RESNET50, LAYOUTS, DTYPES, OPS, NAMES))

    def ask(layer: Any, layout: Any, dtype: Any, op: Any, device: Any) -> fastbn.Plan:
        shape = (64, layer.channels, layer.height, layer.width)
        return fastbn.plan(shape, dtype=dtype, layout=layout, op=op, device=device)

    forwards = [ask(*question) for question in questions]
    backwards = [ask(*question) for question in reversed(questions)]
    assert forwards == backwards[::-1]


# --- Bytes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bill:
    """What an operation on one tensor costs, in tensors of that size."""

    reads: int
    writes: int
    floor: int
    launches: int


# By op, training, want_dx, want_vectors.
BILLS = {
    # x for its statistics, x again, y.
    ("forward", True, True, True): Bill(2, 1, 2, 2),
    ("eval", True, True, True): Bill(1, 1, 2, 1),
    # dy and x for their sums, both again, dx.
    ("backward", True, True, True): Bill(4, 1, 3, 2),
    ("backward", True, True, False): Bill(4, 1, 3, 2),
    ("backward", True, False, True): Bill(2, 0, 2, 1),
    # Given statistics: dx does not wait for the sums.
    ("backward", False, True, True): Bill(2, 1, 3, 1),
    ("backward", False, True, False): Bill(1, 1, 2, 1),
    ("backward", False, False, True): Bill(2, 0, 2, 1),
    # Nobody wants anything.
    ("backward", True, False, False): Bill(0, 0, 0, 0),
    ("backward", False, False, False): Bill(0, 0, 0, 0),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "generic"])
@pytest.mark.parametrize(
    "question", BILLS, ids=lambda question: "-".join(str(part) for part in question)
)
def test_bill(question: tuple[Any, ...], layout: Any) -> None:
    op, training, want_dx, want_vectors = question
    bill = BILLS[question]
    shapes = [(256, layer.channels, layer.height, layer.width) for layer in RESNET50]
    shapes += [(64, 64, 1024, 1024), (3, 5, 7, 9)]
    for device, shape, dtype in product(NAMES, shapes, DTYPES):
        plan = fastbn.plan(
            shape,
            dtype=dtype,
            layout=layout,
            op=op,
            device=device,
            algorithm="two_pass",
            training=training,
            want_dx=want_dx,
            want_dweight=want_vectors,
            want_dbias=want_vectors,
        )
        size = math.prod(shape) * dtype.itemsize
        assert plan.bytes_read == bill.reads * size
        assert plan.bytes_written == bill.writes * size
        assert plan.bytes_moved == (bill.reads + bill.writes) * size
        assert plan.floor_bytes == bill.floor * size
        assert plan.launches == bill.launches
        assert plan.bytes_per_element == (bill.reads + bill.writes) * dtype.itemsize
        if plan.launches:
            assert plan.share == bill.floor / (bill.reads + bill.writes)
        else:
            assert (plan.algorithm, plan.mapping, plan.grid) == ("none", "none", 0)
            assert plan.share == 1


@dataclass(frozen=True)
class Ending:
    """What an operation with something behind batch norm costs, in tensors, and in masks."""

    reads: int
    writes: int
    floor: int
    masks: int


# By op, activation, and whether there is a residual.
ENDINGS = {
    ("forward", "relu", False): Ending(2, 1, 2, 0),
    # x for its statistics, x and the residual, y.
    ("forward", "silu", True): Ending(3, 1, 3, 0),
    ("forward", None, True): Ending(3, 1, 3, 0),
    ("forward", "relu", True): Ending(3, 1, 3, 1),
    ("eval", "relu", True): Ending(2, 1, 3, 0),
    ("backward", "silu", False): Ending(4, 1, 3, 0),
    # dy, x and the residual for their sums and its gradient, then that and x for dx.
    ("backward", "silu", True): Ending(5, 2, 5, 0),
    ("backward", "relu", True): Ending(4, 2, 4, 1),
    # The gradient of the sum is that of the residual.
    ("backward", None, True): Ending(4, 1, 3, 0),
}


@pytest.mark.parametrize(
    "question", ENDINGS, ids=lambda question: "-".join(str(part) for part in question)
)
def test_bill_of_endings(question: tuple[Any, ...]) -> None:
    op, activation, residual = question
    ending = ENDINGS[question]
    shapes = {"contiguous": (64, 32, 28, 28), "channels_last": (64, 32, 7, 7)}
    for device, layout, dtype in product(NAMES, LAYOUTS, DTYPES):
        asked: dict[str, Any] = {"dtype": dtype, "layout": layout, "op": op, "device": device}
        asked |= {"activation": activation, "residual": residual}
        plan = fastbn.plan(shapes[layout], algorithm="two_pass", **asked)
        size = math.prod(shapes[layout]) * dtype.itemsize
        masks = ending.masks * size // VECTOR_BYTES
        assert plan.bytes_moved == (ending.reads + ending.writes) * size + masks
        assert plan.floor_bytes == ending.floor * size + masks
        assert (plan.activation, plan.residual) == (activation or "identity", residual)
        assert activation is None or f"residual and {activation} on" in str(plan) or not residual
        one = fastbn.plan(shapes[layout], **asked)
        assert one.floor_bytes <= one.bytes_moved <= plan.bytes_moved


def test_rows_of_no_whole_vectors_have_no_mask() -> None:
    """Backward reads the residual itself."""
    asked: dict[str, Any] = {"dtype": "bfloat16", "op": "backward", "activation": "relu"}
    asked |= {"residual": True, "algorithm": "two_pass"}
    assert fastbn.plan((64, 32, 7, 7), **asked).bytes_per_element == 2 * 7
    assert fastbn.plan((64, 32, 8, 8), **asked).bytes_per_element == 2 * 6 + 1 / 8
    unwanted = fastbn.plan((64, 32, 8, 8), want_dresidual=False, **asked)
    assert unwanted.bytes_per_element == 2 * 5 + 2 / 8


# --- Vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout", "mapping"),
    [
        ((64, 64, 8, 8), "channels_last", "matrix_columns"),
        ((4096, 256), "contiguous", "matrix_columns"),
        # Several positions to a row, where channels are no whole vectors.
        ((8, 3, 16, 16), "channels_last", "matrix_columns"),
        ((8, 17, 16, 16), "channels_last", "matrix_columns"),
        ((4096, 100), "contiguous", "matrix_columns"),
        ((64, 64, 56, 56), "contiguous", "contiguous"),
        # Ends of segments one element at a time, the rest in vectors.
        ((65, 65, 29, 29), "contiguous", "contiguous"),
    ],
    ids=str,
)
def test_aligned_tensors_are_read_in_vectors(
    shape: tuple[int, ...], layout: Any, mapping: str, dtype: torch.dtype
) -> None:
    for op in OPS:
        plan = fastbn.plan(shape, dtype=dtype, layout=layout, op=op, device="h200")
        assert (plan.mapping, plan.vector_bytes) == (mapping, VECTOR_BYTES)


def test_short_segments_are_read_together() -> None:
    """Channels of 7 x 7 fill whole vectors by the eight, in 16-bit types."""
    plan = fastbn.plan((256, 512, 7, 7), dtype="bfloat16", layout="contiguous", device="h200")
    assert (plan.mapping, plan.vector_bytes) == ("matrix_columns", VECTOR_BYTES)
    plan = fastbn.plan((256, 511, 7, 7), dtype="bfloat16", layout="contiguous", device="h200")
    assert (plan.mapping, plan.vector_bytes) == ("contiguous", VECTOR_BYTES)


def test_rows_that_cannot_be_folded_are_read_by_the_element() -> None:
    """An odd number of odd rows."""
    plan = fastbn.plan((4097, 17), dtype="float16", device="h200")
    assert (plan.mapping, plan.vector_bytes) == ("matrix_columns", 2)


# --- Tensors --------------------------------------------------------------------------------------

# Memory formats by the layout that is asked of them.
FORMATS = {
    ("contiguous", 4): torch.contiguous_format,
    ("contiguous", 5): torch.contiguous_format,
    ("channels_last", 4): torch.channels_last,
    ("channels_last", 5): torch.channels_last_3d,
}


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 6, 5, 7),
        (4, 6, 3, 5, 7),
        (4, 6, 1, 1),
        (1, 1, 1, 1, 1),
        (4, 1, 5, 7),
        (1, 6, 5, 1),
        (1, 1, 5, 7),
        (0, 6, 5, 7),
        (4, 0, 5, 7),
    ],
    ids=str,
)
def test_tensor_is_planned_for_like_its_shape(
    shape: tuple[int, ...], layout: Any, place: str
) -> None:
    for dtype, op in product(DTYPES, OPS):
        x = torch.empty(shape, dtype=dtype, device=place)
        x = x.contiguous(memory_format=FORMATS[layout, len(shape)])
        told = fastbn.plan(x, op=op, device="h200")
        asked = fastbn.plan(shape, dtype=dtype, layout=layout, op=op, device="h200")
        if 0 in shape:
            assert (told.algorithm, asked.algorithm) == ("none", "none")
        else:
            assert told == asked


def test_layout_of_tensors() -> None:
    def layout(x: torch.Tensor) -> str:
        return fastbn.plan(x, device="h200").layout

    x = torch.empty(4, 6, 5, 7)
    assert layout(x) == "contiguous"
    assert layout(x.contiguous(memory_format=torch.channels_last)) == "channels_last"
    assert layout(x[:, :, ::2]) == "generic"
    assert layout(x[:, 1:]) == "generic"
    assert layout(x.transpose(2, 3)) == "generic"
    assert layout(torch.empty(4, 6)) == "channels_last"
    assert layout(torch.empty(6, 4).t()) == "generic"
    assert layout(torch.empty(4, 6, 1)) == "channels_last"
    assert layout(torch.empty(4, 7, 6).transpose(1, 2)) == "generic"
    assert layout(torch.empty(4, 6, 3, 5, 7).contiguous(memory_format=torch.channels_last_3d)) == (
        "channels_last"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offset_views_are_read_by_the_element(layout: Any, dtype: torch.dtype) -> None:
    """Their results start at vectors, they do not."""
    shape = (16, 64, 8, 8)
    elements = math.prod(shape)
    for skipped in (1, VECTOR_BYTES // dtype.itemsize):
        flat = torch.empty(elements + skipped, dtype=dtype)[skipped:]
        x = (
            flat.view(shape)
            if layout == "contiguous"
            else flat.view(16, 8, 8, 64).permute(0, 3, 1, 2)
        )
        for op in OPS:
            plan = fastbn.plan(x, op=op, device="h200")
            assert plan.layout == layout
            aligned = skipped * dtype.itemsize % VECTOR_BYTES == 0
            assert plan.vector_bytes == (VECTOR_BYTES if aligned else dtype.itemsize)


def test_arguments_go_before_what_the_tensor_tells() -> None:
    x = torch.empty(16, 64, 8, 8)
    plan = fastbn.plan(x, dtype=torch.bfloat16, layout="channels_last", device="h200")
    assert plan == fastbn.plan(
        (16, 64, 8, 8), dtype="bfloat16", layout="channels_last", device="h200"
    )


def test_defaults_of_a_shape() -> None:
    plan = fastbn.plan((16, 64, 8, 8), device="h200")
    assert (plan.op, plan.dtype, plan.layout) == ("forward", torch.float32, "contiguous")
    assert plan.shape == (16, 64, 8, 8)
    assert plan == fastbn.plan(torch.Size([16, 64, 8, 8]), device="h200")


def test_dtypes_by_name() -> None:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for given in (name, str(dtype)):
            assert fastbn.plan((4, 6), dtype=given, device="h200").dtype == dtype
    assert fastbn.plan((4, 6), dtype="half", device="h200").dtype == torch.float16


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (4, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_input_launches_nothing(shape: tuple[int, ...], op: Any) -> None:
    plan = fastbn.plan(shape, op=op, device="h200")
    assert (plan.algorithm, plan.launches, plan.bytes_moved, plan.floor_bytes) == ("none", 0, 0, 0)
    assert plan.bytes_per_element == 0
    assert "nothing to launch" in str(plan)


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("H200", "h200"),
        ("RTX 4090", "rtx4090"),
        ("rtx-5090", "rtx5090"),
        ("rtx_4090", "rtx4090"),
        (" B200 ", "b200"),
    ],
)
def test_devices_by_name(given: str, name: str) -> None:
    assert fastbn.plan((4, 6), device=given).device == name


@pytest.mark.skipif(MISSING is None, reason="there is a GPU")
def test_device_without_a_gpu() -> None:
    assert fastbn.plan((4, 6)) == fastbn.plan((4, 6), device="h200")
    assert fastbn.plan(torch.empty(4, 6)).device == "h200"


@pytest.mark.skipif(fastbn.build_info()["cuda"] is not None, reason="built with CUDA")
@pytest.mark.parametrize("device", [0, "cuda", "cuda:0", torch.device("cuda", 0)], ids=repr)
def test_build_without_cuda_has_no_gpus(device: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"GPU 0 .* built without CUDA kernels"):
        fastbn.plan((4, 6), device=device)


@pytest.mark.cuda
@pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=str(MISSING))
def test_gpu_of_this_machine(gpu: str) -> None:
    expected = torch.cuda.get_device_name()
    index = torch.cuda.current_device()
    plans = [
        fastbn.plan((256, 64, 56, 56), device=device)
        for device in (None, index, gpu, torch.device(gpu), torch.device("cuda", index))
    ]
    plans.append(fastbn.plan(torch.empty(256, 64, 56, 56, device=gpu)))
    assert plans[0].device == expected
    assert all(plan == plans[0] for plan in plans)
    assert plans[0].launches >= 1
    assert fastbn.plan(torch.empty(4, 6, device=gpu), device="t4").device == "t4"
    with pytest.raises(ValueError, match="there is no GPU 99 here; GPUs: "):
        fastbn.plan((4, 6), device=99)


# --- The object and its errors --------------------------------------------------------------------


def test_plan_is_a_value() -> None:
    plan = fastbn.plan((256, 64, 56, 56), device="h200")
    assert isinstance(plan, fastbn.Plan)
    assert len({plan, fastbn.plan((256, 64, 56, 56), device="h200")}) == 1
    with pytest.raises(FrozenInstanceError):
        plan.grid = 1  # type: ignore[misc]


def test_plan_in_a_sentence() -> None:
    question: dict[str, Any] = {"dtype": "bfloat16", "device": "h200"}
    plan = fastbn.plan((256, 64, 56, 56), layout="channels_last", algorithm="two_pass", **question)
    times = dict(plan.considered)
    others = ", ".join(f"{name} {time:.1f}" for name, time in times.items() if name != "two_pass")
    assert str(plan) == (
        "forward of (256, 64, 56, 56) bfloat16 channels_last on h200: two_pass over matrix_columns "
        f"in 2 launches of {plan.grid} blocks of {plan.block} threads, 16 bytes at a time; moves "
        "308.3 MB, 6 bytes an element, where the floor is 4 (67%); predicted to take "
        f"{times['two_pass']:.1f} us, and {others}."
    )
    plan = fastbn.plan((256, 64, 56, 56), algorithm="persistent_cluster", **question)
    assert f"threads in clusters of {plan.cluster}, 16 bytes at a time" in str(plan)
    assert "elementwise over matrix_columns in 1 launch of " in str(
        fastbn.plan((64, 64), op="eval", device="h200")
    )


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ((8,), {}, ValueError, r"\(N, C, ...\) of two dimensions or more, but got \(8,\)"),
        ((), {}, ValueError, r"of two dimensions or more, but got \(\)"),
        (torch.empty(8), {}, ValueError, r"of two dimensions or more, but got \(8,\)"),
        ((4, -6), {}, ValueError, r"sizes cannot be negative, but got shape \(4, -6\)"),
        ((2**40, 2**40), {}, ValueError, "no memory holds a tensor of shape"),
        ((4, 6.0), {}, TypeError, r"a tensor or a shape \(N, C, ...\) of integers, but got \(4, 6"),
        (64, {}, TypeError, "of integers, but got 64"),
        ("64", {}, TypeError, "of integers, but got '64'"),
        ((4, 6), {"dtype": torch.int64}, ValueError, "dtype torch.int64; choose float64, float32,"),
        ((4, 6), {"dtype": "float8"}, ValueError, "dtype float8; choose float64, float32, bfloat"),
        ((4, 6), {"dtype": "nn"}, ValueError, "dtype nn; choose"),
        ((4, 6), {"dtype": 16}, TypeError, "dtype must be a torch.dtype or its name, not int"),
        (torch.empty(4, 6, dtype=torch.int32), {}, ValueError, "dtype torch.int32; choose"),
        ((4, 6, 2, 2), {"layout": "nhwc"}, ValueError, "no layout 'nhwc'; choose contiguous, ch"),
        (
            (4, 6, 9),
            {"layout": "channels_last"},
            ValueError,
            r"format of 4-D and 5-D tensors, .* \(4, 6, 9",
        ),
        ((4, 6), {"op": "update"}, ValueError, "no op 'update'; choose forward, backward, eval"),
        ((4, 6), {"activation": "softmax"}, ValueError, "activation is 'softmax'; it may be one"),
        ((4, 6), {"device": "h400"}, ValueError, "no device 'h400'; choose t4, a100, .* b200, or "),
        ((4, 6), {"device": "cpu"}, ValueError, "no device 'cpu'; choose t4, "),
        ((4, 6), {"device": torch.device("cpu")}, ValueError, "only GPUs have plans, .* 'cpu'"),
        ((4, 6), {"device": 2.5}, TypeError, "a name, a torch.device or an index, not float"),
        (
            (4, 6),
            {"algorithm": "best"},
            ValueError,
            "no algorithm 'best'; choose one of auto, two_pass, ",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, (tuple, dict)) else "",
)
def test_errors(x: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastbn.plan(x, **{"device": "h200", **options})
