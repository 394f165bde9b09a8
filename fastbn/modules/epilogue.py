"""What is left of a module when its batch norm has become part of the layer in front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.fx import Proxy

if TYPE_CHECKING:
    from torch import Tensor

    from ..activations import Activation


class Epilogue(nn.Module):
    """``activation(x + residual)``, as :class:`fastbn.BatchNormAct2d` has it after batch norm.

    Args:
        activation: the function.
        rank: of x, where it is the only one that batch norm could be folded for; None for any.
    """

    def __init__(self, activation: Activation, rank: int | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.rank = rank

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Adds the residual, if any, and applies the activation; both like x."""
        if self.rank is not None and not isinstance(x, Proxy) and x.dim() != self.rank:
            raise ValueError(
                f"expected {self.rank}D input (got {x.dim()}D input), for which alone a batch norm "
                "can be part of a linear layer; use the model as it was before fastbn.fold"
            )
        return self.activation(x if residual is None else x + residual)

    def extra_repr(self) -> str:
        """The activation function."""
        given = "".join(f", {key}={value}" for key, value in self.activation.kwargs.items())
        return f"activation={self.activation.name}{given}"
