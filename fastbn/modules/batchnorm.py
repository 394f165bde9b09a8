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

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Proxy

from ..functional import dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from typing_extensions import Self

_STATISTICS = ("running_mean", "running_var")
HALF_DTYPES = (torch.bfloat16, torch.float16)

_is_tracing = torch._C._is_tracing
_current_graph_task_id = torch._C._current_graph_task_id


class _FastBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the three classes add to stock's."""

    # Set it on a class or an instance to update running statistics in recomputed forwards, as
    # stock does.
    update_on_recompute: bool = False

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
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **without_bias
        )
        self._widen_statistics({})

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Normalizes ``input`` (N, C, ...); see the class."""
        recomputed = False
        if torch.compiler.is_compiling():
            # Not is_exporting(), which torch.compile takes to be always true before torch 2.13.
            if torch.compiler._is_exporting_flag:
                return self._exported_forward(input)
        elif isinstance(input, Proxy):
            # A leaf for symbolic tracing, as stock's modules are.
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        elif _is_tracing():
            return self._exported_forward(input)
        else:
            # Inside a backward, where checkpointing computes a forward again.
            recomputed = _current_graph_task_id() != -1
        self._check_input_dim(input)  # type: ignore[no-untyped-call]

        # Straight from the dictionaries, as every call pays for nn.Module's attribute lookup. What
        # is not there (parametrized, pruned or sharded) the lookup finds.
        parameters, buffers = self._parameters, self._buffers
        weight = parameters["weight"] if "weight" in parameters else self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias
        mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean
        var = buffers["running_var"] if "running_var" in buffers else self.running_var
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
        return dispatch(input, weight, bias, mean, var, counter, training, self.momentum, self.eps)

    def _exported_forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Stock's forward: exporters know aten.batch_norm and nothing of ours."""
        weight, mean, var = self.weight, self.running_mean, self.running_var
        if self.training or weight is None or mean is None or var is None:
            return super().forward(input)
        if mean.dtype == weight.dtype or weight.dtype not in HALF_DTYPES:
            return super().forward(input)
        # Which takes 16-bit parameters with statistics of the same dtype only.
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
        return F.batch_norm(input, mean, var, weight, self.bias, eps=self.eps)

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


class BatchNorm1d(_FastBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, faster: (N, C) or (N, C, L) to the same shape."""


class BatchNorm2d(_FastBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, faster: (N, C, H, W) to the same shape."""


class BatchNorm3d(_FastBatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, faster: (N, C, D, H, W) to the same shape."""
