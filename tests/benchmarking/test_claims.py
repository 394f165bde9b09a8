"""What is said of batch normalization holds for fastbn's, in a fast variant of the benchmarks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

# Behind everything else, so that fastbn is the one under test.
pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("matplotlib", reason="benchmarks need the extra [bench]")
pytest.importorskip("sklearn", reason="benchmarks need the extra [bench]")

from benchmarks.claims import arithmetic, learning, study
from benchmarks.claims.network import build, run
from benchmarks.training import load

BUDGET = replace(learning.QUICK, seeds=(0,), steps=2000, sweep_steps=300, small_steps=100)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Layers of 100 units have nothing for a second one but to wait."""
    torch.set_num_threads(1)


def test_scale_of_weights_does_not_matter() -> None:
    finding = arithmetic.scale_of_weights()
    assert finding.held
    assert finding.figures["worst relative difference"] < 1e-13


def test_scale_and_shift_restore_the_identity() -> None:
    finding = arithmetic.identity()
    assert finding.held
    assert max(finding.figures.values()) <= 4


def test_normalizing_outside_the_gradient_blows_up() -> None:
    finding = arithmetic.outside_the_gradient(steps=600)
    # 2 times the rate and the mean that is out of reach, every step.
    assert finding.figures["bias outside"] == pytest.approx(600 * 0.2, rel=0.1)
    assert finding.figures["bias inside"] < 1e-12
    assert finding.figures["change of the loss"] < 1e-12


def test_each_feature_is_normalized_on_its_own() -> None:
    finding = arithmetic.each_feature_on_its_own()
    assert finding.held
    assert max(finding.figures.values()) < 1e-5


def test_training_is_accelerated() -> None:
    trained = learning.pairs(load("cpu"), BUDGET)
    finding = learning.acceleration(trained)
    assert finding.held
    assert finding.figures["least"] > 3
    assert learning.covariate_shift(trained).number == 2


def test_higher_learning_rates_train() -> None:
    finding = learning.learning_rates(load("cpu"), BUDGET)
    assert finding.held
    largest, plain = (finding.figures[f"largest rate, {name}"] for name in ("batch norm", "plain"))
    assert largest >= 10 * max(plain, 0.1)


def test_network_is_that_of_the_paper() -> None:
    plain, normalized = build(batch_norm=False), build(batch_norm=True, dropout=True)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (plain, normalized)]
    assert parameters[0] == 64 * 100 + 2 * 100 * 100 + 3 * 100 + 1010
    # A scale and a shift for each unit instead of a bias.
    assert parameters[1] == parameters[0] + 3 * 100
    assert normalized(torch.rand(5, 1, 8, 8)).shape == (5, 10)


def test_runs_are_repeatable() -> None:
    digits = load("cpu")
    once = partial(run, digits, batch_norm=True, dropout=True, rate=0.5, steps=20, every=10)
    first, second = once(seed=3), once(seed=3)
    assert first.steps == [0, 10, 20]
    assert first.accuracy == second.accuracy
    assert all(map(torch.equal, first.inputs, second.inputs))
    assert once(seed=4).accuracy != first.accuracy


def test_document_and_pictures(tmp_path: Path) -> None:
    found = [arithmetic.identity(), arithmetic.each_feature_on_its_own()]
    text = study.document(found, 1.0, pictures=True)
    for finding in found:
        path = tmp_path / f"claim{finding.number}.png"
        study.picture(finding, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"## {finding.number}. {finding.claim} Held." in text
        assert f"(claim{finding.number}.png)" in text
        assert finding.sentence in text
