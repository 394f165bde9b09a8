"""Batch norm with statistics of the batches of several processes.

Each process reduces its own batch to a row, all exchange their rows in one collective, and each
combines them and applies the result: so forward, and so backward.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import composite
from .collectives import AllReduce, exchange, takes_sums
from .functional import number, refuse_grad
from .ops import (
    batch_norm_backward_combine_apply,
    batch_norm_backward_reduce,
    batch_norm_combine_apply,
    batch_norm_stats,
    check_combine_apply,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class SyncBatchNormFunction(torch.autograd.Function):
    """Batch norm of training over processes, with the compiled steps; see :func:`sync_batch_norm`.

    Gradients of weight and bias are by this process's batch alone, as those of all other
    parameters: who reduces these, reduces them, too.

    It always saves the same five tensors: recomputation by checkpoints may end once it has them,
    and has to end at the same collective everywhere. Backward takes part in its collective even
    if this process does not want dx, as others may.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        group: ProcessGroup,
        layer: str,
    ) -> Tensor:
        """One collective, of 1 + 2C numbers; see :func:`sync_batch_norm` for the arguments."""
        sums = takes_sums(x.dtype, group)
        rows = exchange(batch_norm_stats(x, sums), sums, group, layer)
        y, mean, invstd, count = batch_norm_combine_apply(
            x,
            rows,
            sums,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            eps,
        )
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.eps, ctx.group, ctx.layer = eps, group, layer
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """One collective, of 2C numbers; two that can be differentiated where that is wanted."""
        x, weight, mean, invstd, count = ctx.saved_tensors
        want_dx, want_dweight, want_dbias = ctx.needs_input_grad[:3]
        group, layer = ctx.group, ctx.layer
        if torch.is_grad_enabled():
            all_reduce = partial(_all_reduce, group, layer)
            dx, dweight, dbias = composite.sync_batch_norm_backward(
                dy, x, weight, mean, count, ctx.eps, all_reduce
            )
        else:
            row, dweight, dbias = batch_norm_backward_reduce(
                dy, x, weight, mean, invstd, want_dweight, want_dbias
            )
            rows = exchange(row, takes_sums(x.dtype, group), group, f"backward of {layer}")
            dx = None
            if want_dx:
                dx = batch_norm_backward_combine_apply(dy, x, weight, mean, invstd, rows, count)
        return (
            dx if want_dx else None,
            dweight if want_dweight else None,
            dbias if want_dbias else None,
            *(None,) * 7,
        )


def _all_reduce(group: ProcessGroup, layer: str, row: Tensor) -> Tensor:
    total: Tensor = AllReduce.apply(row, group, f"backward of {layer}")  # type: ignore[no-untyped-call]
    return total


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    group: ProcessGroup,
    layer: str,
) -> Tensor:
    """Normalizes with the statistics of the batches of all processes of a group.

    Everything that is wrong with this process's arguments is said before others wait for it.

    Args:
        x: (N, C, ...), of which this process may have none.
        weight: (C) or None.
        bias: (C) or None.
        running_mean: (C), updated; or None.
        running_var: (C), likewise.
        num_batches_tracked: int64 scalar, incremented; or None.
        momentum: weight of all batches together in the running statistics; None for the average.
        eps: added to the variance.
        group: the processes, this one among them, of which each must call this.
        layer: its name for errors.
    """
    if type(eps) is not float or not (momentum is None or type(momentum) is float):
        momentum = None if momentum is None else number("momentum", 7, momentum)
        eps = number("eps", 8, eps)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{layer} shares statistics with other processes, which torch.func does not transform; "
            "call fastbn.revert first, or transform the model in evaluation"
        )
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None and statistic.requires_grad and torch.is_grad_enabled():
            refuse_grad(name)
    check_combine_apply(x, weight, bias, running_mean, running_var, num_batches_tracked, eps)
    y: Tensor = SyncBatchNormFunction.apply(  # type: ignore[no-untyped-call]
        x,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
        group,
        layer,
    )
    return y
