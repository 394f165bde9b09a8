"""The planner's choice of an algorithm: what fits, is fast by prediction, and moves few bytes."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fastbn
from fastbn import _C
from fastbn.planning import DEVICES
from fastbn.planning.networks import RESNET50
from tests.planner import golden

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: tuple[Any, ...] = ("contiguous", "channels_last")
OPS: tuple[Any, ...] = ("forward", "backward", "eval")
TRAINING: tuple[Any, ...] = ("forward", "backward")
NAMES = tuple(DEVICES)
PERSISTENT: tuple[Any, ...] = ("persistent_block", "persistent_cluster", "persistent_grid")

VECTOR_BYTES = 16
KIB, MIB = 2**10, 2**20
# What a kernel may have without asking for more.
DEFAULT_SHARED_BYTES = 48 * KIB
# That the system takes of a multiprocessor's for each block.
RESERVED_SHARED_BYTES = KIB
MOST_THREADS = 512
MOST_BLOCKS = 2**31 - 1
ONE_BLOCK_BYTES = 2 * MIB
# Of a call whose stream has none.
COUNTERS_BYTES = 16640


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBN_CUDA_ALGORITHM", raising=False)


def tensor_bytes(plan: fastbn.Plan) -> int:
    return math.prod(plan.shape) * plan.dtype.itemsize


def network_plans(device: Any, batch: int, **options: Any) -> Iterator[fastbn.Plan]:
    """Every operation on every layer of ResNet-50, in every layout and dtype."""
    for layer, layout, dtype, op in product(RESNET50, LAYOUTS, DTYPES, OPS):
        shape = (batch, layer.channels, layer.height, layer.width)
        yield fastbn.plan(shape, dtype=dtype, layout=layout, op=op, device=device, **options)


def forced(plan: fastbn.Plan, algorithm: Any) -> fastbn.Plan:
    """The plan of an algorithm for the same question."""
    question: dict[str, Any] = {
        "dtype": plan.dtype,
        "layout": plan.layout,
        "op": plan.op,
        "device": plan.device,
    }
    return fastbn.plan(plan.shape, **{**question, "algorithm": algorithm})


def odd_plans(device: Any) -> Iterator[fastbn.Plan]:
    """The same on shapes that no network has: remainders, single values, and too many elements."""
    shapes = [
        (1, 1),
        (1, 5000, 3),
        (2, 3),
        (3, 1037),
        (4097, 7),
        (100_000, 3),
        (5, 65, 7, 7),
        (7, 1, 37, 41),
        (9, 511, 1, 1),
        (2, 100_000, 2, 2),
        (100_000, 8, 1, 3),
        (64, 64, 1024, 1024),  # 2^32 elements
        (2**31 + 1, 3),
        (1, 3, 2**31 + 3),
    ]
    for shape, layout, dtype, op in product(shapes, (*LAYOUTS, "generic"), DTYPES, OPS):
        if layout == "channels_last" and len(shape) == 3:
            continue  # not a memory format
        yield fastbn.plan(shape, dtype=dtype, layout=layout, op=op, device=device)


def forced_plans(device: Any) -> Iterator[fastbn.Plan]:
    """Plans of every algorithm that fits, chosen or not."""
    for layer, layout, dtype, op in product(RESNET50, LAYOUTS, DTYPES, TRAINING):
        shape = (64, layer.channels, layer.height, layer.width)
        question: dict[str, Any] = {"dtype": dtype, "layout": layout, "op": op, "device": device}
        for name, _ in fastbn.plan(shape, **question).considered:
            yield fastbn.plan(shape, **{**question, "algorithm": name})


# --- Plans fit ------------------------------------------------------------------------------------


def assert_workspace_is_small(plan: fastbn.Plan) -> None:
    """So that PyTorch's allocator has room for it where it keeps small tensors: up to 1 MiB."""
    if plan.shape[1] > 4096:
        return
    largest = 2 * MIB if plan.layout == "channels_last" else MIB
    assert plan.workspace_bytes + COUNTERS_BYTES <= largest


