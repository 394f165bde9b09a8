"""Activation checkpointing counts a batch once, where stock counts it twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastbn

both_ways = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "plain"])


def block(momentum: float | None) -> nn.Sequential:
    return fastbn.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU())
    )


def assert_same_gradients(one: Tensor, other: Tensor) -> None:
    assert one.grad is not None
    assert other.grad is not None
    assert torch.equal(one.grad, other.grad)


@both_ways
@pytest.mark.parametrize("momentum", [0.3, None])
def test_step_is_that_of_a_model_without_checkpoints(
    use_reentrant: bool, momentum: float | None, device: str
) -> None:
    plain = block(momentum).to(device)
    checkpointed = copy.deepcopy(plain)
    for _ in range(2):
        x = torch.randn(4, 3, 7, 7, device=device)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        plain(leaves[0]).square().sum().backward()
        y = checkpoint(checkpointed, leaves[1], use_reentrant=use_reentrant)
        y.square().sum().backward()
        assert_same_gradients(leaves[0], leaves[1])
    assert checkpointed[1].get_buffer("num_batches_tracked").item() == 2
    for one, other in zip(
        plain.state_dict().values(), checkpointed.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert_same_gradients(one, other)


@both_ways
def test_stock_behavior_is_there_for_the_asking(use_reentrant: bool, device: str) -> None:
    ours, stock = fastbn.BatchNorm2d(3, device=device), nn.BatchNorm2d(3, device=device)
    ours.update_on_recompute = True
    x = torch.randn(4, 3, 7, 7, device=device)
    for module in (ours, stock):
        leaf = x.clone().requires_grad_()
        checkpoint(module, leaf, use_reentrant=use_reentrant).square().sum().backward()
    assert [m.get_buffer("num_batches_tracked").item() for m in (ours, stock)] == [2, 2]
    torch.testing.assert_close(ours.running_mean, stock.running_mean)
    torch.testing.assert_close(ours.running_var, stock.running_var)
