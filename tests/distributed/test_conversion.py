"""convert_sync_batchnorm changes classes and a process group, says what stays, and is undone."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastbn
from fastbn.modules.sync import Synchronized
from tests.support.blocks import CHANNELS, Basic, Transform
from tests.support.lookalikes import TimmBatchNormAct2d, TimmSyncBatchNormAct
from tests.support.ranks import collectives, on_threads
from tests.support.tolerances import AGAINST_STOCK_FLOAT64

if TYPE_CHECKING:
    from collections.abc import Callable


def timm_sync(channels: int) -> nn.Module:
    """As timm's own converter makes it."""
    module = TimmSyncBatchNormAct(channels)
    module.add_module("drop", nn.Identity())
    module.add_module("act", nn.SiLU())
    return module


# What makes a module, the class it gets, and that it has after revert.
CLASSES: dict[str, tuple[Callable[[], nn.Module], str, type[nn.Module]]] = {
    "stock 1d": (lambda: nn.BatchNorm1d(4), "SyncBatchNorm1d", nn.BatchNorm1d),
    "stock 2d": (lambda: nn.BatchNorm2d(4), "SyncBatchNorm2d", nn.BatchNorm2d),
    "stock 3d": (lambda: nn.BatchNorm3d(4), "SyncBatchNorm3d", nn.BatchNorm3d),
    "stock sync": (lambda: nn.SyncBatchNorm(4), "SyncBatchNorm", nn.SyncBatchNorm),
    "ours": (lambda: fastbn.BatchNorm2d(4), "SyncBatchNorm2d", nn.BatchNorm2d),
    "ours with activation": (
        lambda: fastbn.BatchNormAct2d(4),
        "SyncBatchNormAct2d",
        fastbn.BatchNormAct2d,
    ),
    "timm": (lambda: TimmBatchNormAct2d(4), "BatchNormAct2d", TimmBatchNormAct2d),
    "timm converted": (
        lambda: fastbn.convert(TimmBatchNormAct2d(4)),
        "BatchNormAct2d",
        TimmBatchNormAct2d,
    ),
    "timm sync": (lambda: timm_sync(4), "SyncBatchNormAct", TimmSyncBatchNormAct),
}


@pytest.mark.usefixtures("importable_lookalikes")
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_changes_and_comes_back(name: str) -> None:
    make, expected, original = CLASSES[name]
    model = nn.Sequential(make())
    before = dict(vars(model[0]))
    module = fastbn.convert_sync_batchnorm(model)[0]
    assert isinstance(module, Synchronized)
    assert isinstance(module, original)
    assert type(module).__name__ == expected
    for key, value in before.items():
        assert vars(module)[key] is value
    assert type(pickle.loads(pickle.dumps(module))) is type(module)
    assert type(copy.deepcopy(module)) is type(module)
    assert fastbn.convert_sync_batchnorm(model, dry_run=True) == fastbn.SwapReport()
    assert fastbn.convert(model, dry_run=True) == fastbn.SwapReport()
    assert fastbn.revert(model, dry_run=True).swapped == ["0"]
    fastbn.revert(model)
    assert type(module) is original
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[key] is value for key, value in before.items())


def test_convert_takes_stock_s_and_keeps_its_group() -> None:
    def call(_: int) -> None:
        group = fastbn.sync_group(None, own=True)
        model = nn.Sequential(nn.SyncBatchNorm(3, process_group=group))
        assert fastbn.convert(model, dry_run=True).swapped == ["0"]
        fastbn.convert(model)
        assert type(model[0]) is fastbn.SyncBatchNorm
        assert vars(copy.deepcopy(model)[0])["process_group"] is group
        fastbn.revert(model)
        assert type(model[0]) is nn.SyncBatchNorm
        assert vars(model[0])["process_group"] is group

    on_threads(2, call)


def test_it_gives_the_group_to_those_that_are_synchronized() -> None:
    def call(_: int) -> None:
        model = nn.Sequential(nn.BatchNorm2d(3), fastbn.SyncBatchNorm2d(3))
        group = fastbn.sync_group(None, own=True)
        fastbn.convert_sync_batchnorm(model, group)
        assert [module.process_group for module in model] == [group, group]
        fastbn.convert_sync_batchnorm(model)
        assert [module.process_group for module in model] == [None, None]

    on_threads(2, call)


class Renormalized(nn.BatchNorm2d):
    """Somebody's subclass."""


def parametrized() -> nn.Module:
    module = nn.BatchNorm2d(3)
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    return module


