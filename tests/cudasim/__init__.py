"""Runs fastbn's CUDA kernels on a simulated GPU: the very kernels, planner and launch code.

``forward`` and ``backward`` take CPU tensors and return results and a report of what was launched
and of every byte that was moved; ``python -m tests.cudasim`` does so from the command line. Results
depend on the schedule of threads, and so on `seed`, only if the kernels have a race. Errors of
kernels (an access out of bounds or misaligned, a deadlock, ...) raise RuntimeError.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from . import build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = [
    "Epilogue",
    "Report",
    "Scale",
    "act_apply",
    "act_backward",
    "backward",
    "backward_combine_apply",
    "backward_reduce",
    "combine_apply",
    "forward",
    "on_stream",
    "stats",
]


@dataclass(frozen=True)
class Report:
    """What an operation did.

    Attributes:
        algorithm: the planner's choice.
        mapping: how elements map to threads.
        launches: of each kernel, `blocks`, `threads`, `shared_bytes` per block, blocks of a
            `cluster`, `barriers` and `cluster_barriers` that were passed, and whether it is
            `cooperative` and `overlaps_previous` ones.
        planned: `read_bytes` and `written_bytes` of activations that the plan counts.
        activations: `read_bytes`, `written_bytes`, histograms of the sizes of `loads` and
            `stores`, `bulk_copies` and their `bulk_bytes`, `bulk_stores` and their
            `bulk_stored_bytes`, and among these `box_copies` and `box_stores`, of x, y, dy and dx
            and, with a residual, of that and its gradient.
        vectors: the same of values per channel.
        workspace: the same of what passes between blocks and kernels.
        allocations: bytes of each block of memory that calls asked for.
        cleared_bytes: that calls set to zero before they launched anything.
    """

    algorithm: str
    mapping: str
    launches: list[dict[str, Any]]
    planned: dict[str, int]
    activations: dict[str, Any]
    vectors: dict[str, Any]
    workspace: dict[str, Any]
    allocations: list[int]
    cleared_bytes: int

    def _total(self, key: str) -> int:
        return sum(int(part[key]) for part in (self.activations, self.vectors, self.workspace))

    @property
    def read_bytes(self) -> int:
        """Of global memory, everything counted."""
        return self._total("read_bytes")

    @property
    def written_bytes(self) -> int:
        """Of global memory, everything counted."""
        return self._total("written_bytes")


@cache
def _ops() -> Any:
    build.load()
    return torch.ops.fastbn_cudasim


@dataclass(frozen=True)
class Scale:
    """A device with less of everything, on which small tensors do what large ones do.

    Attributes:
        multiprocessors: that it has; 0 for all.
        shared_bytes: of a block at most; 0 for all.
    """

    multiprocessors: int = 0
    shared_bytes: int = 0


WHOLE = Scale()


@dataclass(frozen=True)
class Epilogue:
    """What follows batch norm: ``y = activation(batch_norm(x) + residual)``.

    Attributes:
        activation: the function, as operators name it.
        parameter: of a function that has one, else 0.
        residual: like x; None for none.
        mask: what forward returned, for backward to read instead of the residual.
    """

    activation: str = "identity"
    parameter: float = 0.0
    residual: Tensor | None = None
    mask: Tensor | None = None


def _run(
    operator: str, arguments: tuple[Any, ...], device: str, scale: Scale, algorithm: str, seed: int
) -> tuple[Any, Report]:
    ops = _ops()
    ops.configure(seed, device, algorithm, scale.multiprocessors, scale.shared_bytes)
    results = getattr(ops, operator)(*arguments)
    return results, Report(**json.loads(ops.report()))


@contextmanager
def on_stream(index: int, *, capturing: bool = False) -> Iterator[None]:
    """Runs calls on another stream than the first, or captures them for a graph's replays."""
    _ops().use_stream(index, capturing)
    try:
        yield
    finally:
        _ops().use_stream(0, False)


