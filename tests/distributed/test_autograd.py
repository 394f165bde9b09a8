"""Gradients over ranks: twice, recomputed, and where ranks want different ones."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import fastbn
from tests.support.ranks import Collective, collectives, on_threads
from tests.support.tolerances import AGAINST_STOCK_FLOAT64

CUTS = {"even": (4, 4), "uneven": (1, 7), "empty": (0, 8), "many": (1,) * 8 + (0,)}


def second_order(
    module: _BatchNorm, x: Tensor, dy: Tensor, directions: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of a function of the first gradients for x, dy, weight, and the first themselves.

    It is additive over parts of a batch, as far as gradients of weight and bias are.
    """
    x, dy = x.detach().requires_grad_(), dy.detach().requires_grad_()
    wanted = (x, module.weight, module.bias)
    first = grad(module(x), wanted, dy, create_graph=True)
    value = sum((gradient * v).sum() for gradient, v in zip(first, directions, strict=True))
    assert isinstance(value, Tensor)
    second = grad(value + first[0].square().sum(), (x, dy, module.weight))
    return *(gradient.detach() for gradient in first), *second


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(8, 3), (8, 2, 3, 2)], ids=str)
def test_gradients_of_gradients_are_those_of_the_whole_batch(
    shape: tuple[int, ...], cut: str
) -> None:
    x, dy, v = torch.randn(3, *shape, dtype=torch.float64)
    module = fastbn.SyncBatchNorm(shape[1]).double()
    weight, bias, v_weight, v_bias = torch.randn(4, shape[1], dtype=torch.float64)
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    sizes = CUTS[cut]

    def step(rank: int) -> tuple[Tensor, ...]:
        own = copy.deepcopy(module)
        parts = (t.split(sizes)[rank] for t in (x, dy, v))
        x_part, dy_part, v_part = parts
        return second_order(own, x_part, dy_part, (v_part, v_weight, v_bias))

    stocks = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1]).double()
    stocks.weight, stocks.bias = module.weight, module.bias
    expected = second_order(stocks, x, dy, (v, v_weight, v_bias))
    dx, dweight, dbias, ddx, ddy, ddweight = zip(*on_threads(len(sizes), step), strict=True)
    found = (
        torch.cat(dx),
        sum(dweight),
        sum(dbias),
        torch.cat(ddx),
        torch.cat(ddy),
        sum(ddweight),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **AGAINST_STOCK_FLOAT64)


def model() -> nn.Sequential:
    return fastbn.convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    )


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "plain"])
def test_recomputed_forward_exchanges_again_and_updates_once(use_reentrant: bool) -> None:
    plain, x = model(), torch.randn(5, 3, 7, 7)

    def step(call: str, rank: int) -> tuple[list[Tensor], list[Collective]]:
        own = copy.deepcopy(plain)
        leaf = (x[:2] if rank == 0 else x[2:]).clone().requires_grad_()
        if call == "plain":
            y = own(leaf)
        else:
            y = checkpoint(own, leaf, use_reentrant=use_reentrant, preserve_rng_state=False)
        y.square().sum().backward()
        assert leaf.grad is not None
        gradients = [leaf.grad, *(p.grad for p in own.parameters() if p.grad is not None)]
        return [*gradients, *own.buffers()], collectives()

    expected, found = (on_threads(2, partial(step, call)) for call in ("plain", "checkpoint"))
    for (one, exchanged), (other, twice) in zip(expected, found, strict=True):
        assert len(one) == len(other) == 1 + 6 + 6
        for ours, theirs in zip(one, other, strict=True):
            assert torch.equal(ours, theirs)
        forward, backward = exchanged[:2], exchanged[2:]
        assert [c.numel for c in exchanged] == [9, 9, 8, 8]
        assert twice == [*forward, *forward, *backward]


def test_ranks_may_want_different_gradients() -> None:
    """Stock's hang: there the collective is left out where x wants no gradient."""
    module = fastbn.SyncBatchNorm(3).double()
    x, dy = torch.randn(2, 6, 3, 5, dtype=torch.float64)

    def step(rank: int) -> tuple[Tensor | None, Tensor | None]:
        own = copy.deepcopy(module)
        own.weight.requires_grad_(rank == 0)
        leaf = x.split(3)[rank].clone().requires_grad_(rank == 1)
        own(leaf).backward(dy.split(3)[rank])
        return leaf.grad, own.weight.grad

    (dx0, dweight0), (dx1, dweight1) = on_threads(2, step)
    assert dx0 is None
    assert dweight1 is None
    leaf = x.clone().requires_grad_()
    nn.BatchNorm1d(3).double()(leaf).backward(dy)
    assert leaf.grad is not None
    torch.testing.assert_close(dx1, leaf.grad[3:], **AGAINST_STOCK_FLOAT64)
    x_hat = nn.BatchNorm1d(3, affine=False).double()(x)
    expected = (x_hat * dy)[:3].sum((0, 2))
    torch.testing.assert_close(dweight0, expected, **AGAINST_STOCK_FLOAT64)


def test_two_forwards_before_backward_keep_their_gradients() -> None:
    """Running buffers are never saved, so a later forward does not spoil an earlier one."""
    module, x = fastbn.SyncBatchNorm(3), torch.randn(4, 3, 5)

    def step(rank: int) -> tuple[Tensor, Tensor]:
        own = copy.deepcopy(module)
        one, two = (part.clone().requires_grad_() for part in x.split(2))
        one_y, two_y = own(one * (rank + 1)), own(two)
        (one_y.square().sum() + two_y.square().sum()).backward()
        alone = copy.deepcopy(module)
        again = one.detach().requires_grad_()
        alone(again * (rank + 1)).square().sum().backward()
        assert one.grad is not None
        assert again.grad is not None
        return one.grad, again.grad

    for both, alone in on_threads(2, step):
        assert torch.equal(both, alone)


def test_function_transforms_are_refused_in_words() -> None:
    module = fastbn.SyncBatchNorm(3, track_running_stats=False)

    def call(_: int) -> list[Collective]:
        with pytest.raises(NotImplementedError, match=r"which torch\.func does not transform"):
            torch.func.grad(lambda x: module(x).sum())(torch.randn(4, 3))
        return collectives()

    assert on_threads(2, call) == [[], []]
