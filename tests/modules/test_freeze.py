"""Frozen batch norms compute what evaluation computes, whatever train() says, until unfrozen."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fastbn
from tests.support.lookalikes import TimmBatchNormAct2d, TorchvisionFrozenBatchNorm2d
from tests.support.tolerances import AGAINST_STOCK

if TYPE_CHECKING:
    from collections.abc import Callable

MODULES: dict[str, Callable[[], nn.Module]] = {
    "stock": lambda: nn.BatchNorm2d(4),
    "fastbn": lambda: fastbn.BatchNorm2d(4, momentum=None),
    "with activation": lambda: fastbn.BatchNormAct2d(4, activation="silu"),
    "timm": lambda: TimmBatchNormAct2d(4),
    "without parameters": lambda: nn.BatchNorm2d(4, affine=False),
}
each = pytest.mark.parametrize("kind", MODULES)
either = pytest.mark.parametrize("parameters", [False, True], ids=["statistics", "all"])


def network(kind: str, device: str = "cpu") -> nn.Sequential:
    """With statistics that are not those of a fresh module."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MODULES[kind](), nn.Dropout(0.0)).to(device)
    for _ in range(3):
        model(torch.randn(5, 3, 6, 6, device=device) * 2 + 1)
    return model


def outcome(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """Result, gradients and state of a step."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [y.detach(), leaf.grad, *gradients, *(b.clone() for b in model.buffers())]


@each
@either
def test_frozen_module_computes_as_in_evaluation(kind: str, parameters: bool, device: str) -> None:
    model = network(kind, device)
    evaluated = copy.deepcopy(model).eval()
    if parameters:
        for parameter in evaluated[1].parameters():
            parameter.requires_grad_(False)
    assert fastbn.freeze(model, parameters=parameters) is model
    x = torch.randn(5, 3, 6, 6, device=device)
    for _ in range(2):
        model.train()
        for ours, expected in zip(outcome(model, x), outcome(evaluated, x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@each
@either
def test_unfreezing_leaves_no_trace(kind: str, parameters: bool) -> None:
    model = network(kind)
    module = model[1]
    if module._parameters["weight"] is not None:
        module.get_parameter("weight").requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    cls, attributes = type(module), dict(module.__dict__)
    fastbn.freeze(model, parameters=parameters)
    assert fastbn.unfreeze(model) is model
    assert type(module) is cls
    assert module.__dict__ == attributes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@each
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_unfreezing_returns_to_the_mode_that_was_asked_for(
    kind: str, before: bool, after: bool
) -> None:
    model = network(kind).train(before)
    fastbn.freeze(model)
    assert not model[1].training
    fastbn.unfreeze(model)
    assert model[1].training is before
    fastbn.freeze(model)
    model.train(after)
    assert [module.training for module in model] == [after, False, after]
    fastbn.unfreeze(model)
    assert [module.training for module in model] == [after, after, after]


def test_training_goes_on_after_unfreezing() -> None:
    model = network("fastbn")
    plain = copy.deepcopy(model)
    x = torch.randn(5, 3, 6, 6)
    fastbn.freeze(model)
    model(x)
    fastbn.unfreeze(model)
    for ours, expected in zip(outcome(model, x), outcome(plain, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_drop_of_a_frozen_module_follows_the_mode() -> None:
    model = nn.Sequential(TimmBatchNormAct2d(4, drop_layer=nn.Dropout2d))
    fastbn.freeze(model)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {"": True, "0": False, "0.drop": True, "0.act": True}


def test_parameters_can_be_frozen_afterwards() -> None:
    module = fastbn.freeze(fastbn.BatchNorm2d(4))
    module.bias.requires_grad_(False)
    fastbn.freeze(module, parameters=True)
    fastbn.freeze(module, parameters=True)
    assert not module.weight.requires_grad
    fastbn.unfreeze(module)
    assert [module.weight.requires_grad, module.bias.requires_grad] == [True, False]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_frozen_parameters_make_backward_a_pass_over_dy(
    layout: torch.memory_format, device: str
) -> None:
    """Backward does not look at x, which can be anything by then."""
    module: Any = network("fastbn", device)[1]
    fastbn.freeze(module, parameters=True)
    x = torch.randn(5, 4, 6, 6, device=device).to(memory_format=layout).requires_grad_()
    dy = torch.randn(5, 4, 6, 6, device=device)
    y = module(x)
    x.data.fill_(torch.nan)
    (dx,) = torch.autograd.grad(y, x, dy)
    invstd = 1 / (module.running_var + module.eps).sqrt()
    expected = dy * (module.weight * invstd).reshape(1, -1, 1, 1)
    torch.testing.assert_close(dx, expected, **AGAINST_STOCK)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@each
@pytest.mark.usefixtures("importable_lookalikes")
def test_copies_are_frozen_and_can_be_unfrozen(kind: str, how: str) -> None:
    model = fastbn.freeze(network(kind), parameters=True)
    twin = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)
    twin.train()
    x = torch.randn(5, 3, 6, 6)
    assert torch.equal(twin(x), model(x))
    assert repr(twin) == repr(model)
    assert "frozen" in repr(twin)
    fastbn.unfreeze(twin)
    assert "frozen" not in repr(twin)
    assert type(twin[1]) is type(MODULES[kind]())


def test_frozen_module_is_not_reverted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), fastbn.freeze(nn.BatchNorm2d(4)))
    fastbn.convert(model)
    report = fastbn.revert(model, dry_run=True)
    assert report.swapped == ["0"]
    assert list(report.left) == ["1"]
    assert "unfreeze it first" in report.left["1"]
    fastbn.revert(model)
    assert [type(module) for module in model] == [nn.BatchNorm2d, fastbn.BatchNorm2d]


def test_16_bit_module_goes_back_to_stock_s_statistics(device: str) -> None:
    module = nn.BatchNorm2d(4).to(device)
    fastbn.freeze(module).to(torch.bfloat16)
    assert module.running_mean is not None
    assert module.running_mean.dtype == torch.float32
    fastbn.unfreeze(module)
    assert module.running_mean.dtype == torch.bfloat16
    x = torch.randn(4, 4, 5, 5, device=device, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16


def test_what_cannot_be_frozen_brings_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.LazyBatchNorm2d(),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        TorchvisionFrozenBatchNorm2d(4),
    )
    classes = [type(module) for module in model]
    with caplog.at_level(logging.WARNING, logger="fastbn"):
        fastbn.freeze(model)
    assert caplog.messages == [
        "freeze: left 1: LazyBatchNorm2d has no parameters yet; run a batch through the model "
        "first",
        "freeze: left 2: it has no running statistics to be fixed",
    ]
    assert [module.training for module in model] == [False, True, True, True, True]
    fastbn.unfreeze(model)
    assert [type(module) for module in model] == classes
    assert all(module.training for module in model)


def test_compiled_and_exported_model_stays_frozen() -> None:
    model = fastbn.freeze(network("fastbn"), parameters=True)
    model.train()
    x = torch.randn(5, 3, 6, 6)
    expected, counter = model(x), model[1].get_buffer("num_batches_tracked").clone()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, **AGAINST_STOCK)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, **AGAINST_STOCK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected, **AGAINST_STOCK)
    assert torch.equal(model[1].get_buffer("num_batches_tracked"), counter)