def hidden() -> nn.Module:
    module = nn.BatchNorm2d(3)
    vars(module)["forward"] = module.forward
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Renormalized(3), "may behave in its own way"),
    "parametrized": (parametrized, "parametrized"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "no parameters yet"),
    "hidden": (hidden, "hides the class's"),
    "frozen": (lambda: fastbn.freeze(nn.BatchNorm2d(3)), "unfreeze it first"),
    "subclass of ours": (
        lambda: type("Mine", (fastbn.BatchNorm2d,), {})(3),
        "fastbn knows no synchronized Mine",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_brings_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = LEFT[name]
    model = nn.Sequential(nn.BatchNorm2d(3), make(), nn.InstanceNorm2d(3), nn.ReLU())
    kind = type(model[1])
    report = fastbn.convert_sync_batchnorm(model, dry_run=True)
    assert report.swapped == ["0"]
    assert list(report.left) == ["1"]
    assert reason in report.left["1"]
    assert type(model[0]) is nn.BatchNorm2d
    with caplog.at_level(logging.WARNING, logger="fastbn"):
        fastbn.convert_sync_batchnorm(model)
    assert f"left 1: {report.left['1']}" in caplog.text
    assert [type(module) for module in model][:2] == [fastbn.SyncBatchNorm2d, kind]


def test_without_anything_left_there_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fastbn"):
        module = fastbn.convert_sync_batchnorm(nn.BatchNorm2d(3))
    assert not caplog.messages
    assert type(module) is fastbn.SyncBatchNorm2d


def test_frozen_ones_do_not_communicate() -> None:
    model = fastbn.freeze(fastbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))))

    def call(_: int) -> None:
        copy.deepcopy(model).train()(torch.randn(4, 3)).sum().backward()
        assert not collectives()

    on_threads(2, call)
    assert type(fastbn.unfreeze(model)[0]) is fastbn.SyncBatchNorm1d


def test_other_libraries_may_tell_their_own() -> None:
    class Own(nn.BatchNorm2d):
        pass

    class FastOwn(fastbn.BatchNorm2d, Own):
        pass

    class SyncOwn(fastbn.SyncBatchNorm2d, Own):
        pass

    class Neither(fastbn.SyncBatchNorm2d):
        pass

    with pytest.raises(TypeError, match="Neither is not a subclass of Own"):
        fastbn.register(Own, fastbn.Adapter(FastOwn, synchronized=Neither))
    fastbn.register(Own, fastbn.Adapter(FastOwn, synchronized=SyncOwn))
    for module in (Own(3), fastbn.convert(Own(3))):
        assert type(fastbn.convert_sync_batchnorm(module)) is SyncOwn
        assert type(fastbn.revert(module)) is Own


# --- Fused ----------------------------------------------------------------------------------------


class WithActivation(nn.Module):
    """Batch norms that compute what follows them: fastbn's with a residual, and timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.first = fastbn.BatchNormAct2d(CHANNELS, activation="silu")
        self.second = TimmBatchNormAct2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(self.conv(x), residual=x))
        return y


# Those whose batch norms fuse() gives the addition and activation behind them, and others.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Basic(downsample=True),
    "branch that ends with the batch norm": Transform,
    "activations of its own": WithActivation,
}
ORDERS: dict[str, Callable[[nn.Module], object]] = {
    "alone": fastbn.convert_sync_batchnorm,
    "after fuse": lambda model: fastbn.convert_sync_batchnorm(fastbn.fuse(model)),
    "before fuse": lambda model: fastbn.fuse(fastbn.convert_sync_batchnorm(model)),
}


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """The output, gradients, and buffers after a step of training."""
    y = model(x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_keep_what_they_compute(name: str, order: str) -> None:
    plain = MODELS[name]().double()
    model = copy.deepcopy(plain)
    ORDERS[order](model)
    x = torch.randn(5, CHANNELS, 6, 7, dtype=torch.float64)
    y, gradients, buffers = results(plain, x)

    def step(rank: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        found = results(copy.deepcopy(model), x.split([2, 3])[rank])
        norms = sum(isinstance(module, Synchronized) for module in model.modules())
        assert len(collectives()) == 2 * norms > 0
        return found

    ranks = on_threads(2, step)
    close = AGAINST_STOCK_FLOAT64
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), y, **close)
    for key, expected in gradients.items():
        torch.testing.assert_close(sum(rank[1][key] for rank in ranks), expected, **close)
    for _, _, found in ranks:
        torch.testing.assert_close(found, buffers, **close)
    fastbn.revert(model)
    assert not any(isinstance(module, Synchronized) for module in model.modules())


def test_they_fold_and_export_as_those_of_stock() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model.append(fastbn.BatchNormAct2d(4))
    fastbn.convert_sync_batchnorm(model).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    exported = torch.export.export(model, (x,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("batch_norm" in target for target in targets) == 2
    assert not any("fastbn" in target for target in targets)
    assert fastbn.fold(model, dry_run=True).folded == {"1": "0", "3": "2"}
    torch.testing.assert_close(fastbn.fold(model)(x), expected)


def test_stock_s_converter_is_refused_where_it_would_drop_the_activation() -> None:
    for module in (fastbn.BatchNormAct2d(4), fastbn.convert(TimmBatchNormAct2d(4))):
        with pytest.raises(RuntimeError, match=r"use fastbn\.convert_sync_batchnorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(module)


def test_a_group_is_named_by_who_has_it() -> None:
    """Errors tell the layer; a revert forgets its name and its group."""

    def call(_: int) -> None:
        model = nn.ModuleDict({"stem": nn.BatchNorm2d(3)})
        fastbn.convert_sync_batchnorm(model, dist.group.WORLD)
        assert model["stem"].layer_name == "stem"
        fastbn.revert(model)
        assert not {"layer_name", "process_group"} & vars(model["stem"]).keys()

    on_threads(2, call)
