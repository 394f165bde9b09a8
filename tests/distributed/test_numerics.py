"""Parts of a batch on several ranks: the same numbers as of the whole batch in one process."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import nn

import fastbn
from tests.support import oracle
from tests.support.pairs import pairs
from tests.support.ranks import Collective, collectives, on_threads
from tests.support.step_checks import COUNTED, EPS, parts_of
from tests.support.tables import DTYPES, LAYOUTS, Case, Tensors, make
from tests.support.tolerances import assert_near

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.nn.modules.batchnorm import _BatchNorm

SHAPES = {
    "matrix": (300, 35),
    "line": (18, 5, 17),
    "image": (18, 6, 7, 11),
    "volume": (18, 3, 3, 5, 7),
}
STOCKS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

# Shares of the batch.
CUTS = {
    "even": (1, 1),
    "uneven": (1, 7, 2),
    "some empty": (0, 4, 0, 6),
    # So many that rows are added up instead of gathered.
    "many": (1, 1, 1, 0, 2, 1, 1, 1, 1),
}


class Outcome(NamedTuple):
    """What a rank has after a training step."""

    y: Tensor
    dx: Tensor | None
    dweight: Tensor
    dbias: Tensor
    running_mean: Tensor
    running_var: Tensor
    counter: Tensor
    collectives: list[Collective]


def module_for(tensors: Tensors, kind: str, momentum: float | None = 0.1) -> _BatchNorm:
    """A synchronized batch norm with the vectors of a case."""
    x = tensors.x
    if kind == "SyncBatchNorm":
        module: _BatchNorm = fastbn.SyncBatchNorm(x.shape[1], EPS, momentum)
    else:
        stocks = STOCKS[x.dim()](x.shape[1], EPS, momentum)
        module = fastbn.convert_sync_batchnorm(stocks)
    module.weight, module.bias = nn.Parameter(tensors.weight), nn.Parameter(tensors.bias)
    module.running_mean = tensors.running_mean.clone()
    module.running_var = tensors.running_var.clone()
    module.num_batches_tracked = torch.tensor(COUNTED)
    return module


def train(module: _BatchNorm, tensors: Tensors, sizes: Sequence[int]) -> list[Outcome]:
    """A step of each rank, with a module of its own."""
    x, dy = tensors.x.split(list(sizes)), tensors.dy.split(list(sizes))

    def step(rank: int) -> Outcome:
        own = copy.deepcopy(module)
        leaf = x[rank].detach().requires_grad_()
        y = own(leaf)
        y.backward(dy[rank])
        assert own.weight.grad is not None
        assert own.bias.grad is not None
        return Outcome(
            y.detach(),
            leaf.grad,
            own.weight.grad,
            own.bias.grad,
            own.get_buffer("running_mean"),
            own.get_buffer("running_var"),
            own.get_buffer("num_batches_tracked"),
            collectives(),
        )

    return on_threads(len(sizes), step)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "cut", "kind", "momentum"),
    pairs(
        SHAPES,
        ("contiguous", "channels_last", "batch_minor", "stepped"),
        DTYPES,
        CUTS,
        ("SyncBatchNorm", "converted"),
        (0.1, None),
        where=lambda shape, layout, *_: shape != "matrix" or layout in ("contiguous", "stepped"),
    ),
    ids=str,
)
def test_ranks_train_as_one_process(
    shape: str, layout: str, dtype: torch.dtype, cut: str, kind: str, momentum: float | None
) -> None:
    tensors = make(Case(shape, SHAPES[shape], layout, dtype))
    sizes = parts_of(SHAPES[shape][0], CUTS[cut])
    ranks = train(module_for(tensors, kind, momentum), tensors, sizes)

    x, dy, weight = tensors.x, tensors.dy, tensors.weight
    statistics = oracle.batch_statistics(x, EPS)
    y = torch.cat([rank.y for rank in ranks])
    assert_near(y, oracle.output(x, weight, tensors.bias, statistics), "y")
    whole = oracle.gradients(dy, x, weight, statistics, training=True)
    assert_near(torch.cat([rank.dx for rank in ranks if rank.dx is not None]), whole["dx"], "dx")
    share = 1 / (COUNTED + 1) if momentum is None else momentum
    before = tensors.running_mean, tensors.running_var
    for name, exact in oracle.running_statistics(statistics, *before, share).items():
        assert_near(getattr(ranks[0], name), exact, name)
    for rank, part, of_part in zip(ranks, x.split(sizes), dy.split(sizes), strict=True):
        # Of its own part alone.
        own = oracle.gradients(of_part, part, weight, statistics, training=False)
        assert_near(rank.dweight, own["dweight"], "dweight")
        assert_near(rank.dbias, own["dbias"], "dbias")
        # Bitwise.
        assert torch.equal(rank.running_mean, ranks[0].running_mean)
        assert torch.equal(rank.running_var, ranks[0].running_var)
        assert rank.counter == COUNTED + 1


@pytest.mark.parametrize(
    ("world", "dtype", "name"),
    [
        (2, torch.float32, "allgather"),
        (8, torch.float32, "allgather"),
        (9, torch.float32, "allreduce"),
        (9, torch.bfloat16, "allreduce"),
        # Sums of squares would have too few digits.
        (9, torch.float64, "allgather"),
    ],
    ids=str,
)
def test_a_step_is_two_collectives(world: int, dtype: torch.dtype, name: str) -> None:
    """And rows are float64 whatever the dtype, so ranks cannot disagree."""
    tensors = make(Case("counted", (world, 6, 5, 5), "contiguous", dtype))
    for rank in train(module_for(tensors, "converted"), tensors, [1] * world):
        forward, backward = rank.collectives
        assert forward == Collective(name, 1 + 2 * 6, torch.float64)
        assert backward == Collective(name, 2 * 6, torch.float64)


def test_ranks_may_have_different_dtypes() -> None:
    whole = torch.randn(6, 3, 5, 5).bfloat16()
    module = fastbn.SyncBatchNorm(3)

    def step(rank: int) -> Tensor:
        part = whole[:2] if rank == 0 else whole[2:].float()
        own = copy.deepcopy(module)
        own(part)
        return own.get_buffer("running_var")

    expected = nn.BatchNorm2d(3)
    expected(whole.float())
    for running_var in on_threads(2, step):
        torch.testing.assert_close(running_var, expected.get_buffer("running_var"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_layout_of_stock_s(layout: str) -> None:
    tensors = make(Case("strides", (6, 4, 3, 5), layout, torch.float32))
    stocks = nn.BatchNorm2d(4)(tensors.x[:3]).stride()
    for rank in train(module_for(tensors, "converted"), tensors, [3, 3]):
        assert rank.y.stride() == stocks


# --- Few values -----------------------------------------------------------------------------------


def test_all_may_be_empty() -> None:
    tensors = make(Case("empty", (2, 5, 3), "contiguous", torch.float32))
    empty = Tensors(tensors.x[:0], tensors.dy[:0], *list(vars(tensors).values())[2:])
    for rank in train(module_for(empty, "converted"), empty, [0, 0]):
        assert rank.y.shape == (0, 5, 3)
        assert rank.dweight.tolist() == rank.dbias.tolist() == [0] * 5
        assert torch.equal(rank.running_mean, tensors.running_mean)
        assert torch.equal(rank.running_var, tensors.running_var)
        assert rank.counter == COUNTED + 1


@pytest.mark.parametrize("sizes", [(1, 0), (0, 1)], ids=str)
def test_one_value_of_all_ranks_is_its_own_mean(sizes: tuple[int, int]) -> None:
    """Stock refuses it; nobody can refuse it here without waiting for the device."""
    tensors = make(Case("one", (1, 5), "contiguous", torch.float32))
    for rank in train(module_for(tensors, "SyncBatchNorm"), tensors, sizes):
        assert torch.equal(rank.y, tensors.bias.expand(len(rank.y), 5))
        assert torch.equal(rank.running_var, tensors.running_var)
        assert torch.isfinite(rank.dweight).all()


def test_one_value_of_each_rank_is_enough() -> None:
    tensors = make(Case("each", (2, 5), "contiguous", torch.float64))
    ranks = train(module_for(tensors, "SyncBatchNorm"), tensors, [1, 1])
    statistics = oracle.batch_statistics(tensors.x, EPS)
    expected = oracle.output(tensors.x, tensors.weight, tensors.bias, statistics)
    assert_near(torch.cat([rank.y for rank in ranks]), expected, "y")


# --- Without communication ------------------------------------------------------------------------


@pytest.mark.parametrize("tracked", [True, False])
def test_evaluation_does_not_communicate(tracked: bool) -> None:
    """Not even where there are no running statistics, and those of the batch are used."""
    module = fastbn.SyncBatchNorm2d(3, track_running_stats=tracked).eval()
    alone = fastbn.BatchNorm2d(3, track_running_stats=tracked).eval()
    x = torch.randn(4, 3, 5, 5)

    def call(rank: int) -> tuple[Tensor, list[Collective]]:
        return module(x[2 * rank :]).detach(), collectives()

    for rank, (y, exchanged) in enumerate(on_threads(2, call)):
        assert not exchanged
        assert torch.equal(y, alone(x[2 * rank :]))


def test_a_group_of_one_is_plain_batch_norm() -> None:
    x = torch.randn(6, 3, 5, 5)

    def call(rank: int) -> tuple[Tensor, list[Collective], str]:
        module = fastbn.SyncBatchNorm2d(3, process_group=fastbn.sync_group(1))
        already = len(collectives())
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(x[:1, :, :1, :1])
        return module(x[3 * rank :][:3]).detach(), collectives()[already:], ""

    for rank, (y, exchanged, _) in enumerate(on_threads(2, call)):
        assert not exchanged
        assert torch.equal(y, fastbn.BatchNorm2d(3)(x[3 * rank :][:3]))


def test_without_torch_distributed_it_is_plain_batch_norm() -> None:
    x = torch.randn(4, 3, 5, 5)
    for module in (fastbn.SyncBatchNorm(3), fastbn.SyncBatchNorm2d(3)):
        assert torch.equal(module(x), fastbn.BatchNorm2d(3)(x))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(x[:1, :, :1, :1])
