"""``nn.BatchNorm1d/2d/3d`` with the compiled operators underneath.

Differences from stock, all on purpose:

* Activation checkpointing runs forward again inside backward; that run, like any forward inside a
  backward, leaves the running statistics and the counter alone. Stock updates both twice a step.
* Gradients of an evaluation forward stay right when the module trains before its backward.
* ``momentum=None`` needs no synchronization with the device and compiles without graph breaks.
* Input, parameters and running statistics may have different dtypes.
* 16-bit modules keep running statistics in float32, where small updates are not lost.
* ``num_batches_tracked`` must be int64, which it is unless somebody replaced it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import dispatch
from ..fused import dispatch_act

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from typing_extensions import Self

    from ..activations import Activation

_STATISTICS = ("running_mean", "running_var")
HALF_DTYPES = (torch.bfloat16, torch.float16)

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_current_graph_task_id = torch._C._current_graph_task_id


class Frozen(NamedTuple):
    """What :func:`fastbn.unfreeze` makes of a module again.

    Attributes:
        training: the mode that :meth:`train` was told last.
        converted: freezing converted the module.
        requires_grad: of the parameters that were frozen, by name, whether they had gradients.
    """

    training: bool
    converted: bool
    requires_grad: dict[str, bool]


def is_exported() -> bool:
    """Whether operators are recorded for others, who know aten.batch_norm and nothing of ours."""
    if _is_compiling():
        # Not is_exporting(), which torch.compile takes to be always true before torch 2.13.
        return torch.compiler._is_exporting_flag
    return _is_tracing()


class FastBatchNorm(_BatchNorm):
    """What fastbn's batch norms add to stock's, those with an activation included."""

    # Set it on a class or an instance to update running statistics in recomputed forwards, as
    # stock does.
    update_on_recompute: bool = False

    # What computes y of all that a call takes and updates, without an activation and with one.
    # Synchronized batch norms have their own.
    _batch_norm: Callable[..., Tensor] = staticmethod(dispatch)
    _batch_norm_act: Callable[..., Tensor] = staticmethod(dispatch_act)

    # While statistics are fixed, which :func:`fastbn.freeze` does, the module is in eval.
    _frozen: Frozen | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        # Older versions of stock know no bias=.
        without_bias = {} if bias else {"bias": False}
        # By name, as between these nn.SyncBatchNorm has its process_group.
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            **without_bias,
        )
        self._widen_statistics({})

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalizes ``input`` (N, C, ...); see the class."""
        return self._forward(input)

    def _forward(
        self,
        input: Tensor,  # noqa: A002
        residual: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Tensor:
        """Chooses what a call takes and updates, whatever follows batch norm.

        Args:
            input: (N, C, ...).
            residual: added before the activation; None without one.
            activation: None for plain batch norm.
        """
        recomputed = False
        # is_exported() and more, in place, as a call would show in the time of small batches.
        if _is_compiling():
            if torch.compiler._is_exporting_flag:
                return self._exported_forward(input, residual, activation)
        elif isinstance(input, Proxy):
            return self._leaf(input.tracer, input, residual)
        elif _is_tracing():
            return self._exported_forward(input, residual, activation)
        else:
            # Inside a backward, where checkpointing computes a forward again.
            recomputed = _current_graph_task_id() != -1
        self._check_input_dim(input)  # type: ignore[no-untyped-call]

        parameters, buffers = self._parameters, self._buffers
        try:
            # As every call pays for nn.Module's attribute lookup.
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:
            # Parametrized, pruned or sharded.
            weight, bias = self.weight, self.bias
            mean, var = self.running_mean, self.running_var
        counter = None
        training = self.training
        if not training:
            training = mean is None and var is None
        elif not self.track_running_stats or (recomputed and not self.update_on_recompute):
            mean = var = None
        elif "num_batches_tracked" in buffers:
            counter = buffers["num_batches_tracked"]
        else:
            counter = self.num_batches_tracked
        if activation is None:
            return self._batch_norm(
                input, weight, bias, mean, var, counter, training, self.momentum, self.eps
            )
        return self._batch_norm_act(
            input,
            residual,
            weight,
            bias,
            mean,
            var,
            counter,
            training,
            self.momentum,
            self.eps,
            activation,
        )

    def _leaf(self, tracer: Any, input: Tensor, residual: Tensor | None) -> Tensor:  # noqa: A002
        """This call in a symbolic trace, a leaf of it as calls of stock's modules are."""
        arguments = (input,) if residual is None else (input, residual)
        path = tracer.path_of_module(self)
        result: Tensor = tracer.create_proxy("call_module", path, arguments, {})
        return result

    def _exported_forward(
        self,
        input: Tensor,  # noqa: A002
        residual: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        """Stock's forward: exporters know aten.batch_norm and nothing of ours."""
        y = self._exported_batch_norm(input)
        if residual is not None:
            y = y + residual
        return y if activation is None else activation(y)

    def _exported_batch_norm(self, input: Tensor) -> Tensor:  # noqa: A002
        weight, mean, var = self.weight, self.running_mean, self.running_var
        if self.training or weight is None or mean is None or var is None:
            return _BatchNorm.forward(self, input)
        if mean.dtype == weight.dtype or weight.dtype not in HALF_DTYPES:
            return _BatchNorm.forward(self, input)
        # Which takes 16-bit parameters with statistics of the same dtype only.
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
        return F.batch_norm(input, mean, var, weight, self.bias, eps=self.eps)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; of a frozen module, that after :func:`fastbn.unfreeze`."""
        super().train(mode)
        if self._frozen is not None:
            self._frozen = self._frozen._replace(training=mode)
            self.training = False
        return self

    def extra_repr(self) -> str:
        """Stock's, and whether the module is frozen."""
        stocks: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return stocks if self._frozen is None else f"{stocks}, frozen"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen_statistics(before)
        return self

    def _widen_statistics(self, before: dict[str, Tensor | None]) -> None:
        """Keeps running statistics that just became 16-bit in float32, as in ``before``."""
        for name in _STATISTICS:
            now, old = self._buffers.get(name), before.get(name)
            if now is None or now.dtype not in HALF_DTYPES:
                continue
            if old is None or old.dtype in HALF_DTYPES or old.device.type == "meta":
                self._buffers[name] = now.float()
            else:
                self._buffers[name] = old.to(now.device, torch.float32)


class BatchNorm1d(FastBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, faster: (N, C) or (N, C, L) to the same shape."""


class BatchNorm2d(FastBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, faster: (N, C, H, W) to the same shape."""


class BatchNorm3d(FastBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, faster: (N, C, D, H, W) to the same shape."""
