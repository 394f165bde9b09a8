"""Batch norms that share their statistics with other processes: ``nn.SyncBatchNorm``, and more.

``SyncBatchNorm`` is stock's class: of any rank, and what ``DistributedDataParallel`` refuses on a
CPU and other libraries replace. ``SyncBatchNorm1d/2d/3d`` are ``nn.BatchNorm1d/2d/3d``, with their
check of the rank, and none of that happens to them.

Differences from stock, all on purpose:

* A CPU computes them, too, on gloo or whatever the process group has.
* A forward is one collective and a backward another, without waiting for the device.
* They are differentiable twice.
* Modules can be copied, which shares their process group, and pickled, which drops it.
* The process group may be a mesh of one dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..collectives import LostGroup, peers
from ..functional import dispatch
from ..fused import dispatch_act
from ..sync import sync_batch_norm
from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, FastBatchNorm
from .foreign import FastTimmBatchNormAct
from .fused import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

if TYPE_CHECKING:
    from torch import Tensor

    from ..activations import Activation
    from ..collectives import Group


class _InTransit:
    """A process group on the way from a module to a copy: shared, but lost in a pickle."""

    def __init__(self, group: object) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> _InTransit:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return LostGroup, ()


class Synchronized(FastBatchNorm):
    """What makes a batch norm of fastbn's a synchronized one.

    In training statistics are those of the batches of all processes of ``process_group`` together,
    each of which has to call the module, and its backward, as often and in the same order as the
    others. Batches may be of different sizes, and empty. In evaluation, and where a process is
    alone, it is the batch norm it would be without this. Gradients of gradients exchange once more,
    for which x has to require a gradient in every process or in none.

    An activation or a residual behind it is computed by PyTorch.
    """

    # Looked up at every forward: None for all processes.
    process_group: Group | LostGroup = None

    # Where the module is in its model, for errors; if that is known.
    layer_name: str | None = None

    def _layer(self) -> str:
        kind = type(self).__name__
        # Compiled code would be compiled again for each name.
        if torch.compiler.is_compiling() or self.layer_name is None:
            return kind
        return f"{kind} {self.layer_name}".rstrip()

    def _batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> Tensor:
        """Alone, :func:`fastbn.functional.dispatch`."""
        vectors = (weight, bias, running_mean, running_var, num_batches_tracked)
        # Without running statistics evaluation uses those of the batch, of this process's alone.
        group = peers(self.process_group) if self.training else None
        if group is None:
            return dispatch(x, *vectors, training, momentum, eps)
        return sync_batch_norm(x, *vectors, momentum, eps, group, self._layer())

    def _batch_norm_act(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        activation: Activation,
    ) -> Tensor:
        """Alone, :func:`fastbn.fused.dispatch_act`."""
        vectors = (weight, bias, running_mean, running_var, num_batches_tracked)
        group = peers(self.process_group) if self.training else None
        if group is None:
            return dispatch_act(x, residual, *vectors, training, momentum, eps, activation)
        y = sync_batch_norm(x, *vectors, momentum, eps, group, self._layer())
        return activation(y if residual is None else y + residual)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles, of which only the former can take the process group along."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, state, *rest = reduced
        group = state.get("process_group")
        if group is not None:
            state = {**state, "process_group": _InTransit(group)}
        return make, arguments, state, *rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or an unpickled module."""
        group = state.get("process_group")
        if isinstance(group, _InTransit):
            state = {**state, "process_group": group.group}
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class _LikeStocks(Synchronized):
    """Those with the constructor of ``nn.SyncBatchNorm``."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.process_group = process_group


class SyncBatchNorm(_LikeStocks, nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`, on CPUs, too: (N, C, ...) to the same shape.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of all batches together in the running statistics; None for a cumulative
            average.
        affine: have weight and bias.
        track_running_stats: have running statistics.
        process_group: the processes that share statistics: None for all, a process group, or a mesh
            of one dimension; see :func:`fastbn.sync_group`.
        device: of parameters and buffers.
        dtype: of parameters; that of running statistics is float32 where this has 16 bits.
        bias: have a bias, where ``affine``.

    Raises:
        ValueError: an input without channels or of fewer than two dimensions.
        RuntimeError: the exchange with other processes failed, as one of them did; the module was
            pickled and has lost its process group; this process is not in the group.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        super()._check_input_dim(input)
        self._check_non_zero_input_channels(input)


class SyncBatchNorm1d(_LikeStocks, BatchNorm1d):
    """:class:`SyncBatchNorm` as a :class:`torch.nn.BatchNorm1d`: (N, C) or (N, C, L)."""


class SyncBatchNorm2d(_LikeStocks, BatchNorm2d):
    """:class:`SyncBatchNorm` as a :class:`torch.nn.BatchNorm2d`: (N, C, H, W)."""


class SyncBatchNorm3d(_LikeStocks, BatchNorm3d):
    """:class:`SyncBatchNorm` as a :class:`torch.nn.BatchNorm3d`: (N, C, D, H, W)."""


class SyncBatchNormAct1d(Synchronized, BatchNormAct1d):
    """:class:`fastbn.BatchNormAct1d`, synchronized."""


class SyncBatchNormAct2d(Synchronized, BatchNormAct2d):
    """:class:`fastbn.BatchNormAct2d`, synchronized."""


class SyncBatchNormAct3d(Synchronized, BatchNormAct3d):
    """:class:`fastbn.BatchNormAct3d`, synchronized."""


class SyncTimmBatchNormAct(Synchronized, FastTimmBatchNormAct):
    """Of ``timm.layers.BatchNormAct2d``, synchronized, and of its ``SyncBatchNormAct``."""
