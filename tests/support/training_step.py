"""A training step that can be repeated, copied and compared to the last bit, on a GPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import fastbn

from .devices import GPU
from .tables import Case, make

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn.modules.batchnorm import _BatchNorm

# What the planner makes of them, in float32 on any GPU.
SHAPES = {
    # A block for a few channels, and one launch.
    "one_block": (4, 24, 9, 11),
    # Some blocks for each channel and two launches, which leave room on the GPU for others.
    "splits": (16, 16, 41, 43),
    # The same, and the GPU is full.
    "large": (32, 64, 56, 56),
}


@dataclass(frozen=True)
class Step:
    """A module and what it is given: an input that wants a gradient, and that of the output."""

    module: _BatchNorm
    x: Tensor
    dy: Tensor

    @classmethod
    def make(
        cls, shape: tuple[int, ...], layout: str = "contiguous", momentum: float | None = 0.1
    ) -> Step:
        """Random numbers everywhere, in float32."""
        tensors = make(Case("step", shape, layout, torch.float32), GPU)
        kind = {2: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d}[len(shape)]
        module = kind(shape[1], momentum=momentum, device=GPU)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(module, name).copy_(getattr(tensors, name))
        return cls(
            module, tensors.x.requires_grad_(), torch.empty_like(tensors.x).copy_(tensors.dy)
        )

    def __call__(self) -> list[Tensor]:
        """Forward and backward: y, dx, dweight and dbias."""
        y = self.module(self.x)
        wanted = (self.x, self.module.weight, self.module.bias)
        return [y.detach(), *torch.autograd.grad(y, wanted, self.dy)]

    def twin(self) -> Step:
        """The same in tensors of its own."""
        x = torch.empty_like(self.x).copy_(self.x.detach()).requires_grad_()
        return Step(copy.deepcopy(self.module), x, self.dy.clone())

    def load(self, seed: int) -> None:
        """Puts other random numbers into x and dy."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (self.x, self.dy):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 2 + 1)

    def state(self) -> list[Tensor]:
        """Running statistics and counter."""
        return list(self.module.buffers())


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)
