"""What a case of the table must satisfy: every result of fastbn compared with the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import fastbn

from . import oracle
from .tolerances import assert_near

if TYPE_CHECKING:
    from torch import Tensor

    from .tables import Tensors

MOMENTUM = 0.1
EPS = 1e-5
PARAMETERS = {"x": "dx", "weight": "dweight", "bias": "dbias"}


def forward(tensors: Tensors, training: bool) -> Tensor:
    """Fastbn's y; in training its running statistics are updated."""
    return fastbn.batch_norm(
        tensors.x,
        tensors.running_mean,
        tensors.running_var,
        tensors.weight,
        tensors.bias,
        training,
        MOMENTUM,
        EPS,
    )


def statistics_of(tensors: Tensors, training: bool) -> oracle.Statistics:
    """The exact statistics that the forward uses."""
    if training:
        return oracle.batch_statistics(tensors.x, EPS)
    return oracle.given_statistics(tensors.x, tensors.running_mean, tensors.running_var, EPS)


def check(tensors: Tensors, training: bool, condition: float = 1.0) -> None:
    """Y, the running statistics (which eval leaves alone), and all gradients."""
    tensors = tensors.requiring_grad()
    x, weight, bias = tensors.x, tensors.weight, tensors.bias
    statistics = statistics_of(tensors, training)
    running = {"running_mean": tensors.running_mean, "running_var": tensors.running_var}
    before = {name: statistic.clone() for name, statistic in running.items()}

    y = forward(tensors, training)
    assert y.dtype == x.dtype
    assert_near(y, oracle.output(x, weight, bias, statistics), "y", condition)
    if training:
        mean, var = before.values()
        updated = oracle.running_statistics(statistics, mean, var, MOMENTUM)
        for name, statistic in running.items():
            assert_near(statistic, updated[name], name, condition)
    else:
        for name, statistic in running.items():
            assert torch.equal(statistic, before[name])

    y.backward(tensors.dy)
    expected = oracle.gradients(tensors.dy, x, weight, statistics, training)
    for parameter, quantity in PARAMETERS.items():
        leaf = getattr(tensors, parameter)
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype
            assert_near(leaf.grad, expected[quantity], quantity, condition)
