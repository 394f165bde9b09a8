"""A residual network of fused layers, its training step, and what that calls and leaves."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastbn

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


def norm(channels: int, activation: str) -> nn.Module:
    keywords = {"leaky_relu": {"negative_slope": 0.2}, "elu": {"alpha": 0.7}}
    return fastbn.BatchNormAct2d(
        channels, activation=activation, activation_kwargs=keywords.get(activation)
    )


class Bottleneck(nn.Module):
    """A residual block of fused layers."""

    def __init__(self, channels: int, activation: str, *, widens: bool) -> None:
        super().__init__()
        inner = channels // 2
        inputs = inner if widens else channels
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1), norm(inner, activation)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1), norm(inner, activation)
        self.conv3, self.bn3 = nn.Conv2d(inner, channels, 1), norm(channels, activation)
        self.shortcut = nn.Sequential()
        if widens:
            self.shortcut.extend([nn.Conv2d(inputs, channels, 1), fastbn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(y), self.shortcut(x))  # type: ignore[no-any-return]


def network(
    device: str, activation: str = "relu", channels: int = 8, blocks: int = 4
) -> nn.Sequential:
    """A stage of residual blocks; what follows saves a tensor of another shape of its output."""
    return nn.Sequential(
        nn.Conv2d(3, channels // 2, 3),
        norm(channels // 2, activation),
        *(Bottleneck(channels, activation, widens=block == 0) for block in range(blocks)),
        nn.Flatten(),
        nn.Linear(64 * channels, 5),
    ).to(device)


def images(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 10, 10, device=device).to(dtype)


def step(
    model: nn.Module,
    x: Tensor,
    context: AbstractContextManager[object] | None = None,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
) -> list[Tensor]:
    """The output, gradients and buffers of a training step; the model stays as it is."""
    model = copy.deepcopy(model)
    x = x.detach().requires_grad_()
    with context or nullcontext():
        y = call(model, x)
    y.square().sum().backward()
    leaves = [x, *model.parameters()]
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None), *model.buffers()]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class Calls(TorchDispatchMode):
    """Notes the operators that are called, and the memory of what they return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return results

    def recomputed(self) -> int:
        return self.names.count("batch_norm_act_apply")

    def living_bytes(self, *besides: Tensor) -> int:
        """Of what is alive; `besides` was there before, and operators returned views of it."""
        before = {tensor.untyped_storage()._cdata for tensor in besides}
        return sum(
            size
            for address, (storage, size) in self.storages.items()
            if address not in before and not storage.expired()
        )
