"""What benchmarks report was computed right, on tensors that the cache has forgotten."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbn

# Behind everything else, so that fastbn is the one under test.
sys.path.append(str(Path(__file__).parents[1]))
pytest.importorskip("tqdm", reason="benchmarks need the extra [bench]")
pytest.importorskip("tabulate", reason="benchmarks need the extra [bench]")

from benchmarks import algorithms, report
from benchmarks.gpu_timing import input_sets
from benchmarks.layers import BACKWARD, EVALUATION, FORWARD, Case, WrongResultError, measure_case
from benchmarks.shapes import Layer
from benchmarks.timing import Timing

MEBI = 1 << 20
PASSES = (FORWARD, BACKWARD, EVALUATION)


@pytest.mark.parametrize("tensor", [1, 3, 12, 25, 60, 61, 400])
@pytest.mark.parametrize("cache", [4, 40, 60, 126])
def test_inputs_are_forgotten_before_they_come_back(tensor: int, cache: int) -> None:
    """All other sets, of which x and y pass at least, are four caches; and no set is too many."""
    sets = input_sets(tensor * MEBI, cache * MEBI)
    assert (sets - 1) * 2 * tensor >= 4 * cache
    assert sets == 2 or (sets - 2) * 2 * tensor < 4 * cache


@pytest.mark.parametrize("layout", ["ncs", "nsc"])
def test_rows(layout: str, device: str, tmp_path: Path) -> None:
    case = Case(Layer(16, 9, 7, 2), 4, torch.bfloat16, layout, device)
    rows = measure_case(case, PASSES, 0.01)
    assert [row.measured for row in rows] == list(PASSES)
    for row in rows:
        assert list(row.timings) == ["stock", "fastbn", "copy"]
        for timing in row.timings.values():
            assert 0 < timing.p20 <= timing.median <= timing.p80
        if case.on_gpu:
            assert row.plan == fastbn.plan(case.tensor(), op=row.measured.op)
            assert row.stock_backend == "native"  # whatever has 16 bits of this kind
    assert report.layer_table(rows).count("16x9x7") == 3
    assert report.network_table(rows).count("bfloat16") == 3
    path = tmp_path / "rows.json"
    report.write_json(path, {"gpu": "any"}, rows, {"stock": 1.0, "fastbn": 1.0}, 0.0)
    written = json.loads(path.read_text())["rows"]
    assert [row["bytes"] for row in written] == [n * 16 * 9 * 7 * 4 * 2 for n in (2, 3, 2)]
    assert all(("plan" in row) == case.on_gpu for row in written)


class Wrong(fastbn.BatchNorm2d):
    """Off by a percent."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input) * 1.01


def test_wrong_results_are_not_timed(device: str) -> None:
    case = Case(Layer(3, 5, 5, 1), 4, torch.float32, "ncs", device)
    with pytest.raises(WrongResultError, match="fastbn, 4x3x5x5 float32 ncs: y is off"):
        measure_case(case, PASSES, 0.01, {"stock": nn.BatchNorm2d, "fastbn": Wrong})


def made_up_comparison(copy: float, **seconds: float) -> algorithms.Comparison:
    """As if a GPU had taken so long."""
    case = Case(Layer(64, 56, 56, 6), 256, torch.bfloat16, "ncs", "cuda")
    question = {"dtype": torch.bfloat16, "device": "h200"}
    shape = (256, 64, 56, 56)
    plans = {name: fastbn.plan(shape, algorithm=name, **question) for name in seconds}
    timings = {name: Timing(s, s, s, 1) for name, s in {**seconds, "copy": copy}.items()}
    chosen = fastbn.plan(shape, algorithm="auto", **question).algorithm
    return algorithms.Comparison(case, FORWARD, plans, timings, chosen, 2 * 256 * 64 * 56 * 56)


def test_algorithms_are_compared(tmp_path: Path) -> None:
    """The choice against the fastest, predictions against times, bytes against those of a copy."""
    comparison = made_up_comparison(50e-6, split=80e-6, cluster=50e-6, grid=60e-6)
    assert (comparison.chosen, comparison.fastest) == ("grid", "cluster")
    assert comparison.loss == pytest.approx(0.2)
    # It moves what a copy moves, in the same time; split half as much again.
    assert comparison.share("cluster") == pytest.approx(1)
    assert comparison.share("split") == pytest.approx(1.5 * 50 / 80)
    predicted = comparison.plans["split"].microseconds
    assert comparison.error("split") == pytest.approx(predicted / 80 - 1)
    lines = algorithms.table([comparison]).splitlines()[2:]
    assert [line.split()[4] for line in lines] == ["cluster", "grid", "split"]
    assert [" < " in line for line in lines] == [False, True, False]
    assert "fastest in 0 of 1 cases and lost most, 20.0%" in algorithms.verdict([comparison])
    path = tmp_path / "rows.json"
    algorithms.write_json(path, {"gpu": "made up"}, [comparison])
    rows = json.loads(path.read_text())["rows"]
    assert [row["algorithm"] for row in rows] == ["split", "cluster", "grid"]
    assert [row["predicted_seconds"] for row in rows] == [
        plan.microseconds / 1e6 for plan in comparison.plans.values()
    ]
