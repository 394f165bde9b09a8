"""Compares a model with what became of it, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Of the size of a tensor: sums in another order, through a hundred layers.
_TOLERANCE = 1e-9
# Of the largest tensor of its kind: what is left where terms cancel, as in the gradient of a bias
# before batch norm.
_CANCELED = 1e-12


class Results(NamedTuple):
    """What a step leaves, by number or name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value.detach().clone()
    return value


def results(model: nn.Module, inputs: tuple[Any, ...]) -> Results:
    """Outputs, gradients and buffers after one step in float64, with the same random numbers.

    Args:
        model: in float64.
        inputs: its positional arguments, of any dtype.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = pytree.tree_leaves(model(*pytree.tree_map(_double, inputs)))
        tensors = [output for output in outputs if isinstance(output, Tensor)]
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        if differentiable:
            # Of all signs and sizes: of gradients that are the same, batch norm leaves nothing.
            gradients = [torch.randn_like(tensor) for tensor in differentiable]
            torch.autograd.backward(differentiable, gradients)
    return Results(
        {str(number): tensor.detach() for number, tensor in enumerate(tensors)},
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        dict(model.named_buffers()),
    )


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def first_difference(before: Results, after: Results) -> str | None:
    """Where two results differ, in words; None if they do not."""
    for kind, tensors, others in zip(
        ("output", "gradient of", "buffer"), before, after, strict=True
    ):
        floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        canceled = _CANCELED * max(map(_size, floats), default=0.0)
        for name, expected in tensors.items():
            found = others.get(name)
            if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                return f"the {kind} {name} is missing or of another kind"
            same = (found == expected) | (found.isnan() & expected.isnan())
            error = _size((found.double() - expected.double())[~same])
            if not error <= _TOLERANCE * _size(expected) + canceled:  # NaN on one side counts
                largest = f"its largest element is {_size(expected):.1e}"
                return f"the {kind} {name} differs by {error:.1e}, where {largest}"
    return None
