"""Batch norm, a residual and an activation function as one module."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import Proxy

from ..activations import activation_of
from .batchnorm import FastBatchNorm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..activations import Activation

_STOCKS_CONVERTER = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]


class NotForStocksConverter(nn.Module):
    """Refuses ``nn.SyncBatchNorm.convert_sync_batchnorm``, which would drop the activation.

    It makes a SyncBatchNorm of whatever is a ``_BatchNorm``, which these modules have to be for
    everyone else, and gives no module a say in that. But it asks each for ``qconfig``, which
    nothing but quantization knows, so there it can be told no. Who asks is seen by the code that
    runs; all others find an attribute like any other.
    """

    # What TorchScript shall not compile when it traces.
    __jit_unused_properties__: tuple[str, ...] = ("qconfig",)

    def _instead_of_stocks_converter(self) -> str:
        return "use fastbn.convert_sync_batchnorm"

    @property
    def qconfig(self) -> Any:
        """The attribute of that name that quantization sets, if it did."""
        if sys._getframe(1).f_code is _STOCKS_CONVERTER:
            raise RuntimeError(
                "nn.SyncBatchNorm.convert_sync_batchnorm would drop the activation of "
                f"{type(self).__name__}; {self._instead_of_stocks_converter()}"
            )
        try:
            return self.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]


class FastBatchNormAct(NotForStocksConverter, FastBatchNorm):
    """What the three classes add to those without an activation."""

    _activation: Activation

    __jit_unused_properties__ = (
        *NotForStocksConverter.__jit_unused_properties__,
        "activation",
        "activation_kwargs",
    )

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
        activation: str | None = "relu",
        activation_kwargs: Mapping[str, object] | None = None,
    ) -> None:
        function = activation_of(activation, activation_kwargs)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self._activation = function

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002
        """``activation(batch_norm(input) + residual)``; see the class.

        Args:
            input: (N, C, ...).
            residual: like ``input``, or what PyTorch's addition broadcasts and promotes.
        """
        if isinstance(residual, Proxy):
            return self._leaf(residual.tracer, input, residual)
        return self._forward(input, residual, self._activation)

    @property
    def activation(self) -> str:
        """The name of the activation function, ``identity`` where there is none."""
        return self._activation.name

    @property
    def activation_kwargs(self) -> dict[str, float]:
        """The keyword arguments of the activation function, those left out included."""
        return self._activation.kwargs

    def extra_repr(self) -> str:
        """Stock's, and the activation function."""
        given = "".join(f", {key}={value}" for key, value in self.activation_kwargs.items())
        return f"{super().extra_repr()}, activation={self.activation}{given}"


class BatchNormAct1d(FastBatchNormAct, nn.BatchNorm1d):
    """Batch norm of (N, C) or (N, C, L), a residual and an activation function in one pass.

    ``module(x)`` is ``activation(batch_norm(x))`` and ``module(x, residual)`` is
    ``activation(batch_norm(x) + residual)``, of the shape of x; see :func:`fastbn.batch_norm_act`
    for the functions, rounding and gradients. State, checks and all else are those of
    :class:`torch.nn.BatchNorm1d`.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics; None for a cumulative average.
        affine: have weight and bias.
        track_running_stats: have running statistics.
        device: of parameters and buffers.
        dtype: of parameters; that of running statistics is float32 where this has 16 bits.
        bias: have a bias, where ``affine``.
        activation: the name of a function, or None for none.
        activation_kwargs: keyword arguments as PyTorch's module of that name takes them.

    Raises:
        ValueError: no activation of that name; an input of another rank.
        TypeError: a keyword argument that the activation does not have.
    """


class BatchNormAct2d(FastBatchNormAct, nn.BatchNorm2d):
    """:class:`BatchNormAct1d` for (N, C, H, W)."""


class BatchNormAct3d(FastBatchNormAct, nn.BatchNorm3d):
    """:class:`BatchNormAct1d` for (N, C, D, H, W)."""
