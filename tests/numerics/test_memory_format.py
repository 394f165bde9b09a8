"""Results lie in memory as stock's do, and are right whatever strides say about sizes of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

import fastbn
from tests.support import oracle
from tests.support.tolerances import assert_near

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EPS = 1e-5

# Dimensions of size one may have any stride, and both formats may fit: each of these is one that
# PyTorch's two questions, is_contiguous() and suggest_memory_format(), can disagree about. Large
# enough for the paths of contiguous and of channels-last activations.
INPUTS: dict[str, Callable[[str], Tensor]] = {
    "contiguous": lambda device: torch.randn(6, 70, 9, 11, device=device),
    "channels last": lambda device: torch.randn(6, 9, 11, 70, device=device).movedim(-1, 1),
    "channels last, 3-D": lambda device: torch.randn(3, 4, 5, 6, 70, device=device).movedim(-1, 1),
    "channels last, width one": lambda device: (
        torch.randn(8, 50, 64, device=device).transpose(1, 2).unsqueeze(-1)
    ),
    "channels last, height one": lambda device: (
        torch.randn(8, 50, 64, device=device).transpose(1, 2).unsqueeze(2)
    ),
    "channels last, two sizes of one": lambda device: torch.randn(
        8, 50, 64, device=device
    ).transpose(1, 2)[..., None, None],
    "channels last, depth one": lambda device: (
        torch.randn(8, 5, 6, 64, device=device).movedim(-1, 1).unsqueeze(2)
    ),
    "one sample, width one": lambda device: torch.randn(64 * 64, device=device).as_strided(
        (1, 64, 64, 1), (1, 1, 64, 4096)
    ),
    "one channel": lambda device: torch.randn(4, 30, 41, 1, device=device).movedim(-1, 1),
    "one position": lambda device: torch.randn(40, 1, 1, 70, device=device).movedim(-1, 1),
    "sequence, channels last": lambda device: torch.randn(6, 50, 64, device=device).transpose(1, 2),
    "part of the channels": lambda device: torch.randn(6, 9, 11, 80, device=device).movedim(-1, 1)[
        :, 3:73
    ],
    "every other row": lambda device: torch.randn(6, 70, 18, 11, device=device)[:, :, ::2],
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("gradient", ["like x", "contiguous", "channels last", "expanded"])
@pytest.mark.parametrize("name", INPUTS)
def test_results_are_right_and_lie_as_stock_s(
    name: str, gradient: str, training: bool, device: str
) -> None:
    x = INPUTS[name](device)
    channels = x.shape[1]
    weight, bias, mean, var = torch.randn(4, channels, device=device)
    var = var.abs() + 0.5
    dy = torch.randn(x.shape, device=device)
    if gradient == "like x":
        dy = torch.empty_like(x).copy_(dy)
    elif gradient == "channels last":
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
    elif gradient == "expanded":
        dy = torch.randn((), device=device).expand(x.shape)
    leaf = x.detach().requires_grad_()
    leaves = (leaf, weight.clone().requires_grad_(), bias.clone().requires_grad_())

    y = fastbn.batch_norm(leaf, mean.clone(), var.clone(), *leaves[1:], training, 0.1, EPS)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)

    # On the CPU: its one rule holds on all devices.
    running = torch.ones(channels), torch.ones(channels)
    stock = F.batch_norm(INPUTS[name]("cpu"), *running, training=training)
    assert y.stride() == stock.stride()
    assert dx.stride() == stock.stride()
    statistics = (
        oracle.batch_statistics(x, EPS) if training else oracle.given_statistics(x, mean, var, EPS)
    )
    assert_near(y, oracle.output(x, weight, bias, statistics), "y")
    expected = oracle.gradients(dy, x, weight, statistics, training)
    # The table expects terms of random sign, whose sum grows with the root of their number.
    condition = (x.numel() / channels) ** 0.5 if gradient == "expanded" else 1.0
    for quantity, value in (("dx", dx), ("dweight", dweight), ("dbias", dbias)):
        assert_near(value, expected[quantity], quantity, condition)


@pytest.mark.parametrize("name", INPUTS)
def test_tracing_foresees_the_strides(name: str, device: str) -> None:
    x = INPUTS[name](device)
    real = fastbn.batch_norm(x, None, None, training=True)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = fastbn.batch_norm(mode.from_tensor(x), None, None, training=True)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
