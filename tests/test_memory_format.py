"""Results lie in memory as stock's do, and are right whatever strides say about sizes of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import reference
import torch
import torch.nn.functional as F
from tolerances import assert_near

import fastbn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EPS = 1e-5

# Dimensions of size one may have any stride, and both formats may fit: each of these is one that
# PyTorch's two questions, is_contiguous() and suggest_memory_format(), can disagree about. Large
# enough for the paths by runs and by tiles.
INPUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(6, 70, 9, 11),
    "channels last": lambda: torch.randn(6, 9, 11, 70).movedim(-1, 1),
    "channels last, 3-D": lambda: torch.randn(3, 4, 5, 6, 70).movedim(-1, 1),
    "channels last, width one": lambda: torch.randn(8, 50, 64).transpose(1, 2).unsqueeze(-1),
    "channels last, height one": lambda: torch.randn(8, 50, 64).transpose(1, 2).unsqueeze(2),
    "channels last, two sizes of one": lambda: torch.randn(8, 50, 64).transpose(1, 2)[
        ..., None, None
    ],
    "channels last, depth one": lambda: torch.randn(8, 5, 6, 64).movedim(-1, 1).unsqueeze(2),
    "one sample, width one": lambda: torch.randn(64 * 64).as_strided(
        (1, 64, 64, 1), (1, 1, 64, 4096)
    ),
    "one channel": lambda: torch.randn(4, 30, 41, 1).movedim(-1, 1),
    "one position": lambda: torch.randn(40, 1, 1, 70).movedim(-1, 1),
    "sequence, channels last": lambda: torch.randn(6, 50, 64).transpose(1, 2),
    "part of the channels": lambda: torch.randn(6, 9, 11, 80).movedim(-1, 1)[:, 3:73],
    "every other row": lambda: torch.randn(6, 70, 18, 11)[:, :, ::2],
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("gradient", ["like x", "contiguous", "channels last", "expanded"])
@pytest.mark.parametrize("name", INPUTS)
def test_results_are_right_and_lie_as_stock_s(name: str, gradient: str, training: bool) -> None:
    x = INPUTS[name]()
    channels = x.shape[1]
    weight, bias = torch.randn(channels), torch.randn(channels)
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    dy = torch.randn(x.shape)
    if gradient == "like x":
        dy = torch.empty_like(x).copy_(dy)
    elif gradient == "channels last":
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
    elif gradient == "expanded":
        dy = torch.randn(()).expand(x.shape)
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, bias)]
    leaf = x.detach().requires_grad_()

    y = fastbn.batch_norm(leaf, mean.clone(), var.clone(), *leaves, training, 0.1, EPS)
    dx, dweight, dbias = torch.autograd.grad(y, (leaf, *leaves), dy)

    stock = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training, 0.1, EPS)
    assert y.stride() == stock.stride()
    assert dx.stride() == stock.stride()
    statistics = (
        reference.batch_statistics(x, EPS)
        if training
        else reference.given_statistics(x, mean, var, EPS)
    )
    assert_near(y, reference.output(x, weight, bias, statistics), "y")
    expected = reference.gradients(dy, x, weight, statistics, training)
    # The table expects terms of random sign, whose sum grows with the root of their number.
    condition = (x.numel() / channels) ** 0.5 if gradient == "expanded" else 1.0
    for quantity, value in (("dx", dx), ("dweight", dweight), ("dbias", dbias)):
        assert_near(value, expected[quantity], quantity, condition)


@pytest.mark.parametrize("name", INPUTS)
def test_tracing_foresees_the_strides(name: str) -> None:
    x = INPUTS[name]()
    real = fastbn.batch_norm(x, None, None, training=True)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = fastbn.batch_norm(mode.from_tensor(x), None, None, training=True)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
