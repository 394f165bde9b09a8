"""Modules put together as widely used networks put them, each with batch norms to fuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

CHANNELS = 6


def conv(kernel: int = 1) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, bias=False)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(CHANNELS)


class ConvNormAct(nn.Sequential):
    """A sequence of its own; without an activation, what counts ends with the batch norm."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__(conv(), norm(), nn.Identity(), *([activation] if activation else []))


class Basic(nn.Module):
    """Residual block with one activation module for two places, and an addition in place."""

    def __init__(self, downsample: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3), norm()
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(3), norm()
        self.downsample = nn.Sequential(conv(), norm()) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class Transform(nn.Module):
    """Residual block whose branch is a module of its own, which ends with the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(ConvNormAct(nn.SiLU()), ConvNormAct())
        self.drop_path = nn.Identity()
        self.activation = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.f(x))
        return self.activation(x)  # type: ignore[no-any-return]


class Functional(nn.Module):
    """Functions and methods for activations and for additions."""

    def __init__(self, slope: float = 0.2) -> None:
        super().__init__()
        self.conv = conv()
        self.norms = nn.ModuleList(norm() for _ in range(7))
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth, sixth, seventh = self.norms
        x = F.relu(first(self.conv(x)), inplace=True)
        x = F.leaky_relu(second(self.conv(x)), self.slope)
        x = torch.tanh(torch.add(x, third(self.conv(x))))
        x = fourth(self.conv(x)).add_(x).relu_()
        x = F.elu(fifth(self.conv(x)).add(x), alpha=0.5)
        x = F.gelu(sixth(self.conv(x)) + x, approximate="tanh")
        return torch.sigmoid(x + seventh(self.conv(x)))


class DenseLayer(nn.Module):
    """Takes a tensor or a list of them, and activates before it convolves."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs * CHANNELS), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs * CHANNELS, CHANNELS, 1)

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:  # noqa: A002
        features = [input] if isinstance(input, Tensor) else input
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Feeds layers all that came before, ends with a batch norm, and activates by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs) for inputs in (1, 2))
        self.reduce = nn.Sequential(nn.Conv2d(3 * CHANNELS, CHANNELS, 1), norm())

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features if len(features) > 1 else x))
        return F.relu(self.reduce(torch.cat(features, 1)), inplace=True)


class Reparametrized(nn.Module):
    """Three branches that end with batch norms; the last is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = norm()
        self.large, self.small = ConvNormAct(), ConvNormAct()
        self.drop_path = nn.Identity()
        self.act = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity(x)
        x = self.drop_path(self.large(x) + self.small(x))
        x += identity
        return self.act(x)  # type: ignore[no-any-return]


class Separable(nn.Module):
    """Ends with a batch norm, without being a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_dw, self.conv_pw = conv(3), conv()
        self.bn = norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv_pw(self.conv_dw(x)))  # type: ignore[no-any-return]


class Concatenated(nn.Module):
    """Takes a list of tensors without asking whether it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2 * CHANNELS, CHANNELS, 1), norm(), nn.ReLU()

    def forward(self, children: list[Tensor]) -> Tensor:
        x = self.bn(self.conv(torch.cat(children, 1)))
        x += children[0]
        return self.relu(x)  # type: ignore[no-any-return]


class Tree(nn.Module):
    """Gives its root a list."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.root = ConvNormAct(nn.ReLU()), Concatenated()

    def forward(self, x: Tensor) -> Tensor:
        return self.root([self.left(x), x])  # type: ignore[no-any-return]


class Features(nn.ModuleDict):
    """A dictionary of modules with a forward."""

    def __init__(self) -> None:
        super().__init__({"conv": conv(), "bn": norm(), "act": nn.ReLU()})

    def forward(self, x: Tensor) -> Tensor:
        for module in self.values():
            x = module(x)
        return x


