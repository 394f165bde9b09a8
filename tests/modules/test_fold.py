"""A folded model computes the same with fewer layers, and what is not certain is not folded."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations

import fastbn
from tests.support.lookalikes import (
    TimmBatchNormAct2d,
    TimmFrozenBatchNormAct2d,
    TimmSyncBatchNormAct,
    TorchvisionFrozenBatchNorm2d,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Folding rounds the weights of the layer once more.
FOLDED: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def prepared(model: nn.Module) -> nn.Module:
    """In eval, with random statistics and parameters."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def synchronized_by_timm() -> nn.Module:
    module = TimmSyncBatchNormAct(4)
    module.act, module.drop = nn.ReLU(), nn.Identity()
    return module


# Layer and norm, and a shape they take.
PAIRS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "1d": (lambda: [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (2, 3, 8)),
    "2d": (lambda: [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)], (2, 3, 8, 7)),
    "3d": (lambda: [nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)], (2, 3, 4, 5, 4)),
    "no bias": (lambda: [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], (2, 3, 8, 7)),
    "groups": (lambda: [nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)], (2, 4, 8, 7)),
    "transposed": (lambda: [nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 5, 5)),
    "linear": (lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4)], (5, 3)),
    "linear, no bias": (lambda: [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)], (5, 3)),
    "not affine": (lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)], (2, 3, 4, 4)),
    "synchronized": (lambda: [nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)], (2, 3, 4, 4)),
    "fastbn": (lambda: [nn.Conv2d(3, 4, 1), fastbn.BatchNorm2d(4, eps=0.1)], (2, 3, 4, 4)),
    "activation": (
        lambda: [nn.Conv2d(3, 4, 1), fastbn.BatchNormAct2d(4, activation="silu")],
        (2, 3, 4, 4),
    ),
    "linear, activation": (
        lambda: [nn.Linear(3, 4), fastbn.BatchNormAct1d(4, activation="tanh")],
        (5, 3),
    ),
    "timm": (lambda: [nn.Conv2d(3, 4, 1), TimmBatchNormAct2d(4, act_layer=nn.ELU)], (2, 3, 4, 4)),
    "timm synchronized": (lambda: [nn.Conv2d(3, 4, 1), synchronized_by_timm()], (2, 3, 4, 4)),
    "timm frozen": (lambda: [nn.Conv2d(3, 4, 1), TimmFrozenBatchNormAct2d(4)], (2, 3, 4, 4)),
    "torchvision frozen": (
        lambda: [nn.Conv2d(3, 4, 1), TorchvisionFrozenBatchNorm2d(4)],
        (2, 3, 4, 4),
    ),
}
each_pair = pytest.mark.parametrize("kind", PAIRS)


@each_pair
@pytest.mark.parametrize("converted", [False, True], ids=["as it is", "converted"])
def test_pair_becomes_a_layer(kind: str, converted: bool, device: str) -> None:
    make, shape = PAIRS[kind]
    model = prepared(nn.Sequential(*make())).to(device)
    if converted:
        fastbn.convert(model)
    layer = model.get_submodule("0")
    x = torch.randn(shape, device=device)
    expected = model(x)
    report = fastbn.fold(model, dry_run=True)
    assert report == fastbn.FoldReport({"1": "0"})
    assert torch.equal(model(x), expected)
    assert fastbn.fold(model) is model
    assert model.get_submodule("0") is layer
    assert not list(model.get_submodule("1").parameters())
    assert not list(model.get_submodule("1").buffers())
    torch.testing.assert_close(model(x), expected, **FOLDED)


def test_activation_of_timm_keeps_its_path() -> None:
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), TimmBatchNormAct2d(4, act_layer=nn.SELU)))
    act = model.get_submodule("1.act")
    fastbn.fold(fastbn.convert(model))
    assert model.get_submodule("1.act") is act


class Block(nn.Module):
    """The first pair is one, the second ends in a sum; the last norm follows that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = fastbn.BatchNormAct2d(4, activation="leaky_relu")
        self.norm3 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        z: Tensor = self.norm3(self.norm2(self.conv2(y), x))
        return z


def test_block_is_folded_and_still_traces(device: str) -> None:
    model = prepared(Block()).to(device)
    x = torch.randn(2, 4, 6, 6, device=device)
    expected = model(x)
    report = fastbn.fold(model, dry_run=True)
    assert report.folded == {"norm1": "conv1", "norm2": "conv2"}
    assert report.left == {
        "norm3": "it follows BatchNormAct2d, which is neither a convolution nor a linear layer of "
        "stock"
    }
    fastbn.fold(model)
    torch.testing.assert_close(model(x), expected, **FOLDED)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected, **FOLDED)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), expected, **FOLDED)
    assert "activation=leaky_relu, negative_slope=0.01" in repr(model.get_submodule("norm2"))
    assert fastbn.fold(model, dry_run=True).folded == {}


class Pair(nn.Module):
    """Of which forward makes what it likes."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def unclear(module: Any, x: Tensor) -> Tensor:
    y: Tensor = module.norm(module.conv(x))
    return y if y.sum() > 0 else y + 1


