"""Nothing is timed that does not compute what float64 computes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from .cases import SUM_TOLERANCES, TOLERANCES, Inputs, memory_format
from .providers import PROVIDERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .cases import Case

# Where the state that all start from is kept.
_STATE = ("weight", "bias", "running_mean", "running_var")
_PER_CHANNEL = ("dweight", "dbias", "running_mean", "running_var")


class WrongResultError(ArithmeticError):
    """A provider's result is too far from float64's to be worth timing."""


def _oracle(case: Case) -> nn.Module:
    return PROVIDERS["stock"].build(case).to(case.device, torch.float64)


def _in_float64(tensor: Tensor) -> Tensor:
    """A copy that needs a gradient if the original does, and is no leaf either."""
    leaf = tensor.detach().double().requires_grad_(tensor.requires_grad)
    return leaf.view_as(leaf)


class Truth:
    """The right results of a case.

    Attributes:
        start: parameters and statistics to begin with, in float64.
        inputs: what results are compared on.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        """Computes them.

        Args:
            case: what.
            inputs: any; where results are about 0 the gradient becomes 0. There rounding decides
                what ReLU lets through, and no side of it is wrong.
        """
        self._case = case
        oracle = _oracle(case)
        nn.init.uniform_(oracle.norm.weight, 0.5, 1.5)
        nn.init.uniform_(oracle.norm.bias, -1, 1)
        self.start = {name: getattr(oracle.norm, name).detach().clone() for name in _STATE}
        exact = Inputs(*(None if t is None else _in_float64(t) for t in vars(inputs).values()))
        if case.ending != "plain":
            near = self._near_zero(oracle, exact)
            inputs = replace(inputs, dy=inputs.dy.masked_fill(near, 0))
            exact = replace(exact, dy=exact.dy.masked_fill(near, 0))
        self.inputs = inputs
        self._exact = _results(oracle, lambda: exact)

    def _near_zero(self, oracle: nn.Module, exact: Inputs) -> Tensor:
        plain = _oracle(self._case)
        plain.load_state_dict(oracle.state_dict())
        plain.ending = "plain"
        with torch.no_grad():
            size = plain.train()(*exact.arguments).abs_()
        return size <= TOLERANCES[self._case.dtype] * size.max()

    def load(self, norm: nn.Module) -> None:
        """Gives a batch norm the state to begin with."""
        with torch.no_grad():
            for name, value in self.start.items():
                getattr(norm, name).copy_(value)

    def check(self, provider: str, module: nn.Module, layout: str, *, in_place: bool) -> None:
        """Compares a module's results, and leaves it with other statistics.

        Args:
            provider: whose, for the message.
            module: with an attribute ``norm``; it is in the state to begin with.
            layout: in which it gets its inputs, and has to give its results.
            in_place: whether it overwrites them.

        Raises:
            WrongResultError: a result is off, or not of the dtype and shape it should be; or y is
                in another layout.
        """
        inputs = self.inputs.in_layout(layout)
        fresh = inputs.separate if in_place else lambda: inputs
        for name, result in _results(module, fresh).items():
            truth = self._exact[name]
            dtype = self._case.parameter_dtype if name in _PER_CHANNEL else self._case.dtype
            same = (result.shape, result.dtype) == (truth.shape, dtype)
            if name == "y":
                like_x = memory_format(layout, inputs.x.dim())
                same = same and result.is_contiguous(memory_format=like_x)
            if not same:
                raise WrongResultError(
                    f"{provider}, {self._case}: {name} is {result.dtype} of size "
                    f"{tuple(result.shape)} and strides {result.stride()}"
                )
            error = float((result.double() - truth).abs_().max() / truth.abs().max())
            sums = name in ("dweight", "dbias")
            # Written so that NaN fails too.
            if not error <= (SUM_TOLERANCES[self._case.dtype] if sums else TOLERANCES[dtype]):
                raise WrongResultError(
                    f"{provider}, {self._case}: {name} is off by {error:.0e} of its size"
                )


def _results(module: nn.Module, fresh: Callable[[], Inputs]) -> dict[str, Tensor]:
    """All that the passes compute: a training step and then an evaluation."""
    norm = module.norm
    inputs = fresh()
    edges = [get_gradient_edge(tensor) for tensor in inputs.arguments]
    y = module.train()(*inputs.arguments)
    found = {"y": y.detach().clone()}  # as it is before backward, which may overwrite it
    found.update(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
    gradients = torch.autograd.grad(y, (*edges, norm.weight, norm.bias), inputs.dy)
    names = ("dx", "dresidual")[: len(edges)]
    found.update(zip((*names, "dweight", "dbias"), gradients, strict=True))
    with torch.no_grad():
        found["evaluation"] = module.eval()(*fresh().arguments)
    return found
