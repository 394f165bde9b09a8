"""What the steps of batch norm, taken apart, must satisfy: they make one batch of several parts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from . import oracle
from .tolerances import accumulate_dtype, assert_near

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from .tables import Tensors

EPS = 1e-5
# Batches that the counter has seen before.
COUNTED = 3


@dataclass(frozen=True)
class StepOperators:
    """Operators by the signatures of ``fastbn.ops``."""

    stats: Callable[..., Tensor]
    combine_apply: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward_reduce: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward_combine_apply: Callable[..., Tensor]


@dataclass(frozen=True)
class Forward:
    """What comes of forward.

    Attributes:
        ys: y of each part.
        mean: of all parts together; so are the following.
        invstd: see mean.
        count: of values of a channel.
        running_mean: updated.
        running_var: updated.
        batches: the updated counter.
    """

    ys: list[Tensor]
    mean: Tensor
    invstd: Tensor
    count: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: int


def parts_of(batch: int, shares: Sequence[int]) -> list[int]:
    """Sizes of parts, about in proportion to their shares, which add up to the batch."""
    borders = [batch * reached // sum(shares) for reached in accumulate(shares, initial=0)]
    return [end - begin for begin, end in pairwise(borders)]


def exchange(rows: Sequence[Tensor], additive: bool) -> Tensor:
    """What processes do with their rows: add them up, or give all to all."""
    together = torch.stack(list(rows))
    return together.sum(0, keepdim=True) if additive else together


def forward(
    operators: StepOperators,
    tensors: Tensors,
    parts: Sequence[Tensor],
    *,
    additive: bool = False,
    momentum: float | None = 0.1,
) -> Forward:
    """As several processes would do it, each with a part of the batch and state of its own.

    Raises:
        AssertionError: they do not end with the same bits.
    """
    rows = exchange([operators.stats(part, additive) for part in parts], additive)
    outcomes = []
    for part in parts:
        running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
        counter = torch.tensor(COUNTED, device=part.device)
        y, mean, invstd, count = operators.combine_apply(
            part,
            rows,
            additive,
            tensors.weight,
            tensors.bias,
            running_mean,
            running_var,
            counter,
            momentum,
            EPS,
        )
        outcomes.append((y, (mean, invstd, count, running_mean, running_var, counter)))
    shared = outcomes[0][1]
    for _, others in outcomes[1:]:
        for one, other in zip(shared, others, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
    ys = [y for y, _ in outcomes]
    return Forward(ys, *shared[:5], batches=int(shared[5]))


def check(
    operators: StepOperators,
    tensors: Tensors,
    sizes: Sequence[int],
    *,
    additive: bool = False,
    momentum: float | None = 0.1,
) -> None:
    """Forward and backward of a batch in parts, against the oracle's of the whole batch.

    Args:
        operators: to be tried.
        tensors: of the whole batch.
        sizes: of the parts, some of which may be empty.
        additive: whether rows are added up, or all are combined by each process.
        momentum: of the running statistics.
    """
    x, dy, weight = tensors.x, tensors.dy, tensors.weight
    parts = x.split(list(sizes))
    statistics = oracle.batch_statistics(x, EPS)
    found = forward(operators, tensors, parts, additive=additive, momentum=momentum)

    assert found.count.dtype == torch.float64
    assert float(found.count) == x.numel() // x.shape[1]
    assert found.batches == COUNTED + 1
    assert_near(torch.cat(found.ys), oracle.output(x, weight, tensors.bias, statistics), "y")
    for name, exact in oracle.saved_statistics(statistics).items():
        saved = getattr(found, name)
        assert saved.dtype == accumulate_dtype(x.dtype)
        assert_near(saved, exact, name)
    share = 1 / (COUNTED + 1) if momentum is None else momentum
    before = tensors.running_mean, tensors.running_var
    for name, exact in oracle.running_statistics(statistics, *before, share).items():
        assert_near(getattr(found, name), exact, name)

    saved = statistics.mean.to(found.mean), statistics.invstd.to(found.invstd)
    rows = []
    for part, of_part in zip(parts, dy.split(list(sizes)), strict=True):
        row, dweight, dbias = operators.backward_reduce(of_part, part, weight, *saved, True, True)
        rows.append(row)
        own = oracle.gradients(of_part, part, weight, statistics, training=False)
        assert_near(dweight, own["dweight"], "dweight")
        assert_near(dbias, own["dbias"], "dbias")
    together = exchange(rows, additive)
    dxs = [
        operators.backward_combine_apply(of_part, part, weight, *saved, together, found.count)
        for part, of_part in zip(parts, dy.split(list(sizes)), strict=True)
    ]
    expected = oracle.gradients(dy, x, weight, statistics, training=True)
    assert_near(torch.cat(dxs), expected["dx"], "dx")
