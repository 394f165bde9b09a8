"""What is measured: inputs, what follows the batch norm, and the passes over both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from .rows import Subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fastbn.planning import Op

    from .shapes import Shape

Ending = Literal["plain", "relu", "add+relu"]
ENDINGS: tuple[Ending, ...] = ("plain", "relu", "add+relu")

# Memory formats of channels-last inputs by their number of dimensions.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(layout: str, dimensions: int) -> torch.memory_format:
    """PyTorch's name for a layout of tensors with so many dimensions."""
    return torch.contiguous_format if layout == "ncs" else _CHANNELS_LAST[dimensions]


# Largest error against float64 that counts as right, relative to the largest value of a result.
# Stock's float32 sums over channels last lose four digits on the largest layers: hence 1e-3.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-3,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
# The same of dweight and dbias. Random terms all but cancel in those sums, so what is lost of each
# of a million terms shows: with stock 5e-3 in float32, where terms are rounded to 16 bits 1e-2.
SUM_TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2**-7,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-6,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}


@dataclass(frozen=True)
class Inputs:
    """What a pass takes. x and residual need gradients and are no leaves, as in a network.

    Attributes:
        x: what is normalised (N, C, ...).
        residual: what is added to that, of the same shape, where the ending adds.
        dy: the gradient of the result.
    """

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Of a module's forward."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def separate(self) -> Inputs:
        """The same values in other memory, for whoever overwrites them."""
        residual = None if self.residual is None else self.residual.clone()
        return Inputs(self.x.clone(), residual, self.dy.clone())

    def in_layout(self, layout: str) -> Inputs:
        """The same values in a layout, and in the same memory if they have that already."""
        to = memory_format(layout, self.x.dim())
        residual = None if self.residual is None else self.residual.contiguous(memory_format=to)
        return Inputs(
            self.x.contiguous(memory_format=to), residual, self.dy.contiguous(memory_format=to)
        )


@dataclass(frozen=True)
class Case:
    """An input, and what follows the batch norm of it.

    Attributes:
        shapes: name of the set that the shape is from.
        layout: ``ncs``, contiguous, or ``nsc``, channels last.
    """

    shapes: str
    shape: Shape
    dtype: torch.dtype
    layout: str
    ending: Ending = "plain"
    device: str = "cpu"

    def __str__(self) -> str:
        followed = "" if self.ending == "plain" else f", then {self.ending}"
        return f"{self.shape} {self.dtype_name} {self.layout}{followed}"

    @property
    def dtype_name(self) -> str:
        """The dtype without its prefix."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def parameter_dtype(self) -> torch.dtype:
        """float32 or wider, as autocast keeps parameters."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def channels(self) -> int:
        """C."""
        return self.shape.sizes[1]

    @property
    def dimensions(self) -> int:
        """Of the module that takes it: 1, 2 or 3."""
        return max(1, len(self.shape.sizes) - 2)

    @property
    def tensor_bytes(self) -> int:
        """Size of x."""
        return torch.Size(self.shape.sizes).numel() * self.dtype.itemsize

    @property
    def on_gpu(self) -> bool:
        """Whether to measure there."""
        return self.device != "cpu"

    def subject(self, benchmark: str, measured: str, **rest: Any) -> Subject:
        """What rows say of this case: what of it was measured, and how."""
        return Subject(
            benchmark=benchmark,
            shapes=self.shapes,
            shape=str(self.shape),
            dtype=self.dtype_name,
            layout=self.layout,
            measured=measured,
            ending=self.ending,
            count=self.shape.count,
            **rest,
        )

    def tensor(self) -> Tensor:
        """A random tensor of mean 1 and standard deviation 2."""
        values = torch.randn(self.shape.sizes, device=self.device).mul_(2).add_(1)
        return values.to(self.dtype, memory_format=memory_format(self.layout, values.dim()))

    def inputs(self) -> Inputs:
        """Random ones."""
        x = self.tensor().requires_grad_()
        residual = None
        if self.ending == "add+relu":
            leaf = self.tensor().requires_grad_()
            residual = leaf.view_as(leaf)
        return Inputs(x.view_as(x), residual, self.tensor())


# What tables and pictures call them.
LAYOUT_NAMES = {"ncs": "contiguous", "nsc": "channels last"}
PASS_NAMES = {
    "forward": "training forward",
    "backward": "training backward",
    "evaluation": "evaluation",
}


def layouts(shape: Shape) -> tuple[str, ...]:
    """Those that PyTorch has for inputs of this rank."""
    return ("ncs", "nsc") if len(shape.sizes) in _CHANNELS_LAST else ("ncs",)


@dataclass(frozen=True)
class Pass:
    """One of the passes to time.

    Attributes:
        name: what tables call it.
        op: what the planner calls it.
        tensors: how many of the input's size it has to read or write.
        prepare: makes the call to time from a module and its inputs.
    """

    name: str
    op: Op
    tensors: int
    prepare: Callable[[nn.Module, Inputs], Callable[[], object]]

    def traffic(self, ending: Ending) -> int:
        """How many tensors with an ending: one more where a residual, or its gradient, moves.

        The mask of ReLU is not counted: it follows from x, or else is a bit for an element.
        """
        return self.tensors + (ending == "add+relu")


def _forward(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    return partial(module.train(), *inputs.arguments)


def _backward(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    # Edges are asked for in advance: whoever works in place makes x its own result.
    edges = [get_gradient_edge(tensor) for tensor in inputs.arguments]
    y = module.train()(*inputs.arguments)
    wanted = (*edges, *module.parameters())
    return partial(torch.autograd.grad, y, wanted, inputs.dy, retain_graph=True)


def _evaluation(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    return torch.no_grad()(partial(module.eval(), *inputs.arguments))


FORWARD = Pass("forward", "forward", 2, _forward)
BACKWARD = Pass("backward", "backward", 3, _backward)
EVALUATION = Pass("evaluation", "eval", 2, _evaluation)
PASSES = (FORWARD, BACKWARD, EVALUATION)