def forward(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    epilogue: Epilogue | None = None,
    want_mask: bool = False,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    device: str = "h200",
    scale: Scale = WHOLE,
    algorithm: str = "auto",
    seed: int = 0,
) -> tuple[tuple[Tensor, ...], Report]:
    """Batch norm of CPU tensors as the GPU would compute it.

    Args:
        x: input of shape (N, C, ...), any strides.
        weight: of shape (C), or None; so are the following.
        bias: see weight.
        running_mean: updated in training, used in eval; see weight.
        running_var: see running_mean.
        num_batches_tracked: a single int64, counted up in training.
        epilogue: what follows; None for the operators without any.
        want_mask: whether to return one, with an epilogue; eval writes it whenever it can.
        training: whether to normalize by the batch's statistics.
        momentum: weight of the batch in the running statistics; None for the average over all.
        eps: added to the variance.
        device: name of a known GPU.
        scale: how much of it there is.
        algorithm: ``auto``, or one to force.
        seed: of the schedule.

    Returns:
        (y, mean, invstd) or, with a mask, (y, mean, invstd, mask), and the report.
    """
    vectors = (weight, bias, running_mean, running_var)
    name = "batch_norm"
    inputs: tuple[Tensor | None, ...] = (x,)
    behind: tuple[str | float, ...] = ()
    if epilogue is not None:
        name = "batch_norm_act"
        inputs = (x, epilogue.residual)
        behind = (epilogue.activation, epilogue.parameter)
    given = (*inputs, *vectors)
    if training:
        wanted = () if epilogue is None else (want_mask,)
        arguments = (*given, num_batches_tracked, momentum, eps, *behind, *wanted)
    else:
        arguments = (*given, eps, True, *behind)
    operator = f"{name}_{'training' if training else 'eval'}"
    results, report = _run(operator, arguments, device, scale, algorithm, seed)
    return results[: 3 + want_mask], report


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    *,
    training: bool = True,
    want: tuple[bool, bool, bool] = (True, True, True),
    device: str = "h200",
    scale: Scale = WHOLE,
    algorithm: str = "auto",
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor], Report]:
    """Gradients of :func:`forward`.

    Args:
        dy: gradient of y.
        x: input of forward.
        weight: of forward.
        mean: from forward.
        invstd: from forward.
        training: as in forward.
        want: which of dx, dweight and dbias to compute.
        device: see forward.
        scale: see forward.
        algorithm: see forward.
        seed: see forward.

    Returns:
        (dx, dweight, dbias), of no elements where not wanted, and the report.
    """
    arguments = (dy, x, weight, mean, invstd, training, *want)
    return _run("batch_norm_backward", arguments, device, scale, algorithm, seed)


def act_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    epilogue: Epilogue,
    *,
    training: bool = True,
    device: str = "h200",
    scale: Scale = WHOLE,
    seed: int = 0,
) -> tuple[Tensor, Report]:
    """Y of :func:`forward` with an epilogue again, by what it saved; arguments as there."""
    tensors = (x, epilogue.residual, weight, bias, mean, invstd)
    arguments = (*tensors, training, epilogue.activation, epilogue.parameter)
    return _run("batch_norm_act_apply", arguments, device, scale, "auto", seed)


def act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    epilogue: Epilogue,
    *,
    training: bool = True,
    want: tuple[bool, bool, bool, bool] = (True, True, True, True),
    device: str = "h200",
    scale: Scale = WHOLE,
    algorithm: str = "auto",
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Report]:
    """Gradients of :func:`forward` with an epilogue.

    Args:
        dy: gradient of y.
        x: input of forward.
        weight: of forward.
        bias: of forward.
        mean: from forward, float64.
        invstd: from forward, float64.
        epilogue: of forward.
        training: as in forward.
        want: which of dx, dresidual, dweight and dbias to compute.
        device: see forward.
        scale: see forward.
        algorithm: see forward.
        seed: see forward.

    Returns:
        (dx, dresidual, dweight, dbias), of no elements where not wanted, and the report.
    """
    tensors = (dy, x, epilogue.residual, epilogue.mask, weight, bias, mean, invstd)
    arguments = (*tensors, training, epilogue.activation, epilogue.parameter, *want)
    return _run("batch_norm_act_backward", arguments, device, scale, algorithm, seed)


# The steps apart, by the signatures of ``fastbn.ops``. They leave the planner no choice.


def stats(
    x: Tensor, additive: bool, *, device: str = "h200", scale: Scale = WHOLE, seed: int = 0
) -> tuple[Tensor, Report]:
    """The row of x; for the options see :func:`forward`."""
    return _run("batch_norm_stats", (x, additive), device, scale, "auto", seed)


def combine_apply(
    *arguments: Any, device: str = "h200", scale: Scale = WHOLE, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Report]:
    """(y, mean, invstd, count) by rows; see :func:`stats`."""
    return _run("batch_norm_combine_apply", arguments, device, scale, "auto", seed)


def backward_reduce(
    *arguments: Any, device: str = "h200", scale: Scale = WHOLE, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], Report]:
    """(row, dweight, dbias); see :func:`stats`."""
    return _run("batch_norm_backward_reduce", arguments, device, scale, "auto", seed)


def backward_combine_apply(
    *arguments: Any, device: str = "h200", scale: Scale = WHOLE, seed: int = 0
) -> tuple[Tensor, Report]:
    """Dx by rows; see :func:`stats`."""
    return _run("batch_norm_backward_combine_apply", arguments, device, scale, "auto", seed)