UNCERTAIN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "result read by others": (lambda m, x: (y := m.conv(x)) + m.norm(y), "the only one that gets"),
    "layer called again": (lambda m, x: m.norm(m.conv(m.conv(x))), "not the only one that gets"),
    "norm called again": (lambda m, x: m.norm(m.norm(m.conv(x))), "follow one module alone"),
    "something between": (lambda m, x: m.norm(m.conv(x).relu()), "follow one module alone"),
    "called by name": (lambda m, x: m.norm(input=m.conv(x)), "follow one module alone"),
    "weight read": (lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum(), "are read by others"),
    "norm's weight read": (lambda m, x: m.norm(m.conv(x)) * m.norm.weight[0], "read by others"),
    "not called": (lambda m, x: m.conv(x), "forward does not call it"),
    "does not trace": (unclear, "does not trace (TraceError"),
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_uncertain_pair_is_left(name: str) -> None:
    forward, reason = UNCERTAIN[name]
    model = prepared(Pair(forward))
    expected = copy.deepcopy(model)
    report = fastbn.fold(model, dry_run=True)
    assert not report.folded
    assert reason in report.left["norm"]
    assert reason in str(report)
    fastbn.fold(model)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(model(x), expected(x))
    assert type(model.norm) is nn.BatchNorm2d


def test_pair_that_is_called_twice_is_folded() -> None:
    model = prepared(Pair(lambda m, x: m.norm(m.conv(torch.relu(m.norm(m.conv(x)))))))
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    assert fastbn.fold(model, dry_run=True).folded == {"norm": "conv"}
    torch.testing.assert_close(fastbn.fold(model)(x), expected, **FOLDED)


class Optional(nn.Module):
    """Its second argument decides what becomes of the layer's result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(x)
        if skip is None:
            return y
        z: Tensor = self.norm(y) + skip
        return z


def test_pair_that_depends_on_an_argument_is_left() -> None:
    report = fastbn.fold(prepared(Optional()), dry_run=True)
    assert report.left == {"norm": "what it follows depends on which arguments forward gets"}


def test_of_an_untraceable_model_sequences_are_folded() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.Conv2d(4, 4, 1)
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.twice = nn.Sequential(shared, nn.BatchNorm2d(4), shared)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.twice(self.body(x))
            return y if y.sum() > 0 else y + 1

    model = prepared(Untraceable())
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    report = fastbn.fold(model, dry_run=True)
    assert report.folded == {"body.1": "body.0"}
    assert "does not trace (TraceError: " in report.left["twice.1"]
    torch.testing.assert_close(fastbn.fold(model)(x), expected, **FOLDED)


def tied() -> list[nn.Module]:
    one, other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    other.weight = one.weight
    return [one, nn.BatchNorm2d(4), other]


def with_hook(which: int) -> list[nn.Module]:
    modules: list[nn.Module] = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    modules[which].register_forward_hook(lambda *_: None)
    return modules


class OwnNorm(nn.BatchNorm2d):
    """Somebody's subclass."""


class OwnConvolution(nn.Conv2d):
    """Somebody's subclass."""


UNSUITED: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "tied weights": (tied, "another module's, too"),
    "hook on the layer": (lambda: with_hook(0), "hooks"),
    "hook on the norm": (lambda: with_hook(1), "hooks"),
    "own norm": (lambda: [nn.Conv2d(4, 4, 1), OwnNorm(4)], "what OwnNorm computes is not known"),
    "own layer": (lambda: [OwnConvolution(4, 4, 1), nn.BatchNorm2d(4)], "follow one module alone"),
    "no statistics": (
        lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)],
        "no running statistics",
    ),
    "groups of a transposed": (
        lambda: [nn.ConvTranspose2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)],
        "ConvTranspose2d has groups",
    ),
    "images after linear": (lambda: [nn.Linear(4, 4), nn.BatchNorm2d(4)], "another dimension"),
    "training": (lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4).train()], "in training mode"),
    "computed weight": (
        lambda: [parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)],
        "ParametrizedConv2d",
    ),
    "channels": (lambda: [nn.Conv2d(4, 3, 1), nn.BatchNorm2d(4)], "not have as many channels"),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_pair_is_left(name: str) -> None:
    make, reason = UNSUITED[name]
    modules = make()
    modes = [module.training for module in modules]
    model = nn.Sequential(*modules).eval()
    modules[1].training = name == "training" and modes[1]
    state = copy.deepcopy(model.state_dict())
    report = fastbn.fold(model, dry_run=True)
    assert not report.folded
    assert reason in report.left["1"]
    fastbn.fold(model)
    for before, after in zip(state.values(), model.state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_norm_of_a_linear_layer_is_for_matrices() -> None:
    """Of three dimensions batch norm takes the second for channels, a linear layer the third."""
    model = fastbn.fold(prepared(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))))
    with pytest.raises(ValueError, match=r"expected 2D input \(got 3D input\)"):
        model(torch.randn(2, 4, 3))


def test_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        fastbn.fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_the_layer_stay(dtype: torch.dtype) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), fastbn.BatchNorm2d(4))).to(dtype)
    x = torch.randn(2, 3, 5, 5, dtype=dtype)
    expected = model(x)
    fastbn.fold(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # Both sides round intermediate results, of up to 16 or so, to the dtype.
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


def test_forward_leaves_nothing_of_the_trace_behind() -> None:
    def remember(module: Any, x: Tensor) -> Tensor:
        module.last = module.norm(module.conv(x))
        y: Tensor = module.last
        return y

    model: Any = prepared(Pair(remember))
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    fastbn.fold(model)
    assert model.last is expected
    torch.testing.assert_close(model(x), expected, **FOLDED)
