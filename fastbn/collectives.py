"""With whom a process shares statistics, and how they exchange rows of partial results.

By public functions of :mod:`torch.distributed` alone, which ``torch.compile`` traces.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    # What modules may be given: None is for all processes.
    Group: TypeAlias = ProcessGroup | DeviceMesh | None

# Up to so many processes, as a node has them, a gather of all rows takes no longer than their sum.
GATHERING_PROCESSES = 8

# The newer of two names for the same.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


class LostGroup:
    """In a module that was pickled, stands where its process group was, which cannot be."""


def peers(group: Group | LostGroup) -> ProcessGroup | None:
    """The process group to exchange rows with; None where this process is alone.

    Asked at every forward, as a job that is restarted elastically makes its groups again.

    Args:
        group: None for all processes, a process group, or a mesh of one dimension.

    Raises:
        RuntimeError: the group was lost, or does not have this process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if isinstance(group, LostGroup):
        if dist.get_world_size() == 1:
            return None
        raise RuntimeError(
            "a process group cannot be pickled, and this module, which had one, was; set its "
            "process_group, or call fastbn.convert_sync_batchnorm(model, process_group)"
        )
    if isinstance(group, dist.device_mesh.DeviceMesh):
        group = group.get_group()
    elif group is None:
        group = dist.group.WORLD
    size = dist.get_world_size(group)
    if size < 0:
        raise RuntimeError(
            f"rank {dist.get_rank()} is not in the process group that this module shares "
            "statistics with; give each process a group that it is in, as fastbn.sync_group does"
        )
    return None if size == 1 else group


def takes_sums(dtype: torch.dtype, group: ProcessGroup) -> bool:
    """The policy: whether processes get the sum of additive rows by an all-reduce, or all rows.

    The rows of many processes would take long to be gathered. Sums of squares, which additive rows
    hold, have too few digits for statistics in float64.

    Args:
        dtype: of the activation.
        group: the processes.
    """
    return dist.get_world_size(group) > GATHERING_PROCESSES and dtype != torch.float64


def exchange(row: Tensor, sums: bool, group: ProcessGroup, layer: str) -> Tensor:
    """One collective: the rows of all processes in the order of ranks, or their sum.

    Args:
        row: of this process, float64 of shape (K); its memory may be used.
        sums: add rows up.
        group: the processes, each of which calls this with a row of that shape.
        layer: for whom, in errors.

    Returns:
        Shape (R, K), the same bits in all processes; R is 1 for sums.

    Raises:
        RuntimeError: the collective failed, as another process did.
    """
    if torch.compiler.is_compiling():
        return _collective(row, sums, group)
    try:
        return _collective(row, sums, group)
    except RuntimeError as error:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"{layer} on rank {rank} of {size} could not exchange {row.numel()} numbers with the "
            f"other processes: {error}"
        ) from error


def _collective(row: Tensor, sums: bool, group: ProcessGroup) -> Tensor:
    if sums:
        dist.all_reduce(row, group=group)
        return row.unsqueeze(0)
    rows = row.new_empty(dist.get_world_size(group) * row.numel())
    _all_gather(rows, row, group=group)
    return rows.view(-1, row.numel())


class AllReduce(torch.autograd.Function):
    """The sum over all processes, as a function that autograd differentiates.

    What each process computes of it goes into a loss of its own, and gradients are those of all
    losses together.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, group: ProcessGroup, layer: str) -> Tensor:
        """Returns the sum, like ``row``, which is float64 of any shape."""
        ctx.group, ctx.layer = group, layer
        return exchange(row.clone(), True, group, layer).squeeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Adds up what the losses of all processes say."""
        total = AllReduce.apply(  # type: ignore[no-untyped-call]
            gradient.contiguous(), ctx.group, ctx.layer
        )
        return total, None, None


def sync_group(size: Literal["node"] | int | None = "node", own: bool = False) -> ProcessGroup:
    """A process group for batch norms that share statistics with some processes, not with all.

    Every process has to call it, at the same time and with the same arguments, as each takes part
    in making all groups::

        fastbn.convert_sync_batchnorm(model, fastbn.sync_group("node"))

    Every layer waits for its processes, so the time it takes grows with their number, and most
    where they are on several nodes. A node's images are as a rule enough.

    Args:
        size: ``"node"`` for the processes of this node, as ``torchrun`` tells or else by the name
            of the host; a number for groups of so many processes in the order of ranks; None for
            all.
        own: with a communicator of its own even where the group is that of all processes. On NCCL
            with a stream of high priority and few multiprocessors, so that statistics do not wait
            behind gradients; all processes must then launch the collectives of both in the same
            order.

    Returns:
        The group that has this process.

    Raises:
        ValueError: the number of processes is no multiple of ``size``.
    """
    world = dist.get_world_size()
    groups = _ranks_of_groups(size, world)
    everybody = dist.group.WORLD
    assert everybody is not None
    if len(groups) == 1 and not own:
        return everybody
    options = _options_of_own() if own and dist.get_backend() == "nccl" else None
    group, _ = dist.new_subgroups_by_enumeration(groups, pg_options=options)
    mine: ProcessGroup = group
    return mine


def _ranks_of_groups(size: Literal["node"] | int | None, world: int) -> list[list[int]]:
    if size == "node":
        nodes: list[Any] = [None] * world
        dist.all_gather_object(nodes, os.environ.get("GROUP_RANK") or socket.gethostname())
        return [
            [rank for rank in range(world) if nodes[rank] == node] for node in dict.fromkeys(nodes)
        ]
    if size is None:
        return [list(range(world))]
    if size < 1 or world % size:
        raise ValueError(
            f"{world} processes do not make groups of {size}; give a divisor of their number"
        )
    return [list(range(first, first + size)) for first in range(0, world, size)]


def _options_of_own() -> Any:
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.min_ctas, options.config.max_ctas = 1, 2
    return options
