"""Nothing is timed that does not compute what float64 computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .cases import TOLERANCES, Inputs
from .providers import Followed

if TYPE_CHECKING:
    from torch import Tensor

    from .cases import Case

# Where the state that all start from is kept.
_STATE = ("weight", "bias", "running_mean", "running_var")


class WrongResultError(ArithmeticError):
    """A provider's result is too far from float64's to be worth timing."""


def _oracle(case: Case) -> nn.Module:
    return Followed(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[case.dimensions - 1](case.channels),
        case.ending,
    ).to(case.device, torch.float64)


def _in_float64(tensor: Tensor) -> Tensor:
    """A copy that needs a gradient if the original does, and is no leaf either."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad).clone()


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
        dy = inputs.dy
        if case.ending != "plain":
            plain = _oracle(case)
            plain.load_state_dict(oracle.state_dict())
            plain.ending = "plain"
            with torch.no_grad():
                y = plain.train()(*exact.separate().arguments)
            dy = dy.masked_fill(y.abs() <= TOLERANCES[case.dtype] * y.abs().max(), 0)
        self.inputs = Inputs(inputs.x, inputs.residual, dy)
        self._exact = _results(oracle, Inputs(exact.x, exact.residual, dy.double()))

    def load(self, norm: nn.Module) -> None:
        """Gives a batch norm the state to begin with."""
        with torch.no_grad():
            for name, value in self.start.items():
                getattr(norm, name).copy_(value)

    def check(self, provider: str, module: nn.Module, inputs: Inputs) -> None:
        """Compares a module's results, and leaves it with other statistics.

        Args:
            provider: whose, for the message.
            module: with an attribute ``norm``; it is in the state to begin with.
            inputs: those of this truth, in any layout.

        Raises:
            WrongResultError: a result is off.
        """
        for name, result in _results(module, inputs).items():
            truth = self._exact[name]
            error = float((result.double() - truth).abs().max() / truth.abs().max())
            # Written so that NaN fails too.
            if not error <= TOLERANCES[self._case.dtype]:
                raise WrongResultError(
                    f"{provider}, {self._case}: {name} is off by {error:.0e} of its size"
                )


def _results(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """All that the passes compute: a training step and then an evaluation."""
    own = inputs.separate()
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in own.arguments]
    y = module.train()(*own.arguments)
    # As it is before anyone who works in place overwrites it in backward.
    found = {"y": y.detach().clone()}
    norm = module.norm
    gradients = torch.autograd.grad(y, (*edges, norm.weight, norm.bias), own.dy)
    names = ("dx", "dresidual")[: len(edges)]
    found.update(zip((*names, "dweight", "dbias"), gradients, strict=True))
    found.update(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
    with torch.no_grad():
        found["evaluation"] = module.eval()(*inputs.separate().arguments)
    return found
