"""convert and revert change the class of modules and nothing else; the model means the same."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastbn

if TYPE_CHECKING:
    from collections.abc import Callable

# Class of stock, its counterpart, and an input for it.
CLASSES = [
    (nn.BatchNorm1d, fastbn.BatchNorm1d, (8, 6)),
    (nn.BatchNorm1d, fastbn.BatchNorm1d, (4, 6, 9)),
    (nn.BatchNorm2d, fastbn.BatchNorm2d, (4, 6, 5, 7)),
    (nn.BatchNorm3d, fastbn.BatchNorm3d, (2, 6, 3, 5, 4)),
]
each_class = pytest.mark.parametrize(
    ("stock", "fast", "shape"), CLASSES, ids=lambda value: getattr(value, "__name__", str(value))
)


class Residual(nn.Module):
    """A block with a branch, so that gradients meet a batch norm from two sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def network() -> nn.Sequential:
    """Convolutions, branches and a linear head, with 2-D and 1-D batch norms."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8, momentum=None),
        Residual(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(32),
        nn.Linear(32, 5),
    )


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, device: str
) -> torch.Tensor:
    """One step of training on random data; returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 8, 8, generator=generator).to(device)
    target = torch.randint(5, (6,), generator=generator).to(device)
    loss = nn.functional.cross_entropy(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@each_class
def test_class_is_all_that_changes(
    stock: type[nn.Module], fast: type[nn.Module], shape: tuple[int, ...]
) -> None:
    module = stock(6)
    module.train(False)
    state = dict(module.__dict__)
    tensors = {**module._parameters, **module._buffers}
    returned = fastbn.convert(module)
    assert returned is module
    assert type(module) is fast
    assert module.__dict__ == state
    assert all(getattr(module, name) is tensor for name, tensor in tensors.items())
    assert type(fastbn.revert(module)) is stock
    assert all(getattr(module, name) is tensor for name, tensor in tensors.items())


@each_class
@pytest.mark.parametrize("training", [True, False])
def test_converted_module_computes_the_same(
    stock: type[nn.Module],
    fast: type[nn.Module],
    shape: tuple[int, ...],
    training: bool,
    device: str,
) -> None:
    ours, theirs = (stock(6, device=device).train(training) for _ in range(2))
    fastbn.convert(ours)
    x = torch.randn(shape, device=device)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape))
        results.append([y, leaf.grad, module.weight.grad, module.bias.grad, *module.buffers()])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_training_goes_on_as_it_would_have(device: str) -> None:
    """Swapped between two steps, with the optimizer's state in use: the same curve."""
    model = network().to(device)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, plain)]
    for seed in range(8):
        if seed == 2:
            fastbn.convert(model)
        if seed == 6:
            fastbn.revert(model)
        both = zip((model, plain), optimizers, strict=True)
        losses = [step(m, optimizer, seed, device) for m, optimizer in both]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    model.eval(), plain.eval()
    x = torch.randn(4, 3, 8, 8, device=device)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-2, atol=1e-3)


def test_checkpoints_go_both_ways(device: str) -> None:
    model, converted = network().to(device), fastbn.convert(network()).to(device)
    converted.load_state_dict(model.state_dict())
    model.eval(), converted.eval()
    x = torch.randn(4, 3, 8, 8, device=device)
    torch.testing.assert_close(converted(x), model(x))
    other = network().to(device).eval()
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x), model(x))


def test_hooks_stay() -> None:
    module = nn.BatchNorm2d(3)
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda module, arguments, y: seen.append(y))
    y = fastbn.convert(module)(torch.randn(2, 3, 4, 4))
    assert seen[0] is y


class Renormalized(nn.BatchNorm2d):
    """Somebody's subclass."""


def parametrized() -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(3)
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    return module


LOOKALIKES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Renormalized(3), "subclass"),
    "parametrized": (parametrized, "parametrized"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "no parameters yet"),
    "instance": (lambda: nn.InstanceNorm2d(3), "not a batch norm"),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_lookalike_is_left_and_reported(kind: str) -> None:
    make, reason = LOOKALIKES[kind]
    model = nn.Sequential(nn.BatchNorm2d(3), make())
    before = type(model[1])
    report = fastbn.convert(model, dry_run=True)
    assert report.swapped == ["0"]
    assert list(report.left) == ["1"]
    assert reason in report.left["1"]
    fastbn.convert(model)
    assert type(model[0]) is fastbn.BatchNorm2d
    assert type(model[1]) is before


def test_dry_run_changes_nothing_and_tells_all() -> None:
    model = network()
    report = fastbn.convert(model, dry_run=True)
    assert report.swapped == ["1", "2.body.1", "2.body.4", "5"]
    assert not report.left
    assert "4 swapped, 0 left" in str(report)
    assert not any(isinstance(m, fastbn.BatchNorm2d) for m in model.modules())
    fastbn.convert(model)
    assert fastbn.convert(model, dry_run=True) == fastbn.SwapReport()
    assert fastbn.revert(model, dry_run=True).swapped == report.swapped
    assert type(model[1]) is fastbn.BatchNorm2d


def test_report_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastbn"):
        fastbn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3)))
    assert "1 swapped, 1 left" in caplog.text
    assert "left 1: InstanceNorm2d" in caplog.text


def test_shared_module_is_swapped_once() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert fastbn.convert(model, dry_run=True).swapped == ["0"]
    fastbn.convert(model)
    assert model[0] is model[2]
    assert type(model[2]) is fastbn.BatchNorm2d


def test_16_bit_statistics_bring_advice() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3).bfloat16(), nn.BatchNorm2d(3))
    report = fastbn.convert(model, dry_run=True)
    assert list(report.advice) == ["0"]
    assert "float32" in report.advice["0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reverted_16_bit_module_computes(dtype: torch.dtype, device: str) -> None:
    """Stock needs statistics of the parameters' dtype; fastbn had kept them in float32."""
    module = fastbn.convert(nn.BatchNorm2d(3)).to(device, dtype)
    x = torch.randn(4, 3, 5, 5).to(device, dtype)
    module(x)
    assert module.get_buffer("running_mean").dtype == torch.float32
    expected = module.eval()(x)
    fastbn.revert(module)
    assert module.get_buffer("running_mean").dtype == dtype
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(module(x), expected, rtol=4 * resolution, atol=4 * resolution)


MOVES = {
    "to the same": lambda module: module.to(torch.bfloat16),
    "cpu": lambda module: module.cpu(),
    "half": lambda module: module.half(),
    "float": lambda module: module.float(),
    "to a memory format": lambda module: module.to(memory_format=torch.channels_last),
    "there and back": lambda module: module.half().float().bfloat16(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("converted_first", [True, False])
def test_running_statistics_survive_moves_in_float32(
    converted_first: bool, move: str, device: str
) -> None:
    """To the last bit, which 16-bit types do not hold."""
    stock = nn.BatchNorm2d(3)
    module = fastbn.convert(stock).bfloat16() if converted_first else stock.bfloat16()
    module = fastbn.convert(module).to(device)
    exact = torch.tensor([1 + 2**-20, -3 - 2**-19, 1e-9], device=device)
    module.get_buffer("running_mean").copy_(exact)
    module.get_buffer("running_var").copy_(exact.abs())
    moved = MOVES[move](module)
    for name, expected in (("running_mean", exact), ("running_var", exact.abs())):
        statistic = getattr(moved, name)
        assert statistic.dtype == torch.float32
        assert torch.equal(statistic.to(device), expected)
