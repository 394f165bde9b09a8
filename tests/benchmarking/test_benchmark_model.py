"""Steps of a network are only timed where gradients are right; here of a small one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbn

# Behind everything else, so that fastbn is the one under test.
pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("transformers", reason="benchmarks need the extra [bench]")

import transformers

from benchmarks import model, report
from benchmarks.rows import Results, groups

OURS = ["fastbn", "fastbn fused", "fastbn fused, recomputing"]


def small_network() -> nn.Module:
    # Not a parameter to mypy, as it is one of all configurations.
    labels: dict[str, Any] = {"num_labels": 10}
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], **labels
    )
    network: nn.Module = transformers.ResNetForImageClassification(config)
    return network


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_MAKERS", {"resnet50": small_network})
    monkeypatch.setattr(model, "_CLASSES", 10)
    monkeypatch.setattr(model, "_SIZES", {"cpu": ((4, 32), (4, 32))})


def test_steps_of_all_variants() -> None:
    """In float32 and, with autocast, in bfloat16; how much of it batch norm is; and memory."""
    rows, wrong = model.measure_model("cpu", quick=False, compiled=False, budget=0.01)
    assert wrong == []
    found = {(g.subject.dtype, g.subject.measured): g for g in groups(rows)}
    assert found.keys() == {
        (dtype, measured)
        for dtype in ("float32", "bfloat16")
        for measured in ("step", "peak", "batch norm")
    }
    for group in found.values():
        assert list(group.rows) == [*OURS, "stock"]
    for dtype in ("float32", "bfloat16"):
        assert all(0 < r.value.median < 1 for r in found[dtype, "batch norm"].rows.values())
        peaks = {name: r.value.median for name, r in found[dtype, "peak"].rows.items()}
        # At least the first activation, and not more than stock needs.
        assert 4 * 8 * 16 * 16 * 2 < peaks["fastbn"] <= 1.01 * peaks["stock"]
        assert peaks["fastbn fused, recomputing"] < peaks["fastbn fused"]
    assert len(report.model(Results({}, rows)).splitlines()) == 4 + 8


class Mistaken(fastbn.BatchNorm2d):
    """With gradients that are a tenth too large."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(Stretched.apply(input))  # type: ignore[no-untyped-call]


class Stretched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx * 1.1


def test_variants_with_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(network: nn.Module, compiled: bool) -> dict[str, nn.Module]:
        variants = {"fastbn": fastbn.convert(copy.deepcopy(network)), "stock": network}
        for module in variants["fastbn"].modules():
            if isinstance(module, fastbn.BatchNorm2d):
                module.__class__ = Mistaken
        return variants

    monkeypatch.setattr(model, "_variants", mistaken)
    rows, (sentence,) = model.measure_model("cpu", quick=True, compiled=False, budget=0.01)
    assert sentence.startswith("fastbn, ResNet-50 in torch.float32: gradients are off by ")
    assert {row.provider for row in rows} == {"stock"}


@pytest.mark.parametrize("compiled", [False, True])
def test_variants_are_the_same_network(compiled: bool) -> None:
    network = small_network()
    variants = model._variants(network, compiled)
    blocks = {type(m) for m in network.modules() if "resnet" in type(m).__module__}
    names = [*OURS, "stock"]
    names += ["fastbn fused compiled", "stock compiled"] if compiled else []
    assert list(variants) == names
    for name, variant in variants.items():
        kind = fastbn.BatchNorm2d if name.startswith("fastbn") else nn.BatchNorm2d
        norms = [m for m in variant.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {type(norm) for norm in norms} == {kind}
        # Blocks that are fused have a class of their own.
        kinds = {type(m) for m in variant.modules()} - {type(m) for m in network.modules()}
        assert any(issubclass(k, tuple(blocks)) for k in kinds) == ("fused" in name)
        assert isinstance(variant, torch._dynamo.OptimizedModule) == name.endswith("compiled")
        for one, other in zip(variant.parameters(), network.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one is not other