def assert_fits(plan: fastbn.Plan, device: _C.Device) -> None:
    assert 1 <= plan.grid <= MOST_BLOCKS
    assert 1 <= plan.block <= MOST_THREADS
    assert plan.block % 32 == 0
    assert 0 < plan.shared_bytes <= device.shared_per_block
    assert plan.channel_tiles >= 1
    assert plan.splits >= 1
    assert plan.vector_bytes in (plan.dtype.itemsize, VECTOR_BYTES)
    assert plan.mapping in ("matrix_columns", "contiguous", "generic")
    # Vectors are numbered in 32 bits.
    elements = math.prod(plan.shape)
    if plan.mapping == "generic":
        assert plan.layout == "generic" or elements >= 2**32
    else:
        assert plan.layout != "generic"
        assert elements * plan.dtype.itemsize < 2**32 * plan.vector_bytes
    assert (plan.workspace_bytes > 0) == (plan.algorithm in ("two_pass", "persistent_grid"))
    assert_workspace_is_small(plan)
    if plan.algorithm in PERSISTENT:
        assert_persistent_fits(plan, device)
    else:
        assert plan.launches in ((1, 2) if plan.algorithm == "two_pass" else (1,))
        assert plan.shared_bytes <= DEFAULT_SHARED_BYTES
        assert plan.grid == plan.channel_tiles * plan.splits
        assert plan.cluster == 1
        assert plan.cta_groups == plan.blocks_per_multiprocessor == 0


def assert_persistent_fits(plan: fastbn.Plan, device: _C.Device) -> None:
    assert plan.launches == 1
    assert plan.vector_bytes == VECTOR_BYTES
    assert plan.grid == plan.cta_groups * plan.splits
    assert plan.cta_groups <= plan.channel_tiles
    together = plan.blocks_per_multiprocessor
    assert together in (1, 2)
    taken = together * (plan.shared_bytes + RESERVED_SHARED_BYTES)
    assert taken <= device.shared_per_multiprocessor
    assert together * plan.block <= min(MOST_THREADS, device.threads_per_multiprocessor)
    assert plan.grid <= together * device.multiprocessors
    if plan.algorithm == "persistent_block":
        assert plan.splits == plan.cluster == 1
    elif plan.algorithm == "persistent_cluster":
        assert plan.cluster == plan.splits
        assert plan.cluster in (2, 4, 8, 16)
        # As many as the driver lets run at once.
        size = plan.cluster.bit_length() - 1
        assert plan.cta_groups <= (device.clusters if together == 1 else device.half_clusters)[size]
    else:
        assert plan.cluster == 1
        assert plan.splits > 1
        assert device.cooperative


@pytest.mark.parametrize("device", NAMES)
def test_clusters_fit_the_device(device: Any) -> None:
    """Each of their blocks has a multiprocessor, or half of one."""
    properties = DEVICES[device]
    for size, (whole, half) in enumerate(
        zip(properties.clusters, properties.half_clusters, strict=True)
    ):
        assert whole << size <= properties.multiprocessors
        assert half << size <= 2 * properties.multiprocessors
        assert (whole > 0) == (half > 0)


@pytest.mark.parametrize("plans", [network_plans, odd_plans, forced_plans])
@pytest.mark.parametrize("device", NAMES)
def test_plan_fits_the_device(device: Any, plans: Any) -> None:
    batches = [(1,), (32,), (256,)] if plans is network_plans else [()]
    for plan in (plan for batch in batches for plan in plans(device, *batch)):
        assert plan.device == device
        try:
            assert_fits(plan, DEVICES[device])
        except AssertionError as error:
            raise AssertionError(f"{plan}: {plan!r}") from error


