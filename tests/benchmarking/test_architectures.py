"""The study of networks tells those that compute what stock's do from those that do not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import fastbn

pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("tabulate", reason="benchmarks need the extra [bench]")

from benchmarks import architectures
from tests.support.blocks import CHANNELS, Basic, ConvNormAct, Transform

if TYPE_CHECKING:
    from pathlib import Path


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return torch.relu(y).add(y)


def network(name: str) -> nn.Module:
    """Stands for the libraries' networks: 7 batch norms, of which 5 are fused and 1 is left."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 4, 4),
        Basic(downsample=True),
        Transform(),
        UsedTwice(),
        ConvNormAct(nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 5),
    )


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "build", network)
    monkeypatch.setattr(architectures, "_WIDTH", 16)


def test_study_of_a_network() -> None:
    result = architectures.study("stands for/one")
    assert (result.norms, result.swapped, result.fused, result.with_addition) == (7, 7, 5, 2)
    assert result.left == {"3.bn": "its output is used 2 times"}
    assert max(result.outputs, result.gradients, result.statistics) < 1e-12
    assert 0 < result.steps <= 2 * max(result.stock_steps, result.nudged_steps) < 1e-3
    assert result.reverted
    assert result.right


def test_wrong_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fastbn.BatchNorm2d._forward

    def off(self: fastbn.BatchNorm2d, x: Tensor, *epilogue: object) -> Tensor:
        y = original(self, x, *epilogue)  # type: ignore[arg-type]
        return y * (1 + 1e-6) if epilogue else y

    monkeypatch.setattr(fastbn.BatchNorm2d, "_forward", off)
    result = architectures.study("stands for/one")
    assert 1e-8 < result.outputs < 1e-4
    assert result.reverted
    assert not result.right


def test_table_file_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "missing", lambda: None)
        assert architectures.main(["a/b", "c/d", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["environment"]["torch"] == torch.__version__
    rows = content["networks"]
    assert [(row["model"], row["fused"], row["right"]) for row in rows] == [
        ("a/b", 5, True),
        ("c/d", 5, True),
    ]
    (line,) = (line for line in printed.splitlines() if line.startswith("a/b  "))
    assert line.split()[:6] == ["a/b", "7", "7", "5", "2", "1"]
    assert line.split()[-2:] == ["yes", "yes"]
    assert "a/b, left 3.bn: its output is used 2 times" in printed


def test_luck_in_float32_is_told_from_error() -> None:
    """Stock's, a rounding apart, may be as far from float64; nothing else may."""
    exact = {"outputs": 0.0, "gradients": 0.0, "statistics": 0.0, "reverted": True}
    result = architectures.Result("a/b", 1, 1, 1, 0, **exact, stock_steps=1e-7, steps=1e-5)  # type: ignore[arg-type]
    assert not result.right
    result.nudged_steps = 6e-6
    assert result.right


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(architectures, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        architectures.main([])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "need torchvision and timm" in error
    assert "pip install 'fastbn[architectures]'" in error
