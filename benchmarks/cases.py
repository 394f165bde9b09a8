"""What is measured: inputs, what follows the batch norm, and the passes over both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from fastbn import planning
from fastbn.ops import CHANNELS_LAST
from fastbn.planning import dtype_name

from .rows import Subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fastbn.planning import Op

    from .shapes import Shape

Epilogue = Literal["plain", "relu", "add+relu"]
EPILOGUES: tuple[Epilogue, ...] = ("plain", "relu", "add+relu")


def memory_format(layout: str, dimensions: int) -> torch.memory_format:
    """PyTorch's name for a layout of tensors with so many dimensions."""
    return torch.contiguous_format if layout == "contiguous" else CHANNELS_LAST[dimensions]


DTYPES = {dtype_name(dtype): dtype for dtype in planning.DTYPES}


@dataclass(frozen=True)
class Inputs:
    """What a pass takes. x and residual need gradients and are no leaves, as in a network.

    Attributes:
        x: what is normalized (N, C, ...).
        residual: what is added to that, of the same shape, where the epilogue adds.
        dy: the gradient of the result.
    """

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What a module's forward takes."""
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
class BenchmarkCase:
    """An input, and what follows the batch norm of it.

    Attributes:
        shapes: name of the set that the shape is from.
        shape: of the input.
        dtype: of the input.
        layout: ``contiguous`` or ``channels_last``.
        epilogue: what follows the batch norm.
        device: where it is measured.
    """

    shapes: str
    shape: Shape
    dtype: torch.dtype
    layout: str
    epilogue: Epilogue = "plain"
    device: str = "cpu"

    def __str__(self) -> str:
        followed = "" if self.epilogue == "plain" else f", then {self.epilogue}"
        return f"{self.shape} {self.dtype_name} {self.layout}{followed}"

    @property
    def dtype_name(self) -> str:
        """The dtype without its prefix."""
        return dtype_name(self.dtype)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """float32 or wider, as autocast keeps parameters."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.shape.sizes[1]

    @property
    def dimensions(self) -> int:
        """Spatial dimensions of the module that takes the input: 1, 2 or 3."""
        return max(1, len(self.shape.sizes) - 2)

    @property
    def tensor_bytes(self) -> int:
        """Size of x."""
        return torch.Size(self.shape.sizes).numel() * self.dtype.itemsize

    @property
    def on_gpu(self) -> bool:
        """Whether it is measured on a GPU."""
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
            epilogue=self.epilogue,
            count=self.shape.count,
            **rest,
        )

    def tensor(self) -> Tensor:
        """A random tensor of mean 1 and standard deviation 2."""
        values = torch.randn(self.shape.sizes, device=self.device).mul_(2).add_(1)
        return values.to(self.dtype, memory_format=memory_format(self.layout, values.dim()))

    def inputs(self) -> Inputs:
        """Random inputs."""
        x = self.tensor().requires_grad_()
        residual = None
        if self.epilogue == "add+relu":
            leaf = self.tensor().requires_grad_()
            residual = leaf.view_as(leaf)
        return Inputs(x.view_as(x), residual, self.tensor())


# What tables and pictures call layouts and passes.
LAYOUT_NAMES = {"contiguous": "contiguous", "channels_last": "channels last"}
PASS_NAMES = {"forward": "training forward", "backward": "training backward", "eval": "eval"}
NETWORK_NAMES = {"resnet50": "ResNet-50", "efficientnet_b0": "EfficientNet-B0"}


def layouts(shape: Shape) -> tuple[str, ...]:
    """The layouts that PyTorch has for inputs of this rank."""
    both = len(shape.sizes) in CHANNELS_LAST
    return ("contiguous", "channels_last") if both else ("contiguous",)


@dataclass(frozen=True)
class Pass:
    """One of the passes to time.

    Attributes:
        name: what tables call it.
        op: what the planner calls it.
        tensors: how many tensors of the input's size it has to read or write.
        prepare: makes the call to time from a module and its inputs.
    """

    name: str
    op: Op
    tensors: int
    prepare: Callable[[nn.Module, Inputs], Callable[[], object]]

    def traffic(self, epilogue: Epilogue) -> int:
        """Tensors moved with an epilogue: one more where a residual, or its gradient, moves.

        The mask of ReLU is not counted: it follows from x, or else is a bit for an element.
        """
        return self.tensors + (epilogue == "add+relu")


def _forward(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    return partial(module.train(), *inputs.arguments)


def _backward(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    # Edges are asked for in advance: whoever works in place makes x its own result.
    edges = [get_gradient_edge(tensor) for tensor in inputs.arguments]
    y = module.train()(*inputs.arguments)
    wanted = (*edges, *module.parameters())
    return partial(torch.autograd.grad, y, wanted, inputs.dy, retain_graph=True)


def _eval(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    return torch.no_grad()(partial(module.eval(), *inputs.arguments))


FORWARD = Pass("forward", "forward", 2, _forward)
BACKWARD = Pass("backward", "backward", 3, _backward)
EVAL = Pass("eval", "eval", 2, _eval)
PASSES = (FORWARD, BACKWARD, EVAL)