class Auxiliary(nn.Module):
    """Gives a second output in training, from a batch norm that is not called in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), norm()
        self.aux, self.aux_bn = conv(), norm()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = F.relu(self.bn(self.conv(x)))
        if self.training:
            return y, F.relu(self.aux_bn(self.aux(x)))
        return y


class Summed(nn.Module):
    """Adds branches in place to the first of them, all of which end with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = norm()
        self.branches = nn.ModuleList(ConvNormAct() for _ in range(3))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity(x)
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out += branch(x)
        out += identity
        return self.act(out)  # type: ignore[no-any-return]


def padded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Pads by what depends on sizes, which no trace knows."""
    missing = [int(size) % 2 for size in x.shape[-2:]]
    if max(missing) > 0 and layer.stride == (1, 1):
        x = F.pad(x, (0, missing[1], 0, missing[0]))
    return x


class Padded(nn.Module):
    """Calls a function that has to be taken as a whole, and has modules that may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.normalization, self.activation = conv(), norm(), nn.ReLU6()

    def forward(self, features: Tensor) -> Tensor:
        features = self.convolution(padded(features, self.convolution))
        if self.normalization is not None:
            features = self.normalization(features)
        if self.activation is not None:
            features = self.activation(features)
        return features


class Exchange(nn.Module):
    """Changes the list that it takes, and adds what the list then has."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvNormAct(nn.ReLU()) for _ in range(2))
        self.fuse, self.act = ConvNormAct(), nn.ReLU()

    def forward(self, x: list[Tensor]) -> Tensor:
        for number, branch in enumerate(self.branches):
            x[number] = branch(x[number])
        return self.act(self.fuse(x[0]) + x[1])  # type: ignore[no-any-return]


class ManyResolutions(nn.Module):
    """Asks whether it has a list or, as its last layers are what they are, a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act, self.conv = norm(), nn.ReLU(inplace=True), conv()
        self.exchange = Exchange()
        self.final = nn.Sequential(conv(), norm(), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(x))
        y = self.final(self.exchange([x, self.conv(x)]))
        return y[0] if isinstance(y, list) else y  # type: ignore[no-any-return]


# Blocks, and what is fused in them.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "ConvNormAct": (lambda: ConvNormAct(nn.ReLU6()), {"1": "relu6"}),
    "Basic": (Basic, {"bn1": "relu", "bn2": "addition and relu"}),
    "Basic, downsample": (
        lambda: Basic(downsample=True),
        {"bn1": "relu", "bn2": "addition and relu"},
    ),
    "Transform": (Transform, {"f.0.1": "silu", "f.1.1": "addition and hardswish"}),
    "Functional": (
        Functional,
        {
            "norms.0": "relu",
            "norms.1": "leaky_relu",
            "norms.2": "addition and tanh",
            "norms.3": "addition and relu",
            "norms.4": "addition and elu",
            "norms.5": "addition and gelu_tanh",
            "norms.6": "addition and sigmoid",
        },
    ),
    "DenseBlock": (
        DenseBlock,
        {"layers.0.norm1": "relu", "layers.1.norm1": "relu", "reduce.1": "relu"},
    ),
    "Reparametrized": (Reparametrized, {"identity": "addition and mish"}),
    "Separable": (lambda: nn.Sequential(Separable(), nn.Mish(), Separable()), {"0.bn": "mish"}),
    "Tree": (Tree, {"left.1": "relu", "root.bn": "addition and relu"}),
    "Summed": (Summed, {"identity": "addition and relu"}),
    "Features": (Features, {"bn": "relu"}),
    "Padded": (Padded, {"normalization": "relu6"}),
    "ManyResolutions": (
        ManyResolutions,
        {
            "bn": "relu",
            "exchange.branches.0.1": "relu",
            "exchange.branches.1.1": "relu",
            "exchange.fuse.1": "addition and relu",
            "final.1": "tanh",
        },
    ),
    "Auxiliary": (Auxiliary, {"bn": "relu", "aux_bn": "relu"}),
}
