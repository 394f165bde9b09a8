"""Checks results against the tests' oracle: what is wrong is not timed.

The oracle and the table of tolerances are those of the tests, which are written for fastbn. Other
implementations may be worse than that, in the two ways that are counted below, and still be right.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from tests.support import oracle
from tests.support.oracle import Expected
from tests.support.tolerances import arithmetic_error, rounding_error

from .cases import memory_format
from .providers import norm_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .cases import BenchmarkCase, Inputs

# How much more than fastbn an implementation may lose in arithmetic, over the square root of the
# number of values of a channel: the error of a sum that takes them one after another grows like
# that, and fastbn's does not grow.
_SLACK = 2.0
# How often a result, or a term of dweight and dbias, may be rounded to the dtype of the case: batch
# norm and the sum with a residual round once each, and some implementations keep what lies between
# in 16 bits, too.
_ROUNDINGS = 4.0
# A batch norm with stock's eps and momentum, which all providers have.
_STOCK = nn.BatchNorm1d(1)

_PER_CHANNEL = ("dweight", "dbias", "running_mean", "running_var")
# Results that the table of tolerances knows by another name.
_QUANTITIES = {"eval": "y", "dresidual": "y"}


class WrongResultError(ArithmeticError):
    """A provider's result is too far from the oracle's to be worth timing."""


class Truth:
    """The right results of a case.

    Attributes:
        start: parameters and statistics to begin with, in the dtype of parameters.
        inputs: what results are compared on.
    """

    def __init__(self, case: BenchmarkCase, inputs: Inputs) -> None:
        """Computes the results.

        Args:
            case: what is measured.
            inputs: any of the case. Where ReLU's input is about 0 the gradient becomes 0: there
                rounding decides what ReLU lets through, and neither side is wrong.
        """
        self._case = case
        zeros = torch.zeros(case.channels, dtype=case.parameter_dtype, device=case.device)
        self.start = {
            "weight": torch.empty_like(zeros).uniform_(0.5, 1.5),
            "bias": torch.empty_like(zeros).uniform_(-1, 1),
            "running_mean": zeros,
            "running_var": torch.ones_like(zeros),
        }
        weight, *_, running_mean, running_var = self.start.values()
        batch = oracle.batch_statistics(inputs.x, _STOCK.eps)
        self._slack = _SLACK * sqrt(batch.count)
        running = oracle.running_statistics(batch, running_mean, running_var, _STOCK.momentum or 0)
        given = oracle.given_statistics(
            inputs.x, running["running_mean"].value, running["running_var"].value, _STOCK.eps
        )
        y, in_eval = self._output(inputs, batch), self._output(inputs, given)
        dy = inputs.dy
        if case.epilogue != "plain":
            undecided = y.value.abs() <= self._allowed("y", y, case.dtype)
            dy = dy.masked_fill(undecided.to(dy.device), 0)
            inputs = replace(inputs, dy=dy)
            dy = dy.masked_fill((y.value < 0).to(dy.device), 0)
            y, in_eval = (replace(one, value=one.value.clamp_min(0)) for one in (y, in_eval))
        self.inputs = inputs
        exact_dy = dy.to(y.value)
        self._expected = {
            "y": y,
            "eval": in_eval,
            **running,
            **oracle.gradients(dy, inputs.x, weight, batch, training=True),
            "dresidual": Expected(exact_dy, exact_dy.abs(), torch.zeros_like(y.held)),
        }

    def _output(self, inputs: Inputs, statistics: oracle.Statistics) -> Expected:
        """Batch norm and the residual that is added to it, before ReLU."""
        y = oracle.output(inputs.x, self.start["weight"], self.start["bias"], statistics)
        if inputs.residual is None:
            return y
        residual = inputs.residual.detach().to(y.value)
        return Expected(y.value + residual, y.scale + residual.abs(), y.held)

    def _allowed(self, name: str, expected: Expected, dtype: torch.dtype) -> Tensor:
        """The largest error of a result that is right."""
        if name in ("dweight", "dbias"):
            dtype = self._case.dtype
            # Taken one after another, sums are rounded at the size that they have reached.
            expected = replace(expected, scale=expected.scale + expected.value.abs())
        arithmetic = arithmetic_error(dtype, expected, _QUANTITIES.get(name, name), self._slack)
        return arithmetic + _ROUNDINGS * rounding_error(dtype, expected.scale)

    def load(self, norm: nn.Module) -> None:
        """Gives a batch norm the state to begin with."""
        with torch.no_grad():
            for name, value in self.start.items():
                getattr(norm, name).copy_(value)

    def check(self, provider: str, module: nn.Module, layout: str, *, in_place: bool) -> None:
        """Compares a module's results, and leaves it with other statistics.

        Args:
            provider: whose module it is, for the message.
            module: with an attribute ``norm``, which is in the state to begin with.
            layout: in which it gets its inputs, and has to give its results.
            in_place: whether it overwrites its inputs.

        Raises:
            WrongResultError: a result is off, or not of the dtype and shape it should be; or y is
                in another layout.
        """
        inputs = self.inputs.in_layout(layout)
        fresh = inputs.separate if in_place else lambda: inputs
        for name, result in _results(module, fresh).items():
            expected = self._expected[name]
            dtype = self._case.parameter_dtype if name in _PER_CHANNEL else self._case.dtype
            same = (result.shape, result.dtype) == (expected.value.shape, dtype)
            if name == "y":
                like_x = memory_format(layout, inputs.x.dim())
                same = same and result.is_contiguous(memory_format=like_x)
            if not same:
                raise WrongResultError(
                    f"{provider}, {self._case}: {name} is {result.dtype} of size "
                    f"{tuple(result.shape)} and strides {result.stride()}"
                )
            error = (result.to(expected.value) - expected.value).abs_()
            # Written so that NaN fails too.
            if not (error <= self._allowed(name, expected, dtype)).all():
                share = float(error.max() / expected.value.abs().max())
                raise WrongResultError(
                    f"{provider}, {self._case}: {name} is off by {share:.0e} of its size"
                )


def _results(module: nn.Module, fresh: Callable[[], Inputs]) -> dict[str, Tensor]:
    """All that the passes compute: a training step and then an eval forward."""
    norm = norm_of(module)
    inputs = fresh()
    edges: list[Any] = [get_gradient_edge(tensor) for tensor in inputs.arguments]
    y: Tensor = module.train()(*inputs.arguments)
    found = {"y": y.detach().clone()}  # as it is before backward, which may overwrite it
    for name in ("running_mean", "running_var"):
        found[name] = getattr(norm, name).clone()
    gradients = torch.autograd.grad(y, (*edges, norm.weight, norm.bias), inputs.dy)
    names = ("dx", "dresidual")[: len(edges)]
    found.update(zip((*names, "dweight", "dbias"), gradients, strict=True))
    with torch.no_grad():
        found["eval"] = module.eval()(*fresh().arguments)
    return found