@pytest.mark.parametrize("device", NAMES)
def test_large_layers_keep_the_device_busy(device: Any) -> None:
    """Blocks for most multiprocessors, and among them none whose share is far above the mean."""
    multiprocessors = DEVICES[device].multiprocessors
    for plan in network_plans(device, 256):
        if tensor_bytes(plan) < 32 * MIB:
            continue
        if plan.algorithm in PERSISTENT:
            # Copies are under way all the time: fewer multiprocessors draw as much.
            assert plan.grid / plan.blocks_per_multiprocessor >= 0.5 * multiprocessors, plan
            continue
        assert plan.grid >= 0.75 * multiprocessors, plan
        # Matrix columns leave room for one block, contiguous channels for two.
        room = multiprocessors * (1 if plan.mapping == "matrix_columns" else 2)
        waves = math.ceil(plan.grid / room)
        assert plan.grid / (waves * room) >= 0.75, plan


# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", NAMES)
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_never_more_bytes_than_two_passes(device: Any, batch: int) -> None:
    for plan in network_plans(device, batch):
        two_pass = forced(plan, "two_pass")
        assert plan.floor_bytes == two_pass.floor_bytes
        assert plan.floor_bytes <= plan.bytes_moved <= two_pass.bytes_moved, plan
        assert plan.bytes_written == two_pass.bytes_written
        assert plan.launches <= two_pass.launches


@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(("layout", "most"), [("contiguous", 30.5), ("channels_last", 35.5)])
def test_traffic_of_a_training_step(device: str, layout: Any, most: float) -> None:
    """ResNet-50 at batch 256 in bfloat16: two passes move 45.5 GB, and the floor is 28.45."""
    plans = [golden.summary(device, layout, op, 256) for op in TRAINING]
    assert 28.45 < sum(plan["gigabytes"] for plan in plans) <= most


@pytest.mark.parametrize("question", golden.recorded())
def test_decisions_are_the_recorded_ones(question: str) -> None:
    """Golden: no more is known of them than that they were so; see golden.py."""
    device, layout, op, batch = question.split()
    found = golden.summary(device, layout, op, int(batch))
    assert found == golden.recorded()[question], "if meant: python -m tests.planner.golden"


# --- The choice -----------------------------------------------------------------------------------


# Times that differ by less are equal, and what a grid must gain; see csrc/cuda/planner/plan.cpp.
EQUAL = 1.15
GRID_GAIN = 1.25


def grid_is_worth(considered: dict[str, float]) -> bool:
    """A quarter faster than other persistent plans, and not slower than those that read twice."""
    grid = considered["persistent_grid"]
    return all(
        (GRID_GAIN * grid if name in PERSISTENT else grid / EQUAL) <= microseconds
        for name, microseconds in considered.items()
        if name != "persistent_grid"
    )


@pytest.mark.parametrize("device", NAMES)
@pytest.mark.parametrize("batch", [2, 32, 256])
def test_a_fast_plan_is_chosen(device: Any, batch: int) -> None:
    for plan in network_plans(device, batch):
        considered = dict(plan.considered)
        assert plan.microseconds == considered[plan.algorithm]
        if plan.op == "eval":
            assert set(considered) == {"elementwise"}
            continue
        assert "two_pass" in considered
        assert forced(plan, plan.algorithm) == plan
        is_grid = plan.algorithm == "persistent_grid"
        if "persistent_grid" in considered:
            assert is_grid == grid_is_worth(considered), plan
            del considered["persistent_grid"]
        if not is_grid:
            assert plan.microseconds <= EQUAL * min(considered.values()), plan


@pytest.mark.parametrize("device", NAMES)
@pytest.mark.parametrize("batch", [2, 32, 256])
def test_of_equal_times_the_fewest_bytes_decide_and_then_clusters(device: Any, batch: int) -> None:
    for plan in network_plans(device, batch):
        if plan.op == "eval" or plan.algorithm == "persistent_grid":
            continue
        times = {name: time for name, time in plan.considered if name != "persistent_grid"}
        for name, microseconds in times.items():
            if microseconds > EQUAL * min(times.values()):
                continue
            other = forced(plan, name)
            assert plan.bytes_moved <= other.bytes_moved, plan
            if name == "persistent_cluster" and plan.algorithm != name:
                assert (plan.bytes_moved, plan.blocks_per_multiprocessor) != (
                    other.bytes_moved,
                    other.blocks_per_multiprocessor,
                ), plan


