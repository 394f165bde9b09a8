"""Batch norms that an activation follows are counted by the operators that models call."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("tabulate", reason="benchmarks need the extra [bench]")

from benchmarks import coverage
from tests.support.blocks import BLOCKS, CHANNELS, Basic, conv, norm

if TYPE_CHECKING:
    from pathlib import Path


class Preactivated(nn.Module):
    """Activates a sum that the next block adds to, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.relu(x))) + x  # type: ignore[no-any-return]


class Softplus(nn.Module):
    """Has an activation function that fastbn does not have, and a batch norm that none follows."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.last = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softplus(self.bn(x)) * 2)  # type: ignore[no-any-return]


def counted(model: nn.Module) -> coverage.Coverage:
    images = torch.empty(2, CHANNELS, 5, 7, device="meta")
    return coverage.count("stands for/one", model.to("meta"), images)


@pytest.mark.parametrize("name", BLOCKS)
def test_all_that_is_fused_was_seen(name: str) -> None:
    make, expected = BLOCKS[name]
    model = make()
    count = counted(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (count.norms, count.swapped) == (len(norms), len(norms))
    assert (count.followed, count.fused) == (len(expected), len(expected))
    assert count.left == {}


def test_families_differ_in_more_than_sizes() -> None:
    same = ("timm/resnet18", "timm/resnet101"), ("timm/regnetx_002", "timm/regnetx_320")
    assert all(coverage.family(one) == coverage.family(other) for one, other in same)
    others = ("timm/resnet18", "timm/resnet18d", "timm/resnetv2_18", "torchvision/resnet18")
    assert len(set(map(coverage.family, others))) == 4


def test_what_is_left_has_its_reason() -> None:
    model = nn.Sequential(Preactivated(), Preactivated(), Softplus(), Basic(downsample=True))
    count = counted(model)
    assert (count.norms, count.followed, count.fused) == (7, 4, 2)
    assert count.left == {
        "0.bn": "others need what the activation is of, too",
        "2.bn": "fuse does not see the activation",
    }


def test_tables_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"a/preactivated": nn.Sequential(Preactivated(), Preactivated()), "a/none": conv()}
    monkeypatch.setattr(coverage, "build", lambda name: models[name])
    monkeypatch.setattr(
        coverage, "_images", lambda *_: torch.empty(2, CHANNELS, 8, 8, device="meta")
    )
    file = tmp_path / "coverage.json"
    assert coverage.main(["a/preactivated", "a/none", "b/unknown"], file, {"torch": "x"}) == 1
    printed = capsys.readouterr().out
    assert ["a", "2", "1", "2", "2", "1", "0", "0.00%"] in [
        line.split() for line in printed.splitlines()
    ]
    assert "1  others need what the activation is of, too  a/preactivated" in printed
    assert "b/unknown failed: KeyError" in printed
    content = json.loads(file.read_text())
    assert [row["model"] for row in content["networks"]] == ["a/preactivated", "b/unknown"]