@pytest.mark.parametrize("layer", ["256x28x28", "1024x14x14", "512x14x14"])
def test_of_equal_times_two_blocks_to_a_multiprocessor_are_taken(layer: str) -> None:
    """One of them works while the other waits for its cluster."""
    shape = (256, *map(int, layer.split("x")))
    plan = fastbn.plan(shape, dtype="bfloat16", device="h100")
    assert (plan.algorithm, plan.blocks_per_multiprocessor) == ("persistent_cluster", 2)


@pytest.mark.parametrize("device", ["t4", "a100", "rtx4090"])
def test_no_clusters_before_hopper(device: Any) -> None:
    chosen = Counter(
        plan.algorithm
        for batch in (32, 256)
        for plan in network_plans(device, batch)
        if plan.op != "eval" and tensor_bytes(plan) > ONE_BLOCK_BYTES
    )
    assert set(chosen) == {"two_pass", "persistent_block"}


def test_every_algorithm_has_its_place() -> None:
    chosen = {plan.algorithm for batch in (8, 256) for plan in network_plans("h200", batch)}
    assert chosen >= {"two_pass", *PERSISTENT}
    # Odd sizes have no persistent plan.
    assert fastbn.plan((9, 7, 5, 5), device="h200").algorithm == "one_block"


@pytest.mark.parametrize("op", TRAINING)
def test_prediction_follows_the_bytes(op: Any) -> None:
    """Large tensors take longer than the fewest bytes, but not 2.2 times as long as theirs."""
    for name in NAMES:
        bandwidth = DEVICES[name].bandwidth
        for plan in network_plans(name, 256):
            if plan.op != op or tensor_bytes(plan) < 64 * MIB:
                continue
            at_best = plan.floor_bytes / bandwidth * 1e6
            moved = plan.bytes_moved / bandwidth * 1e6
            assert at_best < plan.microseconds < 2.2 * moved, plan


@pytest.mark.parametrize("device", NAMES)
@pytest.mark.parametrize("op", TRAINING)
def test_small_tensors_take_one_launch(device: Any, op: Any) -> None:
    chosen: Counter[str] = Counter()
    batches, channels, spatial = (1, 8, 64, 512), (3, 64, 1000), (1, 49, 784)
    for n, c, s, layout, dtype in product(batches, channels, spatial, LAYOUTS, DTYPES):
        plan = fastbn.plan((n, c, s, 1), dtype=dtype, layout=layout, op=op, device=device)
        chosen[plan.algorithm] += 1
        if plan.algorithm == "one_block":
            assert tensor_bytes(plan) <= ONE_BLOCK_BYTES, plan
            assert plan.splits == 1, plan
        if tensor_bytes(plan) <= 64 * KIB:
            assert plan.launches == 1, plan
    assert chosen["one_block"] > 0
    assert any(chosen[name] for name in PERSISTENT)


# --- Forcing one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", TRAINING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["two_pass", "one_block", *PERSISTENT])
def test_forced_algorithm(op: Any, layout: Any, algorithm: Any) -> None:
    question: dict[str, Any] = {"layout": layout, "op": op, "device": "h200", "dtype": "bfloat16"}
    shape = (32, 64, 7, 7)
    plan = fastbn.plan(shape, **{**question, "algorithm": algorithm})
    assert plan.algorithm == algorithm
    free = fastbn.plan(shape, **question)
    assert plan.microseconds >= free.microseconds / GRID_GAIN
    assert free == fastbn.plan(shape, algorithm="auto", **question)
    assert free.considered == plan.considered


def test_forced_algorithm_leaves_operations_without_a_choice_alone() -> None:
    for algorithm in ("auto", "two_pass", "one_block", *PERSISTENT):
        plan = fastbn.plan((4, 64), op="eval", device="h200", algorithm=algorithm)
        assert plan.algorithm == "elementwise"
        plan = fastbn.plan(
            (4, 64), op="backward", want_dx=False, device="h200", algorithm=algorithm
        )
        assert plan.algorithm == "two_pass"


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        (
            (256, 64, 56, 56),
            {"algorithm": "one_block"},
            "tensors of up to 2097152 bytes, .* 205520896",
        ),
        (
            (9, 7, 5, 5),
            {"algorithm": "persistent_block"},
            "only aligned activations of whole 16-byte vec",
        ),
        (
            (9, 7, 5, 5),
            {"algorithm": "persistent_grid"},
            "only aligned activations of whole 16-byte vectors",
        ),
        (
            (256, 64, 112, 112),
            {"algorithm": "persistent_block"},
            "too little of a channel's elements finds",
        ),
        (
            (64, 64, 56, 56),
            {"algorithm": "persistent_cluster", "device": "a100"},
            "a100 has no clusters",
        ),
        (
            (64, 64, 56, 56),
            {"algorithm": "persistent_grid", "device": "t4"},
            "9.0 or later, and t4 is of 7.5",
        ),
        *(
            ((4, 64), {"algorithm": name, "momentum": None}, "momentum=None takes two launches")
            for name in ("one_block", *PERSISTENT)
        ),
    ],
    ids=str,
)
def test_forced_algorithm_that_does_not_fit(
    shape: tuple[int, ...], options: dict[str, Any], reason: str
) -> None:
    words = (
        f"algorithm '{options['algorithm']}' does not fit: .*{reason}.*; choose auto or two_pass"
    )
    with pytest.raises(ValueError, match=words):
        fastbn.plan(shape, **{"device": "h200", **options})


def test_momentum_none_takes_two_launches() -> None:
    for shape in ((4, 64), (256, 64, 56, 56)):
        assert fastbn.plan(shape, device="h200", momentum=None).algorithm == "two_pass"


def test_environment_forces_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless an argument does."""
    shape, natural = (32, 64, 7, 7), fastbn.plan((32, 64, 7, 7), device="h200").algorithm
    for algorithm in ("two_pass", "one_block", *PERSISTENT):
        monkeypatch.setenv("FASTBN_CUDA_ALGORITHM", algorithm)
        assert fastbn.plan(shape, device="h200").algorithm == algorithm
        assert fastbn.plan(shape, device="h200", algorithm="auto").algorithm == natural
    monkeypatch.setenv("FASTBN_CUDA_ALGORITHM", "one_block")
    with pytest.raises(ValueError, match=r"^FASTBN_CUDA_ALGORITHM: algorithm 'one_block' does"):
        fastbn.plan((4, 64), device="h200", momentum=None)
    monkeypatch.setenv("FASTBN_CUDA_ALGORITHM", "fastest")
    with pytest.raises(ValueError, match=r"^FASTBN_CUDA_ALGORITHM: there is no .* 'fastest'"):
        fastbn.plan((4, 64), device="h200")


OLD_NAMES = {
    "split": "two_pass",
    "tiny": "one_block",
    "resident": "persistent_block",
    "cluster": "persistent_cluster",
    "grid": "persistent_grid",
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_names_in_the_environment_still_work(old: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning that says the new one; arguments take the new ones alone."""
    monkeypatch.setenv("FASTBN_CUDA_ALGORITHM", old)
    with pytest.warns(UserWarning, match=f"={old} is called {OLD_NAMES[old]} now"):
        plan = fastbn.plan((32, 64, 7, 7), device="h200")
    assert plan.algorithm == OLD_NAMES[old]
    with pytest.raises(ValueError, match="there is no algorithm"):
        fastbn.plan((32, 64, 7, 7), device="h200", algorithm=old)
